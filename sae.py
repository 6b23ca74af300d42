"""Sparse autoencoders: the one form they are all read into, taps, pooled features, and how far they drift.

`sae_formats.py` reads the files. Shape letters: N tokens, S sequences, D width of the vectors that are read (`d_in`),
F latents (`d_sae`), K latents that one sequence is compared on.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils import UserError, resolve_path

ENCODE_ELEMENTS = 1 << 24  # activations held at once while encoding: 64 MiB in fp32
OTHER_FEATURES = "others"  # as an index in feature weights: all features that are not listed
SHARE_FLOOR = 1e-6  # added to every share of the KL drift, so that a feature that went silent costs a finite amount


@contextlib.contextmanager
def products_for(dtype: torch.dtype) -> Iterator[None]:
    """Let a GPU multiply fp32 on its tensor cores (TF32: 11 bits of each factor, sums in fp32), seven or eight times as
    fast on an H100 or A100, where one factor is of a dtype without as many: vectors in bf16 have 8."""
    before = torch.get_float32_matmul_precision()
    try:
        if dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class SAE(nn.Module):
    """A frozen autoencoder. JumpReLU (Rajamanoharan et al. 2024, 2407.14435) and, with `k`, TopK (Gao et al. 2024,
    2406.04093): of each vector's features the k largest stay.

        features = relu(pre) * (pre > threshold),  pre = x @ W_enc + b_enc;   x' = features @ W_dec + b_dec

    A threshold of 0 is ReLU. The tensors are in fp32: nothing here is trained, and thresholds lie closer together
    than bf16 resolves.
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
        self.W_dec = W_dec.detach().float()  # no buffer: features take the encoder alone, so it stays in host memory
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
        """The autoencoders that it is made of (`JointSAE` has several), in the order of their features."""
        return [self]

    @property
    def shares(self) -> list[float]:
        """What each member's drift counts for; they sum to 1."""
        return [1.0]

    def encode(self, x: Tensor) -> Tensor:
        """Features [..., F] of vectors x [..., D], in fp32."""
        features = self._jump_relu(x, self.W_enc, self.b_enc, self.threshold)
        if self.k is None:
            return features
        kept = features.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(features).scatter(-1, kept.indices, kept.values)

    def decode(self, features: Tensor) -> Tensor:
        """Vectors [..., D] from features [..., F]."""
        return features @ self.W_dec.to(features.device) + self.b_dec

    def encode_latents(self, x: Tensor, latents: Tensor) -> Tensor:
        """`encode(x)[:, latents]` [N, K] for x [N, D] and latents [K], with gradient through those columns only."""
        features = self._jump_relu(x, self.W_enc[:, latents], self.b_enc[latents], self.threshold[latents])
        return features if self.k is None else features * self._stays(x, latents)

    @torch.no_grad()
    def _stays(self, x: Tensor, latents: Tensor) -> Tensor:
        """Whether each latent [N, K] is among the k largest of all F, in chunks as `pooled_features`."""
        return torch.cat([self.encode(part)[:, latents] > 0 for part in x.split(max(1, ENCODE_ELEMENTS // self.d_sae))])

    @staticmethod
    def _jump_relu(x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False), products_for(x.dtype):
            features = x.float() @ weight
        features += bias  # in place, here and below: all of them at once can be the most that a step holds
        return features.mul_(features > threshold.clamp(min=0))  # relu, too


class JointSAE(SAE):
    """Several autoencoders that read several places at once: their vectors, one after the other, make up D, their
    features make up F. Drift is the mean of theirs, weighted."""

    def __init__(self, members: Sequence[SAE], weights: Sequence[float]) -> None:
        """`weights` are positive numbers; only their proportions matter."""
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
        vectors = x.split([member.d_in for member in self.members], dim=-1)
        return torch.cat([member.encode(own) for member, own in zip(self.members, vectors)], dim=-1)

    def decode(self, features: Tensor) -> Tensor:
        parts = features.split([member.d_sae for member in self.members], dim=-1)
        return torch.cat([member.decode(own) for member, own in zip(self.members, parts)], dim=-1)

    def encode_latents(self, x: Tensor, latents: Tensor) -> Tensor:
        return self.encode(x)[:, latents]


class ResidualTap:
    """Reads the residual stream after one decoder layer: that layer's own output, before any final norm.

    `output_hidden_states[-1]` is not the same thing: the last one has gone through the model's norm.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._read: Tensor | None = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Hook the model for one forward pass. Closed before the backward pass, where activation checkpointing
        runs the layer once more: the tensor kept is the one the loss was computed from."""
        handles = [module.register_forward_hook(self._keep) for module in self._hooked()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooked(self) -> list[nn.Module]:
        return [self.layer]

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._read = output if isinstance(output, Tensor) else output[0]

    def take(self) -> Tensor:
        """The vectors [R, T, D] of the forward pass just read; the tap forgets them."""
        assert self._read is not None, "no forward pass went through the tapped module"
        read, self._read = self._read, None
        return read


class MLPTap(ResidualTap):
    """Reads what one decoder layer's MLP adds to the residual stream.

    That is the MLP's output, followed through the modules that the layer gives it to before it adds it: none in
    Llama, a norm in Gemma 2 and 3, a dropout in GPT-NeoX.
    """

    def __init__(self, layer: nn.Module, mlp: nn.Module) -> None:
        super().__init__(layer)
        self.mlp = mlp

    def _hooked(self) -> list[nn.Module]:
        return list(self.layer.children())

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module is self.mlp or (inputs and inputs[0] is self._read):
            self._read = output


class JointTap(ResidualTap):
    """Reads several places in one forward pass, for a `JointSAE`."""

    def __init__(self, taps: Sequence[ResidualTap]) -> None:
        self.taps = taps

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for tap in self.taps:
                stack.enter_context(tap.reading())
            yield

    def take(self) -> Tensor:
        return torch.cat([tap.take() for tap in self.taps], dim=-1)


def active(features: Tensor) -> Tensor:
    """1 where a feature is active, else 0."""
    return (features > 0).float()


@torch.no_grad()
def pooled_features(
    sae: SAE, residual: Tensor, lengths: Sequence[int], of: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean feature activations [S, F] of each sequence, without gradient; or means `of` what is made of them.

    `residual` [M, D] holds the sequences one after the other, `lengths` [S] how many tokens each has. Encoded in
    chunks: the dense [M, F] never exists. A sequence without tokens has all zeros.
    """
    counts = torch.tensor(lengths, dtype=torch.long)  # on the host, so that nothing waits for the device
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), counts, output_size=len(residual))
    sequence = sequence.to(residual.device, non_blocking=True)
    sums = residual.new_zeros(len(lengths), sae.d_sae, dtype=torch.float32)
    chunk = max(1, ENCODE_ELEMENTS // sae.d_sae)
    for part, owner in zip(residual.split(chunk), sequence.split(chunk)):
        features = sae.encode(part)
        sums.index_add_(0, owner, features if of is None else of(features))
    return sums / counts.clamp(min=1).unsqueeze(1).to(residual.device, non_blocking=True)


def selected_features(sae: SAE, residual: Tensor, lengths: Sequence[int], latents: Tensor) -> Tensor:
    """Mean activations [S, K] of each sequence's own latents [S, K], with gradient into `residual` [M, D]."""
    parts = residual.split(list(lengths))
    return torch.stack([sae.encode_latents(x, own).sum(0) / max(1, len(x)) for x, own in zip(parts, latents)])


def compared_latents(policy: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The latents I_k = topk(policy) | topk(reference) of each sequence (FPO, 2411.07618).

    From pooled features [S, F] of both: latents [S, 2k] and a mask [S, 2k] that is True once for each member.
    Latents that are zero are no members, so a sequence with fewer than k active ones does not depend on how ties
    among zeros fall.
    """
    k = min(k, policy.shape[1])
    from_policy, from_reference = policy.topk(k), reference.topk(k)
    repeated = (from_reference.indices.unsqueeze(2) == from_policy.indices.unsqueeze(1)) & (
        from_policy.values > 0
    ).unsqueeze(1)
    member = torch.cat([from_policy.values > 0, (from_reference.values > 0) & ~repeated.any(2)], dim=1)
    return torch.cat([from_policy.indices, from_reference.indices], dim=1), member


def kl_terms(policy: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """KL(reference || policy) of pooled features [S, K] renormalised over the latents whose weight [S, K] > 0, as the
    terms [S, K] that sum to it.

    A term is q log(q / p) - q + p. It is never negative, so weighting the terms is sound; with equal weights the last
    two cancel in the sum, which is then the plain KL divergence.
    """
    member = weight > 0

    def normalised(features: Tensor) -> Tensor:
        features = features * member
        share = features / features.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        share = (share + SHARE_FLOOR) * member
        return share / share.sum(1, keepdim=True).clamp(min=SHARE_FLOOR) + ~member

    p, q = normalised(policy), normalised(reference)
    return (q * (q / p).log() - q + p) * weight


def mse_terms(policy: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared differences [S, 2k] of pooled features [S, 2k], over k (FPO, 2411.07618 v4, Eq. 10)."""
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
) -> Tensor:
    """How far each sequence's pooled features have moved from the reference's: F [S] of FPO (2411.07618, Eq. 8-10).

    `residual` [M, D] of the policy with gradient, `lengths` [S], `reference` [S, F] pooled features. Which latents
    are compared is decided without gradient from all of them; only those at most 2k are then encoded with
    gradient, where one is wanted. `feature_weights` [F] scales the latents' terms one by one. Of several autoencoders
    each is compared on its own, and the drifts are averaged by their shares.
    """
    if not lengths:  # a batch of no records
        return residual.new_zeros(0)
    vectors = residual.split([member.d_in for member in sae.members], dim=1)
    widths = [member.d_sae for member in sae.members]
    scales = [None] * len(widths) if feature_weights is None else feature_weights.split(widths)
    drifts = []
    for member, x, before, scale in zip(sae.members, vectors, reference.split(widths, dim=1), scales):
        pooled = pooled_features(member, x, lengths)
        latents, is_member = compared_latents(pooled, before, k)
        policy = selected_features(member, x, lengths, latents) if x.requires_grad else pooled.gather(1, latents)
        weight = is_member.float() if scale is None else is_member * scale[latents]
        drifts.append(DIVERGENCES[divergence](policy, before.gather(1, latents), weight).sum(1))
    return torch.stack([share * drift for share, drift in zip(sae.shares, drifts)]).sum(0)


@torch.no_grad()
def drift_by_feature(sae: SAE, policy: Tensor, reference: Tensor, *, divergence: str, k: int) -> Tensor:
    """What each feature adds to each sequence's `feature_drift`, all weights 1: [S, F] from pooled features [S, F] of
    both."""
    widths = [member.d_sae for member in sae.members]
    parts = []
    for share, own, before in zip(sae.shares, policy.split(widths, dim=1), reference.split(widths, dim=1)):
        latents, is_member = compared_latents(own, before, k)
        terms = DIVERGENCES[divergence](own.gather(1, latents), before.gather(1, latents), is_member.float())
        parts.append(torch.zeros_like(own).scatter_add(1, latents, share * terms))
    return torch.cat(parts, dim=1)


def drift_options(sae: SAE, *, divergence: str, k: int, feature_weights: Any = None) -> dict[str, Any]:
    """The options of `feature_drift`, checked against the SAE's width, with the weights read into a tensor [F]."""
    if divergence not in DIVERGENCES:
        raise UserError(f"loss.divergence={divergence}: not one of {', '.join(DIVERGENCES)}")
    smallest = min(member.d_sae for member in sae.members)
    if not 1 <= k <= smallest:
        raise UserError(f"loss.k={k}: has to be between 1 and the SAE's {smallest} features")
    return {"divergence": divergence, "k": k, "feature_weights": read_feature_weights(feature_weights, sae.d_sae)}


def read_feature_weights(source: Any, d_sae: int) -> Tensor | None:
    """Weights [F] from `loss.feature_weights`: null, a list of {index, weight}, or a JSON file with such a list.

    Features not in the list weigh what an entry with the index `others` says, or 1. Of several SAEs, the second one's
    features count on from the first one's. Raises UserError for anything else.
    """
    if source is None:
        return None
    where = "loss.feature_weights"
    if isinstance(source, str):
        where = source
        try:
            source = json.loads(resolve_path(source).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"loss.feature_weights: cannot read {source} as JSON ({error})") from error
    others, listed = 1.0, {}
    for entry in source:
        try:
            weight = float(entry["weight"])
            index = None if entry["index"] == OTHER_FEATURES else int(entry["index"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: {entry!r} is not {{index: a feature or {OTHER_FEATURES}, weight: a number}}"
            ) from error
        if (index is not None and not 0 <= index < d_sae) or not 0 <= weight < float("inf"):
            raise UserError(f"{where}: {entry!r} needs an index in [0, {d_sae}) and a weight of 0 or more")
        if index is None:
            others = weight
        else:
            listed[index] = weight
    weights = torch.full((d_sae,), others)
    weights[list(listed)] = torch.tensor(list(listed.values()))
    return weights
