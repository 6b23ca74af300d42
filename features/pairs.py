"""What preference data would teach, read before training: `eval.py --config-path=... ++mode=features ++data=[PAIRS]`.

The model that training starts from reads both completions of every pair, and an SAE says how active each feature is in
them, on average over the text tokens. Of each feature the difference x, chosen less rejected, is summed up over the
pairs: `data_features.parquet` has a row for each feature, `report.html` shows those that speak loudest, with the pairs
that say it. `++score_by=` writes the pairs again, with a score of each.

What the reference cache of loss=fpo holds is all that is needed, so where it is there, the model reads only the pairs
that the page shows. Shape letters: n pairs, F features, Q = F + 1 quantities, the last of which is the length, G groups
of prompts.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table
from torch import Tensor

from data import tokenise
from dataloader import DataLoader, short_names
from distributed import parallel
from features.intervals import groups_of, ratio, with_interval
from features.measure import Part, described_parts
from features.outcome import Finished, Outcome, measure_outcome
from features.probe import TextRecords, half_of, read_texts, texts_of
from features.reading import batches_of_ranks, decode, pieces
from features.report import SCATTER_POINTS, digits, feature_columns, label, named
from launch import assembly, settings
from launch.schema import Config
from models import read_residual
from sae import attention_sinks, require_different, require_features
from training.loop import Subject
from training.reference import ReferenceCache
from utils import UserError, as_json, atomic_write, console, html_page, progress_bar, require_writable, write_json_lines

AT_ONCE = 256  # pairs whose differences [n, Q] are in memory together, but for a prompt that has more
SHOWN = 8  # features that the chosen completions have most more of, and as many of the rejected ones', with
EXAMPLES = 3  # pairs of each, of which
BEFORE, AFTER = 16, 24  # tokens around the strongest one are shown
TABLE = "data_features.parquet"
LINES_SHOWN = 10  # of the table on the terminal


# ----------------------------------------------------------------------------------------------------- the figures


SUMMED = ("x", "squares", "chosen", "rejected", "more", "less", "first", "second")  # over the pairs of a group


class Differences:
    """Sums over pairs of the differences x [n, Q], and for each quantity the pairs that differ most.

    Pairs of one prompt are not independent, so what a prompt's pairs add up to counts for the standard error. Intervals
    are over G groups of prompts (features/intervals.py).
    """

    def __init__(self, width: int, groups: int) -> None:
        self.prompts, self.squared_sizes = 0, 0.0  # the last: over prompts, of their numbers of pairs
        self.counts = torch.zeros(groups, 3, dtype=torch.float64)  # pairs: all, those of either half of the prompts
        self.groups = torch.zeros(groups, len(SUMMED), width, dtype=torch.float64)
        self.prompt_squares, self.by_size = torch.zeros(2, width, dtype=torch.float64)
        self.most = torch.full((2 * EXAMPLES, width), -torch.inf)
        self.most[EXAMPLES:] = torch.inf  # the smallest
        self.keys = torch.full(self.most.shape, -1)

    @property
    def pairs(self) -> int:
        return int(self.counts[:, 0].sum())

    @property
    def x(self) -> Tensor:
        """The sums [Q] of the differences."""
        return self.groups[:, SUMMED.index("x")].sum(0)

    def add(
        self, chosen: Tensor, rejected: Tensor, keys: Sequence[int], prompt: Tensor, half: Tensor, group: Tensor
    ) -> None:
        """Pairs [n, Q] each, known by `keys`, all those of some prompts: `prompt` [n] numbers these from 0, `half` [n]
        and `group` [n] say which half and which group of the prompts each belongs to."""
        x = (chosen - rejected).double()
        sizes = prompt.bincount().double()
        of_prompts = torch.zeros(len(sizes), x.shape[1], dtype=torch.float64).index_add_(0, prompt, x)
        self.prompts, self.squared_sizes = self.prompts + len(sizes), self.squared_sizes + float(sizes.square().sum())
        self.prompt_squares += of_prompts.square().sum(0)
        self.by_size += sizes @ of_prompts
        for place, values in enumerate((x, x.square(), chosen.double(), rejected.double(), x > 0, x < 0)):
            self.groups[:, place].index_add_(0, group, values.double())
        self.counts[:, 0].index_add_(0, group, torch.ones(len(x), dtype=torch.float64))
        for number in (0, 1):
            own = half == number
            self.groups[:, SUMMED.index("first") + number].index_add_(0, group[own], x[own])
            self.counts[:, 1 + number].index_add_(0, group[own], torch.ones(int(own.sum()), dtype=torch.float64))
        for rows, sign in ((slice(0, EXAMPLES), 1), (slice(EXAMPLES, None), -1)):
            together = torch.cat([sign * self.most[rows], sign * x.float()])
            known = torch.cat([self.keys[rows], torch.tensor(keys)[:, None].expand(-1, x.shape[1])])
            best = together.topk(EXAMPLES, dim=0)
            self.most[rows], self.keys[rows] = sign * best.values, known.gather(0, best.indices)

    def over_ranks(self) -> None:
        """Add up the sums of all ranks. The pairs that differ most stay with the rank that read them."""
        counts = torch.tensor([self.prompts, self.squared_sizes], dtype=torch.float64)
        self.prompts, self.squared_sizes = parallel.sum_over_ranks(counts).tolist()
        self.groups, self.counts = map(parallel.sum_over_ranks, (self.groups, self.counts))
        self.prompt_squares, self.by_size = map(parallel.sum_over_ranks, (self.prompt_squares, self.by_size))

    def figures(self) -> dict[str, np.ndarray]:
        """A column [Q] for each figure, and for all but z half the width of its 95 % interval, `..._error`.

        delta: the mean of x. d: delta over the standard deviation of x. z: delta over its standard error, clustered by
        prompt. delta_first, delta_second: delta on either half of the prompts. more, less: the share of pairs whose
        chosen, or rejected, completion has more.
        """
        counts = self.counts[:, :, None].expand(-1, -1, self.groups.shape[2])
        values, errors = with_interval(torch.cat([self.groups, counts], 1).numpy(), means_of)
        columns: dict[str, np.ndarray] = {}
        for name, value, error in zip(FIGURES, values, errors, strict=True):
            columns |= {name: value, f"{name}_error": error}
        delta, n = torch.from_numpy(columns["delta"]), self.pairs
        clustered = self.prompt_squares - 2 * delta * self.by_size + delta.square() * self.squared_sizes
        error = (clustered.clamp(min=0) * self.prompts / (self.prompts - 1)).sqrt() / n
        return columns | {"z": torch.where(delta == 0, 0.0, delta / error).numpy()}


FIGURES = ("chosen_mean", "rejected_mean", "delta", "d", "delta_first", "delta_second", "more", "less")


def means_of(sums: np.ndarray) -> np.ndarray:
    """FIGURES [8, Q], from sums [len(SUMMED) + 3, Q] over pairs: the last three are how many that are, in all and in
    either half of the prompts."""
    x, squares, chosen, rejected, more, less, first, second, n, n_first, n_second = sums
    delta = x / n
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.sqrt((squares - n * delta**2).clip(min=0) / (n - 1))
        d = np.where(delta == 0, 0.0, delta / deviation)
        halves = ratio(first, n_first), ratio(second, n_second)
    return np.stack([chosen / n, rejected / n, delta, d, *halves, more / n, less / n])


def groups(prompts: Sequence[str]) -> Iterator[list[int]]:
    """The places of all pairs of some prompts, in groups of AT_ONCE pairs or of one prompt."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    group: list[int] = []
    for number, place in enumerate(order):
        group.append(place)
        ends = number + 1 == len(order) or prompts[order[number + 1]] != prompts[place]
        if ends and (len(group) >= AT_ONCE or number + 1 == len(order)):
            yield group
            group = []


