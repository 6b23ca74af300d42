"""How far the report on features is to be trusted: what the SAE sees of the change, and what a feature does.

Both models read the same tokens of a few completions, one model after the other: what the reference had there is kept.

- Does the SAE rebuild what it reads, in both models (FVU), and is the change of the residual stream within what it
  rebuilds, or outside?
- Is a feature's change one of the residual stream? Latent scaling (2504.02922): how strongly its direction is in either
  model where it is active, by least squares.
- Which words does the mean change speak for, through the model's own final norm and head? That asks no SAE.
- How much of KL(policy || reference) goes away where a feature's change is set back?

Shape letters: N completion tokens, P positions of a batch but padding, M text tokens, D width of what an SAE reads,
F its features, K those that the page shows, V words, G groups of prompts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import models
from data.batch import Batch, sum_by_sequence
from distributed import parallel
from distributed.sharding import full_tensor
from features.intervals import ratio, with_interval
from features.reading import Reader, decode
from modeling.attention import whole_blocks
from modeling.head import head_parameters, in_fp32, token_statistics
from sae import ENCODE_ELEMENTS, SAE, ResidualTap, attention_sinks, change_output

WORDS = 10  # that the mean change speaks for most, and as many that it speaks against most
WORDS_AT_ONCE = 1 << 13  # rows of the head in fp32 at once


class Estimate(NamedTuple):
    """A figure, and the half-width of its 95 % interval over prompts."""

    value: float
    error: float


def estimates(sums: np.ndarray, statistic: Any) -> list[Estimate]:
    """Of a statistic with several values, each."""
    value, error = with_interval(sums, statistic)
    return [Estimate(*pair) for pair in zip(value.tolist(), error.tolist(), strict=True)]


@dataclass(frozen=True)
class Trust:
    """What one SAE sees of one kind of text."""

    completions: int
    tokens: int  # that are no attention sink in either model
    fvu: list[Estimate]  # squared error over variance: of the reference, of the policy
    l0: list[Estimate]  # active features a token
    outside: Estimate  # share of the change's square that the change of the reconstruction leaves
    scaling: dict[int, Estimate]  # by feature: how strongly its direction is in the policy, as a share of the reference
    words_for: list[tuple[str, Estimate]]  # standard deviations of all words' scores from their mean
    words_against: list[tuple[str, Estimate]]


@dataclass(frozen=True)
class Causes:
    """How much of the KL is gone where a change is set back."""

    completions: int
    tokens: int
    kl: Estimate  # nats a token
    features: dict[int, Estimate]  # share of it, by feature
    together: list[tuple[str, Estimate]]


@dataclass(frozen=True)
class Remembered:
    """What the reference had, on this rank."""

    residual: dict[tuple[str, int], Tensor]  # [M, D] by kind and batch
    rows: list[tuple[Tensor, Tensor]]  # of each batch of samples, [P, D] where the SAE reads, [N, D] before the head
    head: SimpleNamespace  # a copy of its vocabulary projection


# ------------------------------------------------------------------------------------------------ what the SAE sees


@torch.no_grad()
def remember(reader: Reader) -> Remembered:
    """Read the texts with the reference, whose weights the model has."""
    residual = {(kind, number): x.cpu() for kind, number, _, _, x in reader.read("to compare with", reader.kinds)}
    rows = [(read.vectors.cpu(), read.hidden.cpu()) for read in rows_of(reader, "of the samples' rows")]
    weight, bias = head_parameters(reader.policy.get_output_embeddings())
    copy = SimpleNamespace(weight=full_tensor(weight).clone(), bias=None if bias is None else full_tensor(bias).clone())
    return Remembered(residual, rows, copy)


SCALARS = ("tokens", "squares 0", "squares 1", "errors 0", "errors 1", "active 0", "active 1", "change", "left")


class Compared:
    """Sums over the completions of each group of prompts, of one SAE on one kind of text."""

    def __init__(self, sae: SAE, latents: Sequence[int], groups: int) -> None:
        """`latents` [K] are the features that the page shows."""
        self.sae, self.latents = sae, torch.tensor(latents, dtype=torch.long, device=parallel.device())
        options: Any = {"dtype": torch.float64, "device": parallel.device()}
        self.scalars = torch.zeros(groups, len(SCALARS), **options)
        self.vectors = torch.zeros(groups, 2, sae.d_in, **options)  # of either model
        self.along = torch.zeros(groups, 2, len(latents), **options)  # sums of f * <d, y>, see `add`

    def add(self, group: Tensor, *models_read: Tensor) -> None:
        """Vectors [M, D] of the reference and of the policy at the same tokens, which belong to the groups [M].

        y is what feature k has to account for in a model's vector: the vector less what the other features rebuild of
        it. Of both models' activation f, added up, beta = sum f <d, y> / sum f^2 |d|^2 is the least-squares solution of
        y ~ beta f d. The quotient of the models' betas is that of the sums above.
        """
        size = max(1, ENCODE_ELEMENTS // self.sae.d_sae)
        for own, *parts in zip(group.split(size), *(x.split(size) for x in models_read)):
            vectors = [x.float() for x in parts]
            features = [self.sae.encode(x) for x in parts]
            rebuilt = [self.sae.decode(f) for f in features]
            change, seen = vectors[1] - vectors[0], rebuilt[1] - rebuilt[0]
            scalars = [torch.ones_like(change[:, 0])]
            scalars += [x.square().sum(1) for x in vectors]
            scalars += [(x - y).square().sum(1) for x, y in zip(vectors, rebuilt)]
            scalars += [(f > 0).sum(1).float() for f in features]
            scalars += [change.square().sum(1), (change - seen).square().sum(1)]
            self.scalars.index_add_(0, own, torch.stack(scalars, 1).double())
            self.vectors.index_add_(0, own, torch.stack(vectors, 1).double())
            directions = self.sae.W_dec[self.latents.cpu()].to(change.device)  # [K, D]
            active = [f[:, self.latents] for f in features]
            along = [
                (active[0] + active[1]) * ((x - y) @ directions.T + f * directions.square().sum(1))
                for x, y, f in zip(vectors, rebuilt, active)
            ]
            self.along.index_add_(0, own, torch.stack(along, 1).double())

    def over_ranks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scalars, vectors, along = map(parallel.sum_over_ranks, (self.scalars, self.vectors, self.along))
        return scalars.numpy(force=True), vectors.numpy(force=True), along.numpy(force=True)


def fvu_of(scalars: np.ndarray, vectors: np.ndarray) -> list[Any]:
    """Of the reference and the policy, from sums over tokens: squared error over the variance around the mean."""
    variances = scalars[1:3] - np.square(vectors).sum(1) / max(1.0, scalars[0])
    return [ratio(scalars[3 + n], variances[n]) for n in (0, 1)]


@torch.no_grad()
def compare(reader: Reader, remembered: Remembered, shown: dict[str, list[int]]) -> dict[str, list[Trust]]:
    """Read the texts with the policy too, and say of each kind of text how far its figures are to be trusted, for each
    SAE. `shown` are the features on the page."""
    members, first, found = reader.sae.members, 0, {}
    own: dict[int, dict[str, list[int]]] = {}  # each SAE's features, by kind, as numbers of its own
    for number, member in enumerate(members):
        own[number] = {k: [f - first for f in v if first <= f < first + member.d_sae] for k, v in shown.items()}
        first += member.d_sae
    sums = {k: [Compared(m, own[n][k], reader.groups[k]) for n, m in enumerate(members)] for k in reader.kinds}
    for kind, number, texts, lengths, residual in reader.read("beside the reference's", reader.kinds):
        before = remembered.residual[kind, number].to(residual.device)
        group = torch.repeat_interleave(reader.groups_at(texts), torch.tensor(lengths, device=residual.device))
        for compared, *parts in zip(sums[kind], reader.sae.vectors(before), reader.sae.vectors(residual)):
            kept = ~torch.stack([attention_sinks(x, lengths) for x in parts]).any(0)
            compared.add(group[kept], *(x[kept] for x in parts))
    lens = Lens(reader)
    for kind in reader.kinds:
        found[kind], first = list[Trust](), 0
        for number, compared in enumerate(sums[kind]):
            features = [first + latent for latent in own[number][kind]]
            found[kind].append(summary(reader, kind, features, *compared.over_ranks(), lens))
            first += members[number].d_sae
    return found


def summary(
    reader: Reader,
    kind: str,
    features: list[int],
    scalars: np.ndarray,
    vectors: np.ndarray,
    along: np.ndarray,
    lens: "Lens",
) -> Trust:
    """The figures of one SAE on one kind of text, from the sums of `Compared`."""
    width = scalars.shape[1]
    joined = np.concatenate([scalars, vectors.reshape(len(vectors), -1)], axis=1)
    words_for, words_against = lens.words(np.concatenate([scalars[:, :1], vectors[:, 1] - vectors[:, 0]], axis=1))
    return Trust(
        completions=reader.completions[kind],
        tokens=int(scalars[:, 0].sum()),
        fvu=estimates(joined, lambda s: fvu_of(s[:width], s[width:].reshape(2, -1))),
        l0=estimates(scalars, lambda s: ratio(s[5:7], s[0])),
        outside=estimates(scalars, lambda s: [ratio(s[8], s[7])])[0],
        scaling=dict(zip(features, estimates(along, lambda s: ratio(s[1], s[0])), strict=True)),
        words_for=words_for,
        words_against=words_against,
    )


# -------------------------------------------------------------------------------------------------- the difference lens


class Lens:
    """A change of the residual stream as scores of words: what the model's final norm and head make of it.

    A score is that of the change alone; its unit is the standard deviation over all words, its zero their mean.
    """

    def __init__(self, reader: Reader) -> None:
        """The model has just read something, so that what is split over ranks is at hand."""
        self.tokenizer, self.norm = reader.tokenizer, final_norm(reader)
        self.weight, _ = head_parameters(reader.policy.get_output_embeddings())  # [V, D]
        self.parts = self.weight.split(WORDS_AT_ONCE)
        self.centre = torch.stack([part.float().sum(0) for part in self.parts]).sum(0) / len(self.weight)  # [D]

    def normed(self, change: np.ndarray) -> Tensor:
        """A change [D] after the final norm, less what that makes of no change."""
        assert self.norm is not None
        x = torch.from_numpy(change).float().to(self.weight.device)
        both = in_fp32(self.norm, torch.stack([x, torch.zeros_like(x)])[None])[0]
        return both[0] - both[1]

    @torch.no_grad()
    def words(self, sums: np.ndarray) -> tuple[list[tuple[str, Estimate]], list[tuple[str, Estimate]]]:
        """The words that the mean change speaks for most, and against most, from sums [G, 1 + D] of each group of
        prompts: tokens, and the change over them. None where nothing changed, or where the norm is not known."""
        tokens, change = sums[:, :1].sum(), sums[:, 1:].sum(0)
        if not change.any() or self.norm is None:
            return [], []
        mean = self.normed(change / tokens)
        scores = torch.cat([(part.float() - self.centre) @ mean for part in self.parts])
        best = torch.cat([(way * scores).topk(min(WORDS, len(scores) // 2)).indices for way in (1, -1)])
        rows, spread = self.weight[best].float() - self.centre, float(scores.std())

        def of_words(total: np.ndarray) -> np.ndarray:
            return (rows @ self.normed(total[1:] / total[0]) / spread).cpu().numpy()

        names = [decode(self.tokenizer, [word]) for word in best.tolist()]
        listed = list(zip(names, estimates(sums, of_words), strict=True))
        return listed[: len(listed) // 2], listed[len(listed) // 2 :]


@contextmanager
def remembering(modules: Iterable[nn.Module], given: dict[nn.Module, Any]) -> Iterator[None]:
    """In this block each of the modules leaves in `given` what it gives."""

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        given[module] = output

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(keep))
        yield


@torch.no_grad()
def final_norm(reader: Reader) -> nn.Module | None:
    """The module that gives the model's last hidden states, if a child of the decoder does; all ranks have to ask."""
    given: dict[nn.Module, Any] = {}
    decoder: Any = reader.policy.get_decoder()
    with remembering(decoder.children(), given):
        kind = reader.kinds[0]
        _, _, _, batch = next(iter(reader.batched("of one batch", [kind])))
        last = models.final_hidden_states(reader.policy, batch)
    return next((module for module, output in given.items() if output is last), None)


