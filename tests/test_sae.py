"""SAE files, the tap, pooled features and drift."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import collate, pairs, random_sae, tiny_gemma
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sae as saes
from autoencoders.formats import GEMMA_SCOPE_ARRAYS, load_sae, save_sae
from models import decoder_layers, final_hidden_states, make_tap, recompute_activations, score
from sae import JointSAE, ResidualTap, compared_latents, compute_feature_drift, pooled_features
from training.quantities import QUANTITIES, LossContext
from utils import UserError


def test_round_trip_through_gemma_scopes_layout(tmp_path):
    original = random_sae()
    save_sae(original, tmp_path / "layer_1" / "params.npz")
    read = load_sae(tmp_path / "layer_1" / "params.npz")
    for name in GEMMA_SCOPE_ARRAYS:
        assert torch.equal(getattr(read, name), getattr(original, name))
    assert not list(read.parameters())  # nothing an optimiser could train


def test_agrees_with_saelens():
    lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    ours = random_sae(d_in=16, d_sae=40)
    theirs = lens.JumpReLUSAE(lens.JumpReLUSAEConfig(d_in=16, d_sae=40, dtype="float32", apply_b_dec_to_input=False))
    with torch.no_grad():
        for name in GEMMA_SCOPE_ARRAYS:
            getattr(theirs, name).copy_(getattr(ours, name))
    x = torch.randn(100, 16)
    features = ours.encode(x)
    assert 0 < (features > 0).float().mean() < 1
    torch.testing.assert_close(features, theirs.encode(x))
    torch.testing.assert_close(ours.decode(features), theirs.decode(theirs.encode(x)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("threshold"), "lacks threshold"),
        (lambda a: a.update(W_enc=a["W_enc"].T), "W_enc has shape"),
        (lambda a: a["b_enc"].fill(np.nan), "b_enc has values that are not finite"),
        (lambda a: a.update(W_dec=np.array([{}], dtype=object)), "not a readable npz file of plain arrays"),
    ],
)
def test_damaged_files_are_named(tmp_path, change, message):
    arrays = {name: getattr(random_sae(), name).numpy().copy() for name in GEMMA_SCOPE_ARRAYS}
    change(arrays)
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        load_sae(tmp_path / "params.npz")
    assert str(tmp_path / "params.npz") in str(error.value)


def test_half_a_file_is_an_error(tmp_path):
    save_sae(random_sae(), tmp_path / "params.npz")
    whole = (tmp_path / "params.npz").read_bytes()
    (tmp_path / "params.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable npz"):
        load_sae(tmp_path / "params.npz")


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_tap_reads_the_layers_output_before_the_final_norm(gemma, layer):
    batch = collate(pairs())
    with torch.no_grad():
        tap = ResidualTap(decoder_layers(gemma)[layer])
        with tap.reading():
            final = final_hidden_states(gemma, batch)
        read = tap.take()
        states = gemma.model(
            batch.input_ids, attention_mask=(batch.document >= 0).long(), output_hidden_states=True
        ).hidden_states
    text = batch.document >= 0
    if layer < 2:
        torch.testing.assert_close(read[text], states[layer + 1][text])
    else:  # the last of hidden_states is the output of the norm
        assert not torch.allclose(read[text], states[-1][text])
        torch.testing.assert_close(gemma.model.norm(read)[text], final[text])


def test_pooling_is_the_mean_over_the_completions_text():
    sae, lengths = random_sae(), [3, 1, 0, 5]
    residual = torch.randn(9, 32)
    pooled = pooled_features(sae, residual, lengths)
    expected = [part.mean(0) for part in sae.encode(residual).split(lengths)]
    for row, mean in zip(pooled[[0, 1, 3]], [expected[0], expected[1], expected[3]]):
        torch.testing.assert_close(row, mean)
    assert not pooled[2].any()


def along(*norms):
    """Vectors [M, 32] of these norms."""
    directions = torch.nn.functional.normalize(torch.randn(len(norms), 32, generator=torch.Generator().manual_seed(7)))
    return directions * torch.tensor(norms).unsqueeze(1)


def test_a_sink_is_far_above_the_median_of_its_own_sequence():
    sequences = {
        (1.0, 2.0, 2.0, 19.0, 21.0): [4],  # the median is 2
        (50.0, 1.0): [0],  # of two the lower is the median
        (500.0,): [],  # alone, nothing tells
        (): [],
        (100.0, 100.0, 300.0): [],  # whatever other sequences are like
        (1.0, 1.0, 1.0, 50.0, float("inf"), float("nan")): [3],  # what is not finite has to show
    }
    lengths = [len(norms) for norms in sequences]
    for dtype in (torch.float32, torch.bfloat16):
        sinks = saes.attention_sinks(along(*sum(sequences, ())).to(dtype), lengths)
        assert [own.nonzero().flatten().tolist() for own in sinks.split(lengths)] == list(sequences.values())
    assert saes.attention_sinks(torch.zeros(0, 32), []).tolist() == []


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_features_are_those_of_the_tokens_that_are_no_sinks(divergence):
    sae, lengths, sinks = random_sae(), [4, 5, 3], [1, 8]
    plain = torch.randn(12, 32)
    kept = torch.tensor([n for n in range(12) if n not in sinks])
    planted = plain.clone()
    planted[sinks] *= 1000
    expected = pooled_features(sae, plain[kept], [3, 4, 3])
    torch.testing.assert_close(pooled_features(sae, planted, lengths), expected)
    both = JointSAE([sae, sae], [1.0, 1.0])
    joint = pooled_features(both, torch.cat([planted, plain], 1), lengths)
    torch.testing.assert_close(joint, torch.cat([expected, pooled_features(sae, plain, lengths)], 1))

    reference, options = pooled_features(sae, torch.randn(12, 32), lengths), {"divergence": divergence, "k": 5}
    planted.requires_grad_(), plain.requires_grad_()
    drift = compute_feature_drift(sae, planted, lengths, reference, **options)
    without = compute_feature_drift(sae, plain[kept], [3, 4, 3], reference, **options)
    torch.testing.assert_close(drift, without)
    drift.sum().backward(), without.sum().backward()
    torch.testing.assert_close(planted.grad[kept], plain.grad[kept])
    assert planted.grad[kept].any() and not planted.grad[sinks].any()


def test_pooling_does_not_depend_on_the_chunks(monkeypatch):
    sae, residual = random_sae(), torch.randn(50, 32)
    whole = pooled_features(sae, residual, [20, 30])
    monkeypatch.setattr(saes, "ENCODE_ELEMENTS", 7 * sae.d_sae)
    torch.testing.assert_close(pooled_features(sae, residual, [20, 30]), whole)


def test_compared_latents_are_the_union_of_both_top_ks():
    policy = torch.tensor([[5.0, 0, 3, 1, 0, 0], [0, 0, 0, 2, 0, 0]])
    reference = torch.tensor([[0.0, 4, 3, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    latents, member = compared_latents(policy, reference, k=2)
    sets = [sorted(row[mask].tolist()) for row, mask in zip(latents, member)]
    assert sets == [[0, 1, 2], [3]]  # each member once; zeros are not members


def test_of_equal_features_at_rank_k_the_lowest_are_compared():
    equal = torch.tensor([[2.0, 1, 1, 3, 1, 1], [0, 1e-3, 1e-3, 1e-3, 0, 0]])
    latents, member = compared_latents(equal, equal.flip(0), k=3)
    assert latents[0].tolist() == [3, 0, 1, 1, 2, 3]
    assert [sorted(row[mask].tolist()) for row, mask in zip(latents, member)] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    values, indices = torch.rand(40, 300, generator=torch.Generator().manual_seed(0)).topk(9)
    some = torch.zeros(40, 300).scatter(1, indices, values)
    assert torch.equal(saes.strongest(some, 9)[0], indices)


def test_drift_by_hand():
    policy, reference = torch.tensor([[3.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 9.0, 9.0]])
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    # shares: policy 3/4 1/4, reference 1/2 1/2: KL = log(2/3) / 2 + log(2) / 2
    assert saes.kl_terms(policy, reference, weight).sum().item() == pytest.approx(0.143841, abs=1e-5)
    # k = 2: ((3 - 1)^2 + 0) / 2
    assert saes.mse_terms(policy, reference, weight).sum().item() == pytest.approx(2.0)


def dense_drift(sae, residual, lengths, reference, divergence, k):
    """The formulas of the paper, from the full activations, one sequence at a time."""
    drifts = []
    for x, ref in zip(residual.split(lengths), reference):
        pooled = sae.encode(x).mean(0)
        chosen = set(pooled.topk(k).indices.tolist()) | set(ref.topk(k).indices.tolist())
        index = torch.tensor(sorted(i for i in chosen if pooled[i] > 0 or ref[i] > 0))
        p, q = pooled[index], ref[index]
        if divergence == "mse":
            drifts.append((p - q).square().sum() / k)
        else:
            p, q = p / p.sum() + saes.SHARE_FLOOR, q / q.sum() + saes.SHARE_FLOOR
            p, q = p / p.sum(), q / q.sum()
            drifts.append((q * (q / p).log()).sum())
    return torch.stack(drifts)


@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("k", [3, 10])
@pytest.mark.parametrize("active", [None, 5], ids=["JumpReLU", "TopK"])
def test_sparse_drift_equals_the_dense_formula_in_value_and_gradient(divergence, k, active):
    sae, lengths = random_sae(k=active), [4, 7, 2]
    residual = torch.randn(13, 32, requires_grad=True)
    reference = pooled_features(sae, torch.randn(13, 32), lengths)
    sparse = compute_feature_drift(sae, residual, lengths, reference, divergence=divergence, k=k)
    (sparse_gradient,) = torch.autograd.grad(sparse.sum(), residual)
    dense = dense_drift(sae, residual, lengths, reference, divergence, k)
    (dense_gradient,) = torch.autograd.grad(dense.sum(), residual)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse_gradient, dense_gradient, rtol=1e-3, atol=1e-5)
    assert sparse_gradient.abs().sum() > 0


class Largest(TorchDispatchMode):
    """Records how many elements the largest tensor has that is created inside the `with` block."""

    def __enter__(self):
        self.elements = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("k", [None, 30])
def test_the_activations_of_all_tokens_never_exist(k, monkeypatch):
    """Forward and backward passes hold only chunks of 7 tokens, the vectors and the selected columns."""
    sae, lengths = random_sae(d_sae=480, k=k), [150, 50]
    residual = torch.randn(200, 32, requires_grad=True)
    reference = pooled_features(sae, torch.randn(200, 32), lengths)
    monkeypatch.setattr(saes, "ENCODE_ELEMENTS", 7 * 480)
    with Largest() as sparse:
        drift = compute_feature_drift(sae, residual, lengths, reference, divergence="kl", k=8)
        drift.sum().backward()
    assert sparse.elements <= 200 * 32
    with Largest() as dense:
        dense_drift(sae, residual, lengths, reference, "kl", 8).sum().backward()
    assert dense.elements >= 150 * 480


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_no_drift_from_itself(divergence):
    sae, residual, lengths = random_sae(), torch.randn(6, 32), [2, 4]
    own = pooled_features(sae, residual, lengths)
    drift = compute_feature_drift(sae, residual, lengths, own, divergence=divergence, k=5)
    torch.testing.assert_close(drift, torch.zeros(2), atol=1e-6, rtol=0)


def test_the_sinks_of_a_step_are_looked_for_once(monkeypatch):
    """Drift, features and the metric of a batch share them, and the drift is what it is without."""
    sae, batch = random_sae(), collate(pairs(2))
    residual = torch.randn(len(batch.read), 32)
    residual[3] *= 1000
    residual.requires_grad_()
    batch.reference["features"] = pooled_features(sae, torch.randn(len(batch.read), 32), batch.read_lengths)
    options = {"divergence": "kl", "k": 5}
    alone = compute_feature_drift(sae, residual, batch.read_lengths, batch.reference["features"], **options)
    seen, plain = [], saes.attention_sinks
    monkeypatch.setattr(saes, "attention_sinks", lambda *given: seen.append(1) or plain(*given))
    context = LossContext(batch, SimpleNamespace(residual=residual), sae)
    drift = QUANTITIES["feature_drift"](context, **options)
    QUANTITIES["policy_features"](context, latents=[3])
    assert torch.cat(context.sinks).nonzero().tolist() == [[3]]
    assert len(seen) == 1 and torch.equal(drift, alone)
    gradients = [torch.autograd.grad(own.sum(), residual)[0] for own in (drift, alone)]
    assert torch.equal(*gradients) and gradients[0].any()


def test_feature_weights_scale_the_terms_one_by_one():
    sae, residual, lengths = random_sae(), torch.randn(6, 32), [6]
    reference = pooled_features(sae, torch.randn(6, 32), lengths)
    options = {"divergence": "mse", "k": 48}

    def drift(weights):
        return compute_feature_drift(sae, residual, lengths, reference, **options, feature_weights=weights)

    only_one = torch.zeros(48)
    only_one[7] = 3.0
    own = pooled_features(sae, residual, lengths)
    torch.testing.assert_close(drift(only_one), 3 * (own[:, 7] - reference[:, 7]).square() / 48)
    torch.testing.assert_close(drift(torch.full((48,), 2.0)), 2 * drift(None))


def test_feature_weights_are_read_and_checked(tmp_path):
    (tmp_path / "weights.json").write_text('[{"index": 1, "weight": 5}]')
    (tmp_path / "number.json").write_text("7")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"number\.json: not a list of"):
        saes.read_feature_weights(str(tmp_path / "number.json"), 3)
    assert saes.read_feature_weights(str(tmp_path / "weights.json"), 3).tolist() == [1, 5, 1]
    assert saes.read_feature_weights([{"index": 0, "weight": 0}], 2).tolist() == [0, 1]
    for wrong in (
        [{"index": 3, "weight": 1}],
        [{"index": 0, "weight": -1}],
        [{"feature": 0}],
        {"index": 0},
        str(tmp_path / "none"),
        str(tmp_path / "bytes.json"),
    ):
        with pytest.raises(UserError, match="weights"):
            saes.read_feature_weights(wrong, 3)


@pytest.mark.parametrize("hook", ["residual", "mlp"])
def test_gradient_through_the_tap_is_the_same_with_activation_checkpointing(hook):
    def gradients(checkpointing):
        model, sae, batch = tiny_gemma(), random_sae(), collate(pairs())
        if checkpointing:  # layers and their hooks run again in the backward pass
            recompute_activations(decoder_layers(model), "full")
        scores = score(model.train(), batch, make_tap(model, [(1, hook)]))
        reference = torch.zeros(batch.num_sequences, sae.d_sae)
        drift = compute_feature_drift(sae, scores.residual, batch.read_lengths, reference, divergence="mse", k=8)
        drift.sum().backward()
        assert all(buffer.grad is None for buffer in sae.buffers())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert plain["model.layers.0.mlp.up_proj.weight"].abs().sum() > 0
    assert "model.layers.2.mlp.up_proj.weight" not in plain  # above the tap
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "high"), (torch.float32, "highest")])
def test_tensor_cores_multiply_what_has_no_more_bits_than_they_read(monkeypatch, dtype, precision):
    seen, product = [], torch.Tensor.__matmul__

    def watched(a, b):
        seen.append(torch.get_float32_matmul_precision())
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    random_sae().encode(torch.ones(2, 32, dtype=dtype))
    assert seen == [precision] and torch.get_float32_matmul_precision() == "highest"


def test_a_negative_threshold_is_relu():
    sae = random_sae()
    x = torch.randn(5, 32)
    sae.threshold = -sae.threshold
    torch.testing.assert_close(sae.encode(x), (x @ sae.W_enc + sae.b_enc).relu(), rtol=0, atol=0)
    sae.b_enc[3] = float("nan")
    assert sae.encode(x)[:, 3].isnan().all(), "not hidden by a comparison that is false"