def differences(loader: DataLoader, cache: ReferenceCache) -> Differences:
    """Of all pairs of the loader, over all ranks. Raises UserError where there are too few to say anything of."""
    keys = loader.used()
    prompts = loader.rows.select_columns("messages")[keys]["messages"]
    if len(set(prompts)) < 2:
        raise UserError(f"data: pairs of {len(set(prompts))} prompt, but what is by chance shows only over several")
    of_prompts, count = groups_of(prompts)
    found = Differences((cache.d_sae or 0) + 1, count)
    with progress_bar("pairs", len(keys), 0) as advance:
        done = 0
        for number, places in enumerate(groups(prompts)):
            done += len(places)
            if number % parallel.world_size() == parallel.rank():
                own = [keys[place] for place in places]
                chosen, rejected = (
                    torch.cat([cache.features(own, side), lengths_of(loader, own, side)], 1) for side in (0, 1)
                )
                names = {text: n for n, text in enumerate(dict.fromkeys(prompts[place] for place in places))}
                prompt = torch.tensor([names[prompts[place]] for place in places])
                half = torch.tensor([half_of(prompts[place]) for place in places])
                group = torch.tensor([of_prompts[place] for place in places])
                found.add(chosen, rejected, own, prompt, half, group)
            advance(done, None)
    found.over_ranks()
    return found