# ------------------------------------------------------------------------------------------------ what a feature does


class Rows(NamedTuple):
    """A batch of samples, read at all its positions."""

    own: list[int]  # the texts
    batch: Batch
    where: Tensor  # [R, T] the P positions that are no padding
    vectors: Tensor  # [P, D]
    outputs: list[Any]  # of the tapped layers, as they gave them
    hidden: Tensor  # [N, D] what predicts the completion tokens


def rows_of(reader: Reader, what: str) -> Iterator[Rows]:
    """The samples as the model reads them, prompts too, batch by batch."""
    for _, _, own, collated in reader.batched(what, ["sampled"]):
        batch, given = whole_blocks(reader.policy, collated), dict[nn.Module, Any]()
        layers = [tap.layer for tap in reader.tap.members]
        with reader.tap.reading(), remembering(layers, given):
            hidden = models.final_hidden_states(reader.policy, batch).flatten(0, 1)[batch.predictor]
        where = batch.document >= 0
        yield Rows(own, batch, where, reader.tap.take()[where], [given[layer] for layer in layers], hidden)


def kl_to_reference(policy: PreTrainedModel, hidden: Tensor, batch: Batch, reference: Tensor, head: Any) -> Tensor:
    """KL(policy || reference) [S], summed over each completion's tokens, from hidden states [N, D] of both and the
    reference's head."""
    softcap = getattr(policy.config.get_text_config(), "final_logit_softcapping", None)
    other = (hidden, policy.get_output_embeddings())
    _, kl, _ = token_statistics(reference, batch.target, head, softcap, other)
    assert kl is not None
    return sum_by_sequence(kl, batch.sequence, batch.num_sequences)


