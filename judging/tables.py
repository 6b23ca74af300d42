"""The results of comparisons and grades: the lines of a results file, and tables on the terminal."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import numpy as np
from rich.table import Column, Table

from judging import alpaca_eval_official, statistics
from judging.answers import AnswerSet, Comparison
from judging.judge import Item, Verdict
from judging.protocols import JudgeOutput
from utils import UserError, console

# Outcomes that count neither as a win nor in the total.
NOT_COUNTED: tuple[Literal["malformed", "refused", "failed"], ...] = ("malformed", "refused", "failed")


def comparison_results(
    comparison: Comparison, verdicts: list[Verdict], *, judge: str, protocol: str, seed: int
) -> dict[str, Any]:
    """A comparison's line of the results file. Raises UserError if the judge gave no verdict at all."""
    judged = judged_verdicts(comparison, verdicts, judge)
    items = [comparison.items[index] for index in dict.fromkeys(verdict.item for verdict in judged)]
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    return {
        "date": timestamp(),
        "total": len(judged),
        "prompts": len({comparison.questions[verdict.item] for verdict in judged}),
        "seed": seed,
        "exp_name": comparison.exp_name,
        "judge": judge,
        "protocol": protocol,
        "candidate": side_results(comparison.candidate, outcomes["win"], [item.candidate for item in items]),
        "baseline": side_results(comparison.baseline, outcomes["loss"], [item.baseline for item in items]),
        "ties": outcomes["tie"],
        **{outcome: outcomes[outcome] for outcome in NOT_COUNTED},
        "skipped": comparison.skipped,
        **win_rates(comparison, judged),
        **order_bias(judged),
    }


def judged_verdicts(comparison: Comparison, verdicts: list[Verdict], judge: str) -> list[Verdict]:
    """The verdicts that state a preference. Raises UserError if there are none."""
    judged = [verdict for verdict in verdicts if verdict.preference is not None]
    if not judged:
        raise UserError(
            f"judge {judge!r} gave no verdict on {comparison.candidate} against {comparison.baseline}; the last "
            f"of its {len(verdicts)} replies ({verdicts[-1].status}): {verdicts[-1].text!r}"
        )
    return judged


def side_results(name: str, wins: int, texts: list[str]) -> dict[str, Any]:
    """One model of a comparison: its wins, the lengths of its answers in words, and their mean length in characters."""
    return {
        "name": name,
        "wins": wins,
        "lengths": [len(text.split()) for text in texts],
        "characters": float(np.mean([len(text) for text in texts])),
    }


def win_rates(comparison: Comparison, judged: Sequence[Verdict]) -> dict[str, float | None]:
    """The win rate, the sign test, and the win rate at equal lengths; the latter is None without texts."""
    items = [comparison.items[verdict.item] for verdict in judged]
    preferences = [verdict.preference for verdict in judged if verdict.preference is not None]
    prompts = [comparison.questions[verdict.item] for verdict in judged]
    weights = [verdict.weight for verdict in judged]
    longer_by = [len(item.candidate) - len(item.baseline) for item in items]
    at_equal_lengths = (
        statistics.length_controlled(preferences, longer_by, prompts, weights) if have_texts(items) else None
    )
    return {
        **interval_fields("win_rate", statistics.win_rate(preferences, prompts, weights)),
        "sign_test_p": statistics.sign_test(preferences, prompts),
        **interval_fields("length_controlled_win_rate", at_equal_lengths),
    }


def have_texts(items: Sequence[Item]) -> bool:
    """Whether the answers are known: some recorded verdicts come without them."""
    return any(item.candidate or item.baseline for item in items)


def interval_fields(name: str, value: statistics.Interval | None) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), value or (None, None, None)))


def order_bias(judged: Sequence[Verdict]) -> dict[str, float | None]:
    """How much the order of the two responses matters to the judge.

    `first_shown`: the mean preference for the first response, 0.5 for an unbiased judge; None if an order is unknown.
    `orders_agree`: the share of equal outcomes among items judged in both orders; None without such items.
    """
    for_first = [v.preference if v.candidate_first else 1 - v.preference for v in judged if v.preference is not None]
    known = all(verdict.candidate_first is not None for verdict in judged)
    outcomes: dict[int, list[str]] = defaultdict(list)
    for verdict in judged:
        outcomes[verdict.item].append(verdict.outcome)
    pairs = [pair for pair in outcomes.values() if len(pair) == 2]
    return {
        "first_shown": sum(for_first) / len(for_first) if known else None,
        "orders_agree": sum(one == two for one, two in pairs) / len(pairs) if pairs else None,
    }


