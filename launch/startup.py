"""What train.py and eval.py do before their slow imports: answer --help, end with the launcher that started them, and
keep the start from wasting time."""

import os
import re
import socket
import sys
import textwrap
from collections.abc import Sequence

from utils import REPO, collect_garbage_rarely, end_with_parent

WIDTH = 100


def begin(usage: str, sections: Sequence[str], *, groups: Sequence[str] = ()) -> None:
    """Print the help and end, where the command line asks for it: the usage, what the groups offer, the keys in some
    sections of config.yaml and, as `model`, of model/base.yaml, and those of the loss that the command line names."""
    if "RANK" in os.environ:
        end_with_parent()
        if launcher_is_gone():
            sys.exit("the process that started this rank is gone")
    # Before CUDA starts. Micro-batches differ in size, and blocks of fixed sizes would leave gaps between them.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    collect_garbage_rarely()
    if {"-h", "--help"} & set(sys.argv[1:]):
        losses = [word.partition("=")[2] for word in sys.argv if re.fullmatch(r"loss=[\w-]+", word)]
        named = [f"loss/{name}" for name in losses if (REPO / f"config/loss/{name}.yaml").is_file()]
        print(usage.strip(), *map(choices, groups), *map(keys, [*sections, *named]), sep="\n\n")
        sys.exit(0)


def launcher_is_gone() -> bool:
    """Whether the launcher ended before this rank could be tied to it: nothing listens where it serves the store that
    the ranks meet at."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 serves it
        return False
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=10).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # the rank itself will say what is wrong
        return False
    return False


def choices(group: str) -> str:
    """What a group of the configuration offers, by name."""
    names = sorted(path.stem for path in (REPO / "config" / group).glob("*.yaml") if path.stem != "base")
    if group == "model":
        names.append("or ORG/NAME on the Hub, or path/to/dir in its format")
    return textwrap.fill(
        f"{group}=  {', '.join(names)}", WIDTH, subsequent_indent=" " * (len(group) + 3), break_on_hyphens=False
    )


def keys(section: str) -> str:
    """The keys of a section: each with its default, the line that the YAML file has on it, and what it may be."""
    from launch.schema import kinds

    allowed = kinds()
    group = section.partition("/")[0]
    prefix = f"{group}." if group in ("model", "loss") else ""
    file = {"model": "model/base.yaml", "loss": f"{section}.yaml"}.get(group, "config.yaml")
    text = (REPO / "config" / file).read_text()
    if not prefix:
        text = re.split(r"^# ", text.partition(f"\n# {section}")[2].partition("\n")[2], flags=re.MULTILINE)[0]
    lines = [section.replace("/", "=") + ":"]
    parents: list[str] = []
    for indent, name, value, comment in re.findall(r"^( *)(\w+): *(.*?) *(?:# (.*))?$", text, re.MULTILINE):
        parents[len(indent) // 2 :] = [name]
        if value not in ("", "???"):  # else a section, or what the user has to choose
            key = prefix + ".".join(parents)
            given, kind = f"{key}={value}", allowed.get(key, "text")
            notes = [comment, "" if kind == "text" else f"[{kind}]"]
            lines.append(f"  {given:<42} {' '.join(filter(None, notes))}".rstrip())
    return "\n".join(lines)
