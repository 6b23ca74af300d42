"""Training SAEs: what a step is made of, what it minimises, what a run saves; against plain formulas and SAELens."""

import json
import re
import shutil
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import metrics, random_sae
from datasets import Dataset as Table
from test_ranks import train_on
from test_training import REPO, Killed, assembled, run, settle
from transformers import AutoModelForCausalLM

from autoencoders.activations import ActivationLoader, text_lengths
from autoencoders.formats import load_sae
from autoencoders.training import BatchTopK, SAETrainer
from data.batch import PAD
from dataloader import Dataset, SFTDataLoader, TokenisedData
from training import loop
from training.metrics import MetricAccumulator
from utils import UserError

PAD_ID, BOS, EOS = 0, 1, 2
SMALL_SAE = ["loss=sae", "loss.layer=2", "loss.d_sae=96", "loss.k=6", "loss.batch_tokens=60", "loss.buffer_tokens=150"]
SMALL_SAE += ["loss.dead_after=150", "lr=1e-2", "do_first_eval=false"]


# ------------------------------------------------------------------------------------------------ the buffer


def rows(count=50):
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 99, generator.integers(1, 9)).tolist() for _ in range(2 * count)]
    return Table.from_dict(
        {
            "prompt_ids": [[BOS, *own] for own in ids[:count]],
            "completion_ids": [[[*own, EOS]] for own in ids[count:]],
            "desirable": [None] * count,
            "score": [None] * count,
            "source": [f"row {n}" for n in range(count)],
        }
    )


def text_of(row):
    return [token for token in (*row["prompt_ids"], *row["completion_ids"][0]) if token not in (BOS, EOS)]


def marks(batch):
    """Vectors that say whose they are: (record, place of the token in it, token), in place of a model's."""
    own = (batch.document != PAD) & (batch.input_ids != BOS) & (batch.input_ids != EOS)
    index = torch.tensor([*batch.index, -1])
    x = torch.stack([index[batch.document], batch.position_ids, batch.input_ids], dim=2)[own].float()
    return x, torch.ones(len(x), dtype=torch.bool)


def stream(data, layout="padded", rank=0, world_size=1, batch_tokens=40, buffer_tokens=150, **options):
    loader = SFTDataLoader(
        TokenisedData(data, "", REPO),
        batch_size=4,
        pad_id=PAD_ID,
        eos_id=EOS,
        layout=layout,
        rank=rank,
        world_size=world_size,
        **options,
    )
    return ActivationLoader(loader, marks, special=[BOS, EOS], batch_tokens=batch_tokens, buffer_tokens=buffer_tokens)


def taken(loader, start=0):
    return [[tuple(x) for x in step.x.int().tolist()] for (step,) in loader.steps(start)]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_every_text_token_is_taken_once_an_epoch(layout):
    data = rows()
    loader = stream(data, layout, n_epochs=2)
    steps = taken(loader)
    found = sorted(mark for step in steps for mark in step)
    once = [(n, m + 1, token) for n, row in enumerate(data) for m, token in enumerate(text_of(row))]
    assert found == sorted(once * 2)
    assert len(steps) == len(loader) and all(30 <= len(step) <= 50 for step in steps)
    assert sum(map(loader.records_in, range(len(loader)))) == 2 * len(data)
    assert loader.tokens == len(found)


def test_steps_mix_many_texts_within_bounds():
    """A step of 40 tokens has those of 18 records or more, where 40 tokens in a row are of 4 or 5."""
    loader = stream(rows(200), buffer_tokens=400)
    for (step,) in loader.steps():
        assert len(set(step.rows.tolist())) >= 18
        assert len(loader.buffer) <= 400 + 4 * 16  # and it never holds more than it may, but for a batch of records
        torch.testing.assert_close(step.x[:, 0], torch.from_numpy(step.rows).float())
    assert len(loader.blocks) > 3


