"""Pairs that teach something unasked: found, dropped or turned round, is it still learnt? Measured on the toy language.

    python benchmarks/planted.py [SEED ...]     seed 1, into docs/features.md

Of 1,280 pairs 1,216 differ in tone alone, and friendly is chosen; 64, one in twenty, differ in format alone, and the
list is chosen. Each pair is scored by the behaviour, before any training; the 64 that look most like it are dropped, or
turned round; and DPO trains the built-in model on what is left. A run that is done is kept.
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from prediction import REPO, SAE, cell, command

sys.path.insert(0, str(REPO))

import torch
from control import shares

from data import toy

OUTPUT = REPO / "outputs" / "planted"
PAGE = REPO / "docs" / "features.md"
PAIRS, PLANTED, EPOCHS = 1280, 64, 2
Row = dict[str, Any]


def pairs(seed: int) -> tuple[list[Row], set[str]]:
    """The pairs, in random order, and the prompts of those that are planted."""
    tone, lists = (toy.contrasts(name, "train", seed, 2 * PAIRS) for name in ("tone", "format"))
    found = {row["prompt"]: (row["first"], row["second"]) for row in tone}  # friendly against blunt
    plain = dict(list(found.items())[: PAIRS - PLANTED])
    planted = {row["prompt"]: (row["second"], row["first"]) for row in lists if row["prompt"] not in plain}
    planted = dict(list(planted.items())[:PLANTED])
    rows = [{"prompt": p, "chosen": chosen, "rejected": other} for p, (chosen, other) in (plain | planted).items()]
    assert len(rows) == PAIRS
    random.Random(seed).shuffle(rows)
    return rows, set(planted)


def turned_round(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def write_rows(file: Path, rows: list[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def scored(seed: int, file: Path) -> list[Row]:
    """The pairs as the report writes them, those first whose chosen completion is most like a list."""
    folder = OUTPUT / f"start-{seed}" / "data_features" / file.stem
    if not (folder / "pairs.jsonl").is_file():
        options = ["++mode=features", f"++data=[{file}]", "++probe=format", *SAE, f"++eval_datasets=[{file}]"]
        command("eval.py", "--config-path=assets/tiny", *options, f"++cache_dir={OUTPUT}", f"++exp_name=start-{seed}")
    found = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return found[::-1]  # the probe's first kind of text is plain


def trained(name: str, rows: list[Row], seed: int) -> dict[str, float]:
    """What the model is like after training on some pairs: shares of its samples for held-out prompts."""
    run, result = OUTPUT / f"{name}-{seed}", OUTPUT / f"{name}-{seed}.json"
    if not result.is_file():
        data = write_rows(OUTPUT / f"{name}-{seed}.jsonl", rows)
        options = f"""loss=dpo model=tiny datasets=[{data}] eval_datasets=[toy] n_epochs={EPOCHS} seed={seed}
            optimizer=AdamW lr=3e-4 lr_schedule=linear warmup_ratio=0.1 eval_every=null save_every=null
            do_first_eval=false n_eval_examples=64 cache_dir={OUTPUT} exp_name={run.name}"""
        command("train.py", *options.split())
        result.write_text(json.dumps(shares(run / "LATEST", seed)))
    return json.loads(result.read_text())


def main() -> None:
    seeds = [int(argument) for argument in sys.argv[1:]] or [1]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    names = ("all pairs", "found ones dropped", "found ones turned round", "none planted")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    precision = []
    for seed in seeds:
        rows, planted = pairs(seed)
        ordered = scored(seed, write_rows(OUTPUT / f"pairs-{seed}.jsonl", rows))
        best = {row["prompt"][0]["content"] for row in ordered[:PLANTED]}
        precision.append(len(best & planted) / PLANTED)
        turned = [turned_round(row) if row["prompt"] in best else row for row in rows]
        kept, clean = ([row for row in rows if row["prompt"] not in out] for out in (best, planted))
        for name, own in zip(names, (rows, kept, turned, clean)):
            results[name].append(trained(name.replace(" ", "-"), own, seed))
    start = shares(REPO / "assets/tiny", 0)
    figures = ("list", "friendly", "correct")
    keys = ("format", "tone", "correct")
    lines = [["trained on", *figures], ["nothing", *(f"{start[key]:.2f}" for key in keys)]]
    lines += [[name, *(cell([own[key] for own in found]) for key in keys)] for name, found in results.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * 4, *lines[1:]]) + "\n"
    table = f"Precision at {PLANTED}: {cell(list(precision))}.\n\n{table}"
    print(table)
    place = re.compile("(<!-- planted -->\n).*?(<!-- end -->)", flags=re.S)
    PAGE.write_text(place.sub(lambda found: found[1] + table + found[2], PAGE.read_text()))


if __name__ == "__main__":
    main()
