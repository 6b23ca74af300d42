"""The figures of comparisons and grades: what goes into a results file, and the same as tables."""

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Column, Table

from judging import alpaca_eval_official, statistics
from judging.answers import AnswerFile, Comparison, Row
from judging.judge import Verdict
from judging.protocols import Answer, Shown
from utils import UserError, console


def comparison_figures(args: argparse.Namespace, comparison: Comparison, verdicts: list[Verdict]) -> dict[str, Any]:
    """The figures of a comparison. Malformed, refused and failed verdicts are nobody's win and not in the total."""
    judged = [verdict for verdict in verdicts if verdict.preference is not None]
    if not judged:
        raise UserError(
            f"judge {args.judge!r} gave no verdict on {comparison.candidate} against {comparison.baseline}; the last "
            f"of its {len(verdicts)} replies ({verdicts[-1].status}): {verdicts[-1].text!r}"
        )
    items = [comparison.items[number] for number in dict.fromkeys(verdict.item for verdict in judged)]
    counts = Counter(verdict.outcome for verdict in verdicts)
    preferences = [verdict.preference for verdict in judged if verdict.preference is not None]
    prompts = [comparison.questions[verdict.item] for verdict in judged]
    weights = [verdict.weight for verdict in judged]
    chosen_from = [comparison.items[verdict.item] for verdict in judged]
    longer_by = [len(item.candidate) - len(item.baseline) for item in chosen_from]
    with_text = any(item.candidate or item.baseline for item in items)

    def side(name: str, wins: int, texts: list[str]) -> dict[str, Any]:
        return {
            "name": name,
            "wins": wins,
            "lengths": [len(text.split()) for text in texts],  # in words
            "characters": float(np.mean([len(text) for text in texts])),
        }

    result: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "total": len(judged),
        "prompts": len(set(prompts)),
        "seed": args.seed,
        "exp_name": comparison.exp_name,
        "judge": args.judge,
        "protocol": args.protocol,
        "candidate": side(comparison.candidate, counts["win"], [item.candidate for item in items]),
        "baseline": side(comparison.baseline, counts["loss"], [item.baseline for item in items]),
        "ties": counts["tie"],
        "malformed": counts["malformed"],
        "refused": counts["refused"],
        "failed": counts["failed"],
        "skipped": comparison.skipped,
        **interval("win_rate", statistics.win_rate(preferences, prompts, weights)),
        "sign_test_p": statistics.sign_test(preferences, prompts),
        **interval(
            "length_controlled_win_rate",
            statistics.length_controlled(preferences, longer_by, prompts, weights) if with_text else None,
        ),
        **order_figures(judged),
    }
    if args.alpaca_eval and with_text:
        means = per_item(judged)
        outputs = [item.candidate for item in comparison.items]  # its lengths are of all, judged or not
        result["alpaca_eval"] = statistics.alpaca_eval_figures(list(means.values()), outputs)
        if args.official_lc:
            result["alpaca_eval"] |= alpaca_eval_official.official_length_controlled(comparison, means)
    return result


def interval(name: str, value: statistics.Interval | None) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), value or (None, None, None)))


def per_item(judged: Sequence[Verdict]) -> dict[int, float]:
    """The mean preference of each item's verdicts."""
    values: dict[int, list[float]] = defaultdict(list)
    for verdict in judged:
        if verdict.preference is not None:
            values[verdict.item].append(verdict.preference)
    return {number: sum(those) / len(those) for number, those in values.items()}


def order_figures(judged: Sequence[Verdict]) -> dict[str, float | None]:
    """`first_shown`: the mean preference for whatever was shown first, 0.5 for a judge without a liking for a place.
    `orders_agree`: among the items judged in both orders, the share with the same outcome."""
    shown = [v.preference if v.candidate_first else 1 - v.preference for v in judged if v.preference is not None]
    known = all(verdict.candidate_first is not None for verdict in judged)
    outcomes: dict[int, list[str]] = defaultdict(list)
    for verdict in judged:
        outcomes[verdict.item].append(verdict.outcome)
    pairs = [pair for pair in outcomes.values() if len(pair) == 2]
    return {
        "first_shown": sum(shown) / len(shown) if known else None,
        "orders_agree": sum(one == two for one, two in pairs) / len(pairs) if pairs else None,
    }


def standings(found: list[Comparison], verdicts: list[list[Verdict]]) -> list[dict[str, Any]]:
    """The leaderboard of several comparisons, best first; the anchor is the model that was compared most often."""
    games = [
        statistics.Game(one.candidate, one.baseline, verdict.preference, one.questions[verdict.item], verdict.weight)
        for one, those in zip(found, verdicts)
        for verdict in those
        if verdict.preference is not None
    ]
    ((anchor, _),) = Counter(name for one in found for name in (one.baseline, one.candidate)).most_common(1)
    try:
        board = statistics.leaderboard(games, anchor)
    except ValueError as error:
        console.print(f"no leaderboard: {error}", markup=False)
        return []
    return [
        {"name": place.name, **interval("rating", place.rating), "win_rate": place.win_rate, "anchor": anchor}
        for place in board
    ]


