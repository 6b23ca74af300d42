"""A batch: rows for the model, tokens for the loss.

Three layouts give the same numbers. `padded`: one sequence a row. `packed`: all sequences in one row, one after the
other. `shared_prefix`: like `packed`, but each prompt is there once, however many completions it has.

Shape letters: R rows, T positions a row, S sequences (a prompt with one completion), N completion tokens of the batch,
M positions that an SAE reads, B records (a record of paired data holds two sequences).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from data.settings import ReadAt

PAD = -1  # value of `document` at padding
BATCH_LAYOUTS = ("padded", "packed", "shared_prefix")


@dataclass
class Batch:
    """What the model reads in one forward pass, and which tokens the loss reads.

    Token i of a row sees token j if and only if both have the same document, j <= i, and j's branch is 0 (the prompt)
    or i's branch. Sequence c * B + b is completion c of record b, so in paired data all chosen sequences come first.
    """

    input_ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T]
    document: Tensor  # [R, T] the number of the prompt that the position belongs to, PAD for padding
    branch: Tensor  # [R, T] 0 for the prompt, 1, 2, ... for its completions
    predictor: Tensor  # [N] index into R * T of the position whose output predicts the token
    position: Tensor  # [N] index into R * T of the token itself
    target: Tensor  # [N] the token
    sequence: Tensor  # [N] the sequence that the token belongs to, ascending
    read: Tensor  # [M] index into R * T of the positions at which an SAE reads, by sequence; see `collate`
    lengths: list[int]  # [S] number of completion tokens of each sequence
    read_lengths: list[int]  # [S] number of these positions of each sequence; sums to M
    segments: list[tuple[int, int | None]] | None  # of the one row of a packed batch, see `collate`; None if padded
    index: list[Any]  # [B] the records' row numbers in the tokenised data set
    record: dict[str, Tensor] = field(default_factory=dict)  # [B] or [S] labels, scores; indices of sides
    reference: dict[str, Any] = field(default_factory=dict)  # [S] the reference model's cached values
    data_set: str | None = None  # that all records are of, where each data set is measured by itself
    weights: list[float] | None = None  # [B] what each record counts in the loss; None: 1

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def weighted(self, values: Tensor) -> Tensor:
        """Values of the records [B], sequences [S] or completion tokens [N], each times its record's weight."""
        if self.weights is None:
            return values
        records, weights = len(self.weights), torch.tensor(self.weights).to(values.device, non_blocking=True)
        if len(values) == len(self.target):
            return values * weights[self.sequence % max(1, records)]
        return values * weights.repeat(len(values) // max(1, records))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in pinned host memory: a GPU copies from it while the CPU goes on."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: changed(item) for key, item in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return Batch(**{f.name: changed(getattr(self, f.name)) for f in fields(self)})


def sum_by_sequence(values: Tensor, sequence: Tensor, count: int) -> Tensor:
    """The sums [count] of token values [N] over the tokens of each sequence; `sequence` [N] says whose a token is."""
    return values.new_zeros(count).index_add(0, sequence, values)


def collate(
    records: Sequence[dict[str, Any]], layout: str, *, pad_id: int, eos_id: int, read_at: ReadAt = "text"
) -> Batch:
    """The batch of some records in one of BATCH_LAYOUTS.

    A record has `prompt_ids` (list of ints, never empty: it starts with BOS, or with the template's prefix),
    `completion_ids` (for each completion a list of ints, never empty) and `index`. In `shared_prefix`, records with the
    same prompt share it. Without records the batch has one prompt token and no completion: a rank that has no records
    can run it, and it adds nothing to the loss.

    SAEs read a completion at its `text`, the tokens but the end of sequence, or at the positions `predicting` its
    tokens: the last one of the prompt, and each token that another one follows.

    `packed` and `shared_prefix` make one row, which is a list of segments: (tokens, None) for a prompt or a whole
    sequence, (tokens, index of the prompt's segment) for a completion of a shared prompt.
    """
    completions = len(records[0]["completion_ids"]) if records else 0
    sequences = [(record["prompt_ids"], record["completion_ids"][c]) for c in range(completions) for record in records]
    documents = _documents(sequences, shared=layout == "shared_prefix") if sequences else [([eos_id], [])]
    rows = _write_rows(documents, [completion for _, completion in sequences], pad_id if layout == "padded" else None)
    lengths = [len(completion) for _, completion in sequences]
    predictor, position, sequence = _token_indices(lengths, rows.before, rows.start)
    target = torch.tensor(rows.input_ids)[position]
    kept = slice(None) if read_at == "predicting" else target != eos_id
    shape = (len(documents), -1) if layout == "padded" else (1, -1)
    return Batch(
        input_ids=torch.tensor(rows.input_ids).view(shape),
        position_ids=torch.tensor(rows.position_ids).view(shape),
        document=torch.tensor(rows.document).view(shape),
        branch=torch.tensor(rows.branch).view(shape),
        predictor=predictor,
        position=position,
        target=target,
        sequence=sequence,
        read=(predictor if read_at == "predicting" else position)[kept],
        lengths=lengths,
        read_lengths=sequence[kept].bincount(minlength=len(sequences)).tolist(),
        segments=None if layout == "padded" else rows.segments,
        index=[record["index"] for record in records],
    )


Document = tuple[list[int], list[int]]  # a prompt, and the numbers of the sequences that continue it


def _documents(sequences: Sequence[tuple[list[int], list[int]]], *, shared: bool) -> list[Document]:
    """One document for each sequence (prompt, completion) or, if `shared`, for each different prompt."""
    if not shared:
        return [(prompt, [s]) for s, (prompt, _) in enumerate(sequences)]
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for s, (prompt, _) in enumerate(sequences):
        by_prompt.setdefault(tuple(prompt), []).append(s)
    return [(list(prompt), members) for prompt, members in by_prompt.items()]


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of sequences of these lengths, in batches of `size`, the shortest sequences first: little padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def batches_within(shapes: Sequence[tuple[int, list[int]]], layout: str, max_tokens: int) -> list[list[int]]:
    """Indices of records of these shapes in batches of at most `max_tokens` positions, or of one record; the longest
    first, so that what is too much for the memory shows at once."""
    batches: list[list[int]] = []
    for index in sorted(range(len(shapes)), key=lambda i: -count_positions([shapes[i]], layout)):
        if batches and count_positions([shapes[i] for i in (*batches[-1], index)], layout) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class _Rows:
    """The rows of a batch, one after the other in flat lists, and where each completion is in them."""

    def __init__(self, num_sequences: int) -> None:
        self.input_ids: list[int] = []
        self.position_ids: list[int] = []
        self.document: list[int] = []
        self.branch: list[int] = []
        self.segments: list[tuple[int, int | None]] = []
        self.before = [0] * num_sequences  # index of the token before each completion: the prompt's last
        self.start = [0] * num_sequences  # index of each completion's first token

    def append(self, ids: Sequence[int], position: int, document: int, branch: int) -> None:
        """Add tokens, the first of which has this position in its document."""
        self.input_ids.extend(ids)
        self.position_ids.extend(range(position, position + len(ids)))
        self.document.extend([document] * len(ids))
        self.branch.extend([branch] * len(ids))


def _write_rows(documents: Sequence[Document], completions: Sequence[list[int]], pad_id: int | None) -> _Rows:
    """Write each prompt and its completions. A `pad_id` gives each document a row of its own, padded to one width."""
    rows = _Rows(len(completions))
    width = max(len(prompt) + sum(len(completions[s]) for s in members) for prompt, members in documents)
    for number, (prompt, members) in enumerate(documents):
        rows.append(prompt, 0, number, branch=0)
        prompt_end, prompt_segment = len(rows.input_ids) - 1, len(rows.segments)
        if len(members) != 1:
            rows.segments.append((len(prompt), None))
        for branch, s in enumerate(members, start=1):
            ids = completions[s]
            rows.before[s], rows.start[s] = prompt_end, len(rows.input_ids)
            rows.segments.append((len(prompt) + len(ids), None) if len(members) == 1 else (len(ids), prompt_segment))
            rows.append(ids, len(prompt), number, branch)
        if pad_id is not None:
            rows.append([pad_id] * ((number + 1) * width - len(rows.input_ids)), 0, PAD, branch=0)
    return rows


def _token_indices(
    lengths: Sequence[int], before: Sequence[int], start: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`predictor`, `position` and `sequence` [N] of a Batch, from the length [S] of each completion, the index [S] of
    the token before it and the index [S] of its first token."""
    count = torch.tensor(lengths, dtype=torch.long)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), count)
    first = count.cumsum(0) - count  # index into N of each completion's first token
    position = torch.arange(len(sequence)) + (torch.tensor(start, dtype=torch.long) - first)[sequence]
    predictor = position - 1
    predictor[first] = torch.tensor(before, dtype=torch.long)
    return predictor, position, sequence


def count_positions(shapes: Sequence[tuple[int, list[int]]], layout: str) -> int:
    """The number R * T of positions in a batch of records with these shapes: (prompt length, completion lengths).

    For `shared_prefix` it is an upper bound, since a prompt that several records share is counted once for each.
    """
    if layout == "shared_prefix":
        return sum(prompt + sum(completions) for prompt, completions in shapes)
    sequences = [prompt + completion for prompt, completions in shapes for completion in completions]
    return sum(sequences) if layout == "packed" else len(sequences) * max(sequences)


def micro_batches(
    shapes: Sequence[tuple[int, list[int]]], layout: str, *, ranks: int, least: int, max_tokens: int | None
) -> list[list[list[int]]]:
    """Split records into micro-batches: indices [ranks][micro-batches][records] into `shapes`.

    All ranks get the same number of micro-batches. It is `least`, but not more than the records can fill, and at least
    1. It grows until every micro-batch of two records or more has at most `max_tokens` positions. The longest record
    goes first, each to the micro-batch with the fewest positions, so that ranks which wait for each other have similar
    work. If there are fewer records than ranks, some micro-batches are empty.
    """
    cost = [count_positions([shape], layout) for shape in shapes]
    longest_first = sorted(range(len(shapes)), key=lambda i: -cost[i])
    count = max(1, min(least, len(shapes) // ranks))
    while True:
        bins: list[list[int]] = [[] for _ in range(ranks * count)]
        load = [0] * len(bins)
        for i in longest_first:
            lightest = min(range(len(bins)), key=lambda b: (load[b], len(bins[b])))
            bins[lightest].append(i)
            load[lightest] += cost[i]
        largest = max((count_positions([shapes[i] for i in part], layout) for part in bins if len(part) > 1), default=0)
        if max_tokens is None or largest <= max_tokens:
            break
        count += 1
    bins.sort(key=lambda part: -sum(cost[i] for i in part))
    return [[sorted(part) for part in bins[rank::ranks]] for rank in range(ranks)]
