"""Which features of an SAE tell two kinds of text apart: `eval.py ++mode=features ++probe=...`.

The two kinds are two data sets, or completions of the toy language that differ in one attribute. Each text is one
completion; its features are pooled as FPO pools them, so what is found here is what the loss can hold.

Shape letters: S texts, F features; A and B texts of the two kinds.
"""

import random
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

import dataloader
import models
from data import tokenise, toy
from data.batch import batches_by_length, collate
from distributed import parallel
from distributed.sharding import DTYPES
from launch import assembly, settings
from launch.policies import find_policy, require_language_model
from launch.schema import Config
from sae import OTHER_FEATURES, SAE, ResidualTap, pooled_features
from utils import UserError, atomic_write, console, progress_bar, write_json

LINES_SHOWN = 20  # lines of the table on the terminal
RANKED_AT_ONCE = 4096  # features ranked at once, each of which takes some numbers for each text
TextRecords = list[dict[str, Any]]


def write_probe(config: Config, path: Path, overrides: list[str]) -> None:
    """Rank the features of the configuration's SAE in the policy; write the table and the file for
    `loss.feature_weights` into `features/` of the run.

    Raises UserError for a probe that cannot be made and, once the table is written, where no feature is good enough.
    """
    policy = find_policy(path, config, overrides)
    require_language_model(config, policy)
    paths = settings.find_required_paths(config)
    name, kinds = texts_of(config)
    tokenizer = models.load_tokenizer(policy.tokenizer)
    template = tokenise.make_template(config, tokenizer)
    limits = {"max_length": config.model.max_length, "max_prompt_length": config.model.max_prompt_length}
    rows = [list(tokenise.tokenise(records, tokenizer, template, **limits)[0]) for records in kinds.values()]
    halves = [torch.tensor([half_of(row["messages"]) for row in own]) for own in rows]
    for kind, half in zip(kinds, halves):
        if min(half.sum(), (1 - half).sum()) < 2:
            raise UserError(f"probe: {kind} has {len(half)} texts, too few to rank features on one half of the prompts")

    reading = assembly.read_saes(config, paths, policy.folder)
    implementation, layout = models.choose_attention(config.model, models.load_config(policy.folder), pairs=False)
    device, dtype = parallel.device(), DTYPES[config.model.policy_dtype]
    model = models.load_model(
        policy.folder, implementation, device, policy.load_from, dtype=dtype, vocabulary=len(tokenizer)
    )
    tap, sae = reading.tap(model, config.model.block_name), reading.sae.to(device)
    how = {"layout": layout, "pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    how["read_at"] = config.sae.at
    table = ranking(*(pooled(model, tap, sae, own, config.model.eval_batch_size, **how) for own in rows), *halves)
    weights = weights_of(table, config)
    if parallel.rank() == 0:
        folder = (policy.run or Path(config.cache_dir) / config.exp_name) / "features"
        publish(table, weights, list(kinds), [len(own) for own in rows], folder / f"probe-{name}", config)


def pooled(
    model: PreTrainedModel, tap: ResidualTap, sae: SAE, rows: Sequence[dict[str, Any]], batch_size: int, **how: Any
) -> Tensor:
    """Pooled features [S, F], on the CPU, of tokenised texts; `how` goes to `batch.collate`."""
    found = torch.empty(len(rows), sae.d_sae)
    for places, residual, lengths in read_texts(model, tap, rows, batch_size, **how):
        found[places] = pooled_features(sae, residual, lengths).cpu()
    return found


@torch.no_grad()
def read_texts(
    model: PreTrainedModel, tap: ResidualTap, rows: Sequence[dict[str, Any]], batch_size: int, **how: Any
) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """The vectors [M, D] that an SAE reads of tokenised texts, batch by batch: with the places of the batch's texts,
    and how many vectors each has. `how` goes to `batch.collate`."""
    done, lengths = 0, [len(row["prompt_ids"]) + len(row["completion_ids"][0]) for row in rows]
    with progress_bar("probing", len(rows), done) as advance:
        for places in batches_by_length(lengths, batch_size):
            batch = collate([{**rows[i], "index": i} for i in places], **how).to(parallel.device())
            yield places, models.read_residual(model, batch, tap), batch.read_lengths
            done += len(places)
            advance(done, None)


def texts_of(config: Config) -> tuple[str, dict[str, TextRecords]]:
    """The probe's name, and its two kinds of text, by name, as records of one completion: at most `probe_texts` of
    each, drawn at random, the same each time.

    Of a data set the texts are the demonstrations: the targets of `loss=sft`. Raises UserError for a probe that is
    neither an attribute nor two data sets, and for a data set without texts.
    """
    chosen, count = config.probe, config.probe_texts
    if isinstance(chosen, str):
        rows = toy.contrasts(chosen, "train", 0, count)
        kinds = {value: dataloader.Dataset(value) for value in toy.ATTRIBUTES[chosen]}
        for row in rows:
            for kind, text in zip(kinds.values(), (row["first"], row["second"])):
                example = kind[row["prompt"]]
                example.sft_targets.append(example.add_generation(text))
        name, data = chosen, list(kinds.values())
    else:
        entries = chosen or []
        if len(set(entries)) != 2 or len(entries) != 2:
            known = ", ".join(toy.ATTRIBUTES)
            raise UserError(f"probe={chosen}: has to be two different data sets, [a,b], or one of {known}")
        sources = [dataloader.DataSource(entry) for entry in entries]
        sources = [dataloader.DataSource(s.entry, "" if s.is_file else config.eval_split) for s in sources]
        for source in sources:
            source.check()
        data = [source.load(config) for source in sources]
        name = "-vs-".join(Path(entry).name.split(".")[0] for entry in entries)
    found = {}
    for own in data:
        own.bad.check(config.max_bad_rows)
        records = dataloader.SFTDataLoader.records(own)
        if not records:
            raise UserError(f"probe: {own.name} has no demonstrations, whose texts could be told from others")
        found[own.name] = random.Random(0).sample(records, min(count, len(records)))
    return name, found


def half_of(prompt: str) -> int:
    """0 or 1, by a hash of the prompt: features are ranked on the texts of one half of the prompts, and what they are
    worth is measured on the other's."""
    return sha256(prompt.encode()).digest()[0] % 2


def auc(a: Tensor, b: Tensor) -> Tensor:
    """For each feature [F], of values a [A, F] and b [B, F]: the probability that it is larger in a text of a than in
    one of b, ties half (the Mann-Whitney U statistic over A * B)."""
    parts = []
    for own, other in zip(a.split(RANKED_AT_ONCE, dim=1), b.split(RANKED_AT_ONCE, dim=1)):
        ordered, each = other.T.sort(dim=1).values.contiguous(), own.T.contiguous()
        below, up_to = (torch.searchsorted(ordered, each, right=right) for right in (False, True))
        parts.append((below + up_to).double().mean(1) / (2 * len(b)))
    return torch.cat(parts)


def cohens_d(a: Tensor, b: Tensor) -> Tensor:
    """For each feature [F]: the difference of the means in units of the pooled standard deviation (Cohen 1988).

    0 where the means are equal; infinite where they differ and nothing varies.
    """
    difference = a.double().mean(0) - b.double().mean(0)
    freedom = len(a) + len(b) - 2
    variance = ((len(a) - 1) * a.double().var(0) + (len(b) - 1) * b.double().var(0)) / freedom
    return torch.where(difference == 0, 0.0, difference / variance.sqrt())


def ranking(a: Tensor, b: Tensor, half_a: Tensor, half_b: Tensor) -> dict[str, Tensor]:
    """A column for each figure, a row for each feature, those first that tell a [A, F] from b [B, F] best on the texts
    whose half is 0. The figures `_held_out` are of the others, which had no part in the order."""
    ranked, held_out = ((a[half_a == half], b[half_b == half]) for half in (0, 1))
    columns = {
        "feature": torch.arange(a.shape[1]),
        "auc": auc(*ranked),
        "auc_held_out": auc(*held_out),
        "effect_size": cohens_d(*ranked),
        "effect_size_held_out": cohens_d(*held_out),
        "mean_first": a.mean(0),
        "mean_second": b.mean(0),
        "active_first": (a > 0).float().mean(0),
        "active_second": (b > 0).float().mean(0),
    }
    order = (columns["auc"] - 0.5).abs().sort(descending=True, stable=True).indices
    return {name: column[order] for name, column in columns.items()}


def weights_of(table: dict[str, Tensor], config: Config) -> list[dict[str, Any]]:
    """What `loss.feature_weights` takes: the first `probe_features` features, without those whose held-out AUC is less
    than `probe_min_auc` in the direction that they were ranked by."""
    above = table["auc"] >= 0.5
    confirmed = torch.where(above, table["auc_held_out"], 1 - table["auc_held_out"]) >= config.probe_min_auc
    chosen = table["feature"][: config.probe_features][confirmed[: config.probe_features]]
    others = [] if config.probe_others == 1 else [{"index": OTHER_FEATURES, "weight": float(config.probe_others)}]
    return [*others, *({"index": index, "weight": float(config.probe_weight)} for index in chosen.tolist())]


def publish(
    table: dict[str, Tensor],
    weights: list[dict[str, Any]],
    kinds: Sequence[str],
    counts: Sequence[int],
    target: Path,
    config: Config,
) -> None:
    """Show the best features, and write `<target>.parquet` and `<target>.json`. Raises UserError where no feature is
    in `weights`; an older file of weights is then gone."""
    held = {entry["index"] for entry in weights} - {OTHER_FEATURES}
    title = f"{kinds[0]} ({counts[0]:,} texts) or {kinds[1]} ({counts[1]:,})"
    names = ["feature", "AUC", "held out", "effect size", "held out", *(f"mean, {kind}" for kind in kinds), "weight"]
    shown = Table(*names, title=title)
    for row in zip(*(table[name].tolist() for name in list(table)[:7])):
        if shown.row_count == min(LINES_SHOWN, config.probe_features):
            break
        weight = config.probe_weight if row[0] in held else config.probe_others
        shown.add_row(str(row[0]), *(f"{value:.3f}" for value in row[1:]), f"{weight:g}")
    console.print(shown)

    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target.with_name(f"{target.name}.parquet")) as part:
        hf_datasets.Dataset.from_dict({name: column.tolist() for name, column in table.items()}).to_parquet(part)
    console.print(f"all {len(table['feature']):,} features: {target}.parquet", markup=False)
    file = target.with_name(f"{target.name}.json")
    if not held:
        file.unlink(missing_ok=True)
        raise UserError(
            f"none of the {config.probe_features} best features has a held-out AUC of probe_min_auc="
            f"{config.probe_min_auc}, so there are no weights to write"
        )
    write_json(file, weights)
    console.print(f"{len(held)} features to hold: ++loss.feature_weights={file}", markup=False)
