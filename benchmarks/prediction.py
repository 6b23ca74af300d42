"""Does the pairs' Delta foretell what training does? Measured on the toy language, and written into docs/features.md.

    python benchmarks/prediction.py [SEED ...]                    every loss, seeds 1, 2 and 3
    python benchmarks/prediction.py --losses kto fpo              some losses
    python benchmarks/prediction.py --model MODEL --sae SAE       a real model, on AlpacaEval's pairs in $FPO_DATA

Each loss trains the model on the same pairs, for several numbers of examples. Then one command reads the pairs with the
start, and samples of start and policy for held-out prompts. Each run adds a line to docs/prediction.jsonl. One whose
line is there is not done again, and one that was killed goes on, so the same command goes on where it stopped.
"""

import argparse
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
FIGURES = REPO / "docs" / "prediction.jsonl"
LOSSES = ("dpo", "simpo", "kto", "fpo")
HEAD = [
    "model",
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
class Subject:
    """A model, what it is trained on, and what reads it."""

    name: str
    train: tuple[str, ...]
    fpo: str  # FPO's beta, of a mean over tokens
    data: str
    measure: tuple[str, ...]
    examples: tuple[int, ...]


TOY = Subject(
    name="toy",
    train=("model=tiny", "datasets=[toy]", "optimizer=AdamW", "lr=3e-4", "lr_schedule=linear", "warmup_ratio=0.1"),
    fpo="++loss.beta=2",
    data="toy",
    measure=(
        "++n_samples=256",
        "++max_new_tokens=32",
        "++sae.path=assets/tiny-sae/params.npz",
        "++sae.layer=2",
    ),
    examples=(160, 640),
)


def real(model: str, sae: list[str]) -> Subject:
    """A model on a disk, and an SAE that reads it: its path and, where its files do not say it, the layer."""
    pairs = Path(os.environ["FPO_DATA"]).resolve() / "alpaca_eval"
    train = f"""model={Path(model).resolve()} datasets=[{pairs}/preferences_train.jsonl.gz]
        eval_datasets=[{pairs}/preferences_test.jsonl.gz] warmup_ratio=0.1 ++model.policy_dtype=float32
        ++model.max_length=112 ++model.max_prompt_length=64 ++model.batch_size=16"""
    reads = [f"++sae.path={Path(sae[0]).resolve()}", *(f"++sae.layer={layer}" for layer in sae[1:])]
    return Subject(
        name=Path(model).name,
        train=(*train.split(), *reads),
        fpo="++loss.beta=5",
        data=f"{pairs}/preferences_train.jsonl.gz",
        measure=("++n_samples=192", "++max_new_tokens=48"),
        examples=(192, 768),
    )


@dataclass(frozen=True)
class Case:
    """One run."""

    subject: Subject
    loss: str
    examples: int
    seed: int = 1

    @property
    def key(self) -> dict[str, Any]:
        return {"model": self.subject.name, "loss": self.loss, "examples": self.examples, "seed": self.seed}

    @property
    def folder(self) -> Path:
        return OUTPUT / "-".join(map(str, self.key.values()))


def command(script: str, *arguments: str) -> None:
    """One of this repo's commands, as a user types it."""
    line = [sys.executable, script, *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(line)}\n{done.stdout}{done.stderr}")


def figures() -> list[dict[str, Any]]:
    """The lines that are there."""
    return [json.loads(line) for line in FIGURES.read_text().splitlines()] if FIGURES.is_file() else []


def run(case: Case) -> dict[str, Any]:
    """What the report says of a run, which is trained and measured where that has not been done."""
    for line in figures():
        if case.key.items() <= line.items():
            return line
    if not (case.folder / "LATEST").exists():
        options = f"""loss={case.loss} n_examples={case.examples} seed={case.seed} eval_every=null
            save_every=160 do_first_eval=false n_eval_examples=64 cache_dir={OUTPUT} exp_name={case.folder.name}"""
        own = [case.subject.fpo] if case.loss == "fpo" else []
        command("train.py", *options.split(), *case.subject.train, *own)
    tables = case.folder / "data_features"
    if not list(tables.glob("*/data_features.parquet")):
        measured = ["++mode=features", f"++data=[{case.subject.data}]", *case.subject.measure]
        command("eval.py", f"--config-path={case.folder}", *measured)
    (table,) = tables.glob("*/data_features.parquet")
    found = case.key | json.loads(pq.read_schema(table).metadata[b"data_features"])["outcome"]
    with FIGURES.open("a") as file:
        file.write(json.dumps(found) + "\n")
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
    cells += [cell([own["effective"] for own in found]), of("null", "r2"), of("drawn", "rank")]
    return [case.subject.name, f"`{case.loss}`", f"{case.examples:,}", *cells]


def with_row(page: str, cells: list[str]) -> str:
    """The page with a row of its table replaced, or added."""
    line, start = f"| {' | '.join(cells)} |\n", f"| {' | '.join(cells[:3])} |"
    before, table, after = re.split("(<!-- prediction -->\n.*?)(?=<!-- end -->)", page, maxsplit=1, flags=re.S)
    rows = table.splitlines(keepends=True)
    there = [number for number, own in enumerate(rows) if own.startswith(start)]
    rows[there[0] if there else len(rows) :] = [line, *rows[there[0] + 1 :]] if there else [line]
    return before + "".join(rows) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--model", help="a directory of a real model")
    parser.add_argument("--sae", nargs="+", help="an SAE that reads it, and its layer where its files do not say it")
    given = parser.parse_args()
    if given.model and not (given.sae and "FPO_DATA" in os.environ):
        parser.error("--model needs --sae, and FPO_DATA in the environment")
    subject = real(given.model, given.sae) if given.model else TOY
    print(" | ".join(HEAD))
    for case in (Case(subject, loss, examples) for loss in given.losses for examples in subject.examples):
        cells = row(case, [run(replace(case, seed=seed)) for seed in given.seeds])
        print(" | ".join(cells), flush=True)
        PAGE.write_text(with_row(PAGE.read_text(), cells))


if __name__ == "__main__":
    main()
