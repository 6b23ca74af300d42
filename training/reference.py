"""The reference cache: what the reference model says about the data, computed once and kept on disk.

The reference is the policy before its first step (or another model, `model.reference_path`), so nothing needs two
models in memory. The cache is a directory named by a fingerprint of all that its numbers depend on. In it is a sealed
directory with an Arrow file for each shard of records, which appears whole or not at all: a killed run goes on with the
first one missing.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batch import Batch
from distributed import parallel
from modeling import adapters
from models import score
from sae import SAE, ResidualTap, pooled_features
from utils import UserError, console, damaged_files, progress_bar, remove_litter, sealed_folder

SHARD = 512  # records; also how much a killed run can lose
ROWS = "rows.arrow"
CACHE_COLUMNS = datasets.Features(
    {
        "logps": datasets.Value("float32"),
        "token_logps": datasets.List(datasets.Value("float32")),
        "latents": datasets.List(datasets.Value("int32")),  # every feature with a non-zero pooled activation
        "activations": datasets.List(datasets.Value("float32")),
    }
)


class Records(Protocol):
    """What the reference scores: records known by keys that JSON can hold (a DataLoader's rows, for one)."""

    def used(self) -> list[Any]:
        """The keys of all records, in order."""

    def shapes(self, keys: list[Any], /) -> list[tuple[int, list[int]]]:
        """For each record, the number of tokens of its prompt and of each completion."""

    def parts(self, shapes: list[tuple[int, list[int]]], at_once: int, /) -> list[list[int]]:
        """Which of some records go through the model together; `at_once` of them if nothing else limits that."""

    def batch(self, keys: list[Any], /) -> Batch:
        """The batch of some records."""


class ReferenceCache:
    """Rows of a finished cache. Row C * i + c is completion c of the i-th cached record, of C a record."""

    def __init__(self, folder: Path, keys: Sequence[Any], d_sae: int | None) -> None:
        shards = [datasets.Dataset.from_file(str(folder / name / ROWS)) for name in shard_names(len(keys))]
        self.rows = datasets.concatenate_datasets(shards).with_format("numpy")
        self.completions = len(self.rows) // len(keys)
        self.d_sae = d_sae
        self.place = {key: place for place, key in enumerate(keys)}

    def attach(self, batch: Batch) -> Batch:
        """Put `logps` [S], `token_logps` [N] and, with an SAE, `features` [S, F] into `batch.reference`."""
        places = [self.place[key] * self.completions + c for c in range(self.completions) for key in batch.index]
        rows = self.rows[places]
        none = np.empty(0, np.float32)  # a batch may hold no records
        batch.reference = {
            "logps": torch.tensor(rows["logps"]),
            "token_logps": torch.tensor(np.concatenate([none, *rows["token_logps"]])),
        }
        if self.d_sae is not None:
            batch.reference["features"] = dense(rows, self.d_sae)
        return batch

    def features(self, keys: Sequence[Any], completion: int) -> Tensor:
        """The pooled features [R, F] of one completion of some records."""
        assert self.d_sae is not None
        return dense(self.rows[[self.place[key] * self.completions + completion for key in keys]], self.d_sae)


def dense(rows: dict[str, Any], d_sae: int) -> Tensor:
    """The pooled features [R, F] of some rows of the cache."""
    features = torch.zeros(len(rows["latents"]), d_sae)
    for row, latents, activations in zip(features, rows["latents"], rows["activations"]):
        row[torch.tensor(latents, dtype=torch.long)] = torch.tensor(activations, dtype=torch.float32)
    return features


class LiveReference:
    """A frozen reference model in memory, for a loss that needs its whole distribution."""

    def __init__(self, model: PreTrainedModel, tap: ResidualTap | None, sae: SAE | None) -> None:
        self.model, self.tap, self.sae = model, tap, sae

    @torch.no_grad()
    def attach(self, batch: Batch) -> Batch:
        """As `ReferenceCache.attach`, and the whole distribution as `hidden` [N, D] with its `head`."""
        batch = batch.to(parallel.device())
        with adapters.off(self.model):  # with adapters, the policy without them is the reference
            scores = score(self.model, batch, self.tap)
        batch.reference = {
            "logps": scores.logps,
            "token_logps": scores.token_logps,
            "hidden": scores.hidden,
            "head": self.model.get_output_embeddings(),
        }
        if self.sae is not None and scores.residual is not None:
            batch.reference["features"] = pooled_features(self.sae, scores.residual, batch.read_lengths)
        return batch


Reference = ReferenceCache | LiveReference


def shard_names(records: int) -> list[str]:
    return [f"{start:09d}" for start in range(0, records, SHARD)]


def missing_shards(folder: Path, names: list[str]) -> list[int]:
    """The numbers of the shards that are still to be computed. Damaged ones are named, and removed. For all ranks to
    call: each looks at a share of them."""
    own: dict[int, list[str]] = {}
    for number in range(parallel.rank(), len(names), parallel.world_size()):
        if not (folder / names[number]).is_dir():
            own[number] = []
        elif damaged := damaged_files(folder / names[number]):
            own[number] = damaged
    found = {number: files for part in parallel.gather_objects(own) for number, files in part.items()}
    for number, files in sorted(found.items()):
        if files:
            shard = folder / names[number]
            console.print(f"{shard} is damaged ({', '.join(files)}) and made again", style="yellow", markup=False)
            parallel.from_rank_zero(lambda shard=shard: shutil.rmtree(shard, ignore_errors=True))  # type: ignore[misc]
    return sorted(found)


def load_or_build(
    folder: Path,
    records: Records,
    model: PreTrainedModel,
    tap: ResidualTap | None,
    sae: SAE | None,
    batch_size: int,
) -> ReferenceCache:
    """The cache of these records, computed by `model` in eval mode where it is not there yet.

    Raises UserError if the model gives a log-probability that is not finite.
    """
    keys = records.used()
    names = shard_names(len(keys))
    parallel.from_rank_zero(lambda: remove_litter(folder))
    missing = missing_shards(folder, names)
    if not missing:
        console.print(f"reference cache: found {len(keys):,} records in {folder}")
    elif len(missing) < len(names):
        console.print(f"reference cache: going on after {len(names) - len(missing)} of {len(names)} shards in {folder}")
    else:
        console.print(f"reference cache: computing {len(keys):,} records into {folder}")
    model.eval()
    with progress_bar("reference cache", len(names), len(names) - len(missing)) as advance:
        world = parallel.world_size()
        for first in range(0, len(missing), world):
            at_once = missing[first : first + world]
            parts = [keys[shard * SHARD : (shard + 1) * SHARD] for shard in at_once]
            # A rank without a shard of its own scores one all the same: a split model runs on all ranks or on none.
            shard, own = [*zip(at_once, parts), *[(None, parts[0])] * world][parallel.rank()]
            batches = [records.parts(records.shapes(part), max(1, batch_size // world)) for part in parts]
            own_batches = batches[0 if shard is None else parallel.rank()]
            rows = shard_rows(own, own_batches, max(map(len, batches)), records, model, tap, sae)
            if shard is not None:
                with sealed_folder(folder / names[shard]) as part:
                    write_arrow(rows, part / ROWS)
            advance(len(names) - len(missing) + first + len(at_once), None)
    parallel.wait_for_all()
    return ReferenceCache(folder, keys, None if sae is None else sae.d_sae)


@torch.no_grad()
def shard_rows(
    keys: Sequence[Any],
    batches: Sequence[Sequence[int]],
    passes: int,
    records: Records,
    model: PreTrainedModel,
    tap: ResidualTap | None,
    sae: SAE | None,
) -> list[dict[str, Any]]:
    """The cache's rows of some records, in order, by so many passes of the model: one for each batch of them, and
    others for the company of ranks that have more."""
    rows: dict[tuple[Any, int], dict[str, Any]] = {}
    for places in [*batches, *[batches[0][:1]] * (passes - len(batches))]:
        batch = records.batch([keys[place] for place in places])
        rows |= reference_rows(batch.to(parallel.device()), model, tap, sae)
    completions = len(rows) // len(keys)
    return [rows[key, c] for key in keys for c in range(completions)]


def reference_rows(
    batch: Batch, model: PreTrainedModel, tap: ResidualTap | None, sae: SAE | None
) -> dict[tuple[Any, int], dict[str, Any]]:
    """The cache's row of each completion, by the record's key and completion number."""
    scores = score(model, batch, tap)
    if not torch.isfinite(scores.token_logps).all():
        raise UserError(f"the reference gives log-probabilities that are not finite, among records {batch.index}")
    features: Sequence[Tensor | None] = [None] * batch.num_sequences
    if sae is not None and scores.residual is not None:
        features = list(pooled_features(sae, scores.residual, batch.read_lengths))
    logps = scores.logps.tolist()
    token_logps = [part.numpy(force=True) for part in scores.token_logps.split(batch.lengths)]
    rows = {}
    for sequence, pooled in enumerate(features):
        completion, record = divmod(sequence, len(batch.index))
        latents = pooled.nonzero().flatten() if pooled is not None else torch.empty(0, dtype=torch.long)
        rows[batch.index[record], completion] = {
            "logps": logps[sequence],
            "token_logps": token_logps[sequence],
            "latents": latents.numpy(force=True).astype(np.int32),
            "activations": pooled[latents].numpy(force=True) if pooled is not None else np.empty(0, np.float32),
        }
    return rows


def write_arrow(rows: list[dict[str, Any]], path: Path) -> None:
    """One Arrow file that `datasets.Dataset.from_file` maps into memory."""
    with datasets.arrow_writer.ArrowWriter(path=str(path), features=CACHE_COLUMNS) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
