"""The run page: `<run>/report.html`, made from the files in the run directory alone. It fetches nothing.

`python -m launch.report outputs/my_run` writes it again: for an old run, or when there are new pages to link to.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Sequence
from html import escape
from math import ceil, isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape as escape_markup
from rich.table import Table

from launch.settings import read_saved
from modeling.weights import formats_in
from training.metrics import MetricName, clock
from utils import (
    REPO,
    SIDES,
    UserError,
    console,
    flat,
    html_page,
    json_lines,
    without_seal,
    write_text,
    written,
)

SUMMARY = "summary.json"
CURVE_POINTS = 500  # of a curve, at most
FIGURE_NAMES = {  # of summary.json, in order; a run has those that apply to it
    "loss_before": "held-out loss before",
    "loss_after": "held-out loss after",
    "accuracy_before": "preference accuracy before",
    "accuracy_after": "preference accuracy after",
    "reward_accuracy_before": "reward accuracy before",
    "reward_accuracy_after": "reward accuracy after",
    "toy_score_before": "toy score before",
    "toy_score_after": "toy score after",
    "win_rate": "win rate against the start",
    "feature_drift": "feature drift",
    "l0": "L0, active latents a token",
    "fvu": "FVU, attention sinks apart",
    "ce_recovered": "cross-entropy recovered, share",
    "dead": "dead latents, share",
    "left_out": "tokens left out, share",
    "kl": "KL to the reference, nats a completion",
    "seconds": "seconds",
    "peak_rss_mb": "peak memory, MB",
}
SAE_FIGURES = ("l0", "fvu", "ce_recovered", "dead", "left_out")  # of loss=sae; of several layers `layer_<n>/l0`, ...
# Titles and notes of the charts, in their order on the page. A metric that is not here has a chart too, under its own
# name: first those that belong to data, then the rest.
CHARTS = {
    "loss": ("Loss", ""),
    "rewards/accuracies": ("Reward accuracy", "share of pairs whose chosen completion has the higher reward"),
    "rewards/margins": ("Reward margin", "reward of the chosen completion less that of the rejected one"),
    "rewards": ("Rewards", ""),
    "logps/accuracies": ("Preference accuracy", "share of pairs whose chosen completion is likelier per token"),
    "logps": ("Log-probability", "nats a completion"),
    "feature_drift": ("Feature drift", "from the reference"),
    "kl": ("KL to the reference", "nats a completion"),
    "reconstruction_error": ("Error of the reward head's SAE", "share of the square of the vectors that it reads"),
    "mismatched_logps": ("Log-probability of mismatched completions", "nats a token"),
    "value_loss": ("Value loss", "half the squared error of the value head"),
    "sae/l0": ("L0", "active latents a token"),
    "sae/fvu": ("FVU", "squared error over the variance"),
    "sae/dead": ("Dead latents", "share of all latents"),
    "sae/ce_recovered": ("Cross-entropy recovered", "share of what zeroing the layer costs"),
    "sae/left_out": ("Tokens left out", "share of the text tokens: attention sinks, first tokens without BOS"),
    "sae/ce": ("Cross-entropy", "nats a token: the layer as it is, reconstructed, zeroed"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "lr": ("Learning rate", ""),
    "tokens_per_second": ("Tokens a second", ""),
    "examples_per_second": ("Examples a second", ""),
    "peak_memory_gb": ("Peak memory", "GB, of the fullest rank"),
    "mfu": ("MFU", "share of the GPUs' arithmetic"),
}
SHARES = ("accuracies", "dead", "ce_recovered", "left_out", "mfu")  # shown from 0 to 100 %
CURVES_TOGETHER = {"chosen": "", "rejected": "", "ce_clean": "ce", "ce_sae": "ce", "ce_zero": "ce"}  # in one chart
UNDRAWN = ("step", "examples", "seconds")
OUTCOME = ("loss", "logps/accuracies", "rewards/accuracies", "sae/fvu")  # the first sentence has those that are there
LINKED = {"features/report.html": "what training did to the features"}
LINKED_FILES = ("metrics.jsonl", "config.yaml", "summary.json", "completions.json", "eval.json")

Lines = list[dict[str, Any]]
Columns = dict[str, list[tuple[int, float]]]  # the (step, value) of each metric


class RunPage:
    """Writes the page again while the run goes on. This takes at most a twentieth of the run's time: the page of
    100,000 steps takes seconds to write, so not every evaluation writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.due = folder, 0.0

    def update(self) -> None:
        began = time.monotonic()
        if began >= self.due:
            write_run_page(self.folder)
            self.due = time.monotonic() + 20 * (time.monotonic() - began)


