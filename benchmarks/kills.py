"""A campaign of kills: `python benchmarks/kills.py FOLDER [--kills 100] [--only fpo-2 judging-1]`.

Each time a command is killed with SIGKILL at a random moment, the same command is given again, and what is left is
compared, file by file, with what a command leaves that nothing disturbs: the same names, so no litter, and the same
contents, but for dates and for how long things took. The commands train (FPO, KTO, PPO, an SAE; on one rank and on
two), sample, measure and judge, with the built-in model. Of several ranks one is killed, or the process that started
them, and all have to be gone within 15 seconds.

Most processes are forked from one that has loaded the libraries (tests/forks.py), which saves seconds of each; ranks
and a share of the commands are new Pythons, so that kills come while they load too.

FOLDER keeps what was made, a line for each kill in kills.jsonl, and the directories of kills after which something
differed. The same command goes on where it was, also after a part (--only). It prints a table.
"""

import argparse
import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # of forks too: libraries read them as they load

from forks import forkserver, run_python  # noqa: E402

PORT = 18_765  # of the judge: a result says where its judge was
GONE_SECONDS = 15.0  # after a kill, all processes of the command have to be gone
AT_THE_START, START_SECONDS = 0.15, 20.0  # the share of kills of new Pythons, within so long, or when one has written
CONCURRENCY = 2  # requests that judging has on their way
TRAIN = """model=tiny datasets=[../../data/train.jsonl] eval_datasets=[../../data/test.jsonl] cache_dir=out exp_name=run
    optimizer=AdamW lr=1e-3 warmup_steps=2 max_new_tokens=4 save_every=8 eval_every=12 keep_checkpoints=2
    intermediate_checkpoints=true ++model.batch_size=4 ++model.eval_batch_size=8 ++model.use_peft=false"""
SAMPLE = "++n_samples=24 ++samples=2 ++max_new_tokens=16 ++model.eval_batch_size=8"


@dataclass(frozen=True)
class Kind:
    """A command that is killed, in a directory of its own."""

    name: str
    script: str
    arguments: str
    ranks: int = 1
    starts_from: dict[str, str] = field(default_factory=dict)  # copies, by their names: of what another kind has made

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.ranks}"


def kinds() -> list[Kind]:
    """The commands in the order in which they are killed; one that needs another's files comes after it."""
    own = {"fpo": "", "kto": "", "ppo": "", "sae": "loss.d_sae=32 loss.k=4 loss.batch_tokens=32 loss.buffer_tokens=64"}
    one, two = (
        [
            Kind(name, "train.py", f"loss={name} {options} {TRAIN} ++nproc={ranks}", ranks)
            for name, options in own.items()
        ]
        for ranks in (1, 2)
    )
    run, samples = {"out": "fpo-1/out"}, {"samples": "sampling-1/samples"}
    judged = f"-f samples/run.json -mc 24 -bk chosen -ck policy -j judge --base_url http://127.0.0.1:{PORT}/v1"
    one += [
        Kind("sampling", "eval.py", f"--config-path=out/run {SAMPLE}", starts_from=run),
        Kind("measuring", "eval.py", f"--config-path=out/run ++mode=eval {SAMPLE}", starts_from=run),
        Kind("judging", "compare.py", f"{judged} -r results.jsonl --concurrency {CONCURRENCY}", starts_from=samples),
    ]
    return [*one, *one, *two, *one]  # several ranks take longest, and are killed a third as often


# ---------------------------------------------------------------------------------------------------- the judge


