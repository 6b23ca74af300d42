"""Sparse autoencoders (SAEs), taps that read the model's vectors, pooled features, and feature drift.

autoencoders/formats.py reads SAE files. Shape letters: R rows, T positions, N tokens, M positions that an SAE reads,
S sequences, D width of the vectors that an SAE reads (`d_in`), F its features, also called latents (`d_sae`),
K features on which one sequence is compared.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from utils import MOST, UserError, in_words, resolve_path

ENCODE_ELEMENTS = 1 << 24  # feature activations in memory at once while encoding: 64 MiB in fp32
OTHER_FEATURES = "others"  # an index in feature weights that stands for all features that are not listed
SHARE_FLOOR = 1e-6  # added to every share in the KL drift, so that it stays finite when a feature becomes inactive
SINK_NORM = 10.0  # an attention sink's norm is more than this many times the median of its sequence


@contextlib.contextmanager
def matmul_precision_for(dtype: torch.dtype) -> Iterator[None]:
    """Use TF32 for fp32 matrix products inside the `with` block if one factor comes from bf16.

    On an H100 or A100 this is seven or eight times as fast. TF32 keeps 11 bits of each factor and sums in fp32; bf16
    has only 8 bits.
    """
    before = torch.get_float32_matmul_precision()
    try:
        if dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class SAE(nn.Module):
    """A frozen SAE: JumpReLU (Rajamanoharan et al. 2024, 2407.14435) or, with `k`, TopK (Gao et al. 2024, 2406.04093).

        pre = x @ W_enc + b_enc,   features = relu(pre) * (pre > threshold),   x' = features @ W_dec + b_dec

    A threshold of 0 makes it a ReLU. TopK keeps the k largest features of each vector and sets the others to 0.
    All tensors are in fp32. They are not trained, and bf16 cannot tell apart thresholds that lie close together.
    """

    W_enc: Tensor  # [D, F]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, D]
    b_dec: Tensor  # [D]
    threshold: Tensor  # [F]

    def __init__(
        self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor, k: int | None = None
    ) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("W_enc", W_enc.detach().float())
        self.register_buffer("b_enc", b_enc.detach().float())
        self.W_dec = W_dec.detach().float()  # not a buffer, so it stays in host memory: features need only the encoder
        self.register_buffer("b_dec", b_dec.detach().float())
        self.register_buffer("threshold", threshold.detach().float())

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def members(self) -> list["SAE"]:
        """The single SAEs that it consists of, in the order of their features; a `JointSAE` has several."""
        return [self]

    @property
    def shares(self) -> list[float]:
        """The weight of each member's drift. They sum to 1."""
        return [1.0]

    def vectors(self, x: Tensor) -> tuple[Tensor, ...]:
        """The vectors [..., d_in] of each member, from x [..., D]."""
        return x.split([member.d_in for member in self.members], dim=-1)

    def encode(self, x: Tensor) -> Tensor:
        """Features [..., F] of vectors x [..., D], in fp32."""
        features = self._jump_relu(x, self.W_enc, self.b_enc, self.threshold)
        if self.k is None:
            return features
        kept = features.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(features).scatter(-1, kept.indices, kept.values)

    def decode(self, features: Tensor) -> Tensor:
        """Vectors [..., D] from features [..., F]."""
        return features @ self.W_dec.to(features) + self.b_dec

    def encode_latents(self, x: Tensor, latents: Tensor) -> Tensor:
        """`encode(x)[:, latents]` [N, K] for x [N, D] and latents [K], with gradient through those columns only."""
        features = self._jump_relu(x, self.W_enc[:, latents], self.b_enc[latents], self.threshold[latents])
        return features if self.k is None else features * self._in_top_k(x, latents)

    @torch.no_grad()
    def _in_top_k(self, x: Tensor, latents: Tensor) -> Tensor:
        """Whether each latent [N, K] is among the k largest of all F. Encodes in chunks, like `pooled_features`."""
        return torch.cat([self.encode(part)[:, latents] > 0 for part in x.split(max(1, ENCODE_ELEMENTS // self.d_sae))])

    @staticmethod
    def _jump_relu(x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False), matmul_precision_for(x.dtype):
            features = x.float() @ weight.float()
        features += bias  # in place, here and below, since features can be the largest tensor of a training step
        return features.mul_(features > threshold.clamp(min=0))  # the clamp makes it a ReLU as well


class SAEHead(SAE):
    """The head of a reward model that can be read: a reward linear in an SAE's features (SARM, 2508.08746).

    Its tensors are part of the model, and are written and read with it. Those of the SAE are `trained` too, or stay as
    they are and so in fp32, on each rank whole.
    """

    def __init__(
        self, d_in: int, d_sae: int, k: int | None, *, trained: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        """The values are not set. What is trained is kept in `dtype`."""
        nn.Module.__init__(self)
        self.k = k

        def tensor(*shape: int) -> Tensor:
            return nn.Parameter(torch.empty(shape, dtype=dtype)) if trained else nn.Buffer(torch.empty(shape))

        self.W_enc, self.b_enc = tensor(d_in, d_sae), tensor(d_sae)
        self.W_dec, self.b_dec = tensor(d_sae, d_in), tensor(d_in)
        self.threshold = nn.Buffer(torch.empty(d_sae))
        self.weight = nn.Parameter(torch.empty(1, d_sae, dtype=dtype))

    @staticmethod
    def start(sae: SAE) -> dict[str, Tensor]:
        """The tensors of a head that gives 0, whatever an SAE's features are."""
        own = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        return own | {"threshold": sae.threshold, "weight": torch.zeros(1, sae.d_sae)}

    def forward(self, x: Tensor) -> Tensor:
        """Rewards [..., 1] of vectors x [..., d_in]."""
        return self.encode(x) @ self.weight.float().T

    def reconstruction_error(self, x: Tensor) -> Tensor:
        """|x - x'|^2 / |x|^2 [N] of vectors x [N, d_in], with gradient into the SAE alone."""
        x = x.detach().float()
        return (x - self.decode(self.encode(x))).square().sum(1) / x.square().sum(1)


class JointSAE(SAE):
    """Several SAEs that read several places at once.

    D and F are the concatenation of the members' vectors and features. The drift is the weighted mean of their drifts.
    """

    def __init__(self, members: Sequence[SAE], weights: Sequence[float]) -> None:
        """`weights` are positive numbers. They are divided by their sum."""
        nn.Module.__init__(self)
        self._members = nn.ModuleList(members)
        self._shares = [weight / sum(weights) for weight in weights]

    @property
    def members(self) -> list[SAE]:
        return list(self._members)  # type: ignore[arg-type]

    @property
    def shares(self) -> list[float]:
        return self._shares

    @property
    def d_in(self) -> int:
        return sum(member.d_in for member in self.members)

    @property
    def d_sae(self) -> int:
        return sum(member.d_sae for member in self.members)

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([member.encode(part) for member, part in zip(self.members, self.vectors(x))], dim=-1)

    def decode(self, features: Tensor) -> Tensor:
        parts = features.split([member.d_sae for member in self.members], dim=-1)
        return torch.cat([member.decode(part) for member, part in zip(self.members, parts)], dim=-1)

    def encode_latents(self, x: Tensor, latents: Tensor) -> Tensor:
        return self.encode(x)[:, latents]


def together(members: Sequence[SAE], weights: Sequence[float]) -> SAE:
    """The SAEs of a run as one: a `JointSAE`, where there are several."""
    return members[0] if len(members) == 1 else JointSAE(members, weights)


class ResidualTap:
    """Reads the residual stream after one decoder layer: the layer's output, before any final norm.

    For the last layer, `output_hidden_states[-1]` is different: it is the output of the model's final norm.
    """

    def __init__(self, layer: nn.Module, until: Sequence[nn.Module] = ()) -> None:
        """`until` are the decoder layers up to this one, if a forward pass may leave them out."""
        self.layer, self.until = layer, until
        self._read: Tensor | None = None

    @property
    def members(self) -> list["ResidualTap"]:
        """The single taps, in the order of their vectors; a `JointTap` has several."""
        return [self]

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read the forward pass that runs inside the `with` block.

        Leave the block before the backward pass. There, activation checkpointing runs the layer again, and the tap
        would read a tensor from which the loss was not computed.
        """
        handles = [module.register_forward_hook(self._keep) for module in self._hooked()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def beginning_with(self, output: Any) -> Iterator[None]:
        """Let the forward pass inside the `with` block begin with what the layer gave before, its `output`: the layers
        up to it are not run, where they may be left out."""
        forwards = [layer.forward for layer in self.until]
        for layer in self.until:
            layer.forward = lambda *_, **__: output
        try:
            yield
        finally:
            for layer, forward in zip(self.until, forwards, strict=True):
                layer.forward = forward

    def _hooked(self) -> list[nn.Module]:
        return [self.layer]

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._read = output if isinstance(output, Tensor) else output[0]

    def take(self) -> Tensor:
        """Return the vectors [R, T, D] of the forward pass that was read, and forget them."""
        assert self._read is not None, "no forward pass went through the tapped module"
        read, self._read = self._read, None
        return read


class MLPTap(ResidualTap):
    """Reads what the MLP of one decoder layer adds to the residual stream.

    This is the MLP's output after all modules that the layer applies to it before the addition: none in Llama, a norm
    in Gemma 2 and 3, a dropout in GPT-NeoX.
    """

    def __init__(self, layer: nn.Module, mlp: nn.Module, until: Sequence[nn.Module] = ()) -> None:
        super().__init__(layer, until)
        self.mlp = mlp

    def _hooked(self) -> list[nn.Module]:
        return list(self.layer.children())

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module is self.mlp or (inputs and inputs[0] is self._read):  # the MLP, or a module applied to its output
            self._read = output


class JointTap(ResidualTap):
    """Reads several places in one forward pass, for a `JointSAE`."""

    def __init__(self, taps: Sequence[ResidualTap]) -> None:
        self.taps = taps

    @property
    def members(self) -> list[ResidualTap]:
        return list(self.taps)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for tap in self.taps:
                stack.enter_context(tap.reading())
            yield

    def take(self) -> Tensor:
        return torch.cat([tap.take() for tap in self.taps], dim=-1)


def basis_of(directions: Tensor) -> Tensor:
    """An orthonormal basis [D, r] of the span of directions [K, D], in fp32."""
    _, sizes, rows = torch.linalg.svd(directions.double(), full_matrices=False)
    return rows[sizes > 1e-6 * sizes.max()].T.float()


def change_output(
    layer: nn.Module, change: Callable[[Tensor], Tensor], *, only_training: bool = False
) -> RemovableHandle:
    """From now on, let a layer give `change` of its output [..., D], computed in fp32; if so, only in training mode.
    What it gives undoes that: it ends the change at the end of a `with` block."""

    def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if only_training and not module.training:
            return output
        x = output if isinstance(output, Tensor) else output[0]
        with torch.autocast(x.device.type, enabled=False):
            changed = change(x.float()).to(x.dtype)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    return layer.register_forward_hook(hook)


def ablate(layer: nn.Module, directions: Tensor, centre: Tensor | None = None) -> None:
    """In training mode, take the span of directions [K, D] out of a layer's output h (CAFT, 2507.16795): with Q an
    orthonormal basis, h - (h - centre) Q Q^T. `centre` is a vector [D], zero if not given."""
    basis = basis_of(directions)
    origin = torch.zeros(len(basis), device=basis.device) if centre is None else centre.float()
    change_output(layer, lambda h: h - (h - origin) @ basis @ basis.T, only_training=True)


def steer(layer: nn.Module, direction: Tensor) -> None:
    """Add a direction [D] to a layer's output, at every position."""
    change_output(layer, lambda h: h + direction)


def active(features: Tensor) -> Tensor:
    """1 where a feature is active, else 0."""
    return (features > 0).float()


def owners(lengths: Sequence[int]) -> Tensor:
    """The number [M] of the sequence that each token belongs to, where sequences of these lengths follow each other."""
    counts = torch.tensor(lengths, dtype=torch.long)
    return torch.repeat_interleave(torch.arange(len(lengths)), counts, output_size=sum(lengths))


@torch.no_grad()
def attention_sinks(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Which vectors [M] are of attention sinks: their norm is more than SINK_NORM times the median of their sequence.

    A few tokens of a text, its first one above all, draw attention without meaning (Xiao et al. 2023, 2309.17453), with
    norms of a hundred times the others' (Sun et al. 2024, 2402.17762). `x` [M, D] holds the sequences one after the
    other, `lengths` [S] are their numbers of tokens. What a vector is depends on its own sequence alone, so not on the
    batch or the ranks. The lower of two middle norms is the median. A vector that is not finite is no sink.
    """
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    sequence = owners(lengths)  # on the host, so that the CPU does not wait for the device
    first = torch.tensor([0, *lengths[:-1]], dtype=torch.long).cumsum(0)
    place = torch.arange(len(sequence)) - first[sequence]
    sequence, place = (index.to(x.device, non_blocking=True) for index in (sequence, place))
    table = norms.new_full((len(lengths), max([1, *lengths])), float("nan"))
    table[sequence, place] = norms
    return norms.isfinite() & (norms > SINK_NORM * table.nanmedian(dim=1).values[sequence])


@torch.no_grad()
def summed_features(
    sae: SAE,
    residual: Tensor,
    lengths: Sequence[int],
    *transforms: Callable[[Tensor], Tensor],
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums [1, S, F] of feature activations over the tokens of each sequence that are no attention sinks, and how many
    tokens that are, [S, F] (sinks differ from place to place). Without gradient.

    `residual` [M, D] holds the sequences one after the other; `lengths` [S] are their numbers of tokens. Each of the
    `transforms` of the activations adds its sums, after the first. They are encoded in chunks, so a tensor [M, F] never
    exists. `sinks` [M] are those of a single SAE, where they are known already.
    """
    if len(sae.members) > 1:
        parts = zip(sae.members, sae.vectors(residual))
        of_each = [summed_features(member, x, lengths, *transforms) for member, x in parts]
        return torch.cat([own for own, _ in of_each], dim=2), torch.cat([own for _, own in of_each], dim=1)
    sequence = owners(lengths).to(residual.device, non_blocking=True)
    sinks = attention_sinks(residual, lengths) if sinks is None else sinks
    sequence = sequence.masked_fill(sinks, len(lengths))  # to a row that is left out
    sums = residual.new_zeros(1 + len(transforms), len(lengths) + 1, sae.d_sae, dtype=torch.float32)
    counts = sums.new_zeros(len(lengths) + 1).index_add_(0, sequence, sums.new_ones(len(sequence)))
    chunk = max(1, ENCODE_ELEMENTS // sae.d_sae)
    for part, owner in zip(residual.split(chunk), sequence.split(chunk)):
        features = sae.encode(part)
        sums[0].index_add_(0, owner, features)
        for own, transform in zip(sums[1:], transforms):
            own.index_add_(0, owner, transform(features))
    return sums[:, :-1], counts[:-1].unsqueeze(1).expand(-1, sae.d_sae)


def pooled_features(sae: SAE, residual: Tensor, lengths: Sequence[int], sinks: Tensor | None = None) -> Tensor:
    """Mean feature activations [S, F] of each sequence, without gradient: see `summed_features`.

    A sequence without tokens has zeros.
    """
    sums, counts = summed_features(sae, residual, lengths, sinks=sinks)
    return sums[0] / counts.clamp(min=1)


def selected_features(
    sae: SAE, residual: Tensor, lengths: Sequence[int], latents: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """Mean activations [S, K] of the latents [S, K] of each sequence, over the tokens that are no attention sinks, with
    gradient into `residual` [M, D]. `sinks` [M] are these, where they are known already."""
    sinks = attention_sinks(residual, lengths) if sinks is None else sinks
    kept = (~sinks).float().unsqueeze(1)  # [M, 1]
    means = []
    for x, own, indices in zip(residual.split(list(lengths)), kept.split(list(lengths)), latents):
        means.append((sae.encode_latents(x, indices) * own).sum(0) / own.sum().clamp(min=1))
    return torch.stack(means)


def compared_latents(policy: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The latents of each sequence that drift compares: I_k = topk(policy) | topk(reference) (FPO, 2411.07618).

    Takes pooled features [S, F] of policy and reference. Returns latents [S, 2k] and a mask [S, 2k] that is True once
    for each member of I_k. A latent that is zero in both is not a member. Of equal ones at rank k, the lowest are.
    """
    k = min(k, policy.shape[1])
    (of_policy, is_active), (of_reference, was_active) = strongest(policy, k), strongest(reference, k)
    repeated = (of_reference.unsqueeze(2) == of_policy.unsqueeze(1)) & is_active.unsqueeze(1)
    member = torch.cat([is_active, was_active & ~repeated.any(2)], dim=1)
    return torch.cat([of_policy, of_reference], dim=1), member


def strongest(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of pooled features [S, F]: their latents [S, k], of equal ones those with the lowest numbers, and
    whether each is active."""
    lowest_first = torch.arange(features.shape[1] - 1, -1, -1, device=features.device)
    # The bits of floats that are not negative order them, and leave room for a number that tells equal ones apart.
    keys = (features.float().clamp(min=0).contiguous().view(torch.int32).long() << 32) | lowest_first
    latents = keys.topk(k).indices
    return latents, features.gather(1, latents) > 0


def kl_terms(policy: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Terms [S, K] whose sum is KL(reference || policy) of pooled features [S, K], weighted by `weight` [S, K].

    Features are first normalised to sum to 1 over the latents with weight > 0: p of the policy, q of the reference. A
    term is q log(q / p) - q + p. It is never negative, so it can be weighted; with equal weights - q + p sums to zero
    and the sum is the usual KL divergence.
    """
    member = weight > 0

    def normalised(features: Tensor) -> Tensor:
        features = features * member
        share = features / features.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        share = (share + SHARE_FLOOR) * member
        return share / share.sum(1, keepdim=True).clamp(min=SHARE_FLOOR) + ~member

    p, q = normalised(policy), normalised(reference)
    return (q * (q / p).log() - q + p).clamp(min=0) * weight  # rounding can put it below 0 where p and q are equal


def mse_terms(policy: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared differences [S, 2k] of pooled features [S, 2k], divided by k (FPO, 2411.07618 v4, Eq. 10)."""
    k = policy.shape[1] // 2
    return (policy - reference).square() * weight / k


DIVERGENCES: dict[str, Callable[..., Tensor]] = {"kl": kl_terms, "mse": mse_terms}


def compute_feature_drift(
    sae: SAE,
    residual: Tensor,
    lengths: Sequence[int],
    reference: Tensor,
    *,
    divergence: str,
    k: int,
    feature_weights: Tensor | None = None,
    sinks: Sequence[Tensor] | None = None,
) -> Tensor:
    """How far the pooled features of each sequence have moved from the reference: F [S] of FPO (2411.07618, Eq. 8-10).

    `residual` [M, D] are the policy's vectors, with gradient in training, `lengths` [S] the tokens in each sequence,
    `reference` [S, F] the reference's pooled features. The latents to compare are chosen without gradient, from all
    features; only these, at most 2k for each sequence, are encoded again with gradient. `feature_weights` [F] scales
    the terms of single features. The drift of several SAEs is the mean of their drifts, weighted by their shares.
    `sinks` are the attention sinks [M] of each, where they are known already.
    """
    if not lengths:  # a batch without records
        return residual.new_zeros(0)
    widths = [member.d_sae for member in sae.members]
    scales = [None] * len(widths) if feature_weights is None else feature_weights.split(widths)
    drifts, vectors = [], sae.vectors(residual)
    sinks = [attention_sinks(x, lengths) for x in vectors] if sinks is None else sinks
    for member, x, own, before, scale in zip(sae.members, vectors, sinks, reference.split(widths, dim=1), scales):
        pooled = pooled_features(member, x, lengths, own)
        latents, is_member = compared_latents(pooled, before, k)
        policy = selected_features(member, x, lengths, latents, own) if x.requires_grad else pooled.gather(1, latents)
        weight = is_member.float() if scale is None else is_member * scale[latents]
        drifts.append(DIVERGENCES[divergence](policy, before.gather(1, latents), weight).sum(1))
    return torch.stack([share * drift for share, drift in zip(sae.shares, drifts)]).sum(0)


@torch.no_grad()
def drift_by_feature(sae: SAE, policy: Tensor, reference: Tensor, *, divergence: str, k: int) -> Tensor:
    """How much each feature adds to the drift of each sequence, [S, F], with all feature weights 1.

    `policy` and `reference` [S, F] are pooled features. See `compute_feature_drift`.
    """
    widths = [member.d_sae for member in sae.members]
    parts = []
    for share, after, before in zip(sae.shares, policy.split(widths, dim=1), reference.split(widths, dim=1)):
        latents, is_member = compared_latents(after, before, k)
        terms = DIVERGENCES[divergence](after.gather(1, latents), before.gather(1, latents), is_member.float())
        parts.append(torch.zeros_like(after).scatter_add(1, latents, share * terms))
    return torch.cat(parts, dim=1)


def drift_options(sae: SAE, where: str, *, divergence: str, k: int, feature_weights: Any = None) -> dict[str, Any]:
    """The options of `compute_feature_drift`, checked, with the feature weights read into a tensor [F]. `where` is the
    section of the configuration that has them.

    Raises UserError for an unknown divergence, a `k` beyond the SAE's width, and bad feature weights.
    """
    if divergence not in DIVERGENCES:
        raise UserError(f"{where}.divergence={divergence}: not one of {', '.join(DIVERGENCES)}")
    smallest = min(member.d_sae for member in sae.members)
    if not 1 <= k <= smallest:
        raise UserError(f"{where}.k={k}: has to be between 1 and the SAE's {smallest} features")
    weights: Tensor | None
    if isinstance(feature_weights, str) and ".parquet:" in f"{feature_weights}:":
        weights = read_feature_figures(feature_weights, sae, f"{where}.feature_weights").abs()
    else:
        weights = read_feature_weights(feature_weights, sae.d_sae, f"{where}.feature_weights")
    return {"divergence": divergence, "k": k, "feature_weights": weights}


def require_features(features: Sequence[int], d_sae: int, where: str) -> None:
    """Raises UserError where an SAE lacks one of the features that the setting `where` names."""
    if beyond := [feature for feature in features if feature >= d_sae]:
        raise UserError(f"{where}: {beyond[0]} is no feature of the SAE, which has {d_sae:,}")


def require_different(features: Sequence[int], where: str) -> None:
    """Raises UserError where the setting `where` names a feature twice."""
    if len(set(features)) < len(features):
        raise UserError(f"{where}: a feature is named twice")


def read_feature_weights(source: Any, d_sae: int, where: str = "loss.feature_weights") -> Tensor | None:
    """Weights [F] from the setting `where`: null, a list of {index, weight}, or a JSON file with such a list.

    Features that are not in the list have the weight of the entry with index `others`, or 1. With several SAEs, the
    indices of the second SAE's features follow those of the first. Raises UserError for anything else.
    """
    if source is None:
        return None
    listed, others = listed_features(source, d_sae, where)
    weights = torch.full((d_sae,), others)
    weights[list(listed)] = torch.tensor(list(listed.values()))
    return weights


def read_feature_figures(source: str, sae: SAE, where: str) -> Tensor:
    """A column [F] of a table such as data_features.parquet, from the setting `where`: FILE.parquet:COLUMN.

    The table's rows are the SAE's features in order; rows without a feature, such as that of the length, do not count.
    Raises UserError for anything else, and for a figure that is no number or beyond MOST.
    """
    file, found, column = source.rpartition(":")
    if not found or not file.endswith(".parquet"):
        raise UserError(f"{where}={source}: has to be FILE.parquet:COLUMN, such as data_features.parquet:z")
    path = resolve_path(file)
    try:
        names = pq.read_schema(path).names
        if not {"feature", column} <= set(names):
            raise UserError(f"{where}: {file} lacks a column feature or {column}; it has {', '.join(names)}")
        table = pq.read_table(path, columns=["feature", column]).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where}: cannot read {file} as Parquet ({in_words(error)})") from error
    rows = [(feature, value) for feature, value in zip(table["feature"], table[column]) if feature is not None]
    if [feature for feature, _ in rows] != [n for member in sae.members for n in range(member.d_sae)]:
        raise UserError(f"{where}: the rows of {file} are not the {sae.d_sae:,} features of the SAE in order")
    for feature, value in rows:
        if not isinstance(value, int | float) or not abs(value) <= MOST:
            raise UserError(f"{where}: {column} of feature {feature} in {file} is {value}, no number up to {MOST:g}")
    return torch.tensor([float(value) for _, value in rows])


def listed_features(source: Any, d_sae: int, where: str) -> tuple[dict[int, float], float]:
    """The weights by feature of such a list, and that of all others."""
    if isinstance(source, str):
        setting, where = where, source
        try:
            source = json.loads(resolve_path(source).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{setting}: cannot read {source} as JSON ({in_words(error)})") from error
    if not isinstance(source, list):
        raise UserError(f"{where}: not a list of {{index: a feature or {OTHER_FEATURES}, weight: a number}}")
    others, listed = 1.0, {}
    for entry in source:
        try:
            weight = float(entry["weight"])
            index = None if entry["index"] == OTHER_FEATURES else int(entry["index"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{where}: {entry!r} is not {{index: a feature or {OTHER_FEATURES}, weight: a number}}"
            ) from error
        if (index is not None and not 0 <= index < d_sae) or not 0 <= weight <= MOST:
            raise UserError(f"{where}: {entry!r} needs an index in [0, {d_sae}) and a weight from 0 to {MOST:g}")
        if index is None:
            others = weight
        else:
            listed[index] = weight
    return listed, others