def alpaca_eval_results(comparison: Comparison, verdicts: list[Verdict], official_lc: bool) -> dict[str, Any]:
    """`alpaca_eval`: the comparison's row of AlpacaEval's leaderboard. {} if the judged answers have no texts.

    `official_lc`: add the package's length-controlled win rate. Raises UserError if the package cannot compute it.
    """
    preferences = mean_preferences(verdicts)
    if not have_texts([comparison.items[index] for index in preferences]):
        return {}
    outputs = [item.candidate for item in comparison.items]  # avg_length covers all answers, judged or not
    row = statistics.alpaca_eval_row(list(preferences.values()), outputs)
    if official_lc:
        row |= alpaca_eval_official.official_length_controlled(comparison, preferences)
    return {"alpaca_eval": row}


def mean_preferences(verdicts: Sequence[Verdict]) -> dict[int, float]:
    """The mean preference of each judged item's verdicts, by the item's index."""
    values: dict[int, list[float]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.preference is not None:
            values[verdict.item].append(verdict.preference)
    return {index: sum(group) / len(group) for index, group in values.items()}


def leaderboard_rows(comparisons: list[Comparison], verdicts: list[list[Verdict]]) -> tuple[list[dict[str, Any]], str]:
    """The leaderboard of several comparisons, best model first. The anchor is the model that was compared most often.

    If the models cannot be ranked together, the leaderboard is [], and the text beside it says why.
    """
    games = [
        statistics.Game(
            comparison.candidate,
            comparison.baseline,
            verdict.preference,
            comparison.questions[verdict.item],
            verdict.weight,
        )
        for comparison, group in zip(comparisons, verdicts)
        for verdict in group
        if verdict.preference is not None
    ]
    names = Counter(name for comparison in comparisons for name in (comparison.baseline, comparison.candidate))
    ((anchor, _),) = names.most_common(1)
    try:
        standings = statistics.leaderboard(games, anchor)
    except ValueError as error:
        return [], str(error)
    rows = [
        {
            "name": standing.name,
            **interval_fields("rating", standing.rating),
            "win_rate": standing.win_rate,
            "anchor": anchor,
        }
        for standing in standings
    ]
    return rows, ""


def grade_results(graded: AnswerSet, grades: list[JudgeOutput], *, judge: str, protocol: str) -> dict[str, Any]:
    """A line of the results file for graded answers: mean scores over all, per turn and per category.

    The interval treats questions as clusters. Raises UserError if the judge gave no score at all.
    """
    judged = [(row, grade.value) for row, grade in zip(graded.rows, grades) if grade.value is not None]
    if not judged:
        raise UserError(
            f"judge {judge!r} gave no score to {graded.name}; the last of its {len(grades)} replies "
            f"({grades[-1].status}): {grades[-1].text!r}"
        )
    rows, scores = [row for row, _ in judged], [score for _, score in judged]
    mean, error = statistics.mean_and_error(scores, [row.question for row in rows])
    statuses = Counter(grade.status for grade in grades)
    answers = [judge_input.responses[0] for judge_input in graded.judge_inputs()]
    with_categories = any(row.category for row in graded.rows)
    return {
        "date": timestamp(),
        "total": len(judged),
        "exp_name": graded.file.name,
        "judge": judge,
        "protocol": protocol,
        "candidate": {"name": graded.name, "lengths": [len(answer.split()) for answer in answers]},
        "score": mean,
        "score_low": None if math.isnan(error) else mean - statistics.Z_95 * error,
        "score_high": None if math.isnan(error) else mean + statistics.Z_95 * error,
        "turns": group_means([row.turn for row in rows], scores),
        "categories": group_means([row.category for row in rows], scores) if with_categories else {},
        "with_reference": sum(bool(row.reference) for row in rows),
        **{status: statuses[status] for status in NOT_COUNTED},
        "skipped": len(graded.file.rows) - len(graded.rows),
    }


def group_means(labels: Sequence[Any], scores: Sequence[float]) -> dict[str, float]:
    """The mean score of each label, sorted by label."""
    groups: dict[str, list[float]] = defaultdict(list)
    for label, score in zip(labels, scores):
        groups[str(label)].append(score)
    return {label: sum(group) / len(group) for label, group in sorted(groups.items())}


def timestamp() -> str:
    """The local time in ISO format, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


# --------------------------------------------------------------------------------------------------------------- tables


def percent_with_interval(result: dict[str, Any], name: str) -> str:
    value, low, high = (result[f"{name}{end}"] for end in ("", "_low", "_high"))
    return "-" if value is None else f"{value:.1%} ({low:.1%} to {high:.1%})"


def counts_left_out(result: dict[str, Any]) -> str:
    return ", ".join(f"{result[key]} {key}" for key in (*NOT_COUNTED, "skipped"))


def print_comparisons(results: list[dict[str, Any]], leaderboard: list[dict[str, Any]]) -> None:
    """Print the results of comparisons as tables."""
    for result in results:
        print_wins(result)
        print_rates(result)
    if leaderboard:
        print_leaderboard(leaderboard)


def print_wins(result: dict[str, Any]) -> None:
    by = "recorded" if result["judge"] == "recorded" else f"by {result['judge']}"
    title = f"{result['total']} verdicts on {result['prompts']} prompts, {by}"
    table = Table(Column(overflow="fold"), "wins", "mean words", "mean characters", title=title)
    for side in (result["candidate"], result["baseline"]):
        words = f"{np.mean(side['lengths']):.1f}"
        table.add_row(side["name"], str(side["wins"]), words, f"{side['characters']:.0f}")
    table.add_row("ties", str(result["ties"]), "", "")
    console.print(table)


def print_rates(result: dict[str, Any]) -> None:
    name = result["candidate"]["name"]
    low, high, p = (result[key] for key in ("win_rate_low", "win_rate_high", "sign_test_p"))
    console.print(
        f"{name} wins {result['win_rate']:.1%} (95 % interval {low:.1%} to {high:.1%}); a tie counts half; "
        f"sign test p = {p:.2g}"
    )
    if result["length_controlled_win_rate"] is not None:
        rate = percent_with_interval(result, "length_controlled_win_rate")
        console.print(f"at equal lengths {rate}, by a regression on this comparison alone")
    if result["first_shown"] is not None:
        agree = result["orders_agree"]
        text = f"; both orders agree on {agree:.1%} of the prompts" if agree is not None else ""
        console.print(f"the judge preferred the first response {result['first_shown']:.1%} of the time{text}")
    if "alpaca_eval" in result:
        values = ", ".join(f"{key} {value:.6g}" for key, value in result["alpaca_eval"].items())
        console.print(f"as on AlpacaEval's leaderboard: {values}")
    console.print(f"not in the total: {counts_left_out(result)}")


def print_leaderboard(leaderboard: list[dict[str, Any]]) -> None:
    against = f"win rate against {leaderboard[0]['anchor']}"
    table = Table(Column(overflow="fold"), "rating", "95 % interval", against, title="leaderboard")
    for row in leaderboard:
        interval = f"{row['rating_low']:+.0f} to {row['rating_high']:+.0f}"
        table.add_row(row["name"], f"{row['rating']:+.0f}", interval, f"{row['win_rate']:.1%}")
    console.print(table)


def grade_table_rows(results: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The rows of a table of grades: a label, and a text for each of the results."""

    def two_digits(score: float | None) -> str:
        return "-" if score is None else f"{score:.2f}"

    bounds = [[two_digits(result[f"score_{end}"]) for end in ("low", "high")] for result in results]
    parts = [
        (f"{title}{part}", [two_digits(result[kind].get(part)) for result in results])
        for kind, title in (("turns", "turn "), ("categories", ""))
        for part in sorted({part for result in results for part in result[kind]})
    ]
    return [
        ("score, 1 to 10", [two_digits(result["score"]) for result in results]),
        ("95 % interval", [" to ".join(pair) for pair in bounds]),
        *parts,
        ("mean words", [f"{np.mean(result['candidate']['lengths']):.1f}" for result in results]),
    ]


def print_grades(results: list[dict[str, Any]]) -> None:
    """Print the scores as a table with a column for each set of answers."""
    names = [Column(result["candidate"]["name"], overflow="fold") for result in results]
    table = Table("", *names, title=f"grades by {results[0]['judge']}")
    for label, values in grade_table_rows(results):
        table.add_row(label, *values)
    console.print(table)
    for result in results:
        console.print(
            f"{result['candidate']['name']}: {result['total']} answers graded, {result['with_reference']} of them "
            f"with a reference answer; not in the mean: {counts_left_out(result)}"
        )