class Judge(http.server.BaseHTTPRequestHandler):
    """Prefers a response by a hash of the question, after a while."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_POST(self) -> None:
        Judge.asked += 1
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        verdict = 1 + hashlib.sha256(json.dumps(json.loads(asked)["messages"]).encode()).digest()[0] % 2
        time.sleep(0.2)
        message = {"role": "assistant", "content": f"Response {verdict}"}
        usage = {"prompt_tokens": 100, "completion_tokens": 3, "total_tokens": 103}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        body = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": choices,
            "usage": usage,
        }
        content = json.dumps(body).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the command was killed
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


# ---------------------------------------------------------------------------------------------------- processes

Python = subprocess.Popen[bytes] | forkserver.Process


def in_session(*given: Any) -> None:
    """Run a command in this process, as the leader of a session."""
    os.setsid()
    run_python(*given)


def start(kind: Kind, folder: Path, *, new: bool = False, **more: str) -> Python:
    """Start the command in its directory, in a session of its own, with its output in a file there: in a fork, or in a
    new Python. `more` is added to its environment."""
    command = [str(REPO / kind.script), *kind.arguments.split()]
    environment = {**os.environ, "OPENAI_API_KEY": "sk-of-nobody", **more}
    log = folder.parent / f"{folder.name}.log"
    if not new:
        process = forkserver.Process(target=in_session, args=(command, folder, environment, [log, log]))
        process.start()
        return process
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def status_of(process: Python) -> int | None:
    """The exit status of a command that has ended."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def processes_of(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rpartition(") ")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(own) == session and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def kill(process: Python, victim: int) -> float:
    """Kill one process of the command: the launcher, or another by its number. Gives the seconds until all are gone;
    after GONE_SECONDS all are killed."""
    assert process.pid
    there = processes_of(process.pid)
    os.kill(there[victim] if victim < len(there) else process.pid, signal.SIGKILL)
    killed = time.monotonic()
    while time.monotonic() < killed + GONE_SECONDS:
        if status_of(process) is not None and not processes_of(process.pid):
            return time.monotonic() - killed
        time.sleep(0.1)
    for left in processes_of(process.pid):
        os.kill(left, signal.SIGKILL)
    return float("inf")


def finish(kind: Kind, folder: Path) -> float:
    """Give the command, and let it end; each rank as torchrun starts it. Gives the seconds that it took."""
    import torch.distributed as dist

    began, places = time.monotonic(), [{}]
    if kind.ranks > 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        of_all |= {"WORLD_SIZE": kind.ranks, "LOCAL_WORLD_SIZE": kind.ranks}
        places = [{**of_all, "RANK": rank, "LOCAL_RANK": rank} for rank in range(kind.ranks)]
    ranks = [start(kind, folder, **{name: str(value) for name, value in place.items()}) for place in places]
    while None in (statuses := [status_of(rank) for rank in ranks]):
        time.sleep(0.05)
    if any(statuses):
        raise SystemExit(f"{kind.folder}: exit status {max(statuses)}; {folder}.log says why")
    return time.monotonic() - began


def has_begun(folder: Path, before: set[Path]) -> bool:
    """Whether the command has written something."""
    return any(path not in before for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------------- comparing

TIMES = {"seconds", "tokens_per_second", "examples_per_second", "peak_memory_gb", "peak_rss_mb", "sampled_at", "date"}
PAID = {"requests", "tokens_in", "tokens_out", "cost"}  # of a result: what the command that wrote it has asked for
FOLLOWS = {
    "digests.json",
    "manifest.json",
    "report.html",
    "results.html",
}  # its name only
UNORDERED = {"results.jsonl", "results.verdicts.jsonl"}  # verdicts as they came; a result once more, if it was there


def without_times(value: Any) -> Any:
    """A JSON value without dates and durations."""
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_times(item) for key, item in value.items() if key not in TIMES | PAID}


def content_of(path: Path) -> Any:
    """What two files are compared by."""
    if path.is_symlink():
        return path.readlink()
    if path.is_dir() or path.name in FOLLOWS:
        return None
    if path.suffix == ".safetensors":  # the order of its metadata is random
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        values = [without_times(json.loads(line)) for line in lines]
        return sorted({json.dumps(value) for value in values}) if path.name in UNORDERED else values
    return path.read_bytes()


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def differing(folder: Path, other: Path) -> list[str]:
    """The files that both directories have, with different contents."""
    both = sorted(names_in(folder) & names_in(other))
    return [name for name in both if content_of(folder / name) != content_of(other / name)]


# ---------------------------------------------------------------------------------------------------- the campaign


def prepare(kind: Kind, folder: Path, undisturbed: Path) -> None:
    """Make the directory that the command runs in."""
    folder.mkdir(parents=True)
    for name, source in kind.starts_from.items():
        shutil.copytree(undisturbed / source, folder / name, symlinks=True)


def make_undisturbed(all_kinds: list[Kind], undisturbed: Path) -> dict[str, float]:
    """What each command leaves that nothing disturbs, and how many seconds it takes."""
    from data import toy

    for split, count in (("train", 24), ("test", 12)):
        file = undisturbed.parent / "data" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in toy.preferences(split, seed=0, count=count)))
    times = {}
    for kind in {kind.folder: kind for kind in all_kinds}.values():
        noted = undisturbed / f"{kind.folder}.json"
        if not noted.is_file():
            folder = undisturbed / kind.folder
            shutil.rmtree(folder, ignore_errors=True)
            prepare(kind, folder, undisturbed)
            Judge.asked = 0
            seconds = finish(kind, folder)
            noted.write_text(json.dumps({"seconds": seconds, "asked": Judge.asked}))
        times[kind.folder] = json.loads(noted.read_text())
    return times