def test_another_seed_or_epoch_is_another_order():
    one, other = taken(stream(rows(), n_epochs=2)), taken(stream(rows(), n_epochs=2, seed=1))
    assert one != other and one[: len(one) // 2] != one[len(one) // 2 :]


def test_from_any_step_on_it_is_the_same():
    whole = taken(stream(rows()))
    for start in (1, 3, len(whole) - 1, len(whole)):
        assert taken(stream(rows()), start) == whole[start:]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_steps_of_one(ranks):
    one = taken(stream(rows(), "packed"))
    parts = [taken(stream(rows(), "packed", rank, ranks)) for rank in range(ranks)]
    assert all(len(part) == len(one) for part in parts)
    assert [sorted(chain(*own)) for own in zip(*parts)] == [sorted(step) for step in one]


def test_a_block_of_several_epochs():
    data = rows(6)
    steps = taken(stream(data, n_epochs=4, buffer_tokens=10_000))
    assert sum(map(len, steps)) == 4 * int(text_lengths(data, [BOS, EOS]).sum())


def test_records_with_two_completions_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"one completion a record: loss\.dataloader=SFTDataLoader"):
        assembled(tmp_path, *SMALL_SAE, "loss.dataloader=PairedPreferenceDataLoader")


def test_all_completions_can_be_read(tmp_path):
    chosen = assembled(tmp_path, *SMALL_SAE).stream
    both = assembled(tmp_path, *SMALL_SAE, "++train_on=all").stream
    assert (len(chosen.rows), len(both.rows)) == (24, 48) and both.tokens > 1.8 * chosen.tokens
    data = Dataset("mine")
    data["p"].add_pair("a", "b")
    data["p"].add_pair("a", "c")
    assert [own["completions"] for own in SFTDataLoader.records(data, "all")] == [["a"], ["b"], ["c"]]
    with pytest.raises(UserError, match="train_on=all: loss=dpo does not read single completions, as sft and sae do"):
        assembled(tmp_path, "loss=dpo", "++train_on=all")


# ------------------------------------------------------------------------------------------------ attention sinks

PLANTED = (28, 3)  # the colon of each toy prompt, and the exclamation mark of many completions


@pytest.fixture(scope="session")
def sinks(tmp_path_factory):
    """The key of a model in which two tokens are attention sinks, whose tokenizer has no BOS."""
    folder = tmp_path_factory.mktemp("model") / "sinks"
    shutil.copytree(REPO / "assets/tiny", folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][list(PLANTED)] *= 300
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name, change in {"config": {"tie_word_embeddings": False}, "tokenizer_config": {"bos_token": None}}.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return f"++model.name_or_path={folder}"


def test_first_tokens_and_sinks_are_not_trained_on(tmp_path, sinks, capsys):
    trainer = assembled(tmp_path, *SMALL_SAE, sinks, "loss.layer=[1,2]")
    texts = [text_of(row) for row in trainer.stream.rows]
    out = sum(1 + sum(token in PLANTED for token in text) for text in texts)  # the planted ones are never the first
    steps = list(chain(*trainer.stream.steps()))
    left = sum(step.left_out for step in steps)
    assert left == out > 2 * len(texts) * 0.7
    assert [len(step.x) for step in steps] == [step.tokens for step in steps]
    assert sum(step.tokens for step in steps) == sum(map(len, texts)) - out == trainer.stream.tokens - out
    assert all(x.norm(dim=1).max() < 10 * x.norm(dim=1).median() for step in steps for x in trainer.by_layer(step.x))
    (tmp_path / "sae_tiny").mkdir()
    trainer.train()
    assert "% of them are left out: first tokens without BOS, and attention sinks" in capsys.readouterr().out
    shares = [line["sae_train/left_out"] for line in metrics(tmp_path / "sae_tiny") if "sae_train/left_out" in line]
    assert shares == pytest.approx([step.left_out / (step.left_out + len(step.x)) for step in steps])


def test_fpo_leaves_sinks_out_and_says_how_many(tmp_path, sinks):
    lines = run(tmp_path, "loss=fpo", sinks, "n_examples=8", "warmup_steps=0")
    rows = assembled(tmp_path, "loss=fpo", sinks, "n_examples=8").loaders["eval"].rows
    tokens = [[token for token in own if token != EOS] for row in rows for own in row["completion_ids"]]
    planted = sum(token in PLANTED for own in tokens for token in own)
    for line in (lines[0], lines[-1]):
        assert line["sae_eval/left_out"] == pytest.approx(planted / sum(map(len, tokens)))
    assert planted and lines[1]["sae_train/left_out"] > 0
    assert lines[0]["feature_drift_eval/rejected"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["feature_drift_eval/rejected"] > 1e-4


# ------------------------------------------------------------------------------------------------ the autoencoder

M, D, F, K = 40, 12, 120, 2


def autoencoder(dead_after=10**9, seed=0, **options):
    own = BatchTopK(D, F, K, auxiliary=1 / 32, dead_after=dead_after, seed=seed, **options)
    x = torch.randn(M, D, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    own.start_from(x, M)
    with torch.no_grad():
        for n, parameter in enumerate((own.b_enc, own.W_enc)):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n + 7)) / 5)
    return own, x


