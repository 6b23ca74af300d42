"""Does the pairs' Delta foretell what training does? Measured on the toy language, and written into docs/features.md.

    python benchmarks/prediction.py [SEED ...]     seeds 1, 2 and 3

Each loss trains the built-in model on the same pairs, for several numbers of examples. Then one command reads the pairs
with the start, and samples of start and policy for held-out prompts. A run that is done is kept: the same command goes
on.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq

REPO = Path(__file__).resolve().parent.parent
OUTPUT = REPO / "outputs" / "prediction"
PAGE = REPO / "docs" / "features.md"
LOSSES = {"dpo": [], "simpo": [], "kto": [], "fpo": ["++loss.beta=2"]}  # beta: of a mean over about eight tokens
EXAMPLES = (160, 640)
SAE = ["++sae.path=assets/tiny-sae/params.npz", "++sae.layer=2"]
HEAD = [
    "loss",
    "examples",
    "R2, drawn",
    "ceiling",
    "R2, reweighted",
    "ceiling",
    "effective samples",
    "R2, null",
    "rank, drawn",
]


@dataclass(frozen=True)
class Case:
    """One run."""

    loss: str
    examples: int
    seed: int = 1

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.examples}-{self.seed}"

    @property
    def table(self) -> Path:
        return OUTPUT / self.name / "data_features" / "toy" / "data_features.parquet"


def command(script: str, *arguments: str) -> None:
    """One of this repo's commands, as a user types it."""
    line = [sys.executable, script, *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(line)}\n{done.stdout}{done.stderr}")


def run(case: Case) -> dict[str, Any]:
    """What the report says of a run, which is trained and measured where that has not been done."""
    if not (OUTPUT / case.name / "LATEST").exists():
        options = f"""loss={case.loss} model=tiny datasets=[toy] n_examples={case.examples} seed={case.seed}
            optimizer=AdamW lr=3e-4 lr_schedule=linear warmup_ratio=0.1 eval_every=null save_every=null
            do_first_eval=false n_eval_examples=64 cache_dir={OUTPUT} exp_name={case.name}"""
        command("train.py", *options.split(), *LOSSES[case.loss])
    if not case.table.is_file():
        measured = ["++mode=features", "++data=[toy]", "++n_samples=256", "++max_new_tokens=32", *SAE]
        command("eval.py", f"--config-path={OUTPUT / case.name}", *measured)
    found: dict[str, Any] = json.loads(pq.read_schema(case.table).metadata[b"data_features"])["outcome"]
    return found


def cell(values: list[float | None]) -> str:
    """The mean, and the lowest and highest of several; a dash where one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    spread = f" ({min(known):.2f} to {max(known):.2f})" if len(known) > 1 else ""
    return f"{mean(known):.2f}{spread}"


def row(case: Case, found: list[dict[str, Any]]) -> list[str]:
    fits = [{fit["name"]: fit for fit in own["fits"]} for own in found]

    def of(name: str, key: str) -> str:
        values = [own.get(name, {}).get(key) for own in fits]
        return cell([value[0] if isinstance(value, list) else value for value in values])

    cells = [of("drawn", "r2"), of("drawn", "ceiling"), of("reweighted", "r2"), of("reweighted", "ceiling")]
    effective = cell([own["effective"] for own in found])
    return [f"`{case.loss}`", f"{case.examples:,}", *cells, effective, of("null", "r2"), of("drawn", "rank")]


def main() -> None:
    seeds = [int(argument) for argument in sys.argv[1:]] or [1, 2, 3]
    rows = [HEAD]
    for case in (Case(loss, examples) for loss in LOSSES for examples in EXAMPLES):
        rows.append(row(case, [run(replace(case, seed=seed)) for seed in seeds]))
        print(" | ".join(rows[-1]), flush=True)
    lines = [f"| {' | '.join(own)} |" for own in rows]
    table = "\n".join([lines[0], "|" + "---|" * len(HEAD), *lines[1:]]) + "\n"
    place = re.compile("(<!-- prediction -->\n).*?(<!-- end -->)", flags=re.S)
    PAGE.write_text(place.sub(lambda found: found[1] + table + found[2], PAGE.read_text()))


if __name__ == "__main__":
    main()
