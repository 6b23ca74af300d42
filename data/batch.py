"""Rows for the model, tokens for the loss.

Three layouts give the same numbers: `padded`, one sequence a row; `packed`, all sequences in one row, one after the
other; `shared_prefix`, the same with each prompt once, whatever the number of its completions.

Shape letters: R rows, T positions a row, N completion tokens of the batch, S sequences (a prompt with one
completion), B records (a record of paired data holds two sequences), M completion tokens that are text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

PAD = -1  # `document` of a position that holds nothing
BATCH_LAYOUTS = ("padded", "packed", "shared_prefix")


@dataclass
class Batch:
    """What one forward pass reads and what the loss reads from it.

    Token i of a row sees token j iff they share a document, j <= i, and j's branch is 0 (the prompt) or i's own.
    Sequence c * B + b is completion c of record b, so paired data holds all chosen ones first.
    """

    input_ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T]
    document: Tensor  # [R, T] which prompt the position belongs to, PAD for none
    branch: Tensor  # [R, T] 0 = prompt, 1, 2, ... = its completions
    predictor: Tensor  # [N] index into R * T of the position whose output predicts the token
    position: Tensor  # [N] index into R * T of the token itself
    target: Tensor  # [N] the token
    sequence: Tensor  # [N] which sequence the token belongs to, ascending
    content: Tensor  # [M] index into N of the tokens that are text, not the end of the sequence
    lengths: list[int]  # [S] completion tokens of each sequence
    content_lengths: list[int]  # [S] the same, of the tokens in `content`; sums to M
    segments: list[tuple[int, int | None]] | None  # of the one row of a packed batch, see `collate`; None where padded
    index: list[Any]  # [B] what the records are known by: their rows in the tokenised data set
    record: dict[str, Tensor] = field(default_factory=dict)  # [B] or [S] labels, scores; indices of sides
    reference: dict[str, Any] = field(default_factory=dict)  # [S] cached values of the reference

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in host memory from which a GPU copies without the host waiting for it."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: changed(item) for key, item in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return Batch(**{f.name: changed(getattr(self, f.name)) for f in fields(self)})


def collate(records: Sequence[dict[str, Any]], layout: str, *, pad_id: int, eos_id: int) -> Batch:
    """The batch of some records in one of BATCH_LAYOUTS.

    A record has `prompt_ids` (list of ints, never empty: it starts with BOS, or with the template's prefix),
    `completion_ids` (one list of ints, never empty, for each completion) and `index`. Records with the same prompt
    share it in `shared_prefix`. No records make a batch of one prompt token and no completion: something for a rank to
    run that has nothing to do, and that counts for nothing.

    The one row of `packed` and `shared_prefix` is a list of segments, (tokens, None) for a prompt or a whole sequence
    and (tokens, number of the prompt's segment) for a completion of a shared prompt.
    """
    completions = len(records[0]["completion_ids"]) if records else 0
    pairs = [(record["prompt_ids"], record["completion_ids"][c]) for c in range(completions) for record in records]
    documents = _documents(pairs, shared=layout == "shared_prefix") if pairs else [([eos_id], [])]
    width = max(len(prompt) + sum(len(pairs[s][1]) for s in own) for prompt, own in documents)

    input_ids: list[int] = []
    position_ids: list[int] = []
    document: list[int] = []
    branch: list[int] = []
    segments: list[tuple[int, int | None]] = []
    before = [0] * len(pairs)  # where the token before each completion is
    start = [0] * len(pairs)  # where each completion starts

    def append(ids: Sequence[int], first: int, number: int, own_branch: int) -> None:
        input_ids.extend(ids)
        position_ids.extend(range(first, first + len(ids)))
        document.extend([number] * len(ids))
        branch.extend([own_branch] * len(ids))

    for number, (prompt, own) in enumerate(documents):
        append(prompt, 0, number, 0)
        end_of_prompt, shared = len(input_ids) - 1, len(segments)
        if len(own) != 1:
            segments.append((len(prompt), None))
        for own_branch, s in enumerate(own, start=1):
            ids = pairs[s][1]
            before[s], start[s] = end_of_prompt, len(input_ids)
            segments.append((len(prompt) + len(ids), None) if len(own) == 1 else (len(ids), shared))
            append(ids, len(prompt), number, own_branch)
        if layout == "padded":
            rest = (number + 1) * width - len(input_ids)
            append([pad_id] * rest, 0, PAD, 0)

    lengths = [len(completion) for _, completion in pairs]
    count = torch.tensor(lengths, dtype=torch.long)
    sequence = torch.repeat_interleave(torch.arange(len(pairs)), count)
    first = count.cumsum(0) - count  # of the N tokens, each completion's first
    position = torch.arange(len(sequence)) + (torch.tensor(start, dtype=torch.long) - first)[sequence]
    predictor = position - 1
    predictor[first] = torch.tensor(before, dtype=torch.long)
    target = torch.tensor(input_ids)[position]
    content = (target != eos_id).nonzero().flatten()
    shape = (-1, width) if layout == "padded" else (1, -1)
    return Batch(
        input_ids=torch.tensor(input_ids).view(shape),
        position_ids=torch.tensor(position_ids).view(shape),
        document=torch.tensor(document).view(shape),
        branch=torch.tensor(branch).view(shape),
        predictor=predictor,
        position=position,
        target=target,
        sequence=sequence,
        content=content,
        lengths=lengths,
        content_lengths=sequence[content].bincount(minlength=len(pairs)).tolist(),
        segments=None if layout == "padded" else segments,
        index=[record["index"] for record in records],
    )


def _documents(pairs: Sequence[tuple[list[int], list[int]]], *, shared: bool) -> list[tuple[list[int], list[int]]]:
    """Prompts with the numbers of the sequences that continue each: one, or, if shared, all that have this prompt."""
    if not shared:
        return [(prompt, [s]) for s, (prompt, _) in enumerate(pairs)]
    found: dict[tuple[int, ...], list[int]] = {}
    for s, (prompt, _) in enumerate(pairs):
        found.setdefault(tuple(prompt), []).append(s)
    return [(list(prompt), own) for prompt, own in found.items()]


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of some sequences, given their lengths, in batches of `size`, the shortest first: little padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def tokens_of(shapes: Sequence[tuple[int, list[int]]], layout: str) -> int:
    """Positions R * T of a batch of records of these shapes: (tokens of the prompt, tokens of each completion).

    For `shared_prefix` it is an upper bound: prompts that several records share are counted for each.
    """
    if layout == "shared_prefix":
        return sum(prompt + sum(completions) for prompt, completions in shapes)
    sequences = [prompt + completion for prompt, completions in shapes for completion in completions]
    return sum(sequences) if layout == "packed" else len(sequences) * max(sequences)


def micro_batches(
    shapes: Sequence[tuple[int, list[int]]], layout: str, *, ranks: int, least: int, max_tokens: int | None
) -> list[list[list[int]]]:
    """Which records each rank runs in each of its micro-batches: [ranks][micro-batches][records].

    All ranks get the same number of micro-batches: `least`, or as many as keep each within `max_tokens` positions, as
    far as they hold more than one record; no more than there are records to fill them, and one at least. Records go,
    the longest first, to the emptiest micro-batch, so that ranks which wait for each other have like work. Where there
    are fewer records than ranks some get an empty one.
    """
    cost = [tokens_of([shape], layout) for shape in shapes]
    longest_first = sorted(range(len(shapes)), key=lambda i: -cost[i])
    count = max(1, min(least, len(shapes) // ranks))
    while True:
        bins: list[list[int]] = [[] for _ in range(ranks * count)]
        load = [0] * len(bins)
        for i in longest_first:
            emptiest = min(range(len(bins)), key=lambda b: (load[b], len(bins[b])))
            bins[emptiest].append(i)
            load[emptiest] += cost[i]
        most = max((tokens_of([shapes[i] for i in own], layout) for own in bins if len(own) > 1), default=0)
        if max_tokens is None or most <= max_tokens:
            break
        count += 1
    bins.sort(key=lambda own: -sum(cost[i] for i in own))
    return [[sorted(own) for own in bins[rank::ranks]] for rank in range(ranks)]
