"""The report on features: a table for further work, and a page to read and to show, which fetches nothing."""

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.intervals import with_interval
from features.measure import Measured, Part, Report
from features.reading import Context, Figures
from features.trust import Estimate, Trust
from utils import as_json, atomic_write, html_page

SCATTER_POINTS = 2000  # features of the scatter plot: those that moved most
DIFFERING = 12  # features of the table beside it
MOST = 0.5  # a larger share of the change outside the SAE is warned of
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
                **{f"{name}_error": error for name, error in measured.errors(kind).items()},
            }
            tables.append(pa.table(columns))
    names = ("model", "divergence", "k", "settings", "completions", "tokens")
    about = {name: getattr(report, name) for name in names}
    about |= {"sae": [dataclasses.asdict(part) for part in report.parts]}
    about |= {"trust": {kind: list(map(trust_data, own)) for kind, own in report.trust.items()}}
    about |= {"causes": dataclasses.asdict(report.causes)}
    return pa.concat_tables(tables).replace_schema_metadata({"features": as_json(about)})


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


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's r of two runs' changes [F], over the features that changed in either; NaN where there is none."""
    moved = (one != 0) | (other != 0)
    if not (one[moved].any() and other[moved].any()) or moved.sum() < 3:
        return float("nan")
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
        drifts = [f"{spoken(total_of(run.policy[kind], 'drift'))} in {run.run.name}" for run in (own, other)]
        text += f" On {KIND_NAMES[kind]}, F is {' and '.join(drifts)}."
    return text + "".join(f" {warning}" for warning in warnings(report, "sampled"))


def spoken(estimate: Sequence[float]) -> str:
    """A value with half of its interval, where this is known."""
    value, error = estimate
    return f"{value:.3g}" + (f" (± {error:.2g})" if np.isfinite(error) else "")


def warnings(report: Report, kind: str) -> list[str]:
    """What to be careful with, on one kind of text."""
    said = []
    for part, trust in zip(report.parts, report.trust[kind], strict=True):
        if trust.outside.value > MOST:
            where = "the SAE" if len(report.parts) == 1 else f"the SAE {part.name}"
            within = f" (± {trust.outside.error:.0%})" if np.isfinite(trust.outside.error) else ""
            said.append(
                f"Careful: {trust.outside.value:.0%}{within} of the change of the residual stream on "
                f"{KIND_NAMES[kind]} is outside what {where} rebuilds, so its features tell the smaller part of it."
            )
    return said


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
        "causes": {
            "completions": report.causes.completions,
            "tokens": report.causes.tokens,
            "kl": rounded(report.causes.kl),
            "together": [[name, rounded(share)] for name, share in report.causes.together],
        },
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
        "training": [[0.0, 0.0], *(total_of(profile[kind], "drift") for profile in report.checkpoints.values())],
        "shown": features_data(report, kind),
        "trust": [trust_data(own) | {"name": part.name} for part, own in zip(report.parts, report.trust[kind])],
        "warnings": warnings(report, kind),
    }
    if len(changes) == 2:
        moved = np.abs(changes).sum(0).argsort()[::-1][:SCATTER_POINTS]
        apart = np.abs(changes[1] - changes[0]).argsort()[::-1][:DIFFERING]
        found |= {
            "correlation": correlated(report.runs, kind),
            "moved": int((np.abs(changes).sum(0) > 0).sum()),
            "points": [
                [*named(report.parts, i), *estimated]
                for i, *estimated in zip(moved.tolist(), *changes_of(report.runs, kind, moved))
            ],
            "apart": [
                [*named(report.parts, i), *estimated]
                for i, *estimated in zip(
                    apart.tolist(),
                    pairs_of(*with_interval(own.reference[kind].sums[..., apart], Figures.mean_of)),
                    *changes_of(report.runs, kind, apart),
                    differences_of(report.runs, kind, apart),
                )
            ],
        }
    return found


def change_of(sums: np.ndarray) -> np.ndarray:
    """By how much mean activations rose, from sums of reference and policy [2, len(SUMMED), F]."""
    return Figures.mean_of(sums[1]) - Figures.mean_of(sums[0])


def pairs_of(values: np.ndarray, errors: np.ndarray) -> list[list[float]]:
    """Each value with half of its interval, as the page has them."""
    return [rounded(Estimate(*pair)) for pair in zip(values.tolist(), errors.tolist(), strict=True)]


def changes_of(runs: Sequence[Measured], kind: str, features: Sequence[int] | np.ndarray) -> list[list[list[float]]]:
    """Of each run, by how much the mean activation of some features rose."""
    return [pairs_of(*with_interval(run.both(kind)[..., features], change_of)) for run in runs]


def differences_of(runs: Sequence[Measured], kind: str, features: np.ndarray) -> list[list[float]]:
    """Of some features, the second run's change less the first's."""
    both = [run.both(kind)[..., features] for run in runs]
    if kind == "sampled":  # each on samples of its own
        (one, one_error), (other, other_error) = (with_interval(sums, change_of) for sums in both)
        return pairs_of(other - one, np.hypot(one_error, other_error))
    return pairs_of(*with_interval(np.stack(both, axis=1), lambda sums: change_of(sums[1]) - change_of(sums[0])))


def correlated(runs: Sequence[Measured], kind: str) -> list[float]:
    """The correlation of two runs' changes, and its interval: over prompts where both read the same text."""
    both = [measured.both(kind) for measured in runs]  # [G, 2, len(SUMMED), F]
    changes = [measured.change(kind) for measured in runs]
    if kind == "sampled":  # each on samples of its own
        return [correlation(*changes), float("nan")]

    estimate = with_interval(np.stack(both, axis=1), lambda sums: correlation(*map(change_of, sums)))
    return rounded(Estimate(*map(float, estimate)))