def write_run_page(folder: Path) -> Path:
    """Write the page of a run, finished or not, and give its path. Raises UserError where there is no run."""
    try:
        lines = read_lines(folder / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"{folder}: no metrics.jsonl there, so no run to report on") from error
    page = folder / "report.html"
    write_text(page, run_page(folder, lines))
    return page


def show_summary(folder: Path, *, finished_before: bool = False) -> None:
    """Complete the page of a finished run, and print its figures and the names of the files that it wrote.

    Raises UserError where summary.json cannot be read.
    """
    figures = read_summary(folder)
    if figures is None:
        raise UserError(f"{folder / SUMMARY}: not what the run wrote; remove it, and the same command makes it again")
    page = write_run_page(folder)
    if finished_before:
        console.print(f"{folder} is finished; resume=never starts over and replaces it", markup=False)
    table = Table("figure", "value", title=escape_markup(folder.name))
    for last, name in FIGURE_NAMES.items():
        for key in (key for key in figures if key.rpartition("/")[2] == last):
            value = f"{figures[key]:.4g}"
            if key == "win_rate":
                value += f" (95 % interval {figures['win_rate_low']:.4g} to {figures['win_rate_high']:.4g})"
            layer = key.rpartition("/")[0].replace("_", " ")  # of several
            table.add_row(", ".join(filter(None, [name, layer])), value)
    console.print(table)
    saes = list((folder / "LATEST").glob("layer_*"))
    differences = list((folder / "LATEST").glob("difference/layer_*"))
    there = formats_in(folder / "LATEST")
    names = {"policy_pt": "policy.pt", "hub": "safetensors" if has_sae_head(folder / "LATEST") else "Hub format"}
    holds = "the SAEs" if saes or differences else " and ".join(name for key, name in names.items() if key in there)
    console.print(f"{folder}/: LATEST/ ({holds}), summary.json, metrics.jsonl, config.yaml", markup=False)
    if best := figures.get("best"):
        console.print(f"BEST/: {best['metric']} is best after step {best['step']:,}: {best['value']:.4g}", markup=False)
    if saes:
        one = " ++sae.layer=N" if len(saes) > 1 else ""
        console.print(f"loss=fpo on the same model reads it with ++sae.path={folder}{one}", markup=False)
    looked_at = "curves, completions and settings" if (folder / "completions.json").is_file() else "curves and settings"
    console.print(f"{looked_at}, to look at in a browser: {page}", markup=False)


def has_sae_head(export: Path) -> bool:
    """Whether an export is of a reward model with a head that transformers does not know."""
    config = json_of(export / "config.json")
    return isinstance(config, dict) and "sae_head" in config


def read_lines(path: Path) -> Lines:
    """The lines of a metrics.jsonl, without damaged ones, such as half a line of a killed run. What JSON lacks is
    NaN."""
    with path.open("rb") as file:
        lines = [line for _, line in json_lines(file) if isinstance(line, dict)]
    return [{name: nan if value is None else value for name, value in line.items()} for line in lines]