def grade_figures(
    args: argparse.Namespace,
    file: AnswerFile,
    name: str,
    rows: list[Row],
    shown: list[Shown],
    grades: list[Answer],
) -> dict[str, Any]:
    """The mean score, with an interval that takes questions as its units, and the means of turns and categories."""
    judged = [(row, grade.value) for row, grade in zip(rows, grades) if grade.value is not None]
    if not judged:
        raise UserError(
            f"judge {args.judge!r} gave no score to {name}; the last of its {len(grades)} replies "
            f"({grades[-1].status}): {grades[-1].text!r}"
        )
    scores = [score for _, score in judged]
    mean, error = statistics.mean_and_error(scores, [row.question for row, _ in judged])
    counts = Counter(grade.status for grade in grades)

    def means(labels: list[Any]) -> dict[str, float]:
        by: dict[str, list[float]] = defaultdict(list)
        for label, score in zip(labels, scores):
            by[str(label)].append(score)
        return {label: sum(those) / len(those) for label, those in sorted(by.items())}

    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "total": len(judged),
        "exp_name": file.name,
        "judge": args.judge,
        "protocol": args.protocol,
        "candidate": {"name": name, "lengths": [len(one.responses[0].split()) for one in shown]},
        "score": mean,
        "score_low": None if math.isnan(error) else mean - statistics.Z * error,
        "score_high": None if math.isnan(error) else mean + statistics.Z * error,
        "turns": means([row.turn for row, _ in judged]),
        "categories": means([row.category for row, _ in judged]) if any(row.category for row in rows) else {},
        "with_reference": sum(bool(row.reference) for row, _ in judged),
        **{status: counts[status] for status in ("malformed", "refused", "failed")},
        "skipped": len(file.rows) - len(rows),
    }


# --------------------------------------------------------------------------------------------------------------- tables


def percent(result: dict[str, Any], name: str) -> str:
    value, low, high = (result[f"{name}{end}"] for end in ("", "_low", "_high"))
    return "-" if value is None else f"{value:.1%} ({low:.1%} to {high:.1%})"


def show_pairs(results: list[dict[str, Any]], board: list[dict[str, Any]]) -> None:
    """Print the figures as tables."""
    for result in results:
        by = "recorded" if result["judge"] == "recorded" else f"by {result['judge']}"
        title = f"{result['total']} verdicts on {result['prompts']} prompts, {by}"
        table = Table(Column(overflow="fold"), "wins", "mean words", "mean characters", title=escape(title))
        for side in (result["candidate"], result["baseline"]):
            words = f"{np.mean(side['lengths']):.1f}"
            table.add_row(escape(side["name"]), str(side["wins"]), words, f"{side['characters']:.0f}")
        table.add_row("ties", str(result["ties"]), "", "")
        console.print(table)
        name = result["candidate"]["name"]
        low, high, p = (result[key] for key in ("win_rate_low", "win_rate_high", "sign_test_p"))
        console.print(
            f"{name} wins {result['win_rate']:.1%} (95 % interval {low:.1%} to {high:.1%}), ties half; "
            f"sign test p = {p:.2g}",
            markup=False,
        )
        if result["length_controlled_win_rate"] is not None:
            rate = percent(result, "length_controlled_win_rate")
            console.print(f"at equal lengths {rate}, by a regression on this comparison alone", markup=False)
        if result["first_shown"] is not None:
            agree = result["orders_agree"]
            text = f"; both orders agree on {agree:.1%} of the prompts" if agree is not None else ""
            console.print(f"the response shown first was preferred {result['first_shown']:.1%} of the time{text}")
        if "alpaca_eval" in result:
            values = ", ".join(f"{key} {value:.6g}" for key, value in result["alpaca_eval"].items())
            console.print(f"as on AlpacaEval's board: {values}")
        counts = ", ".join(f"{result[key]} {key}" for key in ("malformed", "refused", "failed", "skipped"))
        console.print(f"not in the total: {counts}")
    if board:
        against = f"win rate against {escape(board[0]['anchor'])}"
        table = Table(Column(overflow="fold"), "rating", "95 % interval", against, title="leaderboard")
        for place in board:
            span = f"{place['rating_low']:+.0f} to {place['rating_high']:+.0f}"
            table.add_row(escape(place["name"]), f"{place['rating']:+.0f}", span, f"{place['win_rate']:.1%}")
        console.print(table)


def grade_rows(results: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The figures of graded answers: for each its name, and a text for each of the results."""

    def mean(part: float | None) -> str:
        return "-" if part is None else f"{part:.2f}"

    bounds = [[mean(result[f"score_{end}"]) for end in ("low", "high")] for result in results]
    parts = [
        (f"{title}{part}", [mean(result[kind].get(part)) for result in results])
        for kind, title in (("turns", "turn "), ("categories", ""))
        for part in sorted({part for result in results for part in result[kind]})
    ]
    return [
        ("score, 1 to 10", [mean(result["score"]) for result in results]),
        ("95 % interval", [" to ".join(pair) for pair in bounds]),
        *parts,
        ("mean words", [f"{np.mean(result['candidate']['lengths']):.1f}" for result in results]),
    ]


def show_grades(results: list[dict[str, Any]]) -> None:
    """Print the scores as a table with a column for each set of answers."""
    names = [Column(escape(result["candidate"]["name"]), overflow="fold") for result in results]
    table = Table("", *names, title=f"grades by {escape(results[0]['judge'])}")
    for name, values in grade_rows(results):
        table.add_row(escape(name), *values)
    console.print(table)
    for result in results:
        counts = ", ".join(f"{result[key]} {key}" for key in ("malformed", "refused", "failed", "skipped"))
        console.print(
            f"{result['candidate']['name']}: {result['total']} answers graded, {result['with_reference']} of them "
            f"beside a reference answer; not in the mean: {counts}",
            markup=False,
        )