def rounded(estimate: Estimate) -> list[float]:
    return [digits(value) for value in estimate]


def total_of(figures: Figures, what: str) -> list[float]:
    """Of a figure added up over the features, the value and its interval."""
    of_sums = {"drift": Figures.drift_of, "rate": Figures.rate_of}[what]
    return rounded(Estimate(*map(float, with_interval(figures.sums, lambda sums: of_sums(sums).sum()))))


def trust_data(trust: Trust) -> dict[str, Any]:
    """All but the scaling of single features."""
    return {
        "completions": trust.completions,
        "tokens": trust.tokens,
        "fvu": list(map(rounded, trust.fvu)),
        "l0": list(map(rounded, trust.l0)),
        "outside": rounded(trust.outside),
        "words": [[[word, rounded(score)] for word, score in own] for own in (trust.words_for, trust.words_against)],
    }


def named(parts: Sequence[Part], index: int) -> list[str | None]:
    """A feature's label, and its page elsewhere."""
    part, number = owner(parts, index)
    return [label(parts, index), None if part.address is None else f"{part.address}/{number}"]


def run_data(measured: Measured, kind: str) -> dict[str, Any]:
    """The figures of one run on one kind of text, and how its drift adds up over the features, largest first."""
    before, after = measured.reference[kind], measured.policy[kind]
    places = np.unique(np.geomspace(1, len(after.drift), 160).round().astype(int))

    def held(sums: np.ndarray) -> np.ndarray:
        return np.sort(share_of_drift(sums))[::-1].cumsum()[places - 1]

    def needed(share: float) -> list[float]:
        of_sums = with_interval(after.sums, lambda sums: holding(Figures.drift_of(sums), share))
        return rounded(Estimate(*map(float, of_sums)))

    curve = pairs_of(*with_interval(after.sums, held))
    return {
        "drift": total_of(after, "drift"),
        "half": needed(0.5),
        "most": needed(0.9),
        "l0": [total_of(before, "rate"), total_of(after, "rate")],
        "seen": [int((before.rate > 0).sum()), int((after.rate > 0).sum())],
        "curve": [[place, *share] for place, share in zip(places.tolist(), curve, strict=True)],
    }


def share_of_drift(sums: np.ndarray) -> np.ndarray:
    """What each feature adds to the drift, as a share of it, from `Figures.sums`."""
    drift = Figures.drift_of(sums)
    return drift / (drift.sum() or 1.0)


def features_data(report: Report, kind: str) -> list[dict[str, Any]]:
    """The features that are shown, with their contexts."""
    own = report.runs[0]
    before, after, errors = own.reference[kind], own.policy[kind], own.errors(kind)
    scaling = {index: share for trust in report.trust[kind] for index, share in trust.scaling.items()}
    drift = with_interval(after.sums, share_of_drift)
    shown_features = list(report.contexts[kind])
    training = [
        changes_of([Measured(own.run, own.reference, profile)], kind, shown_features)[0]
        for profile in report.checkpoints.values()
    ]
    found = []
    for place, (index, contexts) in enumerate(report.contexts[kind].items()):
        name, address = named(report.parts, index)
        shown = {
            "name": name,
            "address": address,
            "mean": [digits(before.mean[index]), digits(after.mean[index])],
            "mean_error": [digits(errors[model][index]) for model in ("reference", "policy")],
            "change_error": digits(errors["change"][index]),
            "rate": [digits(before.rate[index]), digits(after.rate[index])],
            "rate_error": [digits(errors[f"{model}_rate"][index]) for model in ("reference", "policy")],
            "share": [digits(values[index]) for values in drift],
            "scaling": rounded(scaling[index]),
            "cause": rounded(report.causes.features[index]),
            "training": [[0.0, 0.0], *(moved[place] for moved in training)],
            "contexts": [context_data(context) for context in contexts],
        }
        found.append(shown)
    return found


def context_data(context: Context) -> dict[str, Any]:
    values = dataclasses.asdict(context)
    return values | {side: [digits(value) for value in values[side]] for side in ("reference", "policy")}


def digits(value: float) -> float:
    """Four significant digits: all that the page shows, and a quarter of the bytes."""
    return float(f"{value:.4g}")
