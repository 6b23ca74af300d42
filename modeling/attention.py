"""Which tokens see each other, in the form that each implementation of attention takes.

The rule is `Batch`'s: token i sees token j iff they share a document, j <= i, and j's branch is 0 (the prompt) or i's
own. A layer's sliding window counts positions of the document, not places in the row. Padded rows leave all that to
transformers. The one row of a packed batch is computed by one of

- `flash_attention_2`, told where each document ends; it cannot share prompts;
- `flex`: torch's flex attention, with a block mask made of the rule;
- `segments`: segment by segment (`Batch.segments`), those of like lengths together, so that hardly a pair of tokens is
  computed of which neither sees the other. On any device, with soft-capping or without.

The last two are functions of ours that transformers calls in each layer, by its registry of attention functions.

Shape letters: T positions of the row, H heads, G key-value heads, S segments, Q queries, K keys, E width of a head.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import eager_mask

from data.batch import PAD, Batch
from utils import UserError, console

# Architectures that tests/test_layouts.py compares, in every layout, with one forward pass for each sequence.
TESTED = ("gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
WHY = {
    "flash_attention_2": "flash-attn is installed",
    "flex": "a block mask on this GPU",
    "segments": "computes what is seen, and no more",
    "sdpa": "torch's own, for padded rows",
    "eager": "the model soft-caps its attention scores, which SDPA cannot",
    "shared_prefix": "each prompt once",
    "packed": "no padding",
    "padded": "one sequence a row",
}


def choose(
    attention: str, layout: str, config: PretrainedConfig, device: torch.device, dtype: str, *, pairs: bool
) -> tuple[str, str]:
    """The implementation of attention and the layout to train with: the fastest that is right for the model and this
    machine, of those that `attention` and `layout` leave open (`auto`: any); says which and why.

    `pairs`: records hold several completions of one prompt. Raises UserError where nothing fits.
    """
    kind = config.get_text_config().model_type
    on_gpu = device.type == "cuda" and dtype == "bfloat16"
    flash = on_gpu and importlib.util.find_spec("flash_attn") is not None
    found: list[tuple[str, str]] = []
    if kind in TESTED:
        for packed in ("shared_prefix", "packed") if pairs else ("packed", "shared_prefix"):
            if flash and packed == "packed":
                found.append(("flash_attention_2", packed))
            if on_gpu:
                found.append(("flex", packed))
            found.append(("segments", packed))
    if flash:
        found.append(("flash_attention_2", "padded"))
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is None:
        found.append(("sdpa", "padded"))
    found.append(("eager", "padded"))
    for chosen in found:
        if attention in ("auto", chosen[0]) and layout in ("auto", chosen[1]):
            reasons = "; ".join(f"{name}: {WHY[name]}" for name in reversed(chosen))
            console.print(
                f"layout and attention: {reasons}" + ("" if kind in TESTED else f" ({kind} is untested in others)")
            )
            return chosen
    raise UserError(
        f"model.layout={layout}, model.attn_implementation={attention}: not for {kind} in {dtype} on {device.type}, "
        f"where these go together: {', '.join(f'{layout} with {name}' for name, layout in found)}"
    )


def for_sampling(attention: str, config: PretrainedConfig, device: torch.device, dtype: str) -> str:
    """The implementation to sample with: `attention`, if it is one for padded rows, else the fastest of those."""
    padded = ("flash_attention_2", "sdpa", "eager")
    return choose(attention if attention in padded else "auto", "padded", config, device, dtype, pairs=False)[0]


def mask_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What a model's forward pass takes, beside the tokens and their positions, to follow the rule."""
    if batch.segments is None:
        return {"attention_mask": (batch.document != PAD).long()}
    implementation = model.config._attn_implementation
    if implementation == "flash_attention_2":
        lengths = [length for length, _ in batch.segments]
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends, longest = ends.to(batch.input_ids.device, non_blocking=True), max(lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    no_mask = {"attention_mask": batch.input_ids.new_zeros(1, 1, 1, 1)}  # of four dimensions: transformers makes none
    if implementation == "flex":
        windows = {None, getattr(model.config.get_text_config(), "sliding_window", None)}
        return {**no_mask, "block_masks": {window: block_mask(batch, window) for window in windows}}
    assert implementation == "segments", f"{implementation} attention cannot read packed rows"
    return {**no_mask, "blocks": blocks(batch)}


# ---------------------------------------------------------------------------------------------------- flex attention


def rule(batch: Batch, window: int | None) -> Callable[..., Tensor]:
    """The rule, in the form of a `mask_mod`: whether query i of row r sees key j, for indices or tensors of them."""
    document, branch, position = batch.document, batch.branch, batch.position_ids

    def sees(r: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own_branch = (branch[r, j] == 0) | (branch[r, j] == branch[r, i])
        seen = (document[r, i] == document[r, j]) & (j <= i) & own_branch
        return seen if window is None else seen & (position[r, i] - position[r, j] < window)

    return sees


def block_mask(batch: Batch, window: int | None) -> BlockMask:
    """The rule as flex attention takes it, for layers with this sliding window."""
    rows, width = batch.input_ids.shape
    device = batch.input_ids.device
    compiled = device.type == "cuda"  # without, the mask would first exist whole
    return create_block_mask(rule(batch, window), rows, None, width, width, device=device, _compile=compiled)


def flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: output [R, T, H, E] from queries, keys, values [R, H or G, T, E]."""
    masks = options.pop("block_masks", None)
    if masks is None:
        return segments(module, query, key, value, attention_mask, **options)
    mask = masks[options.get("sliding_window")]
    return flex_attention_forward(module, query, key, value, mask, **options)[0], None


# ---------------------------------------------------------------------------------------------------- by segments


PAIRS_AT_ONCE = 1 << 20  # query-key pairs of a block of several segments, at most: its scores exist whole
PAIRS_A_CALL = 512  # query-key pairs that a CPU computes in about the time that a block more takes


@dataclass
class SegmentBlock:
    """Segments of like lengths, each as wide as the longest; what is beyond its end is not read."""

    queries: Tensor  # [S * Q] their places in the row
    keys: Tensor  # [S * K] the places of what comes before each segment in its document, and of itself
    before: Tensor  # [S] how many come before


def blocks(batch: Batch) -> tuple[list[SegmentBlock], Tensor]:
    """The segments of a packed batch, and where in the blocks' queries, one after the other, each place [T] is."""
    assert batch.segments is not None
    lengths, prompts = [length for length, _ in batch.segments], [prompt for _, prompt in batch.segments]
    places = torch.arange(sum(lengths)).split(lengths)
    seen = [own if prompt is None else torch.cat([places[prompt], own]) for own, prompt in zip(places, prompts)]
    found, order, start = [], torch.empty(sum(lengths), dtype=torch.long), 0

    def there(index: Tensor) -> Tensor:
        return index.to(batch.input_ids.device, non_blocking=True)

    for members in alike([(len(own), len(keys)) for own, keys in zip(places, seen)]):
        queries = pad_sequence([places[n] for n in members], batch_first=True)
        keys = pad_sequence([seen[n] for n in members], batch_first=True)
        before = torch.tensor([len(seen[n]) - lengths[n] for n in members])
        found.append(SegmentBlock(there(queries.flatten()), there(keys.flatten()), there(before)))
        for n, first in zip(members, range(start, start + queries.numel(), queries.shape[1])):
            order[places[n]] = torch.arange(first, first + lengths[n])
        start += queries.numel()
    return found, there(order)


def alike(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Segments, given their queries and keys, put together where the padding costs less than the calls saved."""
    groups: list[list[int]] = []
    real = widest = 0
    for n in sorted(range(len(sizes)), key=lambda n: sizes[n][::-1]):
        queries, keys = sizes[n]  # the keys are no fewer than those of any before
        wide, together = max(widest, queries), real + queries * keys
        saved = len(groups[-1]) if groups else 0
        padded = (saved + 1) * wide * keys
        if saved and padded <= min(PAIRS_AT_ONCE, together + saved * PAIRS_A_CALL):
            groups[-1].append(n)
            real, widest = together, wide
        else:
            groups.append([n])
            real, widest = queries * keys, queries
    return groups


@torch.compiler.disable  # a compiled layer would be compiled anew for each batch's lengths
def segments(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    blocks: tuple[list[SegmentBlock], Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: output [R, T, H, E] from queries, keys, values [R, H or G, T, E].

    Without blocks (padded rows, sampling) it takes the additive mask that transformers made.
    """
    how: tuple[Any, ...] = (scaling, softcap, dropout)
    if blocks is None:
        return attend(query, key, value, attention_mask, *how).transpose(1, 2).contiguous(), None

    rows = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]
    width = query.shape[3]
    outputs = []
    for block in blocks[0]:
        count, places = len(block.before), (block.queries, block.keys, block.keys)
        # of rows: several times as fast, backward too, as indexing
        taken = [r.index_select(0, p).view(count, -1, r.shape[1] // width, width) for r, p in zip(rows, places)]
        own, keys, values = (tensor.transpose(1, 2) for tensor in taken)
        bias = causal_bias(block.before, own.shape[2], keys.shape[2], sliding_window, query.dtype)
        outputs.append(attend(own, keys, values, bias, *how).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, blocks[1]).view(1, -1, query.shape[1], width), None


def causal_bias(before: Tensor, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[S, 1, Q, K]: 0 where a query sees a key, elsewhere the lowest number. Before the first query of a segment come
    `before` [S] of its keys."""
    place = torch.arange(max(queries, keys), device=before.device)
    distance = (before.unsqueeze(1) + place[:queries]).unsqueeze(2) - place[:keys]  # below 0 for what is beyond the end
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=before.device)
    return bias.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, softcap: float | None, dropout: float
) -> Tensor:
    """Attention [S, H, Q, E] of queries [S, H, Q, E] to keys and values [S, G, K, E], with a bias [..., Q, K]."""
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling, enable_gqa=grouped)
    rows, heads, queries, width = query.shape
    # The heads that share keys come under one another. As few passes over the scores as there can be: softcap is added
    # to each, which the softmax does not see, so that a sigmoid does what a tanh takes a CPU six times as long for.
    together = (query * (2 * scaling / softcap)).reshape(rows, key.shape[1], -1, width)
    scores = (together @ key.transpose(2, 3)).float().sigmoid_().view(rows, heads, queries, -1)
    scores = torch.add(bias, scores, alpha=2 * softcap)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights.view(*together.shape[:3], -1) @ value).view(query.shape)


for name, function in (("flex", flex), ("segments", segments)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)  # for what is not a packed batch