def plain(own, x):
    """BatchTopK and the auxiliary loss as the papers write them: all latents of all tokens, masked."""
    pre = ((x - own.b_dec) @ own.W_enc + own.b_enc).relu()
    kept = torch.zeros_like(pre).flatten()
    best = pre.flatten().topk(K * len(x))
    features = kept.scatter(0, best.indices, best.values).view_as(pre)
    error = x - features @ own.W_dec - own.b_dec
    silent = torch.where((features > 0).any(0), 0, own.silent + len(x))
    dead = silent > own.dead_after
    alone = pre * dead
    strongest = alone.topk(min(D // 2, int(dead.sum())))
    revived = torch.zeros_like(pre).scatter(1, strongest.indices, strongest.values) @ own.W_dec
    auxiliary = (error.detach() - revived).square().sum(1) if dead.any() else torch.zeros(len(x))
    return error.square().sum(1), auxiliary, features, dead


@pytest.mark.parametrize("dead_after", [10**9, 100])
def test_a_step_is_the_papers_formula(dead_after):
    own, x = autoencoder(dead_after)
    own.silent[::2] = 90
    x = x * own.scale
    expected = plain(own, x)
    gradients = torch.autograd.grad((expected[0] + expected[1] / 32).mean(), list(own.parameters()))
    errors, nested, auxiliary, active, dead = own(x, M)
    torch.testing.assert_close(errors, expected[0])
    torch.testing.assert_close(auxiliary, expected[1])
    assert not nested.any()
    assert torch.equal(active, (expected[2] > 0).sum(1)) and active.sum() == K * M
    assert torch.equal(dead, expected[3]) and bool(dead.any()) == (dead_after == 100)
    (errors + auxiliary / 32).mean().backward()
    for parameter, gradient in zip(own.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_rank_without_tokens_takes_part(monkeypatch):
    own, x = autoencoder(100)
    monkeypatch.setattr(own, "smallest_kept", lambda *_: torch.tensor(1.0))  # which other ranks' tokens decide
    own.silent.fill_(200)
    errors, _, auxiliary, active, dead = own(x[:0], M)
    (errors.sum() + auxiliary.sum()).backward()
    assert len(errors) == len(active) == 0 and dead.all() and own.silent.eq(200 + M).all()
    assert all(not parameter.grad.any() for parameter in own.parameters())


def test_groups_are_saelens_matryoshka():
    """The loss of SAELens's own class, and its gradients."""
    from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    own, x = autoencoder(groups=[10, 50])
    x = x * own.scale
    options = {"d_in": D, "d_sae": F, "k": K, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
    theirs = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(matryoshka_widths=[10, 50, F], **options)
    )
    theirs.load_state_dict({**theirs.state_dict(), **own.state_dict()}, strict=False)
    step = {"sae_in": x, "dead_neuron_mask": None, "coefficients": {}, "n_training_steps": 0}
    expected = theirs.training_forward_pass(TrainStepInput(**step, is_logging_step=False))
    errors, nested, *_ = own(x, M)
    assert len([name for name in expected.losses if name.startswith("inner")]) == 2 and nested.min() > 0
    (errors + nested).mean().backward()
    torch.testing.assert_close((errors + nested).mean(), expected.loss)
    expected.loss.backward()
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.grad, getattr(theirs, name).grad, rtol=1e-4, atol=1e-5, msg=name)


def test_an_sae_is_taken_as_it_is():
    """Whatever the norms of its decoder rows and its thresholds; with as many latents as it has, none changes."""
    sae = random_sae(D, F, seed=3)
    sae.b_dec += 0.5
    own = BatchTopK(D, F, 1, auxiliary=0, dead_after=10**9, seed=0, start=sae)
    x = torch.randn(M, D, generator=torch.Generator().manual_seed(0)) * 3 + 1
    own.start_from(x, M)
    frozen, features = own.frozen(), sae.encode(x)
    norms = sae.W_dec.norm(dim=1)
    assert (features > 0).any() and sae.threshold.unique().numel() == F and norms.std() > 0.1
    torch.testing.assert_close(frozen.encode(x), features * norms, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen.decode(frozen.encode(x)), sae.decode(features), rtol=1e-4, atol=1e-4)
    own.k = int((features > 0).sum())
    _, _, _, kept, _ = own(x * own.scale, 1)
    assert torch.equal(kept, (features > 0).sum(1))


def test_where_it_starts():
    own, x = autoencoder()
    assert (x * own.scale).square().mean().item() == pytest.approx(1)
    apart = x * own.scale - own.b_dec.detach()
    pull = (apart / apart.norm(dim=1, keepdim=True)).sum(0)  # zero at the geometric median
    assert pull.norm() < 1e-2 and (apart.sum(0)).norm() > 0.1
    fresh = BatchTopK(D, F, K, auxiliary=0, dead_after=1, seed=3)
    assert torch.equal(fresh.W_enc, fresh.W_dec.T)
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(F))


def test_decoder_rows_keep_their_norm_and_lose_the_gradient_along_them():
    own, x = autoencoder()
    errors, *_ = own(x * own.scale, M)
    errors.mean().backward()
    own.drop_parallel_gradient()
    torch.testing.assert_close((own.W_dec.grad * own.W_dec).sum(1), torch.zeros(F), atol=1e-6, rtol=0)
    with torch.no_grad():
        own.W_dec.mul_(3)
    own.keep_unit_rows()
    torch.testing.assert_close(own.W_dec.norm(dim=1), torch.ones(F))


def test_what_is_saved_computes_the_same_on_raw_vectors():
    own, x = autoencoder()
    scaled = x * own.scale
    with torch.no_grad():
        own.threshold.copy_(own.smallest_kept(own.preactivations(scaled), M) - 1e-6)
        _, _, features, _ = plain(own, scaled)
        frozen = own.frozen()
        torch.testing.assert_close(frozen.encode(x) * own.scale, features, rtol=1e-4, atol=1e-5)
        rebuilt = (features @ own.W_dec + own.b_dec) / own.scale
        torch.testing.assert_close(frozen.decode(frozen.encode(x)), rebuilt, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ a run


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def arrays(run_folder, layer=2):
    return dict(np.load(only(run_folder, f"LATEST/layer_{layer}/width_96/average_l0_*/params.npz")))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_the_saved_l0_is_k(tmp_path):
    """Not what a running mean over training would leave, which is behind the weights."""
    run(tmp_path, *SMALL_SAE, "exp_name=a", "++n_epochs=3")
    last = metrics(tmp_path / "a")[-1]
    assert last["sae_eval/l0"] == pytest.approx(6, rel=0.15)
    trainer = assembled(tmp_path, *SMALL_SAE, "exp_name=b")
    sae = load_sae(only(tmp_path, "a/LATEST/layer_2/width_96/*/params.npz"))
    trainer.stream.fill(0)
    assert (sae.encode(trainer.stream.buffer) > 0).sum(1).float().mean() == pytest.approx(6, rel=0.1)


def test_progress_shows_what_matters(tmp_path):
    lines = run(tmp_path, *SMALL_SAE, "exp_name=a", "++n_epochs=6")
    steps = [line for line in lines if "loss/train" in line]
    for line in steps:
        assert line["sae_train/l0"] == pytest.approx(6, abs=0.1)
        assert line["loss/train"] > 0 and 0 <= line["sae_train/dead"] <= 1
    assert steps[-1]["sae_train/fvu"] < 0.8 * steps[0]["sae_train/fvu"]
    assert steps[-1]["sae_train/dead"] > steps[0]["sae_train/dead"] == 0
    shown = SAETrainer.headline(SimpleNamespace(), steps[-1])
    assert shown.startswith("l0 6") and "fvu" in shown and "dead" in shown


@pytest.mark.parametrize("planted", [False, True], ids=["BOS", "sinks and no BOS"])
def test_evaluation_against_plain_formulas(tmp_path, sinks, planted):
    """The figures of the last evaluation, from the saved file, transformers' own model, one text at a time."""
    options = [*SMALL_SAE, *([sinks] if planted else [])]
    lines = run(tmp_path, *options, "exp_name=a")
    sae = load_sae(only(tmp_path, "a/LATEST/layer_2/width_96/*/params.npz"))
    trainer = assembled(tmp_path, *options, "exp_name=b")
    special = torch.tensor([i for i in (trainer.tokenizer.bos_token_id, trainer.tokenizer.eos_token_id) if i])
    place = REPO / trainer.config.model.name_or_path
    model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
    vectors, entropy, targets, tokens = [], dict.fromkeys(("clean", "sae", "zero"), 0.0), 0, 0
    for row in trainer.loaders["eval"].rows:
        prompt, (completion,) = row["prompt_ids"], row["completion_ids"]
        ids = torch.tensor([[*prompt, *completion]])
        text = ~torch.isin(ids[0], special)
        targets, tokens = targets + len(completion), tokens + int(text.sum())
        if planted:
            text &= ~torch.isin(ids[0], torch.tensor(PLANTED))
            text[0] = False
        for name in entropy:

            def change(_module, _inputs, output, name=name, text=text):
                x = output[0].clone()
                if name == "clean":
                    vectors.append(x[text])
                x[text] = {"clean": x, "sae": sae.decode(sae.encode(x)), "zero": x * 0}[name][text]
                return x[None]

            handle = model.model.layers[2].register_forward_hook(change)
            with torch.no_grad():
                logps = model(ids).logits[0].log_softmax(-1)
            handle.remove()
            own = range(len(prompt), len(prompt) + len(completion))
            entropy[name] -= sum(float(logps[i - 1, ids[0, i]]) for i in own)
    x = torch.cat(vectors)
    rebuilt = sae.decode(sae.encode(x))
    expected = {
        "l0": float((sae.encode(x) > 0).sum(1).float().mean()),
        "fvu": float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()),
        "ce_recovered": (entropy["zero"] - entropy["sae"]) / (entropy["zero"] - entropy["clean"]),
        **{f"ce_{name}": value / targets for name, value in entropy.items()},
        "left_out": 1 - len(x) / tokens,
    }
    assert (expected["left_out"] > 0.1) == planted
    for name, value in expected.items():
        assert lines[-1][f"sae_eval/{name}"] == pytest.approx(value, rel=1e-3), name
    trainer.read_export(tmp_path / "a/LATEST")
    again = trainer.evaluate()
    assert again == pytest.approx({key: lines[-1][key] for key in again}, rel=1e-5)
    assert lines[-1].keys() - again.keys() == {"step", "examples", "sae_eval/dead"}


def test_several_layers_in_one_pass_are_as_each_alone(tmp_path, capsys):
    together = run(tmp_path, *SMALL_SAE, "exp_name=both", "loss.layer=[0,2]")
    said, figures = capsys.readouterr().out, json.loads((tmp_path / "both/summary.json").read_text())
    for name, words in {"l0": "L0", "fvu": "FVU", "ce_recovered": "cross-entropy recovered", "dead": "dead"}.items():
        for layer in (0, 2):
            value = together[-1][f"sae_eval/layer_{layer}/{name}"]
            assert figures[f"layer_{layer}/{name}"] == value
            assert re.search(rf"{words}[^│]*, layer {layer} +│ {re.escape(f'{value:.4g}')} ", said)
    assert figures["left_out"] == 0
    assert "both/: LATEST/ (the SAEs), summary.json" in said and f"++sae.path={tmp_path}/both ++sae.layer=N" in said
    for layer in (0, 2):
        alone = run(tmp_path, *SMALL_SAE, f"exp_name=layer-{layer}", f"loss.layer={layer}")
        assert_same(arrays(tmp_path / "both", layer), arrays(tmp_path / f"layer-{layer}", layer))
        for line, own in zip(together, alone, strict=True):
            for key in ("sae_train/fvu", "sae_eval/ce_recovered", "sae_eval/l0"):
                if key in own:
                    group, name = key.split("/")
                    assert line[f"{group}/layer_{layer}/{name}"] == pytest.approx(own[key], rel=1e-6)


@pytest.mark.parametrize("step", [2, 3])  # between two blocks of activations, and within one
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, sinks, monkeypatch, step):
    options = [*SMALL_SAE, sinks, "loss.layer=[1,2]", "++n_epochs=2", "++save_every=7", "++eval_every=11"]
    whole = run(tmp_path, *options, "exp_name=whole")
    original = loop.BasicTrainer.optimise

    def dies(self, number, *rest):
        if number == step:
            raise Killed
        return original(self, number, *rest)

    monkeypatch.setattr(loop.BasicTrainer, "optimise", dies)
    with pytest.raises(Killed):
        run(tmp_path, *options, "exp_name=cut")
    monkeypatch.undo()
    assert (tmp_path / "cut/state").is_dir() and not (tmp_path / "cut/LATEST").exists()
    assert run(tmp_path, *options, "exp_name=cut") == whole
    for layer in (1, 2):
        assert_same(arrays(tmp_path / "whole", layer), arrays(tmp_path / "cut", layer))


