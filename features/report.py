"""The report on features: a table for further work, and a page to read and to show, which fetches nothing."""

import dataclasses
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.measure import Context, Measured, Part, Report
from utils import atomic_write, html_page

SCATTER_POINTS = 2000  # features of the scatter plot: those that moved most
DIFFERING = 12  # features of the table beside it
KIND_NAMES = {  # of a kind of text, in a sentence
    "chosen": "chosen completions",
    "rejected": "rejected completions",
    "desirable": "desirable completions",
    "undesirable": "undesirable completions",
    "demonstrated": "demonstrations",
    "sampled": "the policy's own samples",
}


def write_feature_report(report: Report, folder: Path) -> None:
    """Write `drift.parquet` and `report.html`; they replace those of an earlier report."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "drift.parquet") as part:
        pq.write_table(table(report), part)
    with atomic_write(folder / "report.html") as part:
        part.write_text(feature_page(report))


def table(report: Report) -> pa.Table:
    """A row for each run, kind of text and feature; the metadata say what else the figures depend on."""
    features = feature_columns(report.parts)
    tables = []
    for measured in report.runs:
        for kind, after in measured.policy.items():
            before = measured.reference[kind]
            columns = {
                "run": [measured.run.name] * len(features["feature"]),
                "text": [kind] * len(features["feature"]),
                **features,
                "reference_mean": before.mean,
                "policy_mean": after.mean,
                "change": measured.change(kind),
                "reference_rate": before.rate,
                "policy_rate": after.rate,
                "drift": after.drift,
            }
            tables.append(pa.table(columns))
    names = ("model", "divergence", "k", "settings", "completions", "tokens")
    about = {name: getattr(report, name) for name in names}
    about |= {"sae": [dataclasses.asdict(part) for part in report.parts]}
    return pa.concat_tables(tables).replace_schema_metadata({"features": json.dumps(about)})


def feature_columns(parts: Sequence[Part]) -> dict[str, list[Any]]:
    """Of all features of some SAEs: the SAE's name, and the number in it."""
    return {
        "sae": [part.name for part in parts for _ in range(part.d_sae)],
        "feature": [number for part in parts for number in range(part.d_sae)],
    }


# ----------------------------------------------------------------------------------------------------- what is said


def holding(drift: np.ndarray, share: float) -> int:
    """The least number of features that have this share of the drift [F] among them; 0 where there is no drift."""
    if not drift.sum():
        return 0
    return int((np.sort(drift)[::-1].cumsum() < share * drift.sum()).sum()) + 1


def label(parts: Sequence[Part], index: int) -> str:
    """What a feature is called: its number, after its SAE's name where there are several."""
    part, number = owner(parts, index)
    return str(number) if len(parts) == 1 else f"{part.name} {number}"


def owner(parts: Sequence[Part], index: int) -> tuple[Part, int]:
    """Which SAE a feature belongs to, and its number there."""
    for part in parts:
        if index < part.d_sae:
            return part, index
        index -= part.d_sae
    raise IndexError(index)


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's r of two runs' changes [F], over the features that changed in either; None where there is none."""
    moved = (one != 0) | (other != 0)
    if not (one[moved].any() and other[moved].any()) or moved.sum() < 3:
        return None
    return float(np.corrcoef(one[moved], other[moved])[0, 1])


def finding(report: Report) -> str:
    """The result, in a sentence or two."""
    own, *others = report.runs
    drift, change = own.policy["sampled"].drift, own.change("sampled")
    half, kind = holding(drift, 0.5), next(iter(own.policy))
    if not half:
        return "On its own samples the policy's features are the reference's: none of them moved."
    words = [f"On the policy's own samples {half:,} of {len(drift):,} features hold half of the drift"]
    for place, rose in ((int(change.argmax()), True), (int(change.argmin()), False)):
        if change[place]:
            words.append(f"feature {label(report.parts, place)} {'rose' if rose else 'fell'} most")
    text = "; ".join([words[0], " and ".join(words[1:])]).rstrip("; ") + "."
    for other in others:
        text += (
            f" On {KIND_NAMES[kind]}, F is {own.policy[kind].drift.sum():.3g} in {own.run.name} and "
            f"{other.policy[kind].drift.sum():.3g} in {other.run.name}."
        )
    return text


# ----------------------------------------------------------------------------------------------------- the page


def feature_page(report: Report) -> str:
    """The page's HTML."""
    own = report.runs[0]
    beside = "".join(f", beside {measured.run.name}" for measured in report.runs[1:])
    saes = "; ".join(f"{part.path} ({part.place}, {part.d_sae:,} features)" for part in report.parts)
    data = {
        "runs": [measured.run.name for measured in report.runs],
        "features": len(own.policy["sampled"].drift),
        "examples": [0, *report.checkpoints] if len(report.checkpoints) > 1 else [],
        "kinds": [kind_data(report, kind) for kind in own.policy],
    }
    places = {
        "title": escape(f"What {own.run.loss} did to the features: {own.run.name}{beside}"),
        "finding": escape(finding(report)),
        "subtitle": escape(f"{report.model}, read through {saes}. {drawn(report)}"),
        "measure": escape(measure_of(report)),
    }
    return html_page("features/report.html", places, data)