def run_page(folder: Path, lines: Lines) -> str:
    """The page's HTML."""
    config, settings = settings_of(folder)
    summary = read_summary(folder) or {}
    columns = columns_of(lines)
    charts = charts_of(columns)
    last = lines[-1] if lines else {"step": 0, "examples": 0}
    places = {
        "title": escape(str(OmegaConf.select(config, "exp_name") or folder.absolute().name)),
        "outcome": escape(outcome(charts)),
        "subtitle": escape(subtitle(config, last, summary)),
        "links": links(folder),
        "tables": evaluations_table(charts) + facts_table(lines, summary),
        "completions": completions(json_of(folder / "completions.json")),
        "settings": settings,
    }
    data = {
        "steps": last["step"],
        "bin": max((ceil(count / CURVE_POINTS) for count in map(len, columns.values())), default=1),
        "learning": [chart for chart in charts.values() if chart["of_data"]],
        "machine": [chart for chart in charts.values() if not chart["of_data"]],
    }
    return html_page("launch/report.html", places, data)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The figures that a run ended with; None where there are none, or not those that it wrote."""
    figures = json_of(folder / SUMMARY)
    return without_seal(figures) if isinstance(figures, dict) else None


def json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def settings_of(folder: Path) -> tuple[DictConfig, str]:
    """The run's saved configuration and the page's table of it; empty where there is none."""
    file = folder / "config.yaml"
    return read_settings(file, file.read_bytes()) if file.is_file() else (OmegaConf.create(), "")


@functools.lru_cache(maxsize=1)  # a run writes its page at each evaluation
def read_settings(file: Path, content: bytes) -> tuple[DictConfig, str]:  # noqa: ARG001
    config = read_saved(file)
    return config, settings_table(config)


# ---------------------------------------------------------------------------------------------------- the curves


def columns_of(lines: Lines) -> Columns:
    """The values of each metric. NaN and infinity are left out: JSON has neither."""
    found: Columns = {}
    for line in lines:
        for name, value in line.items():
            if name not in UNDRAWN and isinstance(value, (int, float)) and isfinite(value):
                found.setdefault(name, []).append((line["step"], value))
    return found


def charts_of(columns: Columns) -> dict[str, dict[str, Any]]:
    """The charts of a run by their keys in `CHARTS`, in order, each with all curves that belong together."""
    found: dict[str, dict[str, Any]] = {}
    for name, points in columns.items():
        group, split, parts = MetricName.of(name)
        *layers, last = parts or [""]
        key = "/".join(filter(None, [group, CURVES_TOGETHER.get(last, last)]))
        title, note = CHARTS.get(key, (key, ""))
        empty = {
            "title": title,
            "note": note,
            "share": key.endswith(SHARES),
            "of_data": split is not None,
            "series": [],
        }
        curve = " ".join([*layers, last.removeprefix("ce_")] if last in CURVES_TOGETHER else layers)
        series = {"name": curve, "split": split or "train", "points": thinned(points)}
        found.setdefault(key, empty)["series"].append(series)
    for chart in found.values():
        chart["series"].sort(key=lambda series: (series["split"] == "eval", side_order(series["name"])))
    known = list(CHARTS)
    return dict(sorted(found.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known)))


def side_order(name: str) -> int:
    return SIDES.index(name) if name in SIDES else 0


def thinned(points: Sequence[tuple[int, float]]) -> list[list[float]]:
    """At most `CURVE_POINTS` points: [step, value], or [last step, mean, lowest, highest] of several values."""
    size = ceil(len(points) / CURVE_POINTS)
    if size == 1:
        return [[step, rounded(value)] for step, value in points]
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    found = []
    for own in bins:
        values = [value for _, value in own]
        found.append([own[-1][0], *map(rounded, (fmean(values), min(values), max(values)))])
    return found


def rounded(value: float) -> float:
    """Six significant digits: more than the page shows, and a third of the bytes."""
    return float(f"{value:.6g}")


# ---------------------------------------------------------------------------------------------------- the figures


def held_out(chart: dict[str, Any]) -> list[tuple[str, list[list[float]]]]:
    """The curves of a chart on the held-out data: name and points."""
    return [(series["name"], series["points"]) for series in chart["series"] if series["split"] == "eval"]


def shown(chart: dict[str, Any], value: float) -> str:
    return f"{100 * value:.3g}\N{NO-BREAK SPACE}%" if chart["share"] else f"{value:.4g}"


def outcome(charts: dict[str, dict[str, Any]]) -> str:
    """The result of the run in a sentence. A start at 0 is left out: rewards are 0 before the first step, when their
    accuracy is not measured."""
    words = []
    start = min((points[0][0] for chart in charts.values() for _, points in held_out(chart)), default=0)
    for key in OUTCOME:
        for name, points in held_out(charts[key]) if key in charts else []:
            first, last = (shown(charts[key], points[n][1]) for n in (0, -1))
            title = charts[key]["title"]
            title = title[0].lower() + title[1:] if title[1].islower() else title
            from_start = points[0][0] == start and points[0][1]
            words.append(f"{title} {name} ".replace("  ", " ") + (f"{first} → {last}" if from_start else last))
    return f"On held-out data: {', '.join(words[:3])}." if words else "Not evaluated yet."


def subtitle(config: DictConfig, last: dict[str, Any], summary: dict[str, Any]) -> str:
    names = ("loss.name", "model.name", "datasets")
    loss, model, data = (OmegaConf.select(config, name) for name in names)
    what = f"{loss} on {model}, {', '.join(map(str, data or []))}. " if loss else ""
    done = f"{last['step']:,} steps, {last['examples']:,} examples"
    return what + (f"{done}, finished in {clock(summary['seconds'])}." if summary else f"So far {done}.")


def evaluations_table(charts: dict[str, dict[str, Any]]) -> str:
    """The first and the last evaluation."""
    rows, steps = [], sorted({p[0] for chart in charts.values() for _, points in held_out(chart) for p in points})
    if not steps:
        return ""
    ends = dict.fromkeys([steps[0], steps[-1]])
    for chart in charts.values():
        for name, points in held_out(chart):
            values = {point[0]: shown(chart, point[1]) for point in points}
            cells = "".join(f"<td>{values.get(step, '')}</td>" for step in ends)
            what = f"{chart['title']} {name}".strip()
            rows.append(f"<tr><td>{escape(what)}</td>{cells}</tr>")
    heads = "".join(f"<th>step {step:,}</th>" for step in ends)
    return boxed(f"<tr><th>held-out data</th>{heads}</tr>{''.join(rows)}")


def facts_table(lines: Lines, summary: dict[str, Any]) -> str:
    """Figures of the whole run, beside those of its evaluations."""
    paced = [line for line in lines if "tokens_per_second" in line and "seconds" in line]
    seconds = sum(line["seconds"] for line in paced)
    ends = [f"{name}_{end}" for name in ("loss", "accuracy", "reward_accuracy") for end in ("before", "after")]
    evaluated = (*ends, "feature_drift", *SAE_FIGURES)
    facts = {}
    for key, name in FIGURE_NAMES.items():
        if key in summary and key not in evaluated:
            facts[name] = f"{summary[key]:,.4g}" if summary[key] < 1e4 else f"{summary[key]:,.0f}"
    if "win_rate" in summary:
        low, high = (summary[f"win_rate_{end}"] for end in ("low", "high"))
        facts[FIGURE_NAMES["win_rate"]] += f" (95 % interval {low:.3g} to {high:.3g})"
    if seconds:
        tokens = sum(line["tokens_per_second"] * line["seconds"] for line in paced)
        facts |= {"tokens read in training": f"{tokens:,.0f}", "tokens a second": f"{tokens / seconds:,.0f}"}
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return boxed(f"<tr><th>the run</th><th></th></tr>{rows}")


def boxed(rows: str) -> str:
    return f'<div class="scroll"><table class="figures">{rows}</table></div>'


# ---------------------------------------------------------------------------------------------------- the rest


def completions(found: Any) -> str:
    """What the policy writes, before and after training; nothing where the file is damaged."""
    try:
        cards, tokens = "".join(map(completion_card, found["prompts"])), int(found["max_new_tokens"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return ""
    how = f"The likeliest token each time, at most {tokens} of them, to held-out prompts."
    return f'<h2>Completions</h2><p class="dim">{how}</p>{cards}' if cards else ""


def completion_card(item: dict[str, Any]) -> str:
    """One prompt and its completions."""
    several = len(item["messages"]) > 1
    turns = "\n\n".join((f"{m['role']}: " if several else "") + m["content"] for m in item["messages"])
    sides = "".join(
        f'<div><h3>{when} training</h3><div class="text">{escape(item[when])}</div></div>'
        for when in ("before", "after")
        if when in item
    )
    return f'<article><header class="text">{escape(turns)}</header><div class="sides">{sides}</div></article>'


def settings_table(config: DictConfig) -> str:
    """The settings that differ from the defaults of the loss and of models in general."""
    changed = changed_settings(config)
    if not changed:
        return ""
    rows = "".join(
        f"<tr>{''.join(f'<td><code>{escape(cell)}</code></td>' for cell in (key, *values))}</tr>"
        for key, values in changed.items()
    )
    head = "<tr><th>setting</th><th>in this run</th><th>default</th></tr>"
    return f'<h2>Settings that differ from the defaults</h2><table class="settings">{head}{rows}</table>'


def changed_settings(config: DictConfig) -> dict[str, tuple[str, str]]:
    """The settings that differ from config/config.yaml, config/model/base.yaml and config/loss/<name>.yaml: by key, the
    run's value and the default, "" where there is none."""
    ours = flat(OmegaConf.to_container(config))
    defaults = OmegaConf.merge(*default_parts(str(ours.get("loss.name"))))
    named = ["loss.name", "model.name", "model.name_or_path"]  # have no defaults, and others refer to them
    for key in named:
        OmegaConf.update(defaults, key, ours.get(key))
    theirs = {key: value for key, value in flat(resolved(defaults)).items() if key not in named and value != "???"}
    changed = [key for key in ours if key not in theirs or ours[key] != theirs[key]]
    own = [key for key in changed if key not in ("loss.name", "model.name")]  # the page begins with these
    return {key: (written(ours[key]), written(theirs[key]) if key in theirs else "") for key in own}