@torch.no_grad()
def causes(reader: Reader, remembered: Remembered, features: list[int]) -> Causes:
    """What goes away of KL(policy || reference) on the samples, whose weights the model has, where a change of the
    policy's residual stream is set back at all positions but attention sinks: that of each of the features, of those of
    an SAE together, of all that the SAE rebuilds, of all that it reads."""
    by_member, first = [], 0
    for member in reader.sae.members:
        by_member.append([f - first for f in features if first <= f < first + member.d_sae])
        first += member.d_sae
    names = [name for own in by_member for name in (*own, "together", "rebuilt", "all")]
    sums = torch.zeros(reader.groups["sampled"], 2 + len(names), dtype=torch.float64, device=parallel.device())
    for read, (before, reference) in zip(rows_of(reader, "set back"), remembered.rows, strict=True):
        before, reference = before.to(read.vectors.device), reference.to(read.hidden.device)
        lengths = read.batch.document[read.where].bincount().tolist()
        values = [torch.tensor(read.batch.lengths, dtype=torch.float32, device=read.hidden.device)]
        values.append(kl_to_reference(reader.policy, read.hidden, read.batch, reference, remembered.head))
        models_read = reader.sae.vectors(before), reader.sae.vectors(read.vectors)
        parts = zip(reader.sae.members, reader.tap.members, read.outputs, by_member, *models_read)
        for member, tap, output, own, x0, x1 in parts:
            kept = ~torch.stack([attention_sinks(x, lengths) for x in (x0, x1)]).any(0)
            for change in changes(member, own, x0, x1):
                hidden = with_less(reader.policy, tap, output, read, change * kept[:, None])
                values.append(kl_to_reference(reader.policy, hidden, read.batch, reference, remembered.head))
        if read.own:
            sums.index_add_(0, reader.groups_at(read.own), torch.stack(values, 1).double())
    of_groups = parallel.sum_over_ranks(sums).numpy(force=True)
    shares = iter(estimates(of_groups, lambda s: 1 - ratio(s[2:], s[1])))
    found, together, first = dict[int, Estimate](), list[tuple[str, Estimate]](), 0
    for number, (member, own) in enumerate(zip(reader.sae.members, by_member)):
        found |= {first + latent: next(shares) for latent in own}
        where = "" if len(by_member) == 1 else f", SAE {number + 1}"
        for name in ("the features on this page", "all that the SAE rebuilds", "all that it reads"):
            together.append((name + where, next(shares)))
        first += member.d_sae
    return Causes(
        completions=reader.completions["sampled"],
        tokens=int(of_groups[:, 0].sum()),
        kl=estimates(of_groups, lambda s: [ratio(s[1], s[0])])[0],
        features=found,
        together=together,
    )


