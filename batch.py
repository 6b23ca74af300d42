"""Rows for the model, tokens for the loss.

Shape letters: R rows, T positions a row, N completion tokens of the batch, S sequences (a prompt with one
completion), B records (a record of paired data holds two sequences), M completion tokens that are text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

PAD = -1  # `document` of a position that holds nothing


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
    index: list[Any]  # [B] what the records are known by: their rows in the tokenised data set
    record: dict[str, Tensor] = field(default_factory=dict)  # [B] or [S] per-record values: labels, scores
    reference: dict[str, Any] = field(default_factory=dict)  # [S] cached values of the reference

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            return value.to(device, non_blocking=True) if hasattr(value, "to") else value

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


def collate_padded(records: Sequence[dict[str, Any]], *, pad_id: int, eos_id: int) -> Batch:
    """One sequence a row, padded on the right.

    A record has `prompt_ids` (list of ints, never empty: it starts with BOS, or with the template's prefix),
    `completion_ids` (one list of ints, never empty, for each completion) and `index`.
    """
    completions = len(records[0]["completion_ids"])
    pairs = [(record["prompt_ids"], record["completion_ids"][c]) for c in range(completions) for record in records]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    shape = (len(pairs), width)
    input_ids = torch.full(shape, pad_id)
    document = torch.full(shape, PAD)
    branch = torch.zeros(shape, dtype=torch.long)
    position: list[Tensor] = []
    for row, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        document[row, :end] = row
        branch[row, start:end] = 1
        position.append(torch.arange(start, end) + row * width)
    own = torch.cat(position)
    target = input_ids.flatten()[own]
    lengths = [len(completion) for _, completion in pairs]
    content = target != eos_id
    content_lengths = [int(part.sum()) for part in content.split(lengths)]
    return Batch(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(shape).contiguous(),
        document=document,
        branch=branch,
        predictor=own - 1,
        position=own,
        target=target,
        sequence=torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(lengths)),
        content=content.nonzero().flatten(),
        lengths=lengths,
        content_lengths=content_lengths,
        index=[record["index"] for record in records],
    )
