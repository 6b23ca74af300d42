"""What a reward model on an SAE pays for: `python eval.py --config-path=RUN ++mode=features`, loss=bradley-terry-sae.

It reads the held-out pairs. The reward is a sum over features, so the mean margin is too: a feature's contribution is
its weight times its mean activation at the last token of chosen completions less that of rejected ones.
`<run>/features/` gets `paid.parquet`, a row for each feature, and `paid.html`.

Shape letters: S sequences of a batch, F features, K features shown, G groups of prompts (features/intervals.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table
from torch import Tensor

import models
from dataloader import DataLoader
from distributed import parallel
from distributed.sharding import full_tensor
from features.intervals import groups_of, with_interval
from features.measure import Part, described_parts
from features.reading import PROMPT_END, batches_of_ranks, decode
from features.report import digits, feature_columns, named
from launch import assembly, settings
from launch.policies import find_policy
from launch.schema import Config
from launch.settings import RunClasses
from utils import UserError, as_json, atomic_write, console, html_page

SHOWN = 8  # features that add most to the margin, and as many that take most from it, with
EXAMPLES = 3  # completions in which each is strongest
TEXT_END = 60  # last tokens of these
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Paid:
    """What is known of the features of a reward model."""

    weights: np.ndarray  # [F]
    sums: np.ndarray  # [G, 2, 2, F] of chosen and rejected completions: the activation, and whether there is one
    pairs: np.ndarray  # [G, 3]: how many, how many in the right order, their margins

    def means(self) -> np.ndarray:
        """[2, 2, F], over the pairs."""
        return self.sums.sum(0) / self.pairs[:, 0].sum()

    def contributions(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each feature to the mean margin, [F], and the half-width of its interval over prompts."""
        sums = np.concatenate([self.sums[:, 0, 0] - self.sums[:, 1, 0], self.pairs[:, :1]], axis=1)
        return with_interval(sums, lambda s: self.weights * s[:-1] / s[-1])

    def figure(self, column: int) -> list[float]:
        """The accuracy (1) or the mean margin (2), and the half-width of its interval."""
        return [digits(float(value)) for value in with_interval(self.pairs, lambda s: s[column] / s[0])]


def write_paid_features(config: Config, classes: RunClasses, path: Path, overrides: list[str]) -> None:
    """Raises UserError, before a weight is read, where there is no trained reward model."""
    if config.compare_to is not None:
        raise UserError(
            f"compare_to={config.compare_to}: mode=features of loss={config.loss.name} says what the reward model pays "
            "for, and compares it with no other run"
        )
    policy = find_policy(path, config, overrides)
    if policy.run is None:
        raise UserError(f"mode=features reads a run of loss={config.loss.name}; --config-path={path} is none")
    paths = settings.find_paths(config, classes.binding.needs)
    reading = assembly.read_saes(config, paths)
    new_head = reading.new_head(classes)
    assert new_head is not None
    assembly.require_sae_of_head(policy.folder, policy.load_from, new_head, paths.saes[0])
    data = assembly.load_data(config, classes, paths, splits=["eval"])
    parts = described_parts(config, paths, reading.sae)
    if new_head.trained:  # its features are those of the public SAE no more
        parts = [Part(part.name, part.path, part.place, part.d_sae, None) for part in parts]
    places = (len(data.tokenizer), policy.folder, policy.load_from)
    model = assembly.build_model(config.model, data.implementation, *places, reward=True, frozen=True)
    loader = data.loaders["eval"]
    paid = measure(model, loader)
    shown, strongest = most_paid(paid), {}
    if any(shown):
        strongest = strongest_texts(model, loader, [*shown[0], *shown[1]], data.tokenizer)
    if parallel.rank() == 0:
        page = paid_page(paid, parts, shown, strongest, config, policy.run.resolve().name)
        publish(paid, parts, page, policy.run / "features")
    console.print(finding(paid, parts))
    show(paid, parts, shown)
    console.print(f"written to {policy.run / 'features'}: paid.html, paid.parquet")


@torch.no_grad()
def read_pairs(model: Any, loader: DataLoader, what: str) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """This rank's share of the pairs, batch by batch: their keys, the rewards [S] and the features [S, F]; the chosen
    ones come first."""
    for own, batch, counts in batches_of_ranks(loader, what, loader.used()):
        scores = models.score_rewards(model, batch)
        features = model.score.encode(scores.hidden)
        if counts:
            yield own, scores.rewards, features


def measure(model: Any, loader: DataLoader) -> Paid:
    """Sums over the pairs. Raises UserError for rewards that are no numbers."""
    keys = loader.used()
    groups, count = groups_of([tuple(loader.values[key]["prompt_ids"]) for key in keys])
    group_of, head = dict(zip(keys, groups)), model.score
    options: Any = {"dtype": torch.float64, "device": parallel.device()}
    sums = torch.zeros(count, 2, 2, head.d_sae, **options)
    pairs, weights = torch.zeros(count, 3, **options), full_tensor(head.weight)[0].float()
    for own, rewards, features in read_pairs(model, loader, "what is paid for"):
        group = torch.tensor([group_of[key] for key in own], device=rewards.device)
        both = torch.stack([features, (features > 0).float()], dim=1).unflatten(0, (2, len(own))).transpose(0, 1)
        sums.index_add_(0, group, both.double())
        chosen, rejected = rewards.double().chunk(2)
        counted = [torch.ones_like(chosen), (chosen > rejected).double(), chosen - rejected]
        pairs.index_add_(0, group, torch.stack(counted, 1))
    sums, pairs = parallel.sum_over_ranks(sums), parallel.sum_over_ranks(pairs)
    if not pairs.isfinite().all():
        raise UserError("a reward is not a number: the weights, or model.policy_dtype, are at fault")
    return Paid(weights.numpy(force=True), sums.numpy(force=True), pairs.numpy(force=True))


