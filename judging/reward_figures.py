"""How good a reward model is: the share of pairs that it orders rightly, and what the best of n samples is worth."""

import math
import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

import dataloader
from data import toy
from data.rows import BadRows, pair_of, read_rows
from judging import statistics
from judging.labels import Scored, Text
from training.settings import TrainingSettings
from utils import Message, UserError, console, fingerprint

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "subset")


class Pair(NamedTuple):
    """Two answers to a prompt, the first of them the better one."""

    subset: str
    messages: list[Message]
    chosen: str
    rejected: str
    place: str

    def texts(self) -> list[Text]:
        return [Text(self.messages, answer, self.place) for answer in (self.chosen, self.rejected)]


def read_pairs(file: Path, max_bad_rows: float) -> list[Pair]:
    """The pairs of a file with the columns `prompt, chosen, rejected`, perhaps `subset`: RewardBench's layout.

    Without a subset it is the file's name. Raises UserError where there are none, or too many rows are bad.
    """
    bad, found = BadRows(str(file)), []
    for place, row in read_rows([file], bad, PAIR_COLUMNS):
        with bad.at(place):
            subset = str(row.get("subset") or file.name.partition(".")[0])
            found.append(Pair(subset, *pair_of(row), place))
    bad.check(max_bad_rows)
    if not found:
        raise UserError(
            f"{file}: no pairs, which have `prompt, chosen, rejected` and perhaps `subset`; nor is it samples"
        )
    return found


def held_out_pairs(config: TrainingSettings) -> list[Pair]:
    """The pairs of the evaluation rows, `n_eval_examples` of them, drawn at random but the same in every run; a data
    set is a subset. Raises UserError where there are none."""
    data = dataloader.load_datasets(config, "test")
    names = dataloader.short_names([own.name for own in data])
    found = [
        Pair(names[own.name], record["prompt"], chosen, rejected, record["source"])
        for own in data
        for record in dataloader.PairedPreferenceDataLoader.records(own)
        for chosen, rejected in [record["completions"]]
    ]
    if not found:
        raise UserError("the test rows hold no pairs; look at datasets, eval_datasets and eval_split, or give ++files=")
    count = len(found) if config.n_eval_examples is None else min(config.n_eval_examples, len(found))
    return random.Random(0).sample(found, count)


def accuracies(pairs: Sequence[Pair], rewards: Sequence[float | None]) -> dict[str, dict[str, float]]:
    """For each subset, and for all pairs as "all": how many there are, the share whose chosen answer has the higher
    reward, with its 95 % interval, and the mean margin.

    `rewards`: the chosen and the rejected answer's of each pair in turn. Equal ones are not in the right order, as in
    RewardBench. Pairs that lack one are left out.
    """
    found: dict[str, list[tuple[str, float]]] = {}
    for pair, chosen, rejected in zip(pairs, rewards[::2], rewards[1::2], strict=True):
        if chosen is not None and rejected is not None:
            for name in (pair.subset, "all"):
                found.setdefault(name, []).append((fingerprint(pair.messages), chosen - rejected))
    figures = {}
    for name, own in sorted(found.items(), key=lambda item: item[0] == "all"):
        right = [float(margin > 0) for _, margin in own]
        accuracy = statistics.win_rate(right, [prompt for prompt, _ in own])
        figures[name] = {
            "pairs": len(own),
            "accuracy": accuracy.estimate,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "margin": sum(margin for _, margin in own) / len(own),
        }
    return figures


def best_of(n: int, rewards: Sequence[float], values: Sequence[float]) -> float:
    """The expected value of the answer with the highest reward among n of these answers, drawn without replacement.

    It is the unbiased estimate of best-of-n's from N >= n samples: the mean over all subsets of n. The answer of rank i
    in rewards, from 1, is the best of C(i - 1, n - 1) of the C(N, n) subsets. Of equal rewards any may be taken.
    """
    ranked = sorted(zip(rewards, values), key=lambda pair: pair[0])
    total, below = 0.0, 0
    for _, group in groupby(ranked, key=lambda pair: pair[0]):
        own = [value for _, value in group]
        subsets = math.comb(below + len(own), n) - math.comb(below, n)  # whose best is one of the group
        total += subsets / math.comb(len(rewards), n) * (sum(own) / len(own))
        below += len(own)
    return total


def best_of_n_curve(name: str, prompts: Sequence[Scored]) -> dict[str, Any]:
    """For n = 1, 2, 4, ... up to all N samples: the mean over the prompts of the best one's reward and, where all
    prompts are the toy language's, of its true score by the rules, each with its standard error.

    Prompts with fewer than N answers are left out. `name`: of the file. Raises UserError where it has no answer.
    """
    most = max(len(prompt.rewards) for prompt in prompts)
    if most == 0:
        raise UserError(f"{name}: no answer to score")
    whole = [prompt for prompt in prompts if len(prompt.rewards) == most]
    values = {"reward": [prompt.rewards for prompt in whole]}
    said = [prompt.messages[-1]["content"] for prompt in whole]
    if all(toy.attributes(text, "").task for text in said):
        values["true_score"] = [
            [toy.toy_score(text, answer) for answer in prompt.answers] for text, prompt in zip(said, whole)
        ]
    curve = []
    for n in sorted({2**power for power in range(most.bit_length())} | {most}):
        point: dict[str, float | None] = {"n": n}
        for name, own in values.items():
            best = [best_of(n, prompt.rewards, each) for prompt, each in zip(whole, own)]
            mean, error = statistics.mean_and_error(best)
            point |= {name: mean, f"{name}_error": None if math.isnan(error) else error}
        curve.append(point)
    return {"prompts": len(whole), "prompts_left_out": len(prompts) - len(whole), "samples": most, "curve": curve}


def print_accuracies(figures: dict[str, dict[str, float]]) -> None:
    table = Table("subset", "pairs", "accuracy", "95 % interval", "mean margin", title="pairs in the right order")
    for name, own in figures.items():
        interval = f"{own['accuracy_low']:.1%} to {own['accuracy_high']:.1%}"
        table.add_row(name, f"{own['pairs']:,}", f"{own['accuracy']:.1%}", interval, f"{own['margin']:.3f}")
    console.print(table)


def print_curve(name: str, found: dict[str, Any]) -> None:
    names = [key for key in ("reward", "true_score") if key in found["curve"][0]]
    table = Table("best of", *names, title=f"{name}: {found['prompts']:,} prompts, {found['samples']} samples each")
    for point in found["curve"]:
        cells = [
            f"{point[key]:.3f}" + (f" ± {point[f'{key}_error']:.3f}" if point[f"{key}_error"] else "") for key in names
        ]
        table.add_row(str(point["n"]), *cells)
    console.print(table)
