"""What a GPU alone can show, in ten minutes: nine jobs, in order of worth.

    python benchmarks/gpu.py --minutes 9 --out FOLDER       on a GPU
    python benchmarks/gpu.py --device cpu                   a dry run: the same code, tiny shapes, no figures of worth
    python benchmarks/gpu.py --only attention head          some of the jobs

Each job is a process of its own that is killed at its time limit, so that a failure costs only itself. As it goes,
FOLDER gets gpu.json, the same as tables in gpu.md, and gpu.log, which is all that the jobs print. A job that failed, or
a part of one, has a line with the end of its error.

It needs no network: docs/dev/gpu.md says what each job finds, what a machine without this repo's requirements has to be
given as wheels, and how. It runs with torch 2.11 and transformers 5.17 too. The jobs are in gpu_jobs.py.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

from utils import end_with_parent, json_lines, write_json, write_text  # noqa: E402

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One of the jobs (a key of gpu_jobs.WORK). Of 540 seconds so many are its own; it also has what those before it
    have left."""

    name: str
    title: str
    seconds: float


JOBS = [
    Job("attention", "In bf16, by each implementation and layout that works here, against segments in fp32.", 70),
    Job("losses", "Steps of each loss on the built-in model in bf16, as it is and compiled.", 100),
    Job(
        "speed",
        "Gemma-2-2B's shape at UltraFeedback's lengths. Wanted: an MFU of 40 %; the best of peers is 22.5 %.",
        125,
    ),
    Job("trl", "TRL's DPO on the same pairs, its reference in advance, with as many pairs at once as fit.", 75),
    Job(
        "head", "Log-probabilities of 16,384 tokens of 256,000 words and their gradients, against the same in fp32.", 60
    ),
    Job("waits", "Steps in which torch raises an error where the host would wait for the GPU.", 20),
    Job("checkpointing", "What layers keep for the backward pass, with and without torch.compile.", 35),
    Job(
        "resuming",
        "A run that is killed and goes on, and one with weights in host memory, against an undisturbed one.",
        45,
    ),
    Job("study", "The jobs of study.py on a real model, as many as the time allows; figures are in study.jsonl.", 10),
]


# -------------------------------------------------------------------------------------------------- what is found


@dataclass
class Report:
    """gpu.json and gpu.md in a folder: what is known so far."""

    out: Path
    machine: Row = field(default_factory=dict)
    jobs: dict[str, Row] = field(default_factory=dict)  # by name: title, ended, seconds, rows, and an error's end

    def write(self) -> None:
        write_json(self.out / "gpu.json", {"machine": self.machine, "jobs": self.jobs})
        known = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        parts = [f"# benchmarks/gpu.py\n\n{known or 'No job has begun.'}"]
        for name, job in self.jobs.items():
            parts.append(f"## {name}\n\n{job['title']}\n\n{job['ended']}, {job['seconds']:.0f} s.")
            parts += [table(job["rows"])] if job["rows"] else []
            parts += ["```\n" + job["error"].replace("```", "'''") + "\n```"] if job.get("error") else []
        write_text(self.out / "gpu.md", "\n\n".join(parts) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, with a column for each key that one of them has; why one failed comes last."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.sort(key=lambda name: name == "failed")
    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def last_lines(text: str, count: int) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])[-2000:]


# -------------------------------------------------------------------------------------------------- running the jobs


def run_all(
    jobs: Sequence[Job], report: Report, seconds: float, command: Callable[[Job, Path], Sequence[str]], folder: Path
) -> None:
    """Run the jobs one after the other, within so many seconds. `command` gives what runs one and adds its rows, a line
    of JSON each, to the file that it names."""
    began, whole, share = time.monotonic(), sum(job.seconds for job in jobs), 0.0
    for job in jobs:
        share += job.seconds / whole
        file = folder / f"{job.name}.jsonl"
        entry: Row = {"title": job.title, "ended": "Running", "seconds": 0.0, "rows": []}
        report.jobs[job.name] = entry

        def look(file: Path = file, entry: Row = entry) -> None:
            """Take up what the job has found since the last look."""
            lines = (
                [line for _, line in json_lines(file.read_bytes().splitlines(True)) if line] if file.is_file() else []
            )
            report.machine = next((line["machine"] for line in lines if "machine" in line), report.machine)
            rows = [line for line in lines if "machine" not in line]
            if len(rows) > len(entry["rows"]):
                entry["rows"] = rows
                report.write()

        report.write()
        limit = max(1.0, began + share * seconds - time.monotonic())
        entry |= run_job(command(job, file), limit, report.out / "gpu.log", look)
        report.write()
        print(f"{job.name}: {entry['ended']}, {entry['seconds']:.0f} s, lines: {len(entry['rows'])}", flush=True)


def run_job(command: Sequence[str], limit: float, log: Path, look: Callable[[], None]) -> Row:
    """Run a command in a process group of its own, all of which is killed after `limit` seconds; `look` is called now
    and then. Gives how it ended, its seconds and, if not well, the end of what it printed."""
    began, before = time.monotonic(), log.stat().st_size if log.is_file() else 0
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=REPO, start_new_session=True)
    try:
        while process.poll() is None and time.monotonic() < began + limit:
            time.sleep(0.1)
            look()
    finally:
        status = process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a job that has ended has left running
        process.wait()
    look()
    found: Row = {"ended": "Done", "seconds": time.monotonic() - began}
    if status != 0:
        found["ended"] = f"Killed at its limit of {limit:.0f} s" if status is None else f"Failed with status {status}"
        found["error"] = last_lines(log.read_bytes()[before:].decode(errors="replace"), 8)
    return found


def main() -> None:
    names = [job.name for job in JOBS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all jobs together (%(default)s)")
    parser.add_argument("--out", type=Path, default=REPO / "outputs/gpu", metavar="FOLDER", help="(outputs/gpu)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="JOB", help=", ".join(names))
    parser.add_argument("--model", type=Path, default=REPO / "models/smollm2", help="of the study (models/smollm2)")
    parser.add_argument("--data", type=Path, default=os.environ.get("FPO_DATA", "."), help="of the study ($FPO_DATA)")
    parser.add_argument("--child", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        end_with_parent()
        import gpu_jobs

        gpu_jobs.do(**json.loads(arguments.child))
        return
    report = Report(arguments.out.resolve())
    report.out.mkdir(parents=True, exist_ok=True)
    (report.out / "gpu.log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/datasets", "PYTHONUNBUFFERED": "1"}
        if arguments.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        place = {"device": arguments.device, "folder": name, "out": str(report.out)}
        place |= {"model": str(arguments.model.resolve()), "data": str(arguments.data.resolve())}

        def command(job: Job, file: Path) -> list[str]:
            return [sys.executable, __file__, "--child", json.dumps({"name": job.name, "file": str(file), **place})]

        run_all([job for job in JOBS if job.name in arguments.only], report, 60 * arguments.minutes, command, folder)
    print(f"written to {report.out}: gpu.md, gpu.json, gpu.log")
    failed = [name for name, job in report.jobs.items() if job["ended"] != "Done"]
    sys.exit(f"not done: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