def interrupt(kind: Kind, folder: Path, undisturbed: Path, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Give the command and kill it at a random moment; again, where it ended before."""
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        prepare(kind, folder, undisturbed)
        before, victim = set(folder.rglob("*")), draw.randrange(kind.ranks + 1) if kind.ranks > 1 else 0
        early, share = draw.random() < AT_THE_START, draw.random()
        Judge.asked = 0
        process, began = start(kind, folder, new=early), time.monotonic()
        latest = began + share * START_SECONDS if early else float("inf")
        while status_of(process) is None and time.monotonic() < latest and not has_begun(folder, before):
            time.sleep(0.02)
        latest = 0 if early else time.monotonic() + share * seconds
        while status_of(process) is None and time.monotonic() < latest:
            time.sleep(0.02)
        after = time.monotonic() - began
        if status_of(process) is None:
            gone = kill(process, victim)
            return {
                "victim": "launcher" if victim == 0 and kind.ranks > 1 else f"rank {max(0, victim - 1)}",
                "after": round(after, 2),
                "written": len(names_in(folder)) - len(before),
                "gone": gone,
            }


def kill_once(kind: Kind, folder: Path, undisturbed: Path, known: dict[str, float], draw: random.Random) -> Any:
    """Kill the command once, let it end, and compare."""
    result = interrupt(kind, folder, undisturbed, known["seconds"], draw)
    finish(kind, folder)
    expected, found = names_in(undisturbed / kind.folder), names_in(folder)
    return {
        "kind": kind.name,
        "ranks": kind.ranks,
        **result,
        "differing": differing(folder, undisturbed / kind.folder),
        "missing": sorted(expected - found),
        "litter": sorted(found - expected),
        "asked_again": Judge.asked - known["asked"],
    }


def is_as_wanted(result: dict[str, Any]) -> bool:
    same = not (result["differing"] or result["missing"] or result["litter"])
    return same and result["gone"] <= GONE_SECONDS and result["asked_again"] <= CONCURRENCY


def campaign(folder: Path, kills: int, seed: int, only: list[str]) -> list[dict[str, Any]]:
    """The kills, or those of some kinds, and those of earlier calls."""
    all_kinds, undisturbed, log = kinds(), folder / "undisturbed", folder / "kills.jsonl"
    times = make_undisturbed(all_kinds, undisturbed)
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = {result["number"] for result in results}
    for number in range(kills):
        kind, draw = all_kinds[number % len(all_kinds)], random.Random(f"{seed}-{number}")
        if number in done or (only and kind.folder not in only):
            continue
        place = folder / "killed" / f"{number:03d}-{kind.folder}"
        result = {"number": number, **kill_once(kind, place, undisturbed, times[kind.folder], draw)}
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
        results.append(result)
        wanted = is_as_wanted(result)
        print(f"{number + 1}/{kills} {place.name}: {'equal' if wanted else json.dumps(result)}", flush=True)
        if wanted:
            shutil.rmtree(place)
    return results


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The table, a line at a time."""
    yield "| command | ranks | kills | equal results | without litter | all gone after, s, at most |"
    yield "|---|---|---|---|---|---|"
    for kind, ranks in [*dict.fromkeys((result["kind"], result["ranks"]) for result in results), ("all", 0)]:
        own = [result for result in results if kind == "all" or (result["kind"], result["ranks"]) == (kind, ranks)]
        equal = sum(not result["differing"] and not result["missing"] for result in own)
        clean = sum(not result["litter"] for result in own)
        gone = max((result["gone"] for result in own), default=0)
        yield f"| {kind} | {ranks or ''} | {len(own)} | {equal} | {clean} | {gone:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="some of the commands, such as fpo-2: FPO on two ranks")
    arguments = parser.parse_args()
    if not arguments.only or "judging-1" in arguments.only:  # so that two parts can go on at the same time
        server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Judge)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    results = campaign(arguments.folder.resolve(), arguments.kills, arguments.seed, arguments.only)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