def lengths_of(loader: DataLoader, keys: list[int], side: int) -> Tensor:
    """The tokens [n, 1] of one side's completions."""
    return torch.tensor([[float(completions[side])] for _, completions in loader.shapes(keys)])


# ----------------------------------------------------------------------------------------------------- the pairs


@dataclass(frozen=True)
class Excerpt:
    """The part of a completion where a feature is strongest, with its activation at each token."""

    tokens: list[str]
    values: list[float]
    starts: bool  # with the completion's first token
    ends: bool  # with its last


@dataclass(frozen=True)
class Example:
    """A pair that a feature tells apart."""

    prompt: str  # its end
    difference: float
    source: str
    sides: list[Excerpt]  # chosen, rejected


def strongest_pairs(found: Differences, features: Sequence[int]) -> dict[int, list[tuple[float, int]]]:
    """The pairs (difference, key), over all ranks, that differ most in the direction of each feature's delta."""
    own, x = {}, found.x
    for feature in features:
        rows = slice(0, EXAMPLES) if x[feature] > 0 else slice(EXAMPLES, None)
        pairs = zip(found.most[rows, feature].tolist(), found.keys[rows, feature].tolist())
        own[feature] = [(value, key) for value, key in pairs if key >= 0 and value]
    everywhere = parallel.gather_objects(own)
    joined = {feature: [pair for part in everywhere for pair in part[feature]] for feature in features}
    return {feature: sorted(pairs, key=lambda pair: -abs(pair[0]))[:EXAMPLES] for feature, pairs in joined.items()}


@torch.no_grad()
def read_pairs(subject: Subject, what: str, keys: Sequence[int]) -> Iterator[tuple[int, list[Tensor]]]:
    """Of this rank's share of some pairs, the vectors [M, D] that the SAE reads at the text tokens of either
    completion. For all ranks to call, with the same pairs."""
    assert subject.tap is not None
    for own, batch, counts in batches_of_ranks(subject.loaders["train"], what, keys):
        residual = read_residual(subject.policy, batch, subject.tap).split(batch.read_lengths)
        if counts:
            yield from ((key, [residual[n], residual[len(own) + n]]) for n, key in enumerate(own))


def joined(own: dict[Any, Any]) -> dict[Any, Any]:
    """What all ranks have, each of other keys."""
    return {key: value for part in parallel.gather_objects(own) for key, value in part.items()}