def changes(sae: SAE, latents: list[int], before: Tensor, after: Tensor) -> Iterator[Tensor]:
    """Parts [P, D] of the change from vectors before to vectors after [P, D] each: what each of some features makes of
    it, these together, what the SAE rebuilds of it, all of it."""
    numbers = torch.tensor(latents, dtype=torch.long, device=after.device)
    directions = sae.W_dec[latents].to(after.device)
    risen = sae.encode_latents(after, numbers) - sae.encode_latents(before, numbers)  # [P, K]
    yield from (risen[:, k : k + 1] * directions[k] for k in range(len(latents)))
    yield risen @ directions
    size = max(1, ENCODE_ELEMENTS // sae.d_sae)
    rebuilt = [torch.cat([sae.decode(sae.encode(part)) for part in x.split(size)]) for x in (before, after)]
    yield rebuilt[1] - rebuilt[0]
    yield after.float() - before.float()


def with_less(policy: PreTrainedModel, tap: ResidualTap, output: Any, read: Rows, change: Tensor) -> Tensor:
    """What predicts the completion tokens, [N, D], where the tapped layer gives so much less [P, D] than its `output`.
    Where that is nothing, on all ranks, no layer is run."""
    if not parallel.max_over_ranks(float(change.abs().max())):
        return read.hidden
    less = change_output(tap.layer, lambda h: h.index_put((read.where,), h[read.where] - change))
    with tap.beginning_with(output), less:
        return models.final_hidden_states(policy, read.batch).flatten(0, 1)[read.batch.predictor]
