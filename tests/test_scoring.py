"""From rows to log-probabilities: what they are, and what they do not depend on."""

import copy

import pytest
import torch
from conftest import EOS_ID, collate, pairs, random_sae, tiny_gemma

import models
from models import completion_logps, decoder_layers, score
from sae import ResidualTap, pooled_features


def plain_logps(model, prompt, completion):
    """The model's own logits for one sequence alone, soft-capping and all."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0].float()
    own = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return own.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)


@torch.no_grad()
def test_equals_the_models_own_logits(gemma):
    records = pairs(4)
    scores = score(gemma, collate(records))
    expected = [plain_logps(gemma, r["prompt_ids"], r["completion_ids"][c]) for c in (0, 1) for r in records]
    torch.testing.assert_close(scores.token_logps, torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.logps, torch.stack([e.sum() for e in expected]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.mean_logps, torch.stack([e.mean() for e in expected]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_independent_of_padding_and_of_the_other_rows(gemma):
    sae, tap = random_sae(), ResidualTap(decoder_layers(gemma)[1])
    records = pairs(5)

    def read(chosen):
        scores = score(gemma, collate(chosen), tap)
        return scores.logps, pooled_features(sae, scores.residual, scores.batch.content_lengths)

    together_logps, together_features = read(records)
    for i, record in enumerate(records):
        logps, features = read([record])
        torch.testing.assert_close(logps, together_logps[[i, i + 5]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features, together_features[[i, i + 5]], rtol=1e-4, atol=1e-4)


def test_values_and_gradients_do_not_depend_on_the_chunk(monkeypatch):
    def run(elements):
        monkeypatch.setattr(models, "HEAD_ELEMENTS", elements)
        model = tiny_gemma()
        scores = score(model, collate(pairs()))
        scores.logps.sum().backward()
        return scores.token_logps.detach(), model.model.embed_tokens.weight.grad

    whole, chunked = run(1 << 20), run(64 * 3)
    torch.testing.assert_close(whole[0], chunked[0])
    torch.testing.assert_close(whole[1], chunked[1], rtol=1e-4, atol=1e-4)


def test_no_tensor_of_all_positions_by_vocabulary_exists(monkeypatch, gemma):
    """The largest logits ever computed are one chunk of completion positions, forward and backward."""
    monkeypatch.setattr(models, "HEAD_ELEMENTS", 64 * 4)
    sizes = []
    gemma.lm_head.register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[0]))
    batch = collate(pairs(6))
    score(gemma.train(), batch).logps.sum().backward()
    assert max(sizes) == 4
    assert sum(sizes) == 2 * len(batch.target)  # once forward, once recomputed


def test_extreme_logits_stay_finite():
    head = torch.nn.Linear(4, 8, bias=False)
    torch.nn.init.constant_(head.weight, 0.0)
    head.weight.data[0] = 1e4
    logps = completion_logps(torch.ones(2, 4, dtype=torch.float32), torch.tensor([0, 1]), head, softcap=None)
    assert logps.tolist() == pytest.approx([0.0, -4e4])


def test_features_are_pooled_over_text_only():
    records = pairs(2)
    cut = copy.deepcopy(records)
    cut[0]["completion_ids"][0] = cut[0]["completion_ids"][0][:-1]  # a completion cut by max_length has no EOS
    assert collate(records).content_lengths[0] == len(records[0]["completion_ids"][0]) - 1
    assert collate(cut).content_lengths[0] == len(cut[0]["completion_ids"][0])
    batch = collate(records)
    assert EOS_ID not in batch.target[batch.content]
    assert torch.equal(batch.input_ids.flatten()[batch.position], batch.target)


def test_decoder_layers_are_found_by_structure(gemma):
    assert decoder_layers(gemma) is gemma.model.layers
