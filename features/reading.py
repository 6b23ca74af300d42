"""Models read through an SAE: one after the other, the same texts, each rank its share of them.

Shape letters: S sequences, M text tokens of them, D width of what the SAE reads, F features, K features that the page
shows for a kind of text, G groups of prompts (features/intervals.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import models
from data.batch import Batch, batches_by_length
from dataloader import DataLoader
from distributed import parallel
from distributed.sharding import reshard
from features.intervals import groups_of
from modeling.weights import Weights, load_weights
from sae import ENCODE_ELEMENTS, active, attention_sinks, drift_by_feature, summed_features
from training.loop import Subject
from utils import UserError, progress_bar

CONTEXTS = 3  # the strongest contexts of a feature, of so many
BEFORE, AFTER = 16, 8  # tokens around the strongest one, after the
PROMPT_END = 40  # last tokens of the prompt


@dataclass(frozen=True)
class Text:
    """A completion that is read, after its prompt."""

    kind: str  # chosen, sampled, ...
    prompt_ids: list[int]
    completion_ids: list[int]


SUMMED = ("activation", "tokens", "active", "drift", "completions")  # over the completions of a group of prompts


@dataclass(frozen=True)
class Figures:
    """The features of one model on one kind of text: sums [G, len(SUMMED), F], and what they come to, [F] each."""

    sums: np.ndarray

    @staticmethod
    def mean_of(sums: np.ndarray) -> np.ndarray:
        return sums[0] / sums[1].clip(min=1)

    @staticmethod
    def rate_of(sums: np.ndarray) -> np.ndarray:
        return sums[2] / sums[1].clip(min=1)

    @staticmethod
    def drift_of(sums: np.ndarray) -> np.ndarray:
        return sums[3] / sums[4].clip(min=1)

    @cached_property
    def mean(self) -> np.ndarray:
        """Activation, a mean over the text tokens."""
        return self.mean_of(self.sums.sum(0))

    @cached_property
    def rate(self) -> np.ndarray:
        """Share of the text tokens on which the feature is active."""
        return self.rate_of(self.sums.sum(0))

    @cached_property
    def drift(self) -> np.ndarray:
        """What it adds to F, a mean over the completions; of the reference 0."""
        return self.drift_of(self.sums.sum(0))


Profile = dict[str, Figures]  # by kind of text
Pooled = dict[tuple[str, int], Tensor]  # by kind and batch, [S, F], sparse


@dataclass(frozen=True)
class Context:
    """Text around the token where a feature is strongest, with its activation at each token under both models."""

    prompt: str  # its end
    tokens: list[str]
    reference: list[float]
    policy: list[float]
    starts: bool  # with the completion's first token
    ends: bool  # with its last

    @property
    def strength(self) -> float:
        return max(*self.reference, *self.policy)


def put(policy: PreTrainedModel, weights: Weights, new_tokens: int = 0) -> None:
    """Replace the weights of a model, and put it into eval mode."""
    reshard(policy)
    load_weights(policy, weights, new_tokens)
    policy.eval()


def batches_of_ranks(loader: DataLoader, what: str, keys: Sequence[int]) -> Iterator[tuple[list[int], Batch, bool]]:
    """Of this rank's share of some records, each batch: their keys, the batch itself, and whether it counts. A rank
    without one of its own reads another's all the same, since a split model runs on all ranks or on none."""
    world, rank = parallel.world_size(), parallel.rank()
    lengths = [prompt + sum(completions) for prompt, completions in loader.shapes(list(keys))] if keys else []
    batches = batches_by_length(lengths, max(1, loader.batch_size // world))
    with progress_bar(what, len(batches), 0) as advance:
        for first in range(0, len(batches), world):
            own = [keys[place] for place in [*batches[first : first + world], *[batches[first]] * world][rank]]
            yield own, loader.batch(own).to(parallel.device()), first + rank < len(batches)
            advance(min(first + world, len(batches)), None)


class Reader:
    """One model after the other, in the same memory, read through the SAE on the same texts.

    Each rank has its share of the texts, and keeps it.
    """

    def __init__(self, subject: Subject, texts: Sequence[Text], *, batch_size: int, **drift: Any) -> None:
        """The subject has an SAE and a tap. `drift` is divergence and k, where drift is to be measured."""
        assert subject.sae is not None and subject.tap is not None
        self.texts, self.sae, self.tap = texts, subject.sae, subject.tap
        self.policy, self.tokenizer = subject.policy, subject.tokenizer
        (self.loader,) = subject.loaders.values()  # of one split; it knows how batches are laid out
        self.drift = drift
        self.eos_id = subject.tokenizer.eos_token_id
        self.kinds = list(dict.fromkeys(text.kind for text in texts))
        self.completions = {kind: sum(text.kind == kind for text in texts) for kind in self.kinds}
        self.tokens = {kind: sum(len(self.content(t)) for t in texts if t.kind == kind) for kind in self.kinds}
        world = parallel.world_size()
        size = max(1, batch_size // world)
        lengths = [len(text.prompt_ids) + len(text.completion_ids) for text in texts]
        (by_length,) = batches_by_length(lengths, len(texts))
        own = by_length[parallel.rank() :: world]  # like lengths, so that ranks that wait for each other have like work
        self.group, self.groups = [0] * len(texts), dict[str, int]()
        for kind in self.kinds:
            places = [place for place, text in enumerate(texts) if text.kind == kind]
            groups, self.groups[kind] = groups_of([tuple(texts[place].prompt_ids) for place in places])
            for place, group in zip(places, groups):
                self.group[place] = group
        self.batches = {kind: in_batches([i for i in own if texts[i].kind == kind], size) for kind in self.kinds}
        self.rounds = {kind: int(parallel.max_over_ranks(len(self.batches[kind]))) for kind in self.kinds}

    def content(self, text: Text) -> list[int]:
        """The tokens of a completion that are text, as `Batch.content` has them."""
        return [token for token in text.completion_ids if token != self.eos_id]

    def batched(self, what: str, kinds: Sequence[str]) -> Iterator[tuple[str, int, list[int], Batch]]:
        """Each batch of this rank, with its kind, number and texts. As many on each rank: one that has no text of its
        own is to be read all the same, since a split model runs on all ranks or on none."""
        with progress_bar(f"features {what}", sum(self.rounds[kind] for kind in kinds), 0) as advance:
            places = [(kind, number) for kind in kinds for number in range(self.rounds[kind])]
            for done, (kind, number) in enumerate(places, 1):
                (own,) = self.batches[kind][number : number + 1] or [[]]
                texts = [self.texts[i] for i in own or [0]]
                prompts, completions = [t.prompt_ids for t in texts], [[t.completion_ids] for t in texts]
                batch = self.loader.collate(prompts, completions, range(len(texts)))
                yield kind, number, own, batch.to(parallel.device())
                advance(done, None)

    @torch.no_grad()
    def read(self, what: str, kinds: Sequence[str]) -> Iterator[tuple[str, int, list[int], list[int], Tensor]]:
        """The residual stream [M, D] of each of this rank's batches: with the batch's kind, number and texts, and how
        many text tokens each of them has."""
        for kind, number, own, batch in self.batched(what, kinds):
            residual = models.read_residual(self.policy, batch, self.tap)
            if own:
                yield kind, number, own, batch.read_lengths, residual

    def groups_at(self, own: Sequence[int]) -> Tensor:
        """The groups [S] of the prompts of some texts."""
        return torch.tensor([self.group[i] for i in own], device=parallel.device())

    def measure(self, what: str, kinds: Sequence[str], reference: Pooled | None = None) -> tuple[Profile, Pooled]:
        """The figures of the model on some kinds of text, and its pooled features; drift is from the reference's.

        Raises UserError for features that are not finite.
        """
        width, device = (len(SUMMED), self.sae.d_sae), parallel.device()
        sums = {kind: torch.zeros(self.groups[kind], *width, dtype=torch.float64, device=device) for kind in kinds}
        pooled: Pooled = {}
        for kind, number, own, lengths, residual in self.read(what, kinds):
            (activations, actives), counts = summed_features(self.sae, residual, lengths, active)  # [S, F] each
            means, drift = activations / counts.clamp(min=1), torch.zeros_like(activations)
            if reference is None:
                pooled[kind, number] = means.to_sparse().cpu()
            else:
                before = reference[kind, number].to(means.device).to_dense()
                drift = drift_by_feature(self.sae, means, before, **self.drift)
            found = torch.stack([activations, counts, actives, drift, torch.ones_like(drift)], dim=1)
            sums[kind].index_add_(0, self.groups_at(own), found.double())
        profile = {}
        for kind in kinds:
            profile[kind] = Figures(parallel.sum_over_ranks(sums[kind]).numpy(force=True))
            if not np.isfinite(profile[kind].mean).all():
                raise UserError(
                    f"{what}: features that are not finite; the weights, or model.policy_dtype, are at fault"
                )
        return profile, pooled

    def activations(self, what: str, shown: dict[str, list[int]]) -> dict[int, Tensor]:
        """For each of this rank's texts, the activations [M, K] of the features that the page shows for its kind; 0 at
        attention sinks."""
        found: dict[int, Tensor] = {}
        for kind, _, own, lengths, residual in self.read(what, list(shown)):
            latents = torch.tensor(shown[kind], dtype=torch.long, device=residual.device)
            parts = residual.split(max(1, ENCODE_ELEMENTS // self.sae.d_sae))
            sinks = torch.stack([attention_sinks(x, lengths) for x in self.sae.vectors(residual)]).any(0)
            values = torch.cat([self.sae.encode_latents(part, latents) for part in parts])
            values = values.masked_fill(sinks.unsqueeze(1), 0)
            found |= dict(zip(own, values.cpu().split(lengths)))
        return found

    def contexts(
        self, shown: dict[str, list[int]], reference: dict[int, Tensor], policy: dict[int, Tensor]
    ) -> dict[str, dict[int, list[Context]]]:
        """The strongest contexts of the features shown, over all ranks, at most one from each text."""
        own: dict[str, dict[int, list[Context]]] = {}
        for kind, latents in shown.items():
            texts = [i for batch in self.batches[kind] for i in batch if len(policy[i])]
            pairs = [torch.stack([reference[i], policy[i]]) for i in texts]  # [2, M, K]
            peaks = torch.stack([pair.amax((0, 1)) for pair in pairs]) if pairs else torch.zeros(0, len(latents))
            own[kind] = {}
            for column, latent in enumerate(latents):
                best: dict[tuple[int, ...], Context] = {}
                for place in peaks[:, column].argsort(descending=True).tolist():
                    if len(best) == CONTEXTS or peaks[place, column] <= 0:
                        break
                    text = self.texts[texts[place]]
                    if (key := tuple(text.completion_ids)) not in best:
                        best[key] = self.context(text, pairs[place][:, :, column])
                own[kind][latent] = list(best.values())
        everywhere = parallel.gather_objects(own)
        return {
            kind: {latent: strongest(found[kind][latent] for found in everywhere) for latent in latents}
            for kind, latents in shown.items()
        }

    def context(self, text: Text, values: Tensor) -> Context:
        """The context of the strongest token, from a feature's activations [2, M] under reference and policy."""
        ids, tokenizer = self.content(text), self.tokenizer
        at = int(values.amax(0).argmax())
        start, end = max(0, at - BEFORE), min(len(ids), at + AFTER + 1)
        prompt = decode(tokenizer, text.prompt_ids[-PROMPT_END:], skip_special_tokens=True)
        reference, policy = values[:, start:end].tolist()
        return Context(prompt, pieces(tokenizer, ids, start, end), reference, policy, start == 0, end == len(ids))


def in_batches(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def decode(tokenizer: Tokenizer, ids: Sequence[int], **options: bool) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False, **options))


def strongest(found: Iterable[list[Context]]) -> list[Context]:
    """The strongest of the contexts that the ranks have, no text twice."""
    ordered = sorted((context for part in found for context in part), key=lambda context: -context.strength)
    different = {"".join(context.tokens): context for context in reversed(ordered)}
    return [context for context in ordered if different["".join(context.tokens)] is context][:CONTEXTS]


def pieces(tokenizer: Tokenizer, ids: Sequence[int], start: int, end: int) -> list[str]:
    """The text of each of the tokens from start to end. A character that several tokens make is the last one's."""
    texts = [decode(tokenizer, ids[:count]).rstrip("\ufffd") for count in range(start, end + 1)]
    return [longer[len(shorter) :] for shorter, longer in pairwise(texts)]