def most_paid(paid: Paid) -> tuple[list[int], list[int]]:
    """The features that add most to the margin, and those that take most from it, the strongest first."""
    added, _ = paid.contributions()
    order = added.argsort(kind="stable").tolist()
    return [i for i in order[::-1][:SHOWN] if added[i] > 0], [i for i in order[:SHOWN] if added[i] < 0]


def strongest_texts(
    model: Any, loader: DataLoader, shown: Sequence[int], tokenizer: Any
) -> dict[int, list[dict[str, Any]]]:
    """The completions at whose last token each of some features is strongest, no text twice."""
    found: list[tuple[list[float], int, int]] = []  # the activations [K] of a completion: of which pair, of which side
    for own, _, features in read_pairs(model, loader, "where it is active"):
        values = features[:, list(shown)].tolist()
        found += [(values[row], own[row % len(own)], row // len(own)) for row in range(len(values))]
    everywhere = [one for part in parallel.gather_objects(found) for one in part]
    texts: dict[int, list[dict[str, Any]]] = {}
    for column, feature in enumerate(shown):
        best: dict[tuple[int, ...], dict[str, Any]] = {}
        for values, key, side in sorted(everywhere, key=lambda one: (-one[0][column], one[1], one[2])):
            if values[column] <= 0 or len(best) == EXAMPLES:
                break
            row = loader.values[key]
            ids = row["completion_ids"][side]
            text = decode(tokenizer, ids[-TEXT_END:])
            prompt = decode(tokenizer, row["prompt_ids"][-PROMPT_END:], skip_special_tokens=True)
            shown_text = {"prompt": prompt, "text": text, "starts": len(ids) <= TEXT_END}
            best.setdefault(tuple(ids), {**shown_text, "side": SIDES[side], "value": digits(values[column])})
        texts[feature] = list(best.values())
    return texts


# ----------------------------------------------------------------------------------------------------- what is written


def finding(paid: Paid, parts: Sequence[Part]) -> str:
    """The result, in a sentence."""
    added, error = paid.contributions()
    count, (accuracy, within) = int(paid.pairs[:, 0].sum()), paid.figure(1)
    said = f"{accuracy:.1%} (± {within:.1%}) of {count:,} held-out pairs are in the right order."
    if not added.any():
        return f"{said} No feature adds to the margin."
    strongest, total = int(added.argmax()), np.abs(added).sum()
    half = int((np.sort(np.abs(added))[::-1].cumsum() < total / 2).sum()) + 1
    name, _ = named(parts, strongest)
    return (
        f"{said} Of {len(added):,} features {half:,} make half of what adds to the margin and takes from it; feature "
        f"{name} adds most, {added[strongest]:.3g} (± {error[strongest]:.2g})."
    )


def columns_of(paid: Paid, parts: Sequence[Part]) -> dict[str, Any]:
    (chosen, rejected), (added, error) = paid.means(), paid.contributions()
    return {
        **feature_columns(parts),
        "weight": paid.weights,
        "chosen_mean": chosen[0],
        "rejected_mean": rejected[0],
        "chosen_rate": chosen[1],
        "rejected_rate": rejected[1],
        "contribution": added,
        "contribution_error": error,
    }


def show(paid: Paid, parts: Sequence[Part], shown: tuple[list[int], list[int]]) -> None:
    """The features that add to the margin or take from it most, on the terminal."""
    columns = columns_of(paid, parts)
    table = Table("feature", "weight", "chosen", "rejected", "to the margin", "±")
    for index in (*shown[0][:4], *reversed(shown[1][:4])):
        names = ("weight", "chosen_mean", "rejected_mean", "contribution", "contribution_error")
        table.add_row(str(named(parts, index)[0]), *(f"{columns[name][index]:.3g}" for name in names))
    console.print(table)


def paid_page(
    paid: Paid,
    parts: Sequence[Part],
    shown: tuple[list[int], list[int]],
    strongest: dict[int, list[dict[str, Any]]],
    config: Config,
    name: str,
) -> str:
    """The page's HTML."""
    columns = columns_of(paid, parts)

    def of_feature(index: int) -> dict[str, Any]:
        own = {key: digits(float(columns[key][index])) for key in columns if key not in ("sae", "feature")}
        label, address = named(parts, index)
        return {"name": label, "address": address, **own, "texts": strongest[index]}

    (part,) = parts
    data = {
        "pairs": int(paid.pairs[:, 0].sum()),
        "accuracy": paid.figure(1),
        "margin": paid.figure(2),
        **{way: [of_feature(index) for index in own] for way, own in zip(("up", "down"), shown)},
    }
    places = {
        "title": f"What {name} pays for",
        "finding": finding(paid, parts),
        "subtitle": f"{config.model.name}, its reward linear in {part.d_sae:,} features of {part.path} ({part.place}).",
    }
    return html_page("features/paid.html", {key: escape(text) for key, text in places.items()}, data)


def publish(paid: Paid, parts: Sequence[Part], page: str, folder: Path) -> None:
    """Write the table and the page."""
    folder.mkdir(exist_ok=True)
    about = {"pairs": int(paid.pairs[:, 0].sum()), "accuracy": paid.figure(1), "margin": paid.figure(2)}
    table = pa.table(columns_of(paid, parts)).replace_schema_metadata({"paid": as_json(about)})
    with atomic_write(folder / "paid.parquet") as part:
        pq.write_table(table, part)
    with atomic_write(folder / "paid.html") as part:
        part.write_text(page, encoding="utf-8")
