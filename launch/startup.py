"""What train.py and eval.py do before their slow imports: answer --help, end with the launcher that started them, and
keep the start from wasting time."""

import os
import re
import socket
import sys
import textwrap
from collections.abc import Sequence

from utils import REPO, UserError, collect_garbage_rarely, end_with_parent, written

WIDTH = 100


def begin(usage: str, sections: Sequence[str], *, groups: Sequence[str] = ()) -> None:
    """Print the help and end, where the command line asks for it: the usage, what the groups offer, the keys in some
    sections of config.yaml and, as `model`, of model/base.yaml, and those of losses and terms that the command line
    names."""
    if "RANK" in os.environ:
        end_with_parent()
        if launcher_is_gone():
            sys.exit("the process that started this rank is gone")
    # Before CUDA starts. Micro-batches differ in size, and blocks of fixed sizes would leave gaps between them.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    collect_garbage_rarely()
    if {"-h", "--help"} & set(sys.argv[1:]):
        chosen = re.findall(r"^\+*(loss|term)=\[?([\w,-]+)\]?$", "\n".join(sys.argv), re.MULTILINE)
        named = [f"{group}/{name}" for group, names in chosen for name in names.split(",")]
        named = [section for section in named if (REPO / f"config/{section}.yaml").is_file()]
        try:
            print(usage.strip(), *map(choices, groups), *map(keys, sections), *map(own_keys, named), sep="\n\n")
        except UserError as error:  # a loss of the user's that does not fit its YAML
            sys.exit(str(error))
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
    prefix = "model." if section == "model" else ""
    text = (REPO / "config" / ("model/base.yaml" if prefix else "config.yaml")).read_text()
    if not prefix:
        text = re.split(r"^# ", text.partition(f"\n# {section}")[2].partition("\n")[2], flags=re.MULTILINE)[0]
    found = [(f"{prefix}{name}", value, comment) for name, value, comment in yaml_lines(text)]
    return "\n".join([f"{section}:", *(line(*own, allowed.get(own[0], "text")) for own in found)])


def own_keys(section: str) -> str:
    """The keys of a loss or a term, such as `loss/fpo`: its signature says what each may be."""
    from launch.settings import settings_of, yaml_files  # takes the time of all imports

    group, _, name = section.partition("/")
    values, allowed = settings_of(section)
    lines = [own for file in yaml_files(group, name) for own in yaml_lines(file.read_text())]
    comments = {key.rpartition(".")[2]: comment for key, _, comment in lines if comment}
    prefix = "loss" if group == "loss" else f"term.{name}"
    found = [
        line(f"{prefix}.{key}", written(value), comments.get(key, ""), allowed.get(key, "text"))
        for key, value in values.items()
    ]
    return "\n".join([f"{group}={name}:", *found])


def yaml_lines(text: str) -> list[tuple[str, str, str]]:
    """Key, value and comment of each line of a YAML file that has a value, and not one that the user has to choose."""
    found, parents = [], list[str]()
    for indent, name, value, comment in re.findall(r"^( *)(\w+): *(.*?) *(?:# (.*))?$", text, re.MULTILINE):
        parents[len(indent) // 2 :] = [name]
        if value not in ("", "???"):
            found.append((".".join(parents), value, comment))
    return found


def line(key: str, value: str, comment: str, kind: str) -> str:
    """A line of the help."""
    notes = [comment, "" if kind == "text" else f"[{kind}]"]
    return f"  {f'{key}={value}':<42} {' '.join(filter(None, notes))}".rstrip()
