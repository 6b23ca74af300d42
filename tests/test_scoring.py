"""Scoring: log-probabilities are right, and do not depend on padding, other rows, chunks or compiling."""

import copy
import platform
import resource
from pathlib import Path

import pytest
import torch
from conftest import EOS_ID, PAD_ID, collate, pairs, random_sae, tiny_gemma

from data import batch as batches
from distributed import parallel
from modeling import head as heads
from modeling.head import token_statistics
from models import decoder_layers, score
from sae import ResidualTap, pooled_features


def plain_logps(model, prompt, completion):
    """Log-probabilities from the model's own logits, which are soft-capped, for one sequence alone."""
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
        return scores.logps, pooled_features(sae, scores.residual, scores.batch.read_lengths)

    together_logps, together_features = read(records)
    for i, record in enumerate(records):
        logps, features = read([record])
        torch.testing.assert_close(logps, together_logps[[i, i + 5]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features, together_features[[i, i + 5]], rtol=1e-4, atol=1e-4)


def test_values_and_gradients_do_not_depend_on_the_chunk(monkeypatch):
    def run(elements):
        monkeypatch.setattr(heads, "CHUNK_ELEMENTS", elements)
        model = tiny_gemma()
        scores = score(model, collate(pairs()))
        scores.logps.sum().backward()
        return scores.token_logps.detach(), model.model.embed_tokens.weight.grad

    whole, chunked = run(1 << 20), run(64 * 3)
    torch.testing.assert_close(whole[0], chunked[0])
    torch.testing.assert_close(whole[1], chunked[1], rtol=1e-4, atol=1e-4)


def test_a_gpu_computes_whole_tiles_and_more_at_once():
    words = (256_000, 49_152, 32_768, 1 << 27)
    assert [heads.chunk_rows(count, torch.device("cpu")) for count in words] == [262, 1365, 2048, 1]
    assert [heads.chunk_rows(count, torch.device("cuda")) for count in words] == [1024, 5376, 8192, 256]


def test_chunks_of_a_gpus_size_give_the_same_gradients(monkeypatch):
    """Chunks of which the last is a part, and all tokens at once."""
    torch.manual_seed(0)
    own_head, hidden = torch.nn.Linear(6, 50), torch.randn(600, 6, requires_grad=True)
    target, weights, found = torch.randint(50, (600,)), torch.randn(600), []
    for rows in (7, 256, 512, 768):
        monkeypatch.setattr(heads, "chunk_rows", lambda *_, rows=rows: rows)
        logps, *_ = token_statistics(hidden, target, own_head, 3.0)
        found.append((logps, *torch.autograd.grad((logps * weights).sum(), [hidden, *own_head.parameters()])))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_no_tensor_of_all_positions_by_vocabulary_exists(monkeypatch, gemma):
    """The largest logits ever computed are one chunk of completion positions, forward and backward."""
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 64 * 4)
    sizes = []
    logits = heads._Projection.logits
    monkeypatch.setattr(heads._Projection, "logits", lambda *a: (made := logits(*a), sizes.append(len(made)))[0])
    batch = collate(pairs(6))
    score(gemma.train(), batch).logps.sum().backward()
    assert max(sizes) == 4
    last = (len(batch.target) - 1) % 4 + 1
    assert sum(sizes) == 2 * len(batch.target) - last  # all of them forward; all but the last chunk again backward


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [50 * 3, 1 << 20])
def test_the_head_equals_autograd(monkeypatch, chunk, softcap, bias):
    """Values and gradients of log-probabilities and KL against the plain formula."""
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(heads, "CACHE_ELEMENTS", 50 * 2)
    assert_equals_autograd(softcap, bias)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_compiled_head_equals_autograd(monkeypatch, softcap):
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 50 * 3)
    assert heads.compiled_passes().gradient is not heads.EAGER.gradient
    assert_equals_autograd(softcap, bias=False, passes=heads.compiled_passes())


def test_compiling_one_models_passes_leaves_other_models_alone(gemma):
    other = tiny_gemma()
    heads.compile_passes(gemma)
    assert heads.passes_of(gemma.get_output_embeddings()) is heads.compiled_passes()
    assert heads.passes_of(other.get_output_embeddings()) is heads.EAGER