def drawn(report: Report) -> str:
    how = report.settings
    cut = "".join(f", {name} {how[name]}" for name, off in (("top_p", 1), ("top_k", 0)) if how[name] != off)
    return (
        f"Samples: temperature {how['temperature']:g}{cut}, at most {how['max_new_tokens']} tokens, seed {how['seed']}."
    )


def measure_of(report: Report) -> str:
    if report.divergence == "kl":
        return f"KL(reference || policy) of the shares that the {report.k} strongest features of either have"
    return f"the squared differences of the {report.k} strongest features of either, over {report.k}"


def kind_data(report: Report, kind: str) -> dict[str, Any]:
    """What the page shows of one kind of text."""
    own = report.runs[0]
    changes = [measured.change(kind) for measured in report.runs]
    found: dict[str, Any] = {
        "name": kind,
        "words": KIND_NAMES[kind],
        "completions": report.completions[kind],
        "tokens": report.tokens[kind],
        "runs": [run_data(measured, kind) for measured in report.runs],
        "training": [0.0, *(profile[kind].drift.sum() for profile in report.checkpoints.values())],
        "shown": [feature_data(report, kind, index) for index in report.contexts[kind]],
    }
    if len(changes) == 2:
        moved = np.abs(changes).sum(0).argsort()[::-1][:SCATTER_POINTS]
        apart = np.abs(changes[1] - changes[0]).argsort()[::-1][:DIFFERING]
        found |= {
            "correlation": correlation(*changes),
            "moved": int((np.abs(changes).sum(0) > 0).sum()),
            "points": [[*named(report.parts, i), *(digits(change[i]) for change in changes)] for i in moved.tolist()],
            "apart": [
                [
                    *named(report.parts, i),
                    digits(own.reference[kind].mean[i]),
                    *(digits(change[i]) for change in changes),
                ]
                for i in apart.tolist()
            ],
        }
    return found


def named(parts: Sequence[Part], index: int) -> list[str | None]:
    """A feature's label, and its page elsewhere."""
    part, number = owner(parts, index)
    return [label(parts, index), None if part.address is None else f"{part.address}/{number}"]


def run_data(measured: Measured, kind: str) -> dict[str, Any]:
    """The figures of one run on one kind of text, and how its drift adds up over the features, largest first."""
    before, after = measured.reference[kind], measured.policy[kind]
    total = after.drift.sum()
    shares = np.sort(after.drift)[::-1].cumsum() / (total or 1.0)
    places = np.unique(np.geomspace(1, len(shares), 160).round().astype(int))
    return {
        "drift": total,
        "half": holding(after.drift, 0.5),
        "most": holding(after.drift, 0.9),
        "l0": [before.rate.sum(), after.rate.sum()],
        "seen": [int((before.rate > 0).sum()), int((after.rate > 0).sum())],
        "curve": [[place, digits(shares[place - 1])] for place in places.tolist()],
    }


def feature_data(report: Report, kind: str, index: int) -> dict[str, Any]:
    """A feature that is shown, with its contexts."""
    own = report.runs[0]
    before, after = own.reference[kind], own.policy[kind]
    name, address = named(report.parts, index)
    return {
        "name": name,
        "address": address,
        "mean": [digits(before.mean[index]), digits(after.mean[index])],
        "rate": [digits(before.rate[index]), digits(after.rate[index])],
        "share": digits(after.drift[index] / (after.drift.sum() or 1.0)),
        "training": [
            0.0,
            *(digits(p[kind].mean[index] - before.mean[index]) for p in report.checkpoints.values()),
        ],
        "contexts": [context_data(context) for context in report.contexts[kind][index]],
    }


def context_data(context: Context) -> dict[str, Any]:
    values = dataclasses.asdict(context)
    return values | {side: [digits(value) for value in values[side]] for side in ("reference", "policy")}


def digits(value: float) -> float:
    """Four significant digits: all that the page shows, and a quarter of the bytes."""
    return float(f"{value:.4g}")
