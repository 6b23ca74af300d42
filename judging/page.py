"""A page of figures and verdicts to read in a browser. One file; nothing is fetched from anywhere."""

from datetime import datetime
from html import escape
from typing import Any

from judging.answers import Comparison
from judging.judge import Verdict
from judging.protocols import Answer, Shown
from judging.tables import grade_rows
from utils import html_page


def verdict_page(
    results: list[dict[str, Any]],
    comparisons: list[Comparison],
    verdicts: list[list[Verdict]],
    board: list[dict[str, Any]],
) -> str:
    """The page's HTML: `results` are the lines of the results file, `board` the leaderboard, [] without one."""
    data = [listed(result, one, those) for result, one, those in zip(results, comparisons, verdicts)]
    return framed(results, "comparisons", f"{figures_table(results)}{bars(results)}{board_table(board)}", data)


def grades_page(results: list[dict[str, Any]], shown: list[list[Shown]], grades: list[list[Answer]]) -> str:
    """The page of single answers' grades: of each line of `results`, what was shown and what the judge said to it."""
    data = [
        {
            "name": result["candidate"]["name"],
            "candidate": result["candidate"]["name"],
            "items": [graded(one, grade) for one, grade in zip(these, those)],
        }
        for result, these, those in zip(results, shown, grades)
    ]
    heads = "".join(f"<th>{escape(result['candidate']['name'])}</th>" for result in results)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        for name, values in grade_rows(results)
    )
    figures = f'<div class="scroll"><table class="narrow"><tr><th></th>{heads}</tr>{rows}</table></div>'
    return framed(results, "sets of answers", figures, data)


def framed(results: list[dict[str, Any]], several: str, figures: str, data: list[dict[str, Any]]) -> str:
    """The whole page: HTML of figures, and what the reader lists."""
    title = data[0]["name"] if len(data) == 1 else f"{len(data)} {several}"
    judge, protocol, date = (results[0][key] for key in ("judge", "protocol", "date"))
    by = "verdicts as the files record them" if judge == "recorded" else f"judged by {judge}, protocol {protocol}"
    subtitle = f"{by}, {datetime.fromisoformat(date):%Y-%m-%d %H:%M}"
    places = {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "figures": figures,
    }
    return html_page("judging/page.html", places, data)


def listed(result: dict[str, Any], comparison: Comparison, verdicts: list[Verdict]) -> dict[str, Any]:
    """What the reader shows of a comparison: its items, each with its verdicts."""
    items: list[dict[str, Any]] = [
        {"messages": item.messages, "candidate": item.candidate, "baseline": item.baseline, "verdicts": []}
        for item in comparison.items
    ]
    for verdict in verdicts:
        items[verdict.item]["verdicts"].append(
            {
                "outcome": verdict.outcome,
                "preference": verdict.preference,
                "weight": verdict.weight,
                "first": verdict.candidate_first,
                "text": verdict.text,
            }
        )
    one, two = (result[side]["name"] for side in ("candidate", "baseline"))
    return {"name": f"{one} against {two}", "candidate": one, "baseline": two, "items": items}


def graded(shown: Shown, grade: Answer) -> dict[str, Any]:
    """A single answer, whose grade stands where a pair's outcome does."""
    outcome = grade.status if grade.value is None else f"grade {grade.value:g}"
    verdict = {"outcome": outcome, "preference": None, "weight": 1, "first": None, "text": grade.text}
    (response,) = shown.responses
    return {"messages": shown.messages, "reference": shown.reference, "candidate": response, "verdicts": [verdict]}


def rate(result: dict[str, Any], name: str) -> str:
    value, low, high = (result[f"{name}{end}"] for end in ("", "_low", "_high"))
    return "–" if value is None else f"{value:.1%} <span class=dim>{low:.1%} to {high:.1%}</span>"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def figures_table(results: list[dict[str, Any]]) -> str:
    head = (
        "candidate", "baseline", "win rate, 95 % interval", "at equal lengths", "wins / ties / losses", "sign test p",
        "mean words", "first shown preferred", "orders agree", "not counted",
    )  # fmt: skip
    rows = []
    for result in results:
        one, two = result["candidate"], result["baseline"]
        words = " / ".join(f"{sum(side['lengths']) / len(side['lengths']):.0f}" for side in (one, two))
        left = ", ".join(f"{result[key]} {key}" for key in ("malformed", "refused", "failed", "skipped") if result[key])
        cells = (
            f"<b>{escape(one['name'])}</b>",
            escape(two["name"]),
            rate(result, "win_rate"),
            rate(result, "length_controlled_win_rate"),
            f"{one['wins']} / {result['ties']} / {two['wins']} <span class=dim>{result['total']} verdicts</span>"
            f"<span class=dim>{result['prompts']} prompts</span>",
            f"{result['sign_test_p']:.2g}",
            words,
            share(result["first_shown"]),
            share(result["orders_agree"]),
            left or "none",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def bars(results: list[dict[str, Any]]) -> str:
    """Win rates with their intervals, drawn on a line from 0 to 1."""
    rows, one_baseline = [], len({result["baseline"]["name"] for result in results}) == 1
    for number, result in enumerate(results):
        y = 26 * number + 18
        for name, colour, shift in (("win_rate", "var(--win)", 0), ("length_controlled_win_rate", "var(--dim)", 8)):
            value, low, high = (result[f"{name}{end}"] for end in ("", "_low", "_high"))
            if value is not None:
                x1, x2, x = (350 + 420 * one for one in (low, high, value))
                rows.append(
                    f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y + shift}" y2="{y + shift}" stroke="{colour}" '
                    f'stroke-width="2"/><circle cx="{x:.1f}" cy="{y + shift}" r="4" fill="{colour}"/>'
                )
        one, two = result["candidate"]["name"], result["baseline"]["name"]
        label = one if one_baseline else f"{one} against {two}"
        label = label if len(label) <= 50 else f"{label[:49]}…"
        rows.append(f'<text x="335" y="{y + 8}" text-anchor="end">{escape(label)}</text>')
    height = 26 * len(results) + 34
    ticks = "".join(
        f'<line x1="{x}" x2="{x}" y1="6" y2="{height - 22}"/>'
        f'<text x="{x}" y="{height - 6}" text-anchor="middle">{at} %</text>'
        for at, x in ((at, 350 + 4.2 * at) for at in (0, 25, 50, 75, 100))
    )
    drawing = f'<g class="grid">{ticks}</g>{"".join(rows)}'
    legend = '<b class="dot w"></b> win rate <b class="dot d"></b> at equal lengths (fitted on this comparison alone)'
    return (
        f'<div class="scroll"><svg viewBox="0 0 790 {height}" role="img" aria-label="win rates">{drawing}</svg></div>'
        f'<p class="dim">{legend}</p>'
    )


def board_table(board: list[dict[str, Any]]) -> str:
    if not board:
        return ""
    rows = "".join(
        f"<tr><td>{place}</td><td><b>{escape(one['name'])}</b></td><td>{one['rating']:+.0f} "
        f"<span class=dim>{one['rating_low']:+.0f} to {one['rating_high']:+.0f}</span></td>"
        f"<td>{one['win_rate']:.1%}</td></tr>"
        for place, one in enumerate(board, 1)
    )
    head = (
        f"<th></th><th>model</th><th>rating, 95 % interval</th><th>win rate against {escape(board[0]['anchor'])}</th>"
    )
    return f'<h2>Leaderboard</h2><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
