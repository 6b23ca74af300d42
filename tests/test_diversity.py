"""Entropy, KL and n-grams of samples, against exact values and NLTK's."""

import math
import random

import pytest
import torch
from conftest import BOS_ID, EOS_ID, PAD_ID, tiny_gemma
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from sampling import diversity
from sampling.generate import Decoding, Request, sample


class Tokenizer:
    """All of one that sampling needs."""

    pad_token_id, bos_token_id, eos_token_id = PAD_ID, BOS_ID, EOS_ID

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def log_likelihoods(model, prompts, completions, batch_size=64):
    return diversity.log_likelihoods(model, prompts, completions, batch_size=batch_size, pad_id=PAD_ID, eos_id=EOS_ID)


def test_entropy_and_kl_of_samples_are_unbiased():
    """Of one token from two models, where both are known exactly: within four standard errors of 4,000 draws."""
    policy, reference = tiny_gemma(seed=0), tiny_gemma(seed=1)
    prompt, count = [BOS_ID, 5, 9], 4000
    requests = [Request(prompt, 1.0, draw) for draw in range(count)]
    drawn = sample(policy, Tokenizer(), requests, Decoding(1, seed=0), batch_size=1000)
    ids = [answer.ids for answer in drawn]
    own, other = (torch.tensor(log_likelihoods(m, [prompt] * count, ids, 1000)) for m in (policy, reference))
    with torch.no_grad():
        p, q = (m(torch.tensor([prompt])).logits[0, -1].log_softmax(0) for m in (policy, reference))
    for estimate, exact in ((-own, -(p.exp() * p).sum()), (own - other, (p.exp() * (p - q)).sum())):
        assert abs(estimate.mean() - exact) < 4 * estimate.std() / math.sqrt(count)
        assert exact > 0.3


def test_log_likelihoods_by_hand():
    """Whatever the batch: the sum over the completion's tokens."""
    model = tiny_gemma()
    prompts, completions = [[BOS_ID, 7], [BOS_ID, 8, 9, 10], [BOS_ID]], [[4, EOS_ID], [6], [11, 12, 13]]
    found = log_likelihoods(model, prompts, completions, 2)
    for prompt, completion, value in zip(prompts, completions, found):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(1)
        start = len(prompt) - 1
        expected = sum(float(logps[start + i, token]) for i, token in enumerate(completion))
        assert value == pytest.approx(expected, abs=1e-4)


def test_distinct_by_hand():
    assert diversity.distinct(["a b a", "a c"], 1) == 3 / 5
    assert diversity.distinct(["a b a", "a b"], 2) == 2 / 3
    assert math.isnan(diversity.distinct(["a", ""], 2))


def test_self_bleu_is_nltks():
    rng = random.Random(0)
    groups = [[" ".join(rng.choices("abcdef", k=rng.randint(1, 12))) for _ in range(4)] for _ in range(30)]
    smooth = SmoothingFunction().method1
    expected = [
        sentence_bleu([o.split() for j, o in enumerate(group) if j != i], text.split(), smoothing_function=smooth)
        for group in groups
        for i, text in enumerate(group)
    ]
    assert diversity.self_bleu(groups) == pytest.approx(sum(expected) / len(expected))
    assert diversity.self_bleu([["the same five words here"] * 3]) == pytest.approx(1.0)
    assert diversity.self_bleu([["a b c d", "e f g h"]]) == 0.0
    assert diversity.self_bleu([["", "a b"]]) == 0.0
    assert math.isnan(diversity.self_bleu([["alone"], ["too"]]))
