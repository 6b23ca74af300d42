"""From final hidden states to log-probabilities over the vocabulary. The logits of all tokens never exist at once.

Shape letters: N completion tokens, n those of one chunk, D hidden width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from modeling.compiled import compiled

CHUNK_ELEMENTS = 1 << 26  # logits in memory at once: 256 MiB in fp32
GPU_CHUNK_ELEMENTS = 1 << 28  # on a GPU, whose products of few rows wait for the weights: 1 GiB
TILE = 256  # rows; of a GPU's product, a part of a tile takes as long as a whole one
CACHE_ELEMENTS = 1 << 21  # logits that a CPU passes over at once, so that intermediate results stay in its cache


def token_statistics(
    hidden: Tensor,
    target: Tensor,
    head: nn.Module,
    softcap: float | None,
    other: tuple[Tensor, nn.Module] | None = None,
    log_squares: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p(target) [N] in fp32; if `other` is given, KL(other || this model) [N] over the whole vocabulary; and if
    `log_squares`, the log of the sum over the vocabulary of p^2 [N], which has no gradient.

    `hidden` [N, D] are the final hidden states, `head` is the vocabulary projection; `other` holds those of another
    model. The KL has no gradient into the other model. Soft-capping is softcap * tanh(logits / softcap), for both.
    """
    weight, bias = head_parameters(head)
    other_inputs = None if other is None else (other[0].detach(), *head_parameters(other[1]))
    inputs = (hidden, weight, bias, target, softcap, other_inputs, log_squares, passes_of(head))
    logps, kl, squares = _TokenStatistics.apply(*inputs)
    return logps, kl if other else None, squares if log_squares else None