def assert_equals_autograd(softcap, bias, passes=heads.EAGER):
    torch.manual_seed(0)
    hidden, other, target = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6), torch.randint(50, (8,))
    own_head, other_head = (torch.nn.Linear(6, 50, bias=bias) for _ in range(2))
    heads.use_passes(own_head, passes)
    weights = torch.randn(2, 8)

    def logits(x, head):
        y = head(x)
        return (y if softcap is None else softcap * torch.tanh(y / softcap)).log_softmax(1)

    def gradients(logps, kl):
        inputs = [hidden, *own_head.parameters()]
        return torch.autograd.grad((logps * weights[0] + kl * weights[1]).sum(), inputs)

    own, others = logits(hidden, own_head), logits(other, other_head).detach()
    plain = own.gather(1, target[:, None]).squeeze(1), (others.exp() * (others - own)).sum(1)
    *found, squares = token_statistics(hidden, target, own_head, softcap, (other, other_head), log_squares=True)
    torch.testing.assert_close(tuple(found), plain)
    torch.testing.assert_close(squares, own.detach().exp().square().sum(1).log())
    assert not squares.requires_grad
    torch.testing.assert_close(gradients(*found), gradients(*plain))


def test_no_tokens_have_a_gradient_of_zero():
    """The gradient is not None, since it is summed with those of other ranks, which have tokens."""
    own_head, hidden = torch.nn.Linear(6, 50), torch.randn(0, 6, requires_grad=True)
    logps, *_ = token_statistics(hidden, torch.zeros(0, dtype=torch.long), own_head, 3.0)
    logps.sum().backward()
    assert own_head.weight.grad.eq(0).all() and own_head.bias.grad.eq(0).all() and hidden.grad.shape == (0, 6)


def test_the_head_sums_its_gradients_in_fp32(monkeypatch):
    """In bf16 and over many chunks the gradient is as close to the exact one as bf16 allows."""
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 50 * 4)
    torch.manual_seed(0)
    hidden, target, head = torch.randn(400, 6), torch.randint(50, (400,)), torch.nn.Linear(6, 50)
    hidden, head = hidden.bfloat16().requires_grad_(), head.bfloat16()
    exact = torch.nn.Linear(6, 50)
    exact.load_state_dict(head.state_dict())
    wide = hidden.detach().float().requires_grad_()
    for states, module in ((hidden, head), (wide, exact)):
        logps, *_ = token_statistics(states, target, module, None)
        (-logps.sum()).backward()
    assert head.weight.grad.dtype == torch.bfloat16
    error = (head.weight.grad.float() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert error < 4e-3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep what is freed, or not, as they do")
def test_freed_memory_is_kept():
    """Otherwise the system would zero the pages of each chunk's logits again."""
    parallel.keep_freed_memory()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    block = torch.ones(1 << 24)  # 64 MiB
    with_block = resident()
    del block
    assert with_block - resident() < 1 << 24  # bytes


def test_extreme_logits_stay_finite():
    head = torch.nn.Linear(4, 8, bias=False)
    torch.nn.init.constant_(head.weight, 0.0)
    head.weight.data[0] = 1e4
    logps, *_ = token_statistics(torch.ones(2, 4, dtype=torch.float32), torch.tensor([0, 1]), head, softcap=None)
    assert logps.tolist() == pytest.approx([0.0, -4e4])


def test_features_are_pooled_over_text_only():
    records = pairs(2)
    cut = copy.deepcopy(records)
    cut[0]["completion_ids"][0] = cut[0]["completion_ids"][0][:-1]  # a completion cut by max_length has no EOS
    assert collate(records).read_lengths[0] == len(records[0]["completion_ids"][0]) - 1
    assert collate(cut).read_lengths[0] == len(cut[0]["completion_ids"][0])
    batch = collate(records)
    assert EOS_ID not in batch.input_ids.flatten()[batch.read]
    assert torch.equal(batch.input_ids.flatten()[batch.position], batch.target)


@pytest.mark.parametrize("layout", batches.BATCH_LAYOUTS)
def test_features_can_be_read_where_the_completion_is_predicted(layout):
    """At the prompt's last token and the completion's own, without its last one."""
    records = pairs(2)
    batch = batches.collate(records, layout, pad_id=PAD_ID, eos_id=EOS_ID, read_at="predicting")
    read = batch.input_ids.flatten()[batch.read].split(batch.read_lengths)
    sequences = [(record["prompt_ids"], record["completion_ids"][c]) for c in (0, 1) for record in records]
    assert [ids.tolist() for ids in read] == [[prompt[-1], *ids[:-1]] for prompt, ids in sequences]
    document = batch.document.flatten()[batch.read]  # of a prompt that is there once, too
    assert torch.equal(document, batch.document.flatten()[batch.position])


def test_decoder_layers_are_found_by_structure(gemma):
    assert decoder_layers(gemma) == list(gemma.model.layers)
