"""The page of benchmarks/study.py, made from its lines of figures alone: tables, pictures, and sentences that say what
the figures do.

Intervals are 95 %, over seeds and prompts together: the squares of two standard errors are added, that of the seeds'
means and that of the prompts' (as if both were drawn at random), and Student's t has Satterthwaite's degrees of freedom
for the sum. With one seed they are over prompts alone.
"""

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

from scipy import stats
from study import Results, Scale, Setting, Variant, plan

from judging.statistics import Interval, length_controlled

Line = dict[str, Any]
Values = list[list[float]]  # by seed and prompt
NAMES = {"dpo": "DPO", "simpo": "SimPO", "tdpo2": "TDPO-2", "kto": "KTO", "fpo": "FPO", "fpo-mse": "FPO-mse"}
DATA = {"alpaca": "AlpacaEval", "hh": "HH harmless"}
COLOURS = ("#888888", "#1f4fd0", "#c0143c", "#b8a000", "#0a8a5a", "#e07000", "#8a2be2", "#00a0c0", "#d060a0")
PAPER_SECONDS = {"SimPO": 7901, "TDPO-2": 10420, "FPO": 8290}  # of one run on an H100 (2411.07618)
PEERS = ("DPO", "SimPO", "TDPO-2", "LN-DPO")


# -------------------------------------------------------------------------------------------------------------- figures


def combined(by_seed: Sequence[float], prompt_error: float, prompts: int) -> Interval:
    """The mean of the seeds' estimates, with its interval; `prompt_error` is the standard error over prompts of that
    mean."""
    parts = [(prompt_error**2, prompts - 1)]
    if len(by_seed) > 1:
        parts.append((variance(by_seed) / len(by_seed), len(by_seed) - 1))
    total = sum(part for part, _ in parts)
    spread = sum(part**2 / degrees for part, degrees in parts if degrees)
    half = stats.t.ppf(0.975, total**2 / spread) * math.sqrt(total) if spread else 0.0
    return Interval(fmean(by_seed), fmean(by_seed) - half, fmean(by_seed) + half)


def over(values: Values) -> Interval:
    """The mean of a figure, with its interval."""
    by_prompt = [fmean(own) for own in zip(*values, strict=True)]
    error = stdev(by_prompt) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else 0.0
    return combined([fmean(own) for own in values], error, len(by_prompt))


