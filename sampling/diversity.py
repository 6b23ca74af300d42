"""How varied a policy's samples are, and how far the policy has gone from its reference.

The completions are the policy's own. Where they are drawn from its whole distribution (temperature 1, no truncation)
the means of -log policy and of log policy - log reference are unbiased estimates of its entropy and of
KL(policy || reference), of whole completions, in nats.
"""

from collections import Counter
from collections.abc import Sequence
from math import exp, log
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

import models
from data.batch import batches_by_length, collate
from distributed import parallel
from sampling.samples import Conversation
from sampling.settings import SamplingSettings
from training.loop import BasicTrainer

MAX_N = 4  # BLEU's longest n-grams


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int,
    pad_id: int,
    eos_id: int,
) -> list[float]:
    """log p(completion | prompt) of each completion, in nats."""
    records: list[dict[str, Any]] = [
        {"prompt_ids": list(prompt), "completion_ids": [list(completion)], "index": i}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    lengths = [len(record["prompt_ids"]) + len(record["completion_ids"][0]) for record in records]
    found: dict[int, float] = {}
    for places in batches_by_length(lengths, batch_size):
        batch = collate([records[place] for place in places], "padded", pad_id=pad_id, eos_id=eos_id)
        found |= zip(batch.index, models.score(model, batch.to(parallel.device())).logps.tolist())
    return [found[i] for i in range(len(records))]


def ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """The n-grams of a text and how often each is there."""
    return Counter(zip(*(words[start:] for start in range(n))))


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words as a share of all n-grams of the texts together (Li et al. 2016, distinct-1 and -2).

    NaN where no text has n words.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(ngrams(text.split(), n))
    return len(counts) / counts.total() if counts else float("nan")


def self_bleu(groups: Sequence[Sequence[str]]) -> float:
    """The mean BLEU-4 of each text with the others of its group as references (Zhu et al. 2018): high where the draws
    of one prompt resemble each other. Words are split at white space; a precision of 0 counts as 0.1 over the number
    of n-grams. NaN where no group has two texts."""
    scores = [
        bleu(text.split(), [other.split() for j, other in enumerate(group) if j != i])
        for group in groups
        if len(group) > 1
        for i, text in enumerate(group)
    ]
    return mean(scores) if scores else float("nan")


def bleu(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of one text in [0, 1], smoothed as method 1 of Chen and Cherry 2014."""
    if not set(words) & {word for reference in references for word in reference}:
        return 0.0
    total = 0.0
    for n in range(1, MAX_N + 1):
        counts = ngrams(words, n)
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= ngrams(reference, n)
        total += log((sum((counts & most).values()) or 0.1) / max(1, counts.total()))
    closest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return exp(min(0.0, 1 - closest / len(words)) + total / MAX_N)


def sample_figures(config: SamplingSettings, trainer: BasicTrainer, talks: Sequence[Conversation]) -> dict[str, float]:
    """The figures of the policy's samples, first turns only, against the reference: the start, or reference_path."""
    own = [talk.requests[0].prompt_ids for talk in talks]
    plain = [ids[: -1 if trainer.control_tokens else None] for ids in own]  # the reference knows no control token
    answers = [talk.answers[0] for talk in talks]
    texts = [answer.text for answer in answers]
    groups = [texts[start : start + config.samples] for start in range(0, len(texts), config.samples)]

    reference = trainer.load(*models.reference_weights(config.model), frozen=True)
    logps = {
        name: torch.tensor(
            log_likelihoods(
                scorer,
                prompts,
                [answer.ids for answer in answers],
                batch_size=config.model.eval_batch_size,
                pad_id=trainer.tokenizer.pad_token_id,
                eos_id=trainer.tokenizer.eos_token_id,
            )
        )
        for name, scorer, prompts in (("policy", trainer.policy, own), ("reference", reference, plain))
    }
    lengths = torch.tensor([len(answer.ids) for answer in answers])
    values = {
        **{name: getattr(config, name) for name in ("temperature", "top_p", "top_k")},
        "number": len(texts),
        "tokens": float(lengths.float().mean()),
        "cut": mean(answer.finish_reason == "length" for answer in answers),
        "entropy": float(-logps["policy"].mean()),
        "entropy_per_token": float(-logps["policy"].sum() / lengths.sum()),
        "kl": float((logps["policy"] - logps["reference"]).mean()),
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2)},
        "self_bleu": self_bleu(groups),
    }
    return {f"samples/{name}": value for name, value in values.items() if value == value}  # NaN: nothing to say
