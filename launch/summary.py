"""The figures that a run ends with: `summary.json` and a table."""

import json
import resource
import time
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from data import toy
from distributed import parallel
from judging.judge import Item, judge_pairs, toy_judge
from judging.statistics import win_rate
from launch.completions import draw, prompts_of, write_completions
from launch.report import FIGURE_NAMES, read_lines, write_run_page
from launch.settings import Config
from sampling.diversity import log_likelihoods
from sampling.generate import Decoding, Request, Sample
from training.loop import BasicTrainer
from utils import console, write_json


def summarise(trainer: BasicTrainer, config: Config, start_weights: Path, started: float) -> None:
    """Write summary.json and print it, with the names of the files that the run wrote; complete the run page."""
    run = trainer.run
    write_completions(trainer, config, "after")
    figures = from_metrics(run.folder / "metrics.jsonl")
    if config.toy_comparison:
        figures |= against_start(trainer, config, start_weights)
    figures["seconds"] = time.monotonic() - started
    figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if parallel.rank() != 0:
        return
    write_json(run.folder / "summary.json", figures)
    page = write_run_page(run.folder)

    table = Table("figure", "value", title=str(config.exp_name))
    for key, name in FIGURE_NAMES.items():
        if key in figures:
            value = f"{figures[key]:.4g}"
            if key == "win_rate":
                value += f" (95 % interval {figures['win_rate_low']:.4g} to {figures['win_rate_high']:.4g})"
            table.add_row(name, value)
    console.print(table)
    latest = run.folder / "LATEST"
    holds = "policy.pt and Hub format" if (latest / "policy.pt").is_file() else "the SAEs"
    console.print(f"{run.folder}/: LATEST/ ({holds}), summary.json, metrics.jsonl, config.yaml", markup=False)
    console.print(f"curves, completions and settings, to look at in a browser: {page}")


def from_metrics(path: Path) -> dict[str, float]:
    """What the first and the last evaluation say. Accuracy: the share of pairs whose chosen completion the policy
    itself finds likelier per token. Drift: the mean over chosen and rejected completions."""
    evaluations = [line for line in read_lines(path) if "loss/eval" in line]
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


def against_start(trainer: BasicTrainer, config: Config, start_weights: Path) -> dict[str, float]:
    """The tuned policy against the policy it started as, on held-out prompts, by the toy language's rules.

    Both are sampled as they are (temperature 1, no truncation), so the same samples give an unbiased KL:
    the mean over the policy's completions of log policy - log start.
    """
    model = config.model
    start = trainer.load(start_weights, model.load_from, frozen=True)
    rows = {row["prompt"]: row for row in trainer.loaders["eval"].rows}
    prompts = list(rows.values())[: config.toy_comparison]

    plain, controlled = (prompts_of(trainer, prompts, trained=trained) for trained in (False, True))

    def completions(policy: Any, prompt_ids: list[list[int]], seed: int) -> list[Sample]:
        requests = [Request(ids, temperature=1.0) for ids in prompt_ids]
        return draw(trainer, policy, requests, Decoding(config.max_new_tokens, seed))

    def log_likelihood(policy: Any, prompt_ids: list[list[int]], samples: list[Sample]) -> float:
        ids, tokenizer = [drawn.ids for drawn in samples], trainer.tokenizer
        ends = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
        return mean(log_likelihoods(policy, prompt_ids, ids, batch_size=model.eval_batch_size, **ends))

    tuned = completions(trainer.policy, controlled, config.seed)
    before = completions(start, plain, config.seed + 1)
    items = [Item(json.loads(row["messages"]), t.text, b.text) for row, t, b in zip(prompts, tuned, before)]
    verdicts = judge_pairs(items, toy_judge, config.seed)
    rate, low, high = win_rate([verdict.preference for verdict in verdicts if verdict.preference is not None])
    questions = [item.messages[-1]["content"] for item in items]
    return {
        "toy_score_before": mean(toy.toy_score(question, item.baseline) for question, item in zip(questions, items)),
        "toy_score_after": mean(toy.toy_score(question, item.candidate) for question, item in zip(questions, items)),
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "kl": log_likelihood(trainer.policy, controlled, tuned) - log_likelihood(start, plain, tuned),
    }
