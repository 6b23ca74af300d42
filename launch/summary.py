"""The figures that a run ends with: `summary.json`."""

import json
import math
import resource
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from data import toy
from distributed import parallel
from judging.judge import Item, judge_pairs, toy_judge
from judging.statistics import win_rate
from launch.completions import draw, prompts_of, write_completions
from launch.report import SAE_FIGURES, SUMMARY, read_lines
from launch.schema import Config
from sampling.diversity import log_likelihoods
from sampling.generate import Decoding, Request, Sample
from training.loop import BasicTrainer
from utils import console, sealed, write_json


def write_summary(trainer: BasicTrainer, config: Config, start_weights: Path) -> None:
    """Write summary.json, a run's last file but for its page."""
    trainer.stop_if_asked()
    write_completions(trainer, config, "after")
    evaluations = [line for line in read_lines(trainer.run.folder / "metrics.jsonl") if "loss/eval" in line]
    figures: dict[str, Any] = from_evaluations(evaluations)
    if config.toy_comparison:
        trainer.stop_if_asked()
        figures |= against_start(trainer, config, start_weights)
    if trainer.best:
        figures["best"] = trainer.best
    figures["seconds"] = trainer.seconds()
    figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if parallel.rank() == 0:
        write_json(trainer.run.folder / SUMMARY, sealed(figures))
        if learnt_little(evaluations, len(trainer.loaders["eval"].used())):
            console.print(
                "The held-out loss and accuracies moved less than noise: this run learnt next to nothing. "
                f"What matters most is lr (here {config.lr:g}) and how much it trains on (n_epochs, n_examples).",
                style="yellow",
            )


def learnt_little(evaluations: Sequence[dict[str, float]], records: int) -> bool:
    """Whether a run's evaluations, each of so many records, differ by less than noise: the loss by less than 1 %, the
    accuracies by less than two standard errors (of the rewards: from 1/2, for at the start they are equal)."""
    if len(evaluations) < 2 or evaluations[0]["step"] != 0:
        return False
    first, last = evaluations[0], evaluations[-1]
    moved = abs(last["loss/eval"] - first["loss/eval"]) >= 0.01 * abs(first["loss/eval"])
    for name, value in last.items():
        if name.endswith("/accuracies"):
            start = 0.5 if name.startswith("rewards") else first[name]
            moved |= abs(value - start) >= 2 * math.sqrt(0.25 / records)
    return not moved


def from_evaluations(evaluations: Sequence[dict[str, float]]) -> dict[str, float]:
    """What the first and the last evaluation say; of SAEs, the last. Accuracy: the share of pairs whose chosen
    completion the policy itself finds likelier per token; reward accuracy, of a reward model: that it finds better.
    Drift: the mean over chosen and rejected completions."""
    if not evaluations:
        return {}
    figures = {"loss_after": evaluations[-1]["loss/eval"]}
    if evaluations[0]["step"] == 0:
        figures["loss_before"] = evaluations[0]["loss/eval"]
    policy = "logps_eval/accuracies" in evaluations[-1]
    name, key = ("logps_eval/accuracies", "accuracy") if policy else ("rewards_eval/accuracies", "reward_accuracy")
    if name in evaluations[-1]:
        figures[f"{key}_after"] = evaluations[-1][name]
        if evaluations[0]["step"] == 0 and name in evaluations[0]:
            figures[f"{key}_before"] = evaluations[0][name]
    drifts = [value for key, value in evaluations[-1].items() if key.startswith("feature_drift_eval/")]
    if drifts:
        figures["feature_drift"] = sum(drifts) / len(drifts)
    of_saes = {
        key.removeprefix("sae_eval/"): value for key, value in evaluations[-1].items() if key.startswith("sae_eval/")
    }
    if len(of_saes) > 1:  # FPO has one: the share of tokens left out
        figures |= {key: value for key, value in of_saes.items() if key.rpartition("/")[2] in SAE_FIGURES}
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