@functools.cache  # a run writes its page at each evaluation
def default_parts(loss: str) -> list[Any]:
    """The YAML files that hold the defaults; later ones override earlier ones. A loss's file may build on another."""
    parts: list[Any] = [OmegaConf.load(REPO / "config/config.yaml")]
    parts.append({"model": OmegaConf.load(REPO / "config/model/base.yaml")})
    path, chain = REPO / f"config/loss/{loss}.yaml", []
    while path.is_file():
        own: Any = OmegaConf.load(path)
        chain.append(own if "@package _global_" in path.read_text() else {"loss": own})
        below = [name for name in own.get("defaults", []) if name != "_self_" and isinstance(name, str)]
        path = path.with_stem(below[0]) if below else Path()
    return parts + chain[::-1]


def resolved(config: Any) -> dict[str, Any]:
    """The sections of a configuration as plain values, without those that refer to a missing key."""
    found = {}
    for key in config.keys() - {"defaults", "hydra"}:  # which tell Hydra how to compose, and are no settings of a run
        with contextlib.suppress(OmegaConfBaseException):
            value = config[key]
            found[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return found


def links(folder: Path) -> str:
    """The pages beside this one, and the files that it is made from."""
    pages = {
        path.name: f"verdicts: {path.name}" for path in sorted(folder.glob("*.html")) if path.name != "report.html"
    }
    found = LINKED | pages | dict.fromkeys(LINKED_FILES, "")
    return "".join(
        f'<a href="{quote(name)}">{escape(text or name)}</a>'
        for name, text in found.items()
        if (folder / name).is_file()
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Write the page of a run again.")
    parser.add_argument("run", type=Path, help="the run directory, such as outputs/my_run")
    try:
        console.print(f"written to {write_run_page(parser.parse_args().run)}", markup=False)
    except UserError as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
