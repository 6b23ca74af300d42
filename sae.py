"""Sparse autoencoders: files, the tap that reads the residual stream, pooled features, and how far they drift.

Shape letters: N tokens, S sequences, D width of the residual stream (`d_in`), F latents (`d_sae`), K latents that
one sequence is compared on.
"""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils import UserError, appears_whole, local_path

ENCODE_ELEMENTS = 1 << 24  # activations held at once while encoding: 64 MiB in fp32
SHARE_FLOOR = 1e-6  # added to every share of the KL drift, so that a feature that went silent costs a finite amount


class SAE(nn.Module):
    """A frozen JumpReLU autoencoder (Rajamanoharan et al. 2024, 2407.14435), as Gemma Scope's are.

        features = relu(pre) * (pre > threshold),  pre = x @ W_enc + b_enc;   x' = features @ W_dec + b_dec

    The tensors are buffers in fp32: nothing here is trained, and thresholds lie closer together than bf16 resolves.
    """

    W_enc: Tensor  # [D, F]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, D]
    b_dec: Tensor  # [D]
    threshold: Tensor  # [F]

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("W_enc", W_enc.detach().float())
        self.register_buffer("b_enc", b_enc.detach().float())
        self.register_buffer("W_dec", W_dec.detach().float())
        self.register_buffer("b_dec", b_dec.detach().float())
        self.register_buffer("threshold", threshold.detach().float())

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """Features [..., F] of residual vectors x [..., D], in fp32."""
        return self._activate(x, self.W_enc, self.b_enc, self.threshold)

    def decode(self, features: Tensor) -> Tensor:
        """Residual vectors [..., D] from features [..., F]."""
        return features @ self.W_dec + self.b_dec

    def encode_latents(self, x: Tensor, latents: Tensor) -> Tensor:
        """`encode(x)[:, latents]` [N, K] for x [N, D] and latents [K], computing only those columns."""
        return self._activate(x, self.W_enc[:, latents], self.b_enc[latents], self.threshold[latents])

    @staticmethod
    def _activate(x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            pre = x.float() @ weight + bias
        return pre.relu() * (pre > threshold)


GEMMA_SCOPE_ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def load_sae(path: Path) -> SAE:
    """Read an SAE from a `params.npz` in Gemma Scope's layout: the arrays of `GEMMA_SCOPE_ARRAYS`.

    Raises UserError, naming the file, where it is not such a file: missing arrays, shapes that do not fit, values
    that are not finite, or pickled objects (which are never loaded).
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable npz file of plain arrays ({error})") from error
    missing = [name for name in GEMMA_SCOPE_ARRAYS if name not in arrays]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; it has {', '.join(arrays) or 'no array'}")
    d_in, d_sae = arrays["W_dec"].shape[-1], arrays["b_enc"].size
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in {**shapes, "threshold": (d_sae,)}.items():
        if arrays[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {list(arrays[name].shape)} where {list(shape)} would fit the rest"
            )
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: {name} has values that are not finite")
    return SAE(**{name: torch.from_numpy(arrays[name]) for name in GEMMA_SCOPE_ARRAYS})


def save_sae(sae: SAE, path: Path) -> None:
    """Write `params.npz` in Gemma Scope's layout, whole or not at all."""
    with appears_whole(path) as part, part.open("wb") as file:
        np.savez(file, **{name: getattr(sae, name).numpy(force=True) for name in GEMMA_SCOPE_ARRAYS})


class ResidualTap:
    """Reads the residual stream after one decoder layer: that layer's own output, before any final norm.

    `output_hidden_states[-1]` is not the same thing: the last one has gone through the model's norm.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._residual: Tensor | None = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Hook the layer for one forward pass. Closed before the backward pass, where activation checkpointing
        runs the layer once more: the tensor kept is the one the loss was computed from."""

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._residual = output if isinstance(output, Tensor) else output[0]

        handle = self.layer.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def take(self) -> Tensor:
        """The residual stream [R, T, D] of the forward pass just read; the tap forgets it."""
        assert self._residual is not None, "no forward pass went through the tapped layer"
        residual, self._residual = self._residual, None
        return residual


@torch.no_grad()
def pooled_features(sae: SAE, residual: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean feature activations [S, F] of each sequence, without gradient.

    `residual` [M, D] holds the sequences one after the other, `lengths` [S] how many tokens each has. Encoded in
    chunks: the dense [M, F] never exists. A sequence without tokens has all zeros.
    """
    counts = torch.tensor(lengths, dtype=torch.long, device=residual.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=residual.device), counts)
    sums = residual.new_zeros(len(lengths), sae.d_sae, dtype=torch.float32)
    chunk = max(1, ENCODE_ELEMENTS // sae.d_sae)
    for part, owner in zip(residual.split(chunk), sequence.split(chunk)):
        sums.index_add_(0, owner, sae.encode(part))
    return sums / counts.clamp(min=1).unsqueeze(1)


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


def kl_drift(policy: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """KL(reference || policy) [S] of pooled features [S, K] renormalised over the latents whose weight [S, K] > 0.

    Written term by term as q log(q / p) - q + p. The terms are never negative, so weighting them is sound; with
    equal weights the last two cancel in the sum, which is then the plain KL divergence.
    """
    member = weight > 0

    def normalised(features: Tensor) -> Tensor:
        features = features * member
        share = features / features.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        share = (share + SHARE_FLOOR) * member
        return share / share.sum(1, keepdim=True).clamp(min=SHARE_FLOOR) + ~member

    p, q = normalised(policy), normalised(reference)
    return ((q * (q / p).log() - q + p) * weight).sum(1)


def mse_drift(policy: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of squared differences [S] of pooled features [S, 2k], over k (FPO, 2411.07618 v4, Eq. 10)."""
    k = policy.shape[1] // 2
    return ((policy - reference).square() * weight).sum(1) / k


DIVERGENCES: dict[str, Callable[..., Tensor]] = {"kl": kl_drift, "mse": mse_drift}


def feature_drift(
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
    gradient. `feature_weights` [F] scales the latents' terms one by one.
    """
    if not lengths:  # a batch of no records
        return residual.new_zeros(0)
    latents, member = compared_latents(pooled_features(sae, residual, lengths), reference, k)
    policy = selected_features(sae, residual, lengths, latents)
    weight = member.float() if feature_weights is None else member * feature_weights[latents]
    return DIVERGENCES[divergence](policy, reference.gather(1, latents), weight)


def drift_options(d_sae: int, *, divergence: str, k: int, feature_weights: Any = None) -> dict[str, Any]:
    """The options of `feature_drift`, checked against the SAE's width, with the weights read into a tensor [F]."""
    if divergence not in DIVERGENCES:
        raise UserError(f"loss.divergence={divergence}: not one of {', '.join(DIVERGENCES)}")
    if not 1 <= k <= d_sae:
        raise UserError(f"loss.k={k}: has to be between 1 and the SAE's {d_sae} features")
    return {"divergence": divergence, "k": k, "feature_weights": read_feature_weights(feature_weights, d_sae)}


def read_feature_weights(source: Any, d_sae: int) -> Tensor | None:
    """Weights [F] from `loss.feature_weights`: null, a list of {index, weight}, or a JSON file with such a list.

    Features not in the list keep weight 1. Raises UserError for anything else.
    """
    if source is None:
        return None
    where = "loss.feature_weights"
    if isinstance(source, str):
        where = source
        try:
            source = json.loads(local_path(source).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"loss.feature_weights: cannot read {source} as JSON ({error})") from error
    weights = torch.ones(d_sae)
    for entry in source:
        try:
            index, weight = int(entry["index"]), float(entry["weight"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: {entry!r} is not {{index: a feature, weight: a number}}") from error
        if not 0 <= index < d_sae or not 0 <= weight < float("inf"):
            raise UserError(f"{where}: {entry!r} needs an index in [0, {d_sae}) and a weight of 0 or more")
        weights[index] = weight
    return weights
