"""A model's activations as training data: vectors of many texts, mixed in a buffer of bounded size.

The records of a `DataLoader` are cut into blocks of about `buffer_tokens` text tokens. The model reads one block after
the other; what it computes at the text tokens fills the buffer, and the steps that are trained on it take it in random
order, about `batch_tokens` at a time, until nothing is left. So each step has tokens of many texts, and each token is
used once an epoch.

A block is a function of the records, the seed and its number. So nothing of the buffer has to be saved: a resumed run
fills it again with the block that it stopped in. And each rank keeps the activations of its own records, and takes of
each step's tokens those it has: together the same tokens as one rank would take.

Shape letters: M tokens, D width of what is read.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from data.batch import PAD, Batch
from dataloader import DataLoader
from distributed import parallel
from utils import UserError


@dataclass(frozen=True)
class Activations:
    """What one step is trained on, on one rank."""

    x: Tensor  # [M, D] this rank's vectors, in the model's dtype
    rows: np.ndarray  # [M] of the records that they come from
    tokens: int  # of the step, over all ranks
    left_out: int  # this rank's text tokens that would belong to the step but are not trained on

    @property
    def index(self) -> list[int]:
        """The records of which something is not finite."""
        return sorted(set(self.rows[~self.x.isfinite().all(1).numpy(force=True)].tolist()))


@dataclass(frozen=True)
class BufferBlock:
    """What the buffer holds at one time, over all ranks."""

    first: int  # of the loader's steps
    last: int  # and the one after its last
    records: int
    tokens: int
    steps: int  # that train on it

    def part(self, total: int, step: int) -> int:
        """Where a step's share begins, of so many records or tokens, cut into as many parts as there are steps."""
        return total * step // self.steps