class Group:
    """All that is known of a variant (None: the start) on a data set; its lines by seed."""

    def __init__(self, label: str, lines: list[Line], runs: list[Line], start: Line, scale: Scale) -> None:
        self.label, self.lines, self.runs, self.start, self.scale = label, lines, runs, start, scale
        self.layer = scale.layers[-1] if not lines[0].get("layer") else lines[0]["layer"]

    def values(self, name: str) -> Values:
        """A figure, by seed and prompt."""
        return [FIGURES[name](self, line) for line in self.lines]

    def interval(self, name: str) -> Interval | None:
        """None for a win rate without a reward model."""
        return over(self.values(name)) if self.has(name) else None

    def has(self, name: str) -> bool:
        return name != "win" or "rewards" in self.start["samples"]

    def above(self, other: "Group", name: str) -> Interval:
        """How much more of a figure it has than another one: over prompts, and over the seeds that both have."""
        pairs = zip(self.values(name), other.values(name))
        return over([[a - b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs])

    def scalars(self, *path: str) -> list[float]:
        """A figure that has no prompts, by seed."""
        found = []
        for line in self.lines:
            for key in path:
                line = line[key]
            found.append(float(line))  # type: ignore[arg-type]
        return found

    def length_controlled(self) -> Interval | None:
        """The win rate that a logistic regression predicts for samples as long as the start's."""
        verdicts = [self.preferences(line) for line in self.lines]
        longer = [
            [a - b for a, b in zip(line["samples"]["tokens"], self.start["samples"]["tokens"])] for line in self.lines
        ]
        prompts = [place // self.scale.draws for place in range(len(verdicts[0]))]
        fits = [length_controlled(own, further, prompts) for own, further in zip(verdicts, longer)]
        pooled = ([value for own in lists for value in own] for lists in (verdicts, longer))
        together = length_controlled(*pooled, prompts * len(verdicts))
        if together is None or None in fits:
            return None
        error = (together.high - together.low) / 2 / stats.norm.ppf(0.975)
        return combined([fit.estimate for fit in fits if fit], error, len(set(prompts)))

    def preferences(self, line: Line) -> list[float]:
        """For each draw, whether the reward model gives it more than the start's draw of that number; ties half."""
        pairs = zip(line["samples"]["rewards"], self.start["samples"]["rewards"], strict=True)
        return [float(own > other) + float(own == other) / 2 for own, other in pairs]

    def wins(self, line: Line) -> list[float]:
        return by_prompt(self.preferences(line), self.scale.draws)


def by_prompt(draws: Sequence[float], number: int) -> list[float]:
    """The mean of each prompt's draws."""
    return [fmean(draws[start : start + number]) for start in range(0, len(draws), number)]


def drift(line: Line, layer: int) -> list[float]:
    sides = (line["pairs"][f"drift_{layer}_{side}"] for side in ("chosen", "rejected"))
    return [fmean(pair) for pair in zip(*sides, strict=True)]


def entropy(group: Group, line: Line) -> list[float]:
    tokens = by_prompt(line["samples"]["tokens"], group.scale.draws)
    return [nats / count for nats, count in zip(line["samples"]["surprisal"], tokens, strict=True)]


FIGURES: dict[str, Callable[[Group, Line], list[float]]] = {
    "accuracy": lambda _, line: line["pairs"]["accuracy"],
    "reward accuracy": lambda _, line: line["pairs"]["reward_accuracy"],
    "margin": lambda _, line: line["pairs"]["margin"],
    "win": lambda group, line: group.wins(line),
    "KL": lambda _, line: line["samples"]["kl"],
    "entropy": entropy,
    "drift": lambda group, line: drift(line, group.scale.layers[-1]),
}
WORDS = {  # in a sentence
    "accuracy": "preference accuracy",
    "win": "win rate",
    "KL": "KL to the start",
    "entropy": "entropy a token",
    "drift": "feature drift",
}


def label_of(variant: Variant) -> str:
    if variant.alpha == 0:
        return "LN-DPO"
    alpha = "" if variant.alpha is None else f", alpha {variant.alpha:g}"
    return NAMES[variant.loss] + alpha + ("" if variant.layer is None else f", layer {variant.layer}")


def groups_of(scale: Scale, results: Results) -> dict[str, dict[str, Group]]:
    """By data set, then by label, in the order of the grid; the first one is the start."""
    settings: dict[str, dict[str, list[Setting]]] = {data: {} for data in scale.pairs}
    for data, variant, _ in scale.grid:
        settings[data][label_of(variant)] = []
    for job in plan(scale, results):
        if job.kind == "measure" and job.settings:
            setting = job.settings[0]
            settings[setting.data][label_of(setting.variant)].append(setting)
    found: dict[str, dict[str, Group]] = {}
    for data, labels in settings.items():
        start = results[f"measure start on {data}"]
        found[data] = {"start": Group("start", [start], [results["start"]], start, scale)}
        for label, own in labels.items():
            lines, runs = [results[f"measure {s.name}"] for s in own], [results[s.name] for s in own]
            found[data][label] = Group(label, lines, runs, start, scale)
    return found


# --------------------------------------------------------------------------------------------------------------- tables


def number(value: float) -> str:
    """Two or three digits that matter."""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def cell(found: Interval | None) -> str:
    if found is None:
        return ""
    if found.low == found.high:
        return number(found.estimate)
    return f"{number(found.estimate)} ({number(found.low)} to {number(found.high)})"


def seeds_cell(values: Sequence[float]) -> str:
    """The mean, and the lowest and the highest of the seeds."""
    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(fmean(values)) + spread


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def main_table(groups: dict[str, Group]) -> str:
    rows = [
        ["", "seeds", "preference accuracy", "reward accuracy", "margin", "win rate", "the same, lengths equal", "KL"]
    ]
    for label, group in groups.items():
        own = [cell(group.interval(name)) for name in ("accuracy", "reward accuracy", "margin", "win")]
        fair = cell(group.length_controlled()) if group.has("win") else ""
        kl = cell(group.interval("KL"))
        if label == "start":
            own, fair, kl = [own[0], "", "", ""], "", ""
        rows.append([label, str(len(group.lines)) if label != "start" else "", *own, fair, kl])
    return table(rows)


def diversity_table(groups: dict[str, Group]) -> str:
    rows = [["", "entropy, nats a token", "distinct-1", "distinct-2", "self-BLEU", "tokens", "cut"]]
    for label, group in groups.items():
        scalars = [seeds_cell(group.scalars("samples", name)) for name in ("distinct_1", "distinct_2", "self_bleu")]
        tokens = [fmean(line["samples"]["tokens"]) for line in group.lines]
        cut = seeds_cell(group.scalars("samples", "cut"))
        rows.append([label, cell(group.interval("entropy")), *scalars, seeds_cell(tokens), cut])
    return table(rows)


def feature_table(groups: dict[str, Group], layers: Sequence[int]) -> str:
    rows = [["", *(f"drift, layer {layer}" for layer in layers), *(f"FVU, layer {layer}" for layer in layers)]]
    for label, group in groups.items():
        drifts = [cell(over([drift(line, layer) for line in group.lines])) for layer in layers]
        drifts = [""] * len(layers) if label == "start" else drifts
        rows.append([label, *drifts, *(seeds_cell(group.scalars("saes", str(layer), "fvu")) for layer in layers)])
    return table(rows)


def sae_table(scale: Scale, line: Line) -> str:
    rows = [["layer", "L0", "FVU", "CE recovered", "dead"]]
    for layer in scale.layers:
        part = f"layer_{layer}/" if len(scale.layers) > 1 else ""
        names = ("l0", "fvu", "ce_recovered", "dead")
        rows.append([str(layer), *(number(line["evaluated"][f"sae_eval/{part}{name}"]) for name in names)])
    return table(rows)


def costs_of(machine: Line) -> dict[str, str]:
    """What a run costs: CPU time on a CPU, where others may slow the clock down, and what it is called."""
    if machine["kind_of_device"] == "cpu":
        return {"cpu_seconds": "CPU seconds a run", "training_memory_gb": "peak memory, GB"}
    return {"seconds_per_step": "seconds a step", "training_memory_gb": "peak memory, GB"}


def cost(group: Group, name: str) -> float:
    """The least of the seeds, of the runs that were not interrupted (or of all, if all were)."""
    whole = [run for run in group.runs if not run["resumed"]] or group.runs
    return float(min(run[name] for run in whole))


def cost_table(groups: dict[str, Group], costs: dict[str, str]) -> str:
    beside = [label for label in ("SimPO", "TDPO-2") if label in groups]
    shares = [f"{what}, of {label}'s" for label in beside for what in ("time", "memory")]
    rows = [["", *costs.values(), "seconds a step", "tokens a second", *shares]]
    for label, group in list(groups.items())[1:]:
        own = [number(cost(group, name)) for name in (*costs, "seconds_per_step")]
        speed = number(max(run["tokens_per_second"] for run in group.runs))
        rows.append(
            [label, *own, speed, *(number(share) for other in beside for share in ratios(group, groups[other], costs))]
        )
    return table(rows)


def ratios(group: Group, other: Group, costs: dict[str, str]) -> list[float]:
    """Time and memory, as shares of another loss's."""
    return [cost(group, name) / cost(other, name) for name in costs]


def search_table(results: Results) -> str:
    head = ["", "lr", "beta", "its DPO loss", "preference accuracy", "reward accuracy", "margin", ""]
    rows = [head]
    for line in results.values():
        if line["kind"] == "choose":
            for one in line["tried"]:
                figures = [f"{one[name]:.3f}" for name in ("dpo_loss", "accuracy", "reward_accuracy", "margin")]
                beta = "" if one["beta"] is None else f"{one['beta']:g}"
                taken = f"taken as {line['job'].split()[1]}" if one["value"] == line["best"] else ""
                rows.append([NAMES[one["loss"]], f"{one['lr']:g}", beta, *figures, taken])
    return table(rows)


# ------------------------------------------------------------------------------------------------------------ sentences


def both(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "none"


def direction(found: Interval) -> int:
    """1 for more, -1 for less, 0 where the interval has 0 in it."""
    return int(found.low > 0) - int(found.high < 0)


def differences(groups: dict[str, Group]) -> list[tuple[Group, Group]]:
    """What is compared: FPO with its peers, then each of its variants with FPO."""
    fpo = groups["FPO"]
    peers = [(fpo, groups[label]) for label in PEERS if label in groups]
    return peers + [(group, fpo) for label, group in groups.items() if label.startswith("FPO") and group is not fpo]


def difference_table(groups: dict[str, Group]) -> str:
    names = [name for name in WORDS if groups["start"].has(name)]
    rows = [["", *(WORDS[name] for name in names)]]
    for group, other in differences(groups):
        cells = []
        for name in names:
            found = group.above(other, name)
            text = f"{found.estimate:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
            cells.append(f"**{text}**" if direction(found) else text)
        rows.append([f"{group.label} less {other.label}", *cells])
    return table(rows)


def ranked(group: Group, others: Sequence[Group], name: str) -> str:
    """`above DPO, level with SimPO`."""
    labels: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for other in others:
        labels[direction(group.above(other, name))].append(other.label)
    words = {1: "above", -1: "below", 0: "level with"}
    return ", ".join(f"{words[way]} {both(own)}" for way, own in labels.items() if own)


def changes(group: Group, other: Group) -> str:
    """`more KL to the start; no difference in win rate and entropy a token`."""
    names: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for name in (name for name in WORDS if group.has(name)):
        names[direction(group.above(other, name))].append(WORDS[name])
    if not names[1] + names[-1]:
        return f"no difference in {both(names[0])}"
    words = {1: "more", -1: "less", 0: "no difference in"}
    return "; ".join(f"{words[way]} {both(own)}" for way, own in names.items() if own)


def costs_beside(groups: dict[str, Group], costs: dict[str, str]) -> str:
    """`1.05 of SimPO's time and 1.01 of its memory`."""
    found = []
    for label in ("SimPO", "TDPO-2"):
        if label in groups:
            seconds, memory = ratios(groups["FPO"], groups[label], costs)
            found.append(f"{seconds:.2f} of {label}'s time and {memory:.2f} of its memory")
    return both(found)


def claims(groups: dict[str, Group], scale: Scale, costs: dict[str, str]) -> str:
    """What the paper claims, and what is seen."""
    fpo, peers = groups["FPO"], [groups[label] for label in PEERS[:3] if label in groups]
    rows = [["the paper (2411.07618)", "here"]]
    if fpo.has("win"):
        rows.append(["a win rate 5 points above its baselines'", f"a win rate {ranked(fpo, peers, 'win')}"])
    rows.append(["alignment as good as theirs", f"preference accuracy {ranked(fpo, peers, 'accuracy')}"])
    paper = {label: PAPER_SECONDS["FPO"] / PAPER_SECONDS[label] for label in ("SimPO", "TDPO-2")}
    claim = f"SimPO's memory and {paper['SimPO']:.2f} of its time, 0.83 of TDPO-2's and {paper['TDPO-2']:.2f}"
    rows.append([claim, costs_beside(groups, costs)])
    if "LN-DPO" in groups:
        claim = "the constraint on features holds the policy near the start, and its samples diverse"
        rows.append([claim, f"FPO less LN-DPO: {changes(fpo, groups['LN-DPO'])}"])
    for claim, prefix in (
        ("alpha 0.5 is the best", "FPO, alpha"),
        (f"later layers are better (FPO reads layer {scale.layers[-1]} of 30 here)", "FPO, layer"),
        ("squared differences of features (FPO has their KL divergence here)", "FPO-mse"),
    ):
        seen = [
            f"{own.label} less FPO: {changes(own, fpo)}" for label, own in groups.items() if label.startswith(prefix)
        ]
        if seen:
            rows.append([claim, ". ".join(seen)])
    return table(rows)


def in_short(groups: dict[str, Group], costs: dict[str, str]) -> list[str]:
    """The findings, a sentence or two each."""
    start, fpo, trained = groups["start"], groups["FPO"], list(groups.values())[1:]
    better = [group.label for group in trained if beyond(group, start, "accuracy")]
    said = [
        f"**What trained.** Beyond the interval, the chosen completions of more pairs than at the start are "
        f"preferred by {both(better)}."
    ]
    if start.has("win"):
        won = [group.label for group in trained if (rate := group.interval("win")) and rate.low > 0.5]
        said.append(f"**What is preferred.** To the start's samples the reward model prefers those of {both(won)}.")
    peers = [groups[label] for label in PEERS if label in groups]
    names = [name for name in ("accuracy", "win") if start.has(name)]
    level = [f"in {WORDS[name]} {ranked(fpo, peers, name)}" for name in names]
    said.append(f"**FPO beside its peers.** It is {'; '.join(level)}.")
    if "LN-DPO" in groups:
        plain = groups["LN-DPO"]
        said.append(
            "**What the constraint does.** FPO is length-normalised DPO (LN-DPO, FPO at alpha 0) with a constraint. "
            f"At alpha 0.5: {changes(fpo, plain)}."
        )
        others = [group for label, group in groups.items() if label.startswith("FPO, alpha")]
        said[-1] += "".join(f" At {group.label.removeprefix('FPO, ')}: {changes(group, plain)}." for group in others)
    return [*said, f"**What it costs.** FPO takes {costs_beside(groups, costs)}."]


def beyond(group: Group, start: Group, name: str) -> bool:
    """Whether a figure is above the start's."""
    (before,) = start.values(name)
    return over([[a - b for a, b in zip(own, before, strict=True)] for own in group.values(name)]).low > 0


# ------------------------------------------------------------------------------------------------------------- pictures

STYLE = (
    "text{font:13px sans-serif;text-anchor:middle;fill:#222}.key{text-anchor:start}.end{text-anchor:end}"
    ".axis{stroke:#222;fill:none}"
)


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>{STYLE}</style>\n<rect width="100%" height="100%" fill="white"/>\n{inside}\n</svg>\n'
    )


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scatter(groups: dict[str, Group], x_name: str, y_name: str, x_label: str, y_label: str) -> str:
    """An SVG: a point for each group, with its intervals both ways."""
    shown = {label: (group.interval(x_name), group.interval(y_name)) for label, group in groups.items()}
    places = {label: (x, y) for label, (x, y) in shown.items() if x and y}
    left, top, width, height = 70, 20, 480, 330
    bounds = []
    for axis in (0, 1):
        low = min(place[axis].low for place in places.values())
        high = max(place[axis].high for place in places.values())
        pad = 0.05 * (high - low or 1)
        bounds.append((low - pad, high + pad))
    (x0, x1), (y0, y1) = bounds

    def across(value: float) -> float:
        return left + width * (value - x0) / (x1 - x0)

    def down(value: float) -> float:
        return top + height * (y1 - value) / (y1 - y0)

    parts = [f'<path d="M{left},{top} V{top + height} H{left + width}" class="axis"/>']
    for value in ticks(x0, x1):
        parts.append(f'<path d="M{across(value):.1f},{top + height} v5" class="axis"/>')
        parts.append(f'<text x="{across(value):.1f}" y="{top + height + 20}">{value:g}</text>')
    for value in ticks(y0, y1):
        parts.append(f'<path d="M{left},{down(value):.1f} h-5" class="axis"/>')
        parts.append(f'<text x="{left - 9}" y="{down(value):.1f}" dy="4" class="end">{value:g}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 42}">{x_label}</text>')
    middle = f"16,{top + height / 2}"
    parts.append(f'<text x="16" y="{top + height / 2}" transform="rotate(-90 {middle})">{y_label}</text>')
    for place, (label, (x, y)) in enumerate(places.items()):
        colour = COLOURS[place % len(COLOURS)]
        at_x, at_y = across(x.estimate), down(y.estimate)
        bars = (
            f"M{across(x.low):.1f},{at_y:.1f} H{across(x.high):.1f} M{at_x:.1f},{down(y.low):.1f} V{down(y.high):.1f}"
        )
        fill = colour if place < len(COLOURS) else "white"  # a second round of colours is hollow
        parts.append(f'<path d="{bars}" stroke="{colour}" opacity="0.4"/>')
        parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="5" fill="{fill}" stroke="{colour}"/>')
        y_key = top + 12 + 20 * place
        parts.append(f'<circle cx="{left + width + 24}" cy="{y_key - 4}" r="5" fill="{fill}" stroke="{colour}"/>')
        parts.append(f'<text x="{left + width + 36}" y="{y_key}" class="key">{label}</text>')
    return svg(left + width + 170, max(top + height + 60, top + 20 * len(places) + 20), parts)


def bars(groups: dict[str, Group], costs: dict[str, str]) -> str:
    """An SVG: time and memory of each loss, as shares of the largest."""
    trained = list(groups.values())[1:]
    left, width, row = 130, 240, 24
    parts = []
    for column, (name, title) in enumerate(costs.items()):
        x = left + column * (width + 80)
        largest = max(cost(group, name) for group in trained)
        parts.append(f'<text x="{x}" y="24" class="key">{title}</text>')
        for place, group in enumerate(trained):
            y, value = 40 + place * row, cost(group, name)
            end, colour = width * value / largest, COLOURS[(place + 1) % len(COLOURS)]
            parts.append(f'<rect x="{x}" y="{y}" width="{end:.1f}" height="16" fill="{colour}"/>')
            parts.append(f'<text x="{x + end + 6:.1f}" y="{y + 13}" class="key">{number(value)}</text>')
            if column == 0:
                parts.append(f'<text x="{x - 8}" y="{y + 13}" class="end">{group.label}</text>')
    return svg(left + 2 * (width + 80), 52 + row * len(trained), parts)


# ----------------------------------------------------------------------------------------------------------------- page

PLACES_OF_SCALE = ("name", "draws", "prompts", "new_tokens", "max_prompt", "max_length", "batch_size")
OWN_LR = "Each loss has a learning rate of its own; all of FPO has one beta."
TAKEN_LR = "SimPO takes FPO's learning rate, TDPO-2 and KTO take DPO's, all of FPO (LN-DPO too) has one and one beta."


def write_page(scale: Scale, results: Results, folder: Path) -> str:
    """Write results.md and its pictures; gives what was written. The page has the whole plan or is not there."""
    left = [job.name for job in plan(scale, results) if job.name not in results]
    if left:
        return f"no page: {len(left)} jobs are left, {left[0]} first"
    groups = groups_of(scale, results)
    alpaca, costs, kl = groups["alpaca"], costs_of(results["machine"]), "KL to the start, nats a sample"
    pictures = {
        "results-accuracy.svg": scatter(alpaca, "KL", "accuracy", kl, "preference accuracy"),
        "results-diversity.svg": scatter(alpaca, "KL", "entropy", kl, "entropy, nats a token"),
        "results-cost.svg": bars(alpaca, costs),
    }
    for name, picture in pictures.items():
        (folder / name).write_text(picture)
    (folder / "results.md").write_text(page(scale, results, groups))
    return f"written: {folder / 'results.md'}, {', '.join(pictures)}"


def page(scale: Scale, results: Results, groups: dict[str, dict[str, Group]]) -> str:
    """The page's text."""
    alpaca, machine, costs = groups["alpaca"], results["machine"], costs_of(results["machine"])
    rows = {name: own for name, own in results["data"]["rows"].items() if "pairs" in own}
    counts = {name: f"{own['pairs']:,} pairs of {own['prompts']:,} prompts" for name, own in rows.items()}
    whole = "The reference pass of DPO, FPO and KTO, a forward pass over the pairs, is kept for later runs"
    places = {
        **{key: getattr(scale, key) for key in PLACES_OF_SCALE},
        **{key: machine[key] for key in ("device", "threads", "dtype")},
        "flag": "" if scale.name == "default" else f" --{scale.name}",
        "hours": f"{sum(line['seconds'] for line in results.values()) / 3600:.1f}",
        "in_short": "\n".join(bullet(sentence) for sentence in in_short(alpaca, costs)),
        "claims": claims(alpaca, scale, costs),
        "differences": difference_table(alpaca),
        "main": main_table(alpaca),
        "diversity": diversity_table(alpaca),
        "features": feature_table(alpaca, scale.layers),
        "width": scale.sae_width,
        "saes": sae_table(scale, results["saes"]),
        "cost": cost_table(alpaca, costs),
        "reference": f"{whole}: only a loss with one seed has it in its CPU seconds."
        if "cpu_seconds" in costs
        else f"{whole}.",
        "validation": counts["alpaca/validation"],
        "whose": OWN_LR if scale.own_lr else TAKEN_LR,
        "settings": search_table(results),
        "others": "\n".join(other_data(data, own, counts) for data, own in groups.items() if data != "alpaca"),
        "hh": ", and Anthropic's HH harmless" if "hh" in groups else "",
        "policy": counts["alpaca/policy"],
        "test": counts["alpaca/test"],
        "judge": judge(results, counts),
        "precision": precision(results),
    }
    text = (Path(__file__).parent / "study_page.md").read_text().format(**places)
    return "\n\n".join(map(wrapped, re.sub(r"\n{3,}", "\n\n", text).strip().split("\n\n"))) + "\n"


def bullet(sentence: str) -> str:
    return textwrap.fill(f"- {sentence}", 120, subsequent_indent="  ", break_on_hyphens=False)


def wrapped(paragraph: str) -> str:
    """A paragraph of prose in lines of at most 120 characters; others as they are."""
    if paragraph[0] in "|#!-{":
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), 120, break_long_words=False, break_on_hyphens=False)