def head_parameters(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [V, D] and the bias [V] of a vocabulary projection."""
    return cast(Tensor, head.weight), cast(Tensor | None, getattr(head, "bias", None))


class _TokenStatistics(torch.autograd.Function):
    """`token_statistics`, chunk by chunk. The backward pass starts with the last chunk, whose logits are kept. It
    computes the logits of the other chunks again.

    The gradient is written by hand because autograd would keep or create a tensor [n, V] for nearly every operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        softcap: float | None,
        other: tuple[Tensor, Tensor, Tensor | None] | None,
        log_squares: bool,
        passes: "Passes",
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = _Projection(hidden, weight, bias, softcap, passes)
        others = None if other is None else _Projection(*other, softcap, passes)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        kl, squares = torch.zeros_like(logps), torch.zeros_like(logps)
        ctx.mark_non_differentiable(squares)
        ctx.lse, ctx.other_lse, ctx.last_logits = torch.empty_like(logps), torch.empty_like(logps), None
        for chunk in own.chunks():
            ctx.last_logits = None  # frees memory for the next chunk
            logits = own.logits(chunk)
            other_logits = None if others is None else others.logits(chunk)
            for rows, tokens in row_blocks(logits, chunk.start):
                logps[tokens], ctx.lse[tokens] = passes.target_logps(logits[rows], target[tokens])
                if log_squares:
                    squares[tokens] = passes.log_squares(logits[rows], ctx.lse[tokens])
                if other_logits is not None:
                    kl[tokens], ctx.other_lse[tokens] = passes.kl(logits[rows], ctx.lse[tokens], other_logits[rows])
            ctx.last_logits = logits
        ctx.own, ctx.others, ctx.target, ctx.passes = own, others, target, passes
        return logps, kl, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_kl: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        own, others = ctx.own, ctx.others
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(own.hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        for chunk in reversed(own.chunks()):
            logits, ctx.last_logits = own.logits(chunk) if ctx.last_logits is None else ctx.last_logits, None
            other_logits = None if others is None else others.logits(chunk)
            for rows, tokens in row_blocks(logits, chunk.start):
                other = None if other_logits is None else (other_logits[rows], ctx.other_lse[tokens])
                grads = grad_logps[tokens], grad_kl[tokens]
                ctx.passes.gradient(logits[rows], ctx.lse[tokens], ctx.target[tokens], *grads, own.softcap, other)
            grad = logits.to(own.weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ own.weight
            if needs_weight:
                grad_weight = add_product(grad_weight, grad.T, own.hidden[chunk])
            if needs_bias:
                grad_bias = add_in_fp32(grad_bias, logits.sum(0))
        # autograd casts the gradients to the inputs' dtypes
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def add_in_fp32(total: Tensor | None, term: Tensor) -> Tensor:
    """total + term in fp32. The total is changed in place, so that a second tensor of its size never exists."""
    return term.float() if total is None else total.add_(term)


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in fp32, the total in place. A product of bf16 is rounded to bf16 before it is added on a
    CPU alone: a GPU adds its sums to the total as they are, and the product is nowhere in memory."""
    if left.device.type == "cpu" and left.dtype != torch.float32:
        return add_in_fp32(total, left @ right)
    wide: dict[str, Any] = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
    if total is None:
        return torch.mm(left, right, **wide)
    return torch.addmm(total, left, right, out=total, **wide)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """The number of tokens whose logits are in memory at once. On a GPU they are whole tiles."""
    if device.type == "cpu":
        return max(1, CHUNK_ELEMENTS // vocabulary)
    return max(1, GPU_CHUNK_ELEMENTS // vocabulary // TILE) * TILE


class _Projection:
    """The soft-capped logits of one model, a chunk at a time."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, passes: "Passes"
    ) -> None:
        self.hidden, self.weight, self.bias, self.softcap, self.passes = hidden, weight, bias, softcap, passes
        self.rows = chunk_rows(len(weight), weight.device)  # of a chunk, in the backward pass too

    def chunks(self) -> list[slice]:
        """Ranges of the N tokens. Without tokens there is one empty chunk."""
        return [slice(start, start + self.rows) for start in range(0, max(1, len(self.hidden)), self.rows)]

    def logits(self, chunk: slice) -> Tensor:
        """[n, V] in fp32."""
        return self.passes.soft_cap(project(self.hidden[chunk], self.weight, self.bias), self.softcap)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The logits [n, V] before soft-capping. A GPU gives its sums in fp32, as they are; a CPU only rounded to the dtype
    of `hidden`."""
    if hidden.device.type == "cpu" or hidden.dtype == torch.float32:
        return F.linear(hidden, weight, bias)
    logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return logits if bias is None else logits.add_(bias)


def in_fp32(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a small module gives when it computes in fp32, whatever its parameters are kept in."""
    parameters = {name: parameter.float() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, parameters, (inputs.float(),))


# --------------------------------------------------------------------------------------------- passes over the logits


def row_blocks(logits: Tensor, first: int) -> list[tuple[slice, slice]]:
    """Split a chunk's logits [n, V] into blocks of rows: (rows of the chunk, the same rows among the N tokens).

    `first` is the place of the chunk's first row among the N tokens. A CPU gets blocks that fit into its cache.
    """
    size = max(1, CACHE_ELEMENTS // logits.shape[1] if logits.device.type == "cpu" else len(logits))
    blocks = [(start, min(start + size, len(logits))) for start in range(0, len(logits), size)]
    return [(slice(start, stop), slice(first + start, first + stop)) for start, stop in blocks]


def soft_cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits in fp32, soft-capped if `softcap` is given. May overwrite its input."""
    logits = logits.float()
    if softcap is None:
        return logits
    # This is softcap * tanh(x / softcap), written with a sigmoid, which takes a CPU a sixth of the time of a tanh.
    return logits.mul_(2 / softcap).sigmoid_().sub_(0.5).mul_(2 * softcap)


def target_logps(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) [n] and the logsumexp [n] of the logits [n, V]."""
    lse = logits.logsumexp(1)
    return logits.gather(1, target.unsqueeze(1)).squeeze(1) - lse, lse


def log_sum_of_squares(logits: Tensor, lse: Tensor) -> Tensor:
    """log sum_v p(v)^2 [n] of the logits [n, V], whose logsumexp [n] is `lse`."""
    return (2 * logits).logsumexp(1) - 2 * lse


def kl_divergence(logits: Tensor, lse: Tensor, other_logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(other || this model) [n] and the other model's logsumexp [n]. Overwrites `other_logits` [n, V].

    `lse` [n] is the logsumexp of this model's `logits` [n, V].
    """
    other_lse = other_logits.logsumexp(1)
    other_probs = (other_logits - other_lse.unsqueeze(1)).exp_()
    return other_probs.mul_(other_logits.sub_(logits)).sum(1) - other_lse + lse, other_lse


def logits_to_gradient(
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    grad_logps: Tensor,
    grad_kl: Tensor,
    softcap: float | None,
    other: tuple[Tensor, Tensor] | None,
) -> None:
    """Overwrite soft-capped logits [n, V] with the gradient with respect to the logits before soft-capping.

    `grad_logps` and `grad_kl` [n] are the gradients with respect to the results of `target_logps` and `kl_divergence`.
    `other` holds the other model's logits [n, V], which are overwritten, and logsumexp [n].
    """
    out = logits if softcap is None else torch.empty_like(logits)
    grad = torch.sub(logits, lse.unsqueeze(1), out=out).exp_()  # the probabilities
    grad.mul_((grad_kl - grad_logps).unsqueeze(1))
    grad.scatter_add_(1, target.unsqueeze(1), grad_logps.unsqueeze(1))
    if other is not None:
        other_logits, other_lse = other
        other_probs = other_logits.sub_(other_lse.unsqueeze(1)).exp_()
        grad.sub_(other_probs.mul_(grad_kl.unsqueeze(1)))
    if softcap is not None:  # the derivative of the soft-capping: 1 - (capped / softcap)^2
        torch.addcmul(grad, grad, logits.square_(), value=-1 / softcap**2, out=logits)


# ------------------------------------------------------------------------------------------------- eager or compiled


@dataclass(frozen=True)
class Passes:
    """The five functions that pass over a chunk's logits: as they are written above, or compiled."""

    soft_cap: Callable[..., Tensor]
    target_logps: Callable[..., tuple[Tensor, Tensor]]
    log_squares: Callable[..., Tensor]
    kl: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., None]


EAGER = Passes(soft_cap, target_logps, log_sum_of_squares, kl_divergence, logits_to_gradient)
CHOSEN = "_passes"  # the attribute of a vocabulary projection that holds its passes


@cache
def compiled_passes() -> Passes:
    """The five functions, each fused by torch.compile. They are compiled once in a process."""
    return Passes(
        soft_cap=compiled(soft_cap, dynamic=True),
        target_logps=compiled(target_logps, dynamic=True),
        log_squares=compiled(log_sum_of_squares, dynamic=True),
        kl=compiled(kl_divergence, dynamic=True),
        gradient=compiled(logits_to_gradient, dynamic=True),
    )


def use_passes(head: nn.Module, passes: Passes) -> None:
    """From now on `token_statistics` uses these passes for this vocabulary projection."""
    setattr(head, CHOSEN, passes)


def passes_of(head: nn.Module) -> Passes:
    """The passes chosen by `use_passes`, or EAGER."""
    return getattr(head, CHOSEN, EAGER)


def compile_passes(model: PreTrainedModel) -> None:
    """Use compiled passes for a model's vocabulary projection (`model.compile`); a reward model has none."""
    if (head := model.get_output_embeddings()) is not None:
        use_passes(head, compiled_passes())