def examples(subject: Subject, pairs: dict[int, list[tuple[float, int]]]) -> dict[int, list[Example]]:
    """The pairs of each feature, read token by token."""
    keys = sorted({key for own in pairs.values() for _, key in own})
    by_key = {key: [f for f, own in pairs.items() if key in [k for _, k in own]] for key in keys}
    shown: dict[tuple[int, int], list[Excerpt]] = {}
    loader, sae = subject.loaders["train"], subject.sae
    assert sae is not None
    for key, sides in read_pairs(subject, "the pairs to show", keys):
        latents = torch.tensor(by_key[key], device=parallel.device())
        active = [sae.encode_latents(x, latents).cpu() for x in sides]
        contents = [[t for t in ids if t != loader.eos_id] for ids in loader.values[key]["completion_ids"]]
        for column, feature in enumerate(by_key[key]):
            shown[feature, key] = [
                excerpt(subject, ids, values[:, column]) for ids, values in zip(contents, active, strict=True)
            ]
    shown = joined(shown)
    found = {}
    for feature, own in pairs.items():
        found[feature] = [
            Example(prompt_end(subject, key), x, loader.rows[key]["source"], shown[feature, key]) for x, key in own
        ]
    return found


def excerpt(subject: Subject, ids: list[int], values: Tensor) -> Excerpt:
    at = int(values.argmax()) if len(values) else 0
    start, end = max(0, at - BEFORE), min(len(ids), at + AFTER + 1)
    shown = [digits(value) for value in values[start:end].tolist()]
    return Excerpt(pieces(subject.tokenizer, ids, start, end), shown, start == 0, end == len(ids))


def prompt_end(subject: Subject, key: int) -> str:
    ids = subject.loaders["train"].values[key]["prompt_ids"]
    return decode(subject.tokenizer, ids[-2 * BEFORE :], skip_special_tokens=True)


# ----------------------------------------------------------------------------------------------------- all of it


def write_data_features(config: Config, run: Finished | None = None) -> Path:
    """Read the pairs of `data`, and write `data_features.parquet`, `report.html` and, with `score_by` or a
    probe, `pairs.jsonl`; of a finished run, what training did beside it. Gives the folder.

    Raises UserError, before a weight is read, for data without pairs and for an SAE that does not fit.
    """
    data_sets = config.data or []
    config = config.model_copy(update={"datasets": data_sets})
    classes = settings.classes_of_loss("fpo")  # so that its reference cache is used
    paths = settings.find_required_paths(config)
    folder = Path(config.cache_dir) / config.exp_name / "data_features" / "+".join(short_names(data_sets).values())
    parallel.from_rank_zero(lambda: require_own_folder(folder, data_sets, config.model.name_or_path))
    reading = assembly.read_saes(config, paths)
    if config.score_by is not None:
        require_different(config.score_by, "score_by")
        require_features(config.score_by, reading.sae.d_sae, "score_by")
    kinds = list(texts_of(config)[1].values()) if config.probe is not None else []
    data = assembly.load_data(config, classes, paths, splits=["train"])
    subject = assembly.load_subject(config, classes, data, reading)
    cached = assembly.make_references(config, classes.binding, paths, data.tokens, subject, reading, ["train"])
    cache, loader = cached["train"], data.loaders["train"]
    assert isinstance(cache, ReferenceCache)

    found = differences(loader, cache)
    columns = found.figures()
    parts = described_parts(config, paths, reading.sae)
    order = np.argsort(-columns["z"][:-1], kind="stable").tolist()
    up = [f for f in order[:SHOWN] if columns["delta"][f] > 0]
    down = [f for f in order[: -SHOWN - 1 : -1] if columns["delta"][f] < 0]
    shown = examples(subject, strongest_pairs(found, up + down))
    scores = None
    if kinds:
        scores = scores_by_behaviour(config, subject, kinds)
    elif config.score_by is not None:
        scores = scores_by_features(config.score_by, loader, cache)

    outcome = None if run is None else measure_outcome(run, subject, columns)
    if parallel.rank() == 0:
        about = {
            "model": config.model.name,
            "source": config.model.name_or_path,
            "data": data_sets,
            "pairs": found.pairs,
            "prompts": int(found.prompts),
            "sae": [asdict(part) for part in parts],
        }
        if outcome is not None:
            columns |= outcome.columns
            about["outcome"] = outcome_data(outcome)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / TABLE) as part:
            pq.write_table(table(columns, parts, about), part)
        with atomic_write(folder / "report.html") as part:
            part.write_text(page(columns, parts, shown, up, down, about, outcome))
        if scores is not None:
            with atomic_write(folder / "pairs.jsonl") as part, part.open("wb") as file:
                write_json_lines(file, *scored_rows(loader, scores))
        show(columns, parts, up, down)
        files = "report.html, data_features.parquet" + (", pairs.jsonl" if scores is not None else "")
        if outcome is not None:
            console.print(foretold(outcome), markup=False)
        console.print(f"written to {folder}: {files}", markup=False)
    return folder