def other_data(data: str, groups: dict[str, Group], counts: dict[str, str]) -> str:
    judged = "" if groups["start"].has("win") else " There is no reward model, so no win rate."
    about = (
        f"The same start, SAEs and settings; {counts[f'{data}/policy']} to train on, {counts[f'{data}/test']} to test."
    )
    return f"## {DATA[data]}\n\n{about}{judged}\n\n{main_table(groups)}"


def judge(results: Results, counts: dict[str, str]) -> str:
    line = results.get("reward-alpaca")
    if line is None:
        return ""
    accuracy, pairs = line["evaluated"]["rewards_eval/accuracies"], results["data"]["rows"]["alpaca/test"]["pairs"]
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / pairs)
    return (
        f"**The judge** is a reward model of the same size, trained from the start on {counts['alpaca/reward']}, which "
        f"the policies do not see. It agrees with {accuracy:.2f} ± {half:.2f} of the test pairs. What it cannot tell, "
        "a win rate cannot show; and a policy may win by what it mistakes for quality."
    )


def precision(results: Results) -> str:
    found = results.get("precision")
    if found is None:
        return ""
    return (
        f"**bfloat16** beside float32: the start's log-probability of a token differs by {found['mean']:.4f} nats, a "
        f"mean over {found['completions']} completions, and by {found['largest']:.4f} at most."
    )
