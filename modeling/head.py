"""From final hidden states to log-probabilities over the vocabulary, without the logits ever existing whole.

Shape letters: N completion tokens, n those of one chunk, D hidden width, V vocabulary.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 26  # logits held at once: 256 MiB in fp32
CACHE_ELEMENTS = 1 << 21  # of them passed over at once on a CPU: what a pass makes on its way then stays in the cache


def token_statistics(
    hidden: Tensor,
    target: Tensor,
    head: nn.Module,
    softcap: float | None,
    other: tuple[Tensor, nn.Module] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) [N] in fp32 from the final hidden states [N, D] and, given the final hidden states [N, D] and the
    head of another model, KL(other || own) [N] over the whole vocabulary, which has no gradient into the other."""
    weight, bias = parameters(head)
    others = None if other is None else (other[0].detach(), *parameters(other[1]))
    logps, kl = _TokenStatistics.apply(hidden, weight, bias, target, softcap, others)
    return logps, kl if other else None


def parameters(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [V, D] and the bias [V] of a vocabulary projection."""
    return cast(Tensor, head.weight), cast(Tensor | None, getattr(head, "bias", None))


class _TokenStatistics(torch.autograd.Function):
    """Chunk by chunk; the backward pass computes each chunk's logits again, but for the last, which it starts with.

    Written out, since autograd keeps or makes a tensor [n, V] for nearly each operation that here works in place.
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
    ) -> tuple[Tensor, Tensor]:
        own = _Projection(hidden, weight, bias, softcap)
        others = None if other is None else _Projection(*other, softcap)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        kl = torch.zeros_like(logps)
        ctx.lse, ctx.others_lse, ctx.last = torch.empty_like(logps), torch.empty_like(logps), None
        for part in own.chunks():
            ctx.last = None  # room for the next
            logits = own.logits(part)
            theirs = None if others is None else others.logits(part)
            for rows, place in passes(logits, part.start):
                logps[place], ctx.lse[place] = statistics(logits[rows], target[place])
                if theirs is not None:
                    kl[place], ctx.others_lse[place] = divergence(logits[rows], ctx.lse[place], theirs[rows])
            ctx.last = logits
        ctx.own, ctx.others, ctx.target = own, others, target
        return logps, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        own, others = ctx.own, ctx.others
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(own.hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        for part in reversed(own.chunks()):
            logits, ctx.last = own.logits(part) if ctx.last is None else ctx.last, None
            theirs = None if others is None else others.logits(part)
            for rows, place in passes(logits, part.start):
                of_others = None if theirs is None else (theirs[rows], ctx.others_lse[place])
                grads = grad_logps[place], grad_kl[place]
                to_gradient(logits[rows], ctx.lse[place], ctx.target[place], *grads, own.softcap, of_others)
            grad = logits.to(own.weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ own.weight
            if needs_weight:
                grad_weight = added(grad_weight, grad.T @ own.hidden[part])
            if needs_bias:
                grad_bias = added(grad_bias, logits.sum(0))
        return grad_hidden, grad_weight, grad_bias, None, None, None  # autograd casts them to their inputs' dtypes


def added(total: Tensor | None, term: Tensor) -> Tensor:
    """A sum in fp32, of one term so far where there is no total; in its place, so that there are never two."""
    return term.float() if total is None else total.add_(term)


class _Projection:
    """Soft-capped logits of one model, by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
        self.hidden, self.weight, self.bias, self.softcap = hidden, weight, bias, softcap

    def chunks(self) -> list[slice]:
        """RunClasses of the N tokens, small enough for their logits to fit into CHUNK_ELEMENTS; of no tokens, one."""
        size = max(1, CHUNK_ELEMENTS // len(self.weight))
        return [slice(start, start + size) for start in range(0, max(1, len(self.hidden)), size)]

    def logits(self, part: slice) -> Tensor:
        """[n, V] in fp32."""
        return capped(F.linear(self.hidden[part], self.weight, self.bias), self.softcap)


# --------------------------------------------------------------------------------------------- passes over the logits


PASSES = ("capped", "statistics", "divergence", "to_gradient")  # what `compile_passes` compiles


def passes(logits: Tensor, first: int) -> list[tuple[slice, slice]]:
    """Rows of logits [n, V] to pass over together, and where they are among the N tokens, of which the chunk's first is
    `first`."""
    size = max(1, CACHE_ELEMENTS // logits.shape[1] if logits.device.type == "cpu" else len(logits))
    parts = [(start, min(start + size, len(logits))) for start in range(0, len(logits), size)]
    return [(slice(start, stop), slice(first + start, first + stop)) for start, stop in parts]


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """In fp32, soft-capped; may overwrite them."""
    logits = logits.float()
    if softcap is None:
        return logits
    # softcap * tanh(x / softcap), by a sigmoid, which takes a CPU a sixth of the time of a tanh
    return logits.mul_(2 / softcap).sigmoid_().sub_(0.5).mul_(2 * softcap)


def statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) [n], and the logarithm [n] of what probabilities are divided by."""
    lse = logits.logsumexp(1)
    return logits.gather(1, target.unsqueeze(1)).squeeze(1) - lse, lse


def divergence(logits: Tensor, lse: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(theirs || own) [n], and their logarithm as `statistics` gives it. Overwrites theirs."""
    others_lse = theirs.logsumexp(1)
    share = (theirs - others_lse.unsqueeze(1)).exp_()
    return share.mul_(theirs.sub_(logits)).sum(1) - others_lse + lse, others_lse


def to_gradient(
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    grad_logps: Tensor,
    grad_kl: Tensor,
    softcap: float | None,
    others: tuple[Tensor, Tensor] | None,
) -> None:
    """Turns logits [n, V] into the gradient of the logits before soft-capping, from those of what `statistics` and
    `divergence` give. `others`: their logits, which it overwrites, and logarithm."""
    room = logits if softcap is None else torch.empty_like(logits)
    grad = torch.sub(logits, lse.unsqueeze(1), out=room).exp_()  # the probabilities
    grad.mul_((grad_kl - grad_logps).unsqueeze(1))
    grad.scatter_add_(1, target.unsqueeze(1), grad_logps.unsqueeze(1))
    if others is not None:
        theirs, others_lse = others
        share = theirs.sub_(others_lse.unsqueeze(1)).exp_()
        grad.sub_(share.mul_(grad_kl.unsqueeze(1)))
    if softcap is not None:  # the derivative of the soft-capping: 1 - (capped / softcap)^2
        torch.addcmul(grad, grad, logits.square_(), value=-1 / softcap**2, out=logits)


def compile_passes() -> None:
    """Have torch.compile fuse what each of these does, from now on in this process (`model.compile`)."""
    for name in PASSES:
        globals()[name] = torch.compile(globals()[name], dynamic=True)