def require_own_folder(folder: Path, data: list[str], model: str) -> None:
    """Raises UserError where the report cannot be written, or would replace one on other data, or on another model."""
    for place in (folder, folder.parent):
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise UserError(f"{place}: a link or a file, where a directory for the report has to be")
    if (folder / TABLE).is_file():
        try:
            about = json.loads((pq.read_schema(folder / TABLE).metadata or {})[b"data_features"])
        except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
            raise UserError(f"{folder / TABLE} is there already, and not of this command; move it") from error
        for other, own in ((about.get("data"), data), (about.get("source", model), model)):
            if other != own:
                raise UserError(f"{folder} is on {other}, not on {own}; ++exp_name= names another place")
    require_writable(folder / TABLE)


def scores_by_features(features: list[int], loader: DataLoader, cache: ReferenceCache) -> dict[int, float]:
    """Of each pair, by how much more active the features are, added up, in the chosen completion."""
    keys = loader.used()
    scores: dict[int, float] = {}
    for start in range(0, len(keys), AT_ONCE):
        own = keys[start : start + AT_ONCE]
        chosen, rejected = (cache.features(own, side)[:, features].sum(1) for side in (0, 1))
        scores |= dict(zip(own, (chosen - rejected).tolist()))
    return scores


def scores_by_behaviour(config: Config, subject: Subject, kinds: list[TextRecords]) -> dict[int, float]:
    """Of each pair, the cosine of v_pair and v_behaviour (2602.11079): of the mean vector of the chosen completion's
    text tokens less that of the rejected one's, and of the probe's first kind of text less its second."""
    limits = {"max_length": config.model.max_length, "max_prompt_length": config.model.max_prompt_length}
    template = tokenise.make_template(config, subject.tokenizer)
    loader, means = subject.loaders["train"], []
    assert subject.tap is not None
    how = {"layout": loader.layout, "pad_id": loader.pad_id, "eos_id": loader.eos_id}
    for records in kinds:
        rows = list(tokenise.tokenise(records, subject.tokenizer, template, **limits)[0])
        texts = read_texts(subject.policy, subject.tap, rows, max(1, loader.batch_size), **how)
        vectors = [mean_vector(x) for _, residual, lengths in texts for x in residual.split(lengths)]
        means.append(torch.stack(vectors).mean(0))
    behaviour = means[0] - means[1]
    scores = {}
    for key, sides in read_pairs(subject, "the pairs' vectors", loader.used()):
        chosen, rejected = map(mean_vector, sides)
        scores[key] = float(torch.cosine_similarity(chosen - rejected, behaviour, dim=0))
    return joined(scores)


def mean_vector(x: Tensor) -> Tensor:
    """The mean [D] of vectors [M, D] that are no attention sinks."""
    kept = x.float()[~attention_sinks(x, [len(x)])]
    return kept.sum(0) / max(1, len(kept))


def scored_rows(loader: DataLoader, scores: dict[int, float]) -> Iterator[dict[str, Any]]:
    """The pairs, highest score first, as `datasets=` reads them."""
    for key, score in sorted(scores.items(), key=lambda item: -item[1]):
        row = loader.rows[key]
        chosen, rejected = row["completions"]
        yield {
            "prompt": json.loads(row["messages"]),
            "chosen": chosen,
            "rejected": rejected,
            "score": score,
            "source": row["source"],
        }


def table(columns: dict[str, np.ndarray], parts: list[Part], about: dict[str, Any]) -> pa.Table:
    """A row for each feature, in order, and a last one for the length, whose `sae` and `feature` are null."""
    features = {name: [*values, None] for name, values in feature_columns(parts).items()}
    return pa.table({**features, **columns}).replace_schema_metadata({"data_features": as_json(about)})


