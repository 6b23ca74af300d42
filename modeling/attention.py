"""Attention: which tokens see each other, given to each implementation in its own form.

The rule is that of `Batch`: token i sees token j if and only if both have the same document, j <= i, and j's branch is
0 (the prompt) or i's branch. A layer's sliding window counts positions in the document, not places in the row. For
padded rows, transformers makes the masks. The one row of a packed batch is computed by one of these:

- `flash_attention_2` gets the ends of the documents. It cannot share prompts.
- `flex` is torch's flex attention, with a block mask made from the rule.
- `segments` computes each segment (`Batch.segments`) with the keys that it can see; segments of similar length go
  together. It computes few scores that the mask hides, and runs on any device, with or without soft-capping.

The last two are functions in this module. transformers calls them in each layer, through its registry of attention
functions.

Shape letters: R rows, T positions of a row, H heads, G key-value heads, E width of a head, S segments of one block, Q
and K queries and keys of a segment.
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from data.batch import PAD, Batch
from modeling.compiled import compiled
from utils import UserError, console

# For these architectures tests/test_layouts.py compares every layout with one forward pass for each sequence.
TESTED = ("gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
REASONS = {
    "flash_attention_2": "flash-attn is installed",
    "flex": "a block mask, on a GPU",
    "segments": "computes only what tokens see",
    "sdpa": "torch's own, for padded rows",
    "eager": "the model soft-caps its attention scores, which SDPA cannot do",
    "shared_prefix": "each prompt once",
    "packed": "no padding",
    "padded": "one sequence a row",
}


def choose(
    attention: str, layout: str, config: PretrainedConfig, device: torch.device, dtype: str, *, pairs: bool
) -> tuple[str, str]:
    """Choose (attention implementation, layout) for training, and print the choice and why.

    It is the fastest combination that works for the model on this machine and that `attention` and `layout` allow;
    `auto` allows any. `pairs` says that records hold several completions of one prompt. Raises UserError if no
    combination is possible.
    """
    kind = config.get_text_config().model_type
    possible = possible_combinations(config, device, dtype, pairs=pairs)
    for chosen in possible:
        if attention in ("auto", chosen[0]) and layout in ("auto", chosen[1]):
            reasons = "; ".join(f"{name}: {REASONS[name]}" for name in reversed(chosen))
            untested = "" if kind in TESTED else f" ({kind} is not tested in other layouts)"
            console.print(f"layout and attention: {reasons}{untested}; computes in {dtype}")
            return chosen
    raise UserError(
        f"model.layout={layout}, model.attn_implementation={attention}: not for {kind} in {dtype} on {device.type}, "
        f"where these go together: {', '.join(f'{layout} with {name}' for name, layout in possible)}"
    )


def possible_combinations(
    config: PretrainedConfig, device: torch.device, dtype: str, *, pairs: bool
) -> list[tuple[str, str]]:
    """All (attention implementation, layout) that work for a model on this machine, the fastest first."""
    on_gpu = device.type == "cuda" and dtype == "bfloat16"
    flex = on_gpu and flex_fits(config, device)
    flash = on_gpu and importlib.util.find_spec("flash_attn") is not None
    possible: list[tuple[str, str]] = []
    if config.get_text_config().model_type in TESTED:
        for layout in ("shared_prefix", "packed") if pairs else ("packed", "shared_prefix"):
            if flash and layout == "packed":
                possible.append(("flash_attention_2", layout))
            if flex:
                possible.append(("flex", layout))
            possible.append(("segments", layout))
    if flash:
        possible.append(("flash_attention_2", "padded"))
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is None:
        possible.append(("sdpa", "padded"))
    possible.append(("eager", "padded"))
    return possible


WIDE = (128, 160 << 10)  # heads that are wider need a GPU with this much shared memory, in bytes, for flex attention


def flex_fits(config: PretrainedConfig, device: torch.device) -> bool:
    """Whether torch's kernels of flex attention, forward and backward, fit into a GPU for heads of the model's width.

    An A100 has 163 KB of shared memory for a block and an H100 227; an A10, L40S or RTX 4090 has 99. Where there is no
    GPU, a plan is for one of the first kind.
    """
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if width <= WIDE[0] or not torch.cuda.is_available():
        return True
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= WIDE[1])


def for_sampling(attention: str, config: PretrainedConfig, device: torch.device, dtype: str) -> str:
    """The attention implementation to sample with: `attention` if it reads padded rows, else the fastest that does."""
    for_padded = ("flash_attention_2", "sdpa", "eager")
    return choose(attention if attention in for_padded else "auto", "padded", config, device, dtype, pairs=False)[0]


def mask_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The arguments of a model's forward pass that make it follow the rule, beside the tokens and their positions."""
    if batch.segments is None:
        return {"attention_mask": (batch.document != PAD).long()}
    implementation = model.config._attn_implementation
    if implementation == "flash_attention_2":
        lengths = [length for length, _ in batch.segments]
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends, longest = ends.to(batch.input_ids.device, non_blocking=True), max(lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    no_mask = {"attention_mask": batch.input_ids.new_zeros(1, 1, 1, 1)}  # transformers leaves a 4-d mask as it is
    if implementation == "flex":
        return {**no_mask, "block_masks": BlockMasks(batch)}
    if implementation == "outline":
        return no_mask
    assert implementation == "segments", f"{implementation} attention cannot read packed rows"
    return {**no_mask, "blocks": segment_blocks(batch)}


# ---------------------------------------------------------------------------------------------------- flex attention


BLOCK, LEAST_WIDTH = 128, 256  # rows are padded to whole blocks; of one alone torch would make other graphs


def whole_blocks(model: PreTrainedModel, batch: Batch) -> Batch:
    """The batch as the model reads it: for flex attention its one row is padded at the end, which moves no position."""
    width = batch.input_ids.shape[1]
    missing = max(LEAST_WIDTH, -(-width // BLOCK) * BLOCK) - width
    if model.config._attn_implementation != "flex" or batch.segments is None or not missing:
        return batch

    def padded(row: Tensor, value: int) -> Tensor:
        return F.pad(row, (0, missing), value=value)

    return replace(
        batch,
        input_ids=padded(batch.input_ids, 0),
        position_ids=padded(batch.position_ids, 0),
        document=padded(batch.document, PAD),
        branch=padded(batch.branch, 0),
    )


@dataclass
class BlockMasks:
    """The block masks of a batch. One is made when a layer with its sliding window first asks for it."""

    batch: Batch
    made: dict[int | None, BlockMask] = field(default_factory=dict)

    def of(self, window: int | None) -> BlockMask:
        if window not in self.made:
            self.made[window] = block_mask(self.batch, window)
        return self.made[window]


def mask_rule(batch: Batch, window: int | None) -> Callable[..., Tensor]:
    """The rule as a `mask_mod` of flex attention: whether query i of row r sees key j.

    The function takes indices or tensors of indices. `window` is the layer's sliding window.
    """
    document, branch, position = batch.document, batch.branch, batch.position_ids

    def can_see(r: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        in_branch = (branch[r, j] == 0) | (branch[r, j] == branch[r, i])
        visible = (document[r, i] == document[r, j]) & (j <= i) & in_branch
        return visible if window is None else visible & (position[r, i] - position[r, j] < window)

    return can_see


def block_mask(batch: Batch, window: int | None) -> BlockMask:
    """The rule as a block mask of flex attention, for layers with this sliding window."""
    rows, width = batch.input_ids.shape
    device = batch.input_ids.device
    compiled = device.type == "cuda"  # otherwise the full mask [T, T] is made first
    return create_block_mask(mask_rule(batch, window), rows, None, width, width, device=device, _compile=compiled)


@torch.compiler.disable  # it is compiled by itself: within a layer's graph the soft-cap would become a variable
def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    block_masks: BlockMasks | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`flex` in the registry of transformers: output [R, T, H, E] from queries, keys and values [R, H or G, T, E].

    Without block masks (padded rows, sampling) it computes what `segment_attention` does.
    """
    if block_masks is None:
        options: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "softcap": softcap}
        return segment_attention(module, query, key, value, attention_mask, **options)
    assert not dropout, "flex attention has no dropout"
    output = compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else soft_capped(softcap),
        block_mask=block_masks.of(sliding_window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """torch's flex attention, compiled once in a process. Uncompiled it makes all scores, so that is an error: when
    there are too many graphs (`fullgraph`), and when the environment turns torch.compile off."""
    warnings.filterwarnings("error", "flex_attention called without torch.compile")
    return compiled(torch_flex_attention, fullgraph=True)


@cache
def soft_capped(softcap: float) -> Callable[..., Tensor]:
    """Soft-capping as a `score_mod` of flex attention."""

    def cap(score: Tensor, _row: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


# ---------------------------------------------------------------------------------------------------- by segments


MAX_PAIRS = 1 << 20  # query-key pairs of a block of several segments, whose scores are all in memory at once
PAIRS_PER_CALL = 512  # a CPU computes this many query-key pairs in about the time that one more block costs


@dataclass
class SegmentBlock:
    """Segments of similar length that are computed together, padded to the longest. Outputs at padding are not used."""

    queries: Tensor  # [S * Q] places in the row of each segment's tokens
    keys: Tensor  # [S * K] places in the row of the prompt's tokens, if the segment continues one, and of its own
    before: Tensor  # [S] how many of the keys belong to the prompt


def segment_blocks(batch: Batch) -> tuple[list[SegmentBlock], Tensor]:
    """The segments of a packed batch, in blocks.

    Also an index [T]: where in the queries of all blocks, one after the other, each place of the row is.
    """
    assert batch.segments is not None
    lengths, prompts = [length for length, _ in batch.segments], [prompt for _, prompt in batch.segments]
    places = torch.arange(sum(lengths)).split(lengths)
    seen = [own if prompt is None else torch.cat([places[prompt], own]) for own, prompt in zip(places, prompts)]
    blocks, order, start = [], torch.empty(sum(lengths), dtype=torch.long), 0

    def on_device(index: Tensor) -> Tensor:
        return index.to(batch.input_ids.device, non_blocking=True)

    for group in group_by_length([(len(own), len(keys)) for own, keys in zip(places, seen)]):
        queries = pad_sequence([places[n] for n in group], batch_first=True)
        keys = pad_sequence([seen[n] for n in group], batch_first=True)
        before = torch.tensor([len(seen[n]) - lengths[n] for n in group])
        blocks.append(SegmentBlock(on_device(queries.flatten()), on_device(keys.flatten()), on_device(before)))
        for n, first in zip(group, range(start, start + queries.numel(), queries.shape[1])):
            order[places[n]] = torch.arange(first, first + lengths[n])
        start += queries.numel()
    return blocks, on_device(order)


def group_by_length(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Group segments: their indices into `sizes`, which holds (queries, keys) of each segment.

    Segments share a group if their padding costs less than the calls that the group saves.
    """
    groups: list[list[int]] = []
    pairs = most_queries = 0  # of the last group: query-key pairs without padding, and queries of its longest segment
    for n in sorted(range(len(sizes)), key=lambda n: sizes[n][::-1]):
        queries, keys = sizes[n]  # in ascending order of the keys, so this is the largest number yet
        new_most, new_pairs = max(most_queries, queries), pairs + queries * keys
        calls_saved = len(groups[-1]) if groups else 0
        padded_pairs = (calls_saved + 1) * new_most * keys
        if calls_saved and padded_pairs <= min(MAX_PAIRS, new_pairs + calls_saved * PAIRS_PER_CALL):
            groups[-1].append(n)
            pairs, most_queries = new_pairs, new_most
        else:
            groups.append([n])
            pairs, most_queries = queries * keys, queries
    return groups


@torch.compiler.disable  # otherwise torch.compile compiles a layer again for the lengths of each batch
def segment_attention(
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
    """`segments` in the registry of transformers: output [R, T, H, E] from queries, keys and values [R, H or G, T, E].

    Without blocks (padded rows, sampling) it uses `attention_mask`, the additive mask that transformers has made.
    """
    options: tuple[Any, ...] = (scaling, softcap, dropout)
    if blocks is None:
        return attend(query, key, value, attention_mask, *options).transpose(1, 2).contiguous(), None

    rows = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]
    width = query.shape[3]
    outputs = []
    for block in blocks[0]:
        count, places = len(block.before), (block.queries, block.keys, block.keys)
        # index_select of rows is several times as fast as indexing, also in the backward pass.
        taken = [r.index_select(0, p).view(count, -1, r.shape[1] // width, width) for r, p in zip(rows, places)]
        queries, keys, values = (tensor.transpose(1, 2) for tensor in taken)
        bias = causal_bias(block.before, queries.shape[2], keys.shape[2], sliding_window, query.dtype)
        outputs.append(attend(queries, keys, values, bias, *options).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, blocks[1]).view(1, -1, query.shape[1], width), None


def causal_bias(before: Tensor, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """An additive mask [S, 1, Q, K]: 0 if the query sees the key, else the lowest number of the dtype.

    `before` [S] of each segment's keys come before its first query.
    """
    place = torch.arange(max(queries, keys), device=before.device)
    distance = (before.unsqueeze(1) + place[:queries]).unsqueeze(2) - place[:keys]  # below 0 for later keys and padding
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=before.device)
    return bias.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, softcap: float | None, dropout: float
) -> Tensor:
    """Attention output [S, H, Q, E] of queries [S, H, Q, E], keys and values [S, G, K, E], and a bias [..., Q, K]."""
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling, enable_gqa=grouped)
    rows, heads, queries, width = query.shape
    # softcap * tanh(x / softcap) = 2 * softcap * sigmoid(2 * x / softcap) - softcap, and a sigmoid takes a CPU a sixth
    # of the time of a tanh. Its inner factor goes into the queries, its outer one into adding the bias, and the last
    # term is left out, since the softmax does not depend on it. So soft-capping costs one pass over the scores, fewer
    # than head.soft_cap, which returns the capped values. Heads that share keys are rows of one product.
    grouped_query = (query * (2 * scaling / softcap)).reshape(rows, key.shape[1], -1, width)
    scores = (grouped_query @ key.transpose(2, 3)).float().sigmoid_().view(rows, heads, queries, -1)
    scores = torch.add(bias, scores, alpha=2 * softcap)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights.view(*grouped_query.shape[:3], -1) @ value).view(query.shape)


# ---------------------------------------------------------------------------------------------------- for plans

FUSED = ("flash_attention_2", "flex", "sdpa")  # one kernel each, of which a plan runs this outline


class Outline(torch.autograd.Function):
    """Computes nothing, and keeps for the backward pass what a fused kernel does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output


def outline_attention(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    **_: Any,
) -> tuple[Tensor, None]:
    """`outline` in the registry of transformers, also on the meta device."""
    return Outline.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register("outline", outline_attention)
AttentionMaskInterface.register("outline", lambda *_args, **_options: None)
for name, function in (("flex", flex_attention), ("segments", segment_attention)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, eager_mask)  # used for padded rows and sampling
