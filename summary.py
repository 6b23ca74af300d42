"""The figures that a run ends with: `summary.json` and a table."""

import json
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import models
from batch import collate_padded
from compare import Item, judge_pairs, toy_judge, win_rate
from sampling import Sample, sample
from trainers import BasicTrainer
from utils import console, write_json

NAMES = {  # the figures in the order of the table; a run has those that apply to it
    "loss_before": "held-out loss before",
    "loss_after": "held-out loss after",
    "accuracy_before": "preference accuracy before",
    "accuracy_after": "preference accuracy after",
    "win_rate": "win rate against the start",
    "feature_drift": "feature drift",
    "kl": "KL to the reference, nats a completion",
    "seconds": "seconds",
    "peak_rss_mb": "peak memory, MB",
}


def summarise(trainer: BasicTrainer, start_weights: Path, started: float) -> None:
    """Write summary.json and print it, with the names of the files that the run wrote."""
    run, config = trainer.run, trainer.config
    figures = from_metrics(run.folder / "metrics.jsonl")
    if config.toy_comparison:
        figures |= against_start(trainer, start_weights, config.toy_comparison)
    figures["seconds"] = time.monotonic() - started
    figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_json(run.folder / "summary.json", figures)

    table = Table("figure", "value", title=str(config.exp_name))
    for key, name in NAMES.items():
        if key in figures:
            value = f"{figures[key]:.4g}"
            if key == "win_rate":
                value += f" (95 % interval {figures['win_rate_low']:.4g} to {figures['win_rate_high']:.4g})"
            table.add_row(name, value)
    console.print(table)
    console.print(f"{run.folder}/: LATEST/ (policy.pt and Hub format), summary.json, metrics.jsonl, config.yaml")


def from_metrics(path: Path) -> dict[str, float]:
    """What the first and the last evaluation say. Accuracy: the share of pairs whose chosen completion the policy
    itself finds likelier per token. Drift: the mean over chosen and rejected completions."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [line for line in lines if "loss/eval" in line]
    if not evaluations:
        return {}
    figures = {"loss_after": evaluations[-1]["loss/eval"]}
    if evaluations[0]["step"] == 0:
        figures["loss_before"] = evaluations[0]["loss/eval"]
    if "logps_eval/accuracies" in evaluations[-1]:
        figures["accuracy_after"] = evaluations[-1]["logps_eval/accuracies"]
        if evaluations[0]["step"] == 0:
            figures["accuracy_before"] = evaluations[0]["logps_eval/accuracies"]
    drifts = [value for key, value in evaluations[-1].items() if key.startswith("feature_drift_eval/")]
    if drifts:
        figures["feature_drift"] = sum(drifts) / len(drifts)
    return figures


def against_start(trainer: BasicTrainer, start_weights: Path, count: int) -> dict[str, float]:
    """The tuned policy against the policy it started as, on held-out prompts, by the toy language's rules.

    Both are sampled as they are (temperature 1, no truncation), so the same samples give an unbiased KL:
    E over the policy's completions of log policy - log start.
    """
    config, model = trainer.config, trainer.config.model
    attention = trainer.policy.config._attn_implementation
    start = models.load_model(start_weights, attention, trainer.device, model.load_from)
    rows = {row["prompt"]: row for row in trainer.loaders["eval"].rows}
    prompts = list(rows.values())[:count]

    def completions(policy: Any, seed: int) -> list[Sample]:
        return sample(
            policy,
            trainer.tokenizer,
            [row["prompt_ids"] for row in prompts],
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=config.max_new_tokens,
            batch_size=model.eval_batch_size,
            seed=seed,
        )

    tuned, before = completions(trainer.policy, config.seed), completions(start, config.seed + 1)
    items = [Item(json.loads(row["messages"]), t.text, b.text) for row, t, b in zip(prompts, tuned, before)]
    outcomes = Counter(verdict.outcome for verdict in judge_pairs(items, toy_judge, config.seed))
    rate, low, high = win_rate(outcomes["win"], outcomes["tie"], outcomes["loss"])
    return {
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "kl": sequence_kl(trainer, start, [row["prompt_ids"] for row in prompts], [s.ids for s in tuned]),
    }


@torch.no_grad()
def sequence_kl(trainer: BasicTrainer, start: Any, prompts: list[list[int]], completions: list[list[int]]) -> float:
    """Mean over the policy's own completions of log policy(y|x) - log start(y|x), in nats."""
    tokenizer, size = trainer.tokenizer, trainer.config.model.eval_batch_size
    records = [
        {"prompt_ids": prompt, "completion_ids": [ids], "index": i}
        for i, (prompt, ids) in enumerate(zip(prompts, completions))
    ]
    total = 0.0
    for first in range(0, len(records), size):
        batch = collate_padded(
            records[first : first + size], pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id
        ).to(trainer.device)
        total += float((models.score(trainer.policy, batch).logps - models.score(start, batch).logps).sum())
    return total / len(records)