def outcome_data(outcome: Outcome) -> dict[str, Any]:
    """All but the columns."""
    names = ("prompts", "samples", "features", "effective", "left_out", "shown")
    return {name: getattr(outcome, name) for name in names} | {"fits": list(map(asdict, outcome.fits))}


def show(columns: dict[str, np.ndarray], parts: list[Part], up: list[int], down: list[int]) -> None:
    """The table on the terminal."""
    shown = Table("feature", "delta", "d", "z", "halves", "chosen has more", "rejected has more")
    for place in [-1, *up[: LINES_SHOWN // 2], *down[: LINES_SHOWN // 2]]:
        values = {name: float(column[place]) for name, column in columns.items()}
        shown.add_row(
            "length" if place < 0 else label(parts, place),
            *(f"{values[name]:.3g}" for name in ("delta", "d", "z")),
            f"{values['delta_first']:.3g}, {values['delta_second']:.3g}",
            *(f"{values[name]:.1%}" for name in ("more", "less")),
        )
    console.print(shown)


def foretold(outcome: Outcome) -> str:
    """How well the pairs foretold what training did, in a sentence."""
    best, null = outcome.best, outcome.fits[-1]
    return (
        f"Of what training changed in samples for {outcome.prompts:,} held-out prompts ({best.name}), delta accounts "
        f"for R2 = {best.r2.value:.2f} over {outcome.features:,} features, where noise leaves about "
        f"{best.ceiling:.2f} possible; of two draws from the start, for {null.r2.value:.2f}."
    )


def page(
    columns: dict[str, np.ndarray],
    parts: list[Part],
    shown: dict[int, list[Example]],
    up: list[int],
    down: list[int],
    about: dict[str, Any],
    outcome: Outcome | None,
) -> str:
    """The page's HTML."""

    def figures(place: int) -> dict[str, float | None]:
        values = {name: float(column[place]) for name, column in columns.items()}
        return {name: digits(value) if math.isfinite(value) else None for name, value in values.items()}

    def card(feature: int) -> dict[str, Any]:
        own = [asdict(example) | {"difference": digits(example.difference)} for example in shown[feature]]
        name, address = named(parts, feature)
        return {"name": name, "address": address, **figures(feature), "pairs": own}

    firm = np.sign(columns["delta_first"][:-1]) * np.sign(columns["delta_second"][:-1]) > 0
    strong = np.abs(columns["z"][:-1]) > 3
    length = figures(-1)
    data: dict[str, Any] = {"length": length, "up": list(map(card, up)), "down": list(map(card, down)), "outcome": None}
    if outcome is not None:
        change = columns[f"outcome_{outcome.shown}"]
        compared = np.flatnonzero(outcome.compared)
        largest = (np.abs(columns["delta"][:-1]) + np.abs(change[:-1]))[compared].argsort()[::-1][:SCATTER_POINTS]
        names = ("delta", "delta_error", f"outcome_{outcome.shown}", f"outcome_{outcome.shown}_error")
        points = [
            [*named(parts, f), *(digits(float(columns[name][f])) for name in names)] for f in compared[largest].tolist()
        ]
        data["outcome"] = {**outcome_data(outcome), "points": points}
    longer = length["delta"] or 0
    places = {
        "title": f"What {', '.join(Path(name).name for name in about['data'])} would teach {about['model']}",
        "finding": f"{int((strong & firm).sum()):,} of {len(firm):,} features differ between chosen and rejected "
        "completions by more than three standard errors, and with one sign on both halves of the prompts. Chosen "
        f"completions are {abs(longer):.3g} (± {length['delta_error'] or 0:.2g}) tokens "
        f"{'longer' if longer > 0 else 'shorter'}." + ("" if outcome is None else f" {foretold(outcome)}"),
        "subtitle": f"{about['pairs']:,} pairs of {about['prompts']:,} prompts, read by {about['model']} before "
        f"training, through {'; '.join(part['path'] for part in about['sae'])}.",
    }
    return html_page("features/pairs.html", {name: escape(text) for name, text in places.items()}, data)