def test_killed_before_the_export_it_exports_the_same(tmp_path, monkeypatch):
    """Of a run that was at its end no activations are read any more; the threshold is in its state."""
    run(tmp_path, *SMALL_SAE, "exp_name=whole")

    def dies(*_):
        raise Killed

    monkeypatch.setattr(loop.BasicTrainer, "export", dies)
    with pytest.raises(Killed):
        run(tmp_path, *SMALL_SAE, "exp_name=cut")
    monkeypatch.undo()
    run(tmp_path, *SMALL_SAE, "exp_name=cut")
    assert_same(arrays(tmp_path / "whole"), arrays(tmp_path / "cut"))


def test_two_ranks_are_as_one(tmp_path, sinks):
    _, options = settle(tmp_path, *SMALL_SAE, sinks, "loss.layer=[1,2]", "exp_name=run", "++n_epochs=3", "lr=1e-3")
    for ranks in (1, 2):
        train_on(ranks, [[*options, f"++cache_dir={tmp_path}/{ranks}"]])
    one, two = (metrics(tmp_path / f"{ranks}/run") for ranks in (1, 2))
    for expected, found in zip(one, two, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():  # equal prefixes give equal vectors, whose ties at the threshold all stay
            loose = key.endswith("l0") or key == "grad_norm"
            assert found[key] == pytest.approx(value, rel=2e-2 if loose else 1e-3, abs=1e-4), key
    assert sum(line.get("sae_train/layer_1/dead", 0) for line in one) > 0
    for name, value in arrays(tmp_path / "1/run", 1).items():
        np.testing.assert_allclose(arrays(tmp_path / "2/run", 1)[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_saelens_reads_both_formats(tmp_path, monkeypatch):
    lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    run(tmp_path, *SMALL_SAE, "exp_name=a", "loss.saelens=true")
    npz = only(tmp_path, "a/LATEST/layer_2/width_96/*/params.npz")
    ours = load_sae(npz)
    native = lens.SAE.load_from_disk(npz.parent / "saelens")
    assert native.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert native.cfg.metadata.model_name.endswith("assets/tiny")

    def local(*_, filename, subfolder="", **__):
        return str(tmp_path / "a/LATEST" / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    overrides = {"dtype": "float32", "d_in": 128, "d_sae": 96, "device": "cpu"}
    folder = str(npz.parent.relative_to(tmp_path / "a/LATEST"))
    fields, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", folder, "cpu", False, overrides
    )
    fields = loaders.handle_config_defaulting(fields)
    scope = lens.JumpReLUSAE(lens.JumpReLUSAEConfig.from_dict(fields))
    scope.load_state_dict(state)

    again = load_sae(npz.parent / "saelens")
    trainer = assembled(tmp_path, *SMALL_SAE, "exp_name=b")
    x = trainer.stream.fill(0).float()
    features = ours.encode(x)
    assert 3 < (features > 0).sum(1).float().mean() < 12
    with torch.no_grad():
        for theirs in (native, scope, again):
            torch.testing.assert_close(theirs.encode(x), features, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(theirs.decode(theirs.encode(x)), ours.decode(features), rtol=1e-4, atol=1e-3)


def test_what_cannot_be_trained_is_refused(tmp_path):
    for change, message in {
        "loss.layer=4": r"loss\.layer=4: the model has layers 0 to 3",
        "loss.layer=[1,1]": r"loss\.layer=\[1, 1\]: a layer's number from 0, a list of different ones",
        "loss.layer=[]": r"loss\.layer=\[\]: a layer's number from 0",
        "loss.layer=last": r"loss\.layer=last: has to be a whole number or a list",
        "loss.groups=[50,20]": r"loss\.groups=\[50, 20\]: numbers of the first latents, each larger than",
        "loss.groups=[96]": r"smaller than loss\.d_sae=96",
        "loss.k=97": r"loss\.k=97: more than the loss\.d_sae=96 latents",
        "loss.batch_tokens=0": r"loss\.batch_tokens=0: has to be at least 1",
        "warmup_steps=1000": r"warmup_steps=1000: the run has \d+ steps of about 60 text tokens.*; warmup_steps=\d+ ",
        "++model.layout=shared_prefix": r"model\.layout=shared_prefix",
        "mode=plan": r"mode=.*plan",
    }.items():
        with pytest.raises(UserError, match=message):
            assembled(tmp_path, *SMALL_SAE, change)


def test_an_sae_is_trained_further(tmp_path, capsys):
    """From the file of a run, or of somebody else: it starts as good as it was, and ends better."""
    few = [*SMALL_SAE, "exp_name=start", "warmup_steps=0"]
    run(tmp_path, *few)
    own = [option for option in SMALL_SAE if not option.startswith(("loss=", "loss.layer", "loss.d_sae", "loss.k"))]
    own += ["loss=sae-finetune", "do_first_eval=true", f"++sae.path={tmp_path}/start"]
    lines = run(tmp_path, *own, "exp_name=further", "++n_epochs=4")
    said = capsys.readouterr().out
    (k,) = re.findall(r"layer 2: the SAE has [\d.]+ latents active a token here, so loss\.k=(\d+)", said)
    trained = [line for line in lines if "loss/train" in line]
    assert trained[0]["sae_train/l0"] == pytest.approx(int(k), abs=0.5)
    before = metrics(tmp_path / "start")[-1]
    assert trained[0]["sae_train/fvu"] == pytest.approx(before["sae_eval/fvu"], rel=0.3)
    assert lines[-1]["sae_eval/fvu"] < 0.8 * before["sae_eval/fvu"]
    with pytest.raises(UserError, match="takes SAEs of the residual stream, one for each layer"):
        part = f"{{path:{tmp_path}/start}}"
        assembled(tmp_path, *own[:-1], "++sae.path=null", f"++sae.parts={{a:{part},b:{part}}}")


def test_the_difference_of_two_models_that_differ_by_a_direction(tmp_path):
    """Planted in the embedding of one token: a latent is what that adds to the layer's output there."""
    direction = torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(1)), dim=0)
    folder = shutil.copytree(REPO / "assets/tiny", tmp_path / "planted")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][PLANTED[0]] += 2 * direction
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    own = [*SMALL_SAE, "loss=sae-difference", "loss.layer=0", "loss.d_sae=16", "loss.k=1", "++n_epochs=30"]
    own += [f"++model.name_or_path={folder}", f"++model.reference_path={REPO}/assets/tiny", "exp_name=difference"]
    lines = run(tmp_path, *own)
    assert lines[-1]["sae_eval/fvu"] < 0.5
    sae = load_sae(only(tmp_path, "difference/LATEST/difference/layer_0/width_16/*/params.npz"))
    one, other = (
        AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
        for place in (folder, REPO / "assets/tiny")
    )
    ids = torch.tensor([[BOS, 9, PLANTED[0], 11]])
    with torch.no_grad():
        x = [model(ids, output_hidden_states=True).hidden_states[1] for model in (one, other)]
    features, cosine = sae.encode(x[0] - x[1])[0], torch.nn.functional.cosine_similarity
    assert not features[:2].any() and features[2].any()  # only from that token on
    assert cosine(sae.decode(features[2]), (x[0] - x[1])[0, 2], dim=0) > 0.95
    assert cosine(sae.W_dec[features[2].argmax()], direction, dim=0) > 0.8
    with pytest.raises(UserError, match=r"model\.reference_path has to name the other model"):
        assembled(tmp_path, *own, "++model.reference_path=null")
    with pytest.raises(UserError, match="a run without SAEs"):  # it does not read the residual stream
        assembled(tmp_path, "loss=fpo", f"++sae.path={tmp_path}/difference")


def test_a_step_on_the_difference_is_saelens_on_what_transformers_gives(tmp_path):
    """Vectors, loss, latents and gradients, against plain models and SAELens's own class."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    folder = shutil.copytree(REPO / "assets/tiny", tmp_path / "other")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1.5
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    own = [*SMALL_SAE, "loss=sae-difference", "loss.layer=1", "loss.d_sae=32"]
    own += [f"++model.name_or_path={folder}", f"++model.reference_path={REPO}/assets/tiny"]
    trainer = assembled(tmp_path, *own)
    plain = [
        AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
        for place in (folder, REPO / "assets/tiny")
    ]
    expected = []
    with torch.no_grad():
        for row in trainer.stream.rows:
            ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"][0]]])
            one, other = (model(ids, output_hidden_states=True).hidden_states[2][0] for model in plain)
            expected.append((one - other)[(ids[0] != BOS) & (ids[0] != EOS)])
    expected, steps = torch.cat(expected), list(chain(*trainer.stream.steps()))
    along = torch.randn(128, generator=torch.Generator().manual_seed(0))  # which tells the vectors apart
    found = torch.cat([step.x for step in steps])
    assert expected.norm(dim=1).min() > 0.01 and not any(step.left_out for step in steps)
    torch.testing.assert_close((found @ along).sort().values, (expected @ along).sort().values, rtol=1e-3, atol=1e-4)

    (sae,), step = trainer.autoencoders, steps[0]
    with torch.no_grad():
        sae.start_from(step.x, step.tokens)
        sae.b_enc.add_(torch.randn(32, generator=torch.Generator().manual_seed(1)) / 5)
    x = expected[torch.cdist(step.x, expected).argmin(1)]
    x = x / x.square().mean().sqrt()
    options = {"d_in": 128, "d_sae": 32, "k": 6, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
    theirs = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**options))
    theirs.load_state_dict({**theirs.state_dict(), **sae.state_dict()}, strict=False)
    given = TrainStepInput(sae_in=x, dead_neuron_mask=None, coefficients={}, n_training_steps=0, is_logging_step=False)
    made = theirs.training_forward_pass(given)
    losses = trainer.compute_loss(step, "train", MetricAccumulator()).mean()
    torch.testing.assert_close(losses, made.loss, rtol=1e-3, atol=1e-4)
    pre = sae.preactivations(step.x * sae.scale)
    latents = pre * (pre >= sae.smallest_kept(pre, step.tokens))
    assert (latents > 0).sum() == 6 * step.tokens
    torch.testing.assert_close(latents, made.feature_acts, rtol=1e-3, atol=1e-3)
    losses.backward()
    made.loss.backward()
    for name, parameter in sae.named_parameters():
        gradient = getattr(theirs, name).grad
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max()), msg=name
        )


def test_vectors_that_are_not_finite_name_their_examples(tmp_path, monkeypatch):
    original = ActivationLoader._taken

    def breaks(self, step):
        taken = original(self, step)
        taken.x[torch.from_numpy(taken.rows == 3)] = float("nan")
        return taken

    monkeypatch.setattr(ActivationLoader, "_taken", breaks)
    with pytest.raises(UserError, match=r"step 1: the loss is not finite.* Examples: \S+train\.jsonl:4\. "):
        run(tmp_path, *SMALL_SAE, "exp_name=a", "loss.batch_tokens=1000", "loss.buffer_tokens=1000", "warmup_steps=0")


def test_the_learning_rate_is_a_trapezoid(tmp_path):
    lines = run(tmp_path, *SMALL_SAE, "exp_name=a", "++n_epochs=8", "warmup_steps=10")
    rates = [line["lr"] / 1e-2 for line in lines if "lr" in line]
    left = range(len(rates) - 1, -1, -1)  # steps, after each
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[10:] == pytest.approx([min(1, 5 * n / len(rates)) for n in left][10:], abs=1e-6)
    assert len(rates) > 15 and rates[10] == 1