class ActivationLoader:
    """A loader whose steps hold activations; another loader's steps hold records."""

    def __init__(
        self,
        loader: DataLoader,
        read: Callable[[Batch], tuple[Tensor, Tensor]],
        *,
        special: Sequence[int],
        batch_tokens: int,
        buffer_tokens: int,
    ) -> None:
        """`read` gives the vectors [M, D] at a batch's text tokens, in the order of its records: all tokens but
        padding and the `special` ids; and which of them [M] are trained on. Raises UserError for data that has not one
        completion a record, or no text."""
        self.loader, self.read, self.rows = loader, read, loader.rows
        self.lengths = text_lengths(loader.rows, special)
        self.blocks = list(self._cut(batch_tokens, buffer_tokens))
        if not self.blocks:
            raise UserError("loss=sae: the data has no text tokens")
        self.ends = list(accumulate(block.steps for block in self.blocks))
        self.tokens = sum(block.tokens for block in self.blocks)
        self.filled: int | None = None  # the number of the block in the buffer
        self.buffer = torch.empty(0)  # [M, D] of this rank's records
        self.order = np.empty(0)  # in which its vectors are taken: those that are trained on
        self.place = np.empty(0)  # in that order, of each among the block's of all ranks
        self.source = np.empty(0)  # in that order, the record that each comes from
        self.counts: list[int] = []  # of each step of the block, the tokens that are trained on, over all ranks
        self.left_out: list[int] = []  # of each step, this rank's tokens that are not

    def _cut(self, batch_tokens: int, buffer_tokens: int) -> Iterator[BufferBlock]:
        """Blocks of like size: a small one at the end would make a poor last step."""
        rows = [self.loader.indices(step) for step in range(len(self.loader))]
        records = np.cumsum([0, *map(len, rows)])
        tokens = np.cumsum([0, *(self.lengths[own].sum() for own in rows)])
        count = math.ceil(tokens[-1] / buffer_tokens)
        ends = np.searchsorted(tokens, tokens[-1] * np.arange(count + 1) / max(count, 1))
        for first, last in pairwise(np.unique(ends).tolist()):
            own = int(tokens[last] - tokens[first])
            steps = max(1, round(own / batch_tokens))
            yield BufferBlock(first, last, int(records[last] - records[first]), own, steps)

    def __len__(self) -> int:
        """The number of steps."""
        return self.ends[-1]

    def _find(self, step: int) -> tuple[int, int]:
        """The block that a step is in, and its number there."""
        number = bisect_right(self.ends, step)
        return number, step - (self.ends[number] - self.blocks[number].steps)

    def records_in(self, step: int) -> int:
        """How many records a step counts for, over all ranks: an even share of its block's."""
        number, own = self._find(step)
        block = self.blocks[number]
        return block.part(block.records, own + 1) - block.part(block.records, own)

    def steps(self, start: int = 0) -> Iterator[list[Activations]]:
        """This rank's part of each step, from step `start` on."""
        for step in range(start, len(self)):
            number, own = self._find(step)
            self.fill(number)
            yield [self._taken(own)]

    def in_buffer(self, most: int) -> list[Activations]:
        """At most `most` of the first steps in the buffer; none before it was filled."""
        if self.filled is None:
            return []
        return [self._taken(step) for step in range(min(most, self.blocks[self.filled].steps))]

    def _taken(self, step: int) -> Activations:
        """What a step of the block in the buffer takes."""
        assert self.filled is not None
        block = self.blocks[self.filled]
        taken = slice(*np.searchsorted(self.place, [block.part(block.tokens, n) for n in (step, step + 1)]))
        x = self.buffer[torch.from_numpy(self.order[taken]).to(self.buffer.device)]
        return Activations(x, self.source[taken], self.counts[step], self.left_out[step])

    def fill(self, number: int) -> Tensor:
        """This rank's vectors [M, D] of a block: the model runs, unless they are in the buffer already."""
        if self.filled == number:
            return self.buffer
        block, self.buffer = self.blocks[number], torch.empty(0)  # the old one makes room first
        batches, tokens, sources, start = [], [], [], 0  # this rank's; `tokens` are numbered through the block
        for step, own in zip(range(block.first, block.last), self.loader.steps(block.first)):
            rows = self.loader.indices(step)
            first = dict(zip(rows, start + np.cumsum(self.lengths[rows]) - self.lengths[rows]))
            start += self.lengths[rows].sum()
            batches += own
            for row in (row for batch in own for row in batch.index):
                tokens.append(first[row] + np.arange(self.lengths[row]))
                sources.append(np.full(self.lengths[row], row))
        kept = self._read(batches, sum(map(len, tokens)))
        none = np.arange(0)  # a rank may have no records
        place = np.random.default_rng([self.loader.seed, number]).permutation(block.tokens)
        place, source = place[np.concatenate([none, *tokens])], np.concatenate([none, *sources])
        starts = [block.part(block.tokens, step) for step in range(block.steps + 1)]
        self.order = place.argsort()
        read = np.diff(np.searchsorted(place[self.order], starts))
        self.order = self.order[kept[self.order]]
        self.place, self.source, self.filled = place[self.order], source[self.order], number
        trained_on = np.diff(np.searchsorted(self.place, starts))
        self.left_out = (read - trained_on).tolist()
        self.counts = parallel.sum_over_ranks(torch.from_numpy(trained_on)).tolist()
        return self.buffer

    def _read(self, batches: list[Batch], tokens: int) -> np.ndarray:
        """Fill the buffer; gives which of its vectors [M] are trained on."""
        kept, filled = np.zeros(tokens, dtype=bool), 0
        for batch in batches:
            x, own = self.read(batch)
            if not filled:
                self.buffer = x.new_empty(tokens, x.shape[1])
            self.buffer[filled : filled + len(x)] = x
            kept[filled : filled + len(x)] = own.numpy(force=True)
            filled += len(x)
        return kept


def text_positions(batch: Batch, special: Sequence[int]) -> Tensor:
    """Which positions [R, T] of a batch hold text: SAEs are neither trained nor read on BOS, EOS and padding."""
    return (batch.document != PAD) & ~torch.isin(batch.input_ids, torch.tensor(special, device=batch.input_ids.device))


def text_lengths(rows: Dataset, special: Sequence[int]) -> np.ndarray:
    """How many tokens of each record, of its prompt and its completion, are text. Raises UserError where a record has
    several completions."""
    ids = pa.array(list(special))

    def text(lists: Any) -> np.ndarray:
        parents = pc.list_parent_indices(lists).filter(pc.invert(pc.is_in(pc.list_flatten(lists), ids)))
        return np.bincount(parents.to_numpy(zero_copy_only=False), minlength=len(lists))

    found = []
    for part in rows.with_format("arrow").iter(batch_size=10_000):
        prompts, completions = (part[name].combine_chunks() for name in ("prompt_ids", "completion_ids"))
        if pc.max(pc.list_value_length(completions)).as_py() != 1:
            raise UserError("loss=sae reads one completion a record: loss.dataloader=SFTDataLoader")
        found.append(text(prompts) + text(pc.list_flatten(completions)))
    return np.concatenate(found)
