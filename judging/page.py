"""An HTML page of results and verdicts: one file that loads nothing from anywhere."""

from datetime import datetime
from html import escape
from typing import Any

from judging.answers import Comparison
from judging.judge import Verdict
from judging.protocols import JudgeInput, JudgeOutput
from judging.tables import NOT_COUNTED, grade_table_rows
from utils import html_page


def verdict_page(
    results: list[dict[str, Any]],
    comparisons: list[Comparison],
    verdicts: list[list[Verdict]],
    leaderboard: list[dict[str, Any]],
) -> str:
    """The HTML page of comparisons. `results`: lines of the results file. `leaderboard`: its rows, [] without one."""
    data = [comparison_data(result, one, group) for result, one, group in zip(results, comparisons, verdicts)]
    summary = f"{results_table(results)}{win_rate_chart(results)}{leaderboard_table(leaderboard)}"
    return render_page(results, "comparisons", summary, data)


def grades_page(
    results: list[dict[str, Any]], judge_inputs: list[list[JudgeInput]], grades: list[list[JudgeOutput]]
) -> str:
    """The HTML page of single answers' grades. For each line of `results`: the judge's inputs and its outputs."""
    data = [
        {
            "name": result["candidate"]["name"],
            "candidate": result["candidate"]["name"],
            "items": [graded_answer_data(judge_input, grade) for judge_input, grade in zip(inputs, outputs)],
        }
        for result, inputs, outputs in zip(results, judge_inputs, grades)
    ]
    heads = "".join(f"<th>{escape(result['candidate']['name'])}</th>" for result in results)
    rows = "".join(
        f"<tr><td>{escape(label)}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        for label, values in grade_table_rows(results)
    )
    summary = f'<div class="scroll"><table class="narrow"><tr><th></th>{heads}</tr>{rows}</table></div>'
    return render_page(results, "sets of answers", summary, data)


def render_page(results: list[dict[str, Any]], plural: str, summary: str, data: list[dict[str, Any]]) -> str:
    """The whole page. `plural`: a word for several entries of `data`. `summary`: HTML. `data`: the page's list."""
    title = data[0]["name"] if len(data) == 1 else f"{len(data)} {plural}"
    judge, protocol, date = (results[0][key] for key in ("judge", "protocol", "date"))
    by = "verdicts as the files record them" if judge == "recorded" else f"judged by {judge}, protocol {protocol}"
    subtitle = f"{by}, {datetime.fromisoformat(date):%Y-%m-%d %H:%M}"
    places = {"title": escape(title), "subtitle": escape(subtitle), "figures": summary}
    return html_page("judging/page.html", places, data)


def comparison_data(result: dict[str, Any], comparison: Comparison, verdicts: list[Verdict]) -> dict[str, Any]:
    """The page's data on a comparison: its items, each with its verdicts."""
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


def graded_answer_data(judge_input: JudgeInput, grade: JudgeOutput) -> dict[str, Any]:
    """The page's data on a single answer. Its grade takes the place of a pair's outcome."""
    outcome = grade.status if grade.value is None else f"grade {grade.value:g}"
    verdict = {"outcome": outcome, "preference": None, "weight": 1, "first": None, "text": grade.text}
    (response,) = judge_input.responses
    return {
        "messages": judge_input.messages,
        "reference": judge_input.reference,
        "candidate": response,
        "verdicts": [verdict],
    }


def rate_cell(result: dict[str, Any], name: str) -> str:
    value, low, high = (result[f"{name}{end}"] for end in ("", "_low", "_high"))
    return "–" if value is None else f"{value:.1%} <span class=dim>{low:.1%} to {high:.1%}</span>"


def percent_cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def results_table(results: list[dict[str, Any]]) -> str:
    head = (
        "candidate", "baseline", "win rate, 95 % interval", "at equal lengths", "wins / ties / losses", "sign test p",
        "mean words", "first shown preferred", "orders agree", "not counted",
    )  # fmt: skip
    rows = []
    for result in results:
        one, two = result["candidate"], result["baseline"]
        words = " / ".join(f"{sum(side['lengths']) / len(side['lengths']):.0f}" for side in (one, two))
        not_counted = ", ".join(f"{result[key]} {key}" for key in (*NOT_COUNTED, "skipped") if result[key])
        cells = (
            f"<b>{escape(one['name'])}</b>",
            escape(two["name"]),
            rate_cell(result, "win_rate"),
            rate_cell(result, "length_controlled_win_rate"),
            f"{one['wins']} / {result['ties']} / {two['wins']} <span class=dim>{result['total']} verdicts</span>"
            f"<span class=dim>{result['prompts']} prompts</span>",
            f"{result['sign_test_p']:.2g}",
            words,
            percent_cell(result["first_shown"]),
            percent_cell(result["orders_agree"]),
            not_counted or "none",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def win_rate_chart(results: list[dict[str, Any]]) -> str:
    """An SVG of the win rates and their intervals."""
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


def leaderboard_table(leaderboard: list[dict[str, Any]]) -> str:
    if not leaderboard:
        return ""
    rows = "".join(
        f"<tr><td>{place}</td><td><b>{escape(one['name'])}</b></td><td>{one['rating']:+.0f} "
        f"<span class=dim>{one['rating_low']:+.0f} to {one['rating_high']:+.0f}</span></td>"
        f"<td>{one['win_rate']:.1%}</td></tr>"
        for place, one in enumerate(leaderboard, 1)
    )
    anchor = escape(leaderboard[0]["anchor"])
    head = f"<th></th><th>model</th><th>rating, 95 % interval</th><th>win rate against {anchor}</th>"
    return f'<h2>Leaderboard</h2><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
