"""Reward models that can be read: the head's reward, what is trained, and that all that takes a reward model takes
them."""

import copy
import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, collate, look_at, pairs, random_sae
from test_reward_figures import figures
from test_taps import tiny
from test_training import assembled, metrics, run, settle
from transformers import AutoModelForSequenceClassification

import eval as evaluation
import models
import train
from autoencoders.formats import load_sae, save_sae
from launch import assembly, report
from launch.policies import read_config
from trainers import BradleyTerrySAETrainer
from utils import UserError


def headed(folder, kind="Gemma2", *, trained=False, **options):
    """A model, and the reward model that is cut out of it, with a random SAE at its layer 1."""
    start, sae = tiny(kind), random_sae(**options)
    start.save_pretrained(folder)
    new_head = models.NewHead(sae, 1, trained)
    model = models.load_model(folder, "eager", torch.device("cpu"), reward=True, new_head=new_head)
    assert torch.count_nonzero(model.score.weight) == 0
    torch.nn.init.normal_(model.score.weight)
    return start, sae, model


def test_the_loss_by_hand():
    values = (torch.tensor([value]) for value in (1.5, 0.5, 0.2, 0.4))
    losses, chosen, rejected = BradleyTerrySAETrainer.loss(None, *values, reconstruction=2.0)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-1)) + 2 * 0.3)
    assert (chosen.item(), rejected.item()) == (1.5, 0.5)


@pytest.mark.parametrize("kind", ["Gemma2", "Llama", "GPTNeoX"])
def test_a_reward_by_hand(tmp_path, kind):
    """Features of what layer 1 gives at the last token, times weights; the layer after it and the norm are gone."""
    start, sae, model = headed(tmp_path, kind)
    batch = collate(pairs())
    with torch.no_grad():
        states = start(batch.input_ids, attention_mask=(batch.document >= 0).long(), output_hidden_states=True)
        last = (batch.document >= 0).sum(1) - 1
        x = states.hidden_states[2][torch.arange(len(last)), last]
        expected = sae.encode(x) @ model.score.weight[0]
        found = models.score_rewards(model, batch)
    torch.testing.assert_close(found.rewards, expected)
    assert expected.unique().numel() == len(expected)
    missed = (x - sae.decode(sae.encode(x))).square().sum(1) / x.square().sum(1)
    torch.testing.assert_close(found.reconstruction_error, missed)
    assert len(models.decoder_layers(model)) == 2 and model.config.num_hidden_layers == 2


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_reach_what_is_trained(tmp_path, trained):
    """The reward's: layers, weights, and the encoder where the SAE is trained. The reconstruction's: the SAE alone."""
    *_, model = headed(tmp_path, trained=trained)
    encoder = {f"score.{name}" for name in ("W_enc", "b_enc")}
    autoencoder = {*encoder, "score.W_dec", "score.b_dec"}
    rest = {name for name, _ in model.named_parameters()} - autoencoder
    assert "score.weight" in rest and any("layers.1" in name for name in rest)

    def reached(loss):
        model.zero_grad()
        loss.sum().backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    scores = models.score_rewards(model, collate(pairs()))
    assert reached(scores.rewards) == rest | (encoder if trained else set())
    if trained:
        assert reached(models.score_rewards(model, collate(pairs())).reconstruction_error) == autoencoder
    else:
        assert not scores.reconstruction_error.requires_grad


@pytest.mark.parametrize("trained", [False, True])
def test_a_run_is_scored_and_labels_like_the_dense_one(tmp_path, plain_run, trained):
    own = ["loss=bradley-terry-sae", f"loss.reconstruction={int(trained)}", "exp_name=trained"]
    if trained:
        run(tmp_path, *own)
    folder = tmp_path / "trained" if trained else plain_run("bradley-terry-sae")
    latest = folder / "LATEST"
    last = metrics(folder)[-1]
    assert 0 < last["reconstruction_error/eval"] < 1 and "rewards_eval/accuracies" in last
    found = figures(folder, tmp_path)["accuracy"]["all"]
    assert found["accuracy"] == pytest.approx(last["rewards_eval/accuracies"])
    assert found["margin"] == pytest.approx(last["rewards_eval/margins"], rel=1e-4)

    trainer = assembled(tmp_path, *own, "model.layout=padded")
    before = {name: tensor.clone() for name, tensor in trainer.policy.score.state_dict().items()}
    trainer.read_export(latest)
    moved = {name for name, tensor in trainer.policy.score.state_dict().items() if not tensor.equal(before[name])}
    assert moved == {"weight"} | ({"W_enc", "b_enc", "W_dec", "b_dec"} if trained else set())
    batch = trainer.loaders["train"].batch([0, 1, 2])
    again = models.load_model(latest, "eager", torch.device("cpu"), reward=True)
    with torch.no_grad():
        ours = models.score_rewards(trainer.policy, batch).rewards
        theirs = again(batch.input_ids, attention_mask=(batch.document >= 0).long()).logits.squeeze(1)
    torch.testing.assert_close(ours, theirs)
    with pytest.raises((RuntimeError, ValueError), match=r"score|mismatch"):  # not loaded as another model in silence
        AutoModelForSequenceClassification.from_pretrained(latest)

    ppo = assembled(tmp_path, "loss=ppo", f"loss.reward={folder}", "exp_name=ppo")
    torch.testing.assert_close(models.score_rewards(ppo.reward_model, batch).rewards, ours, rtol=1e-4, atol=1e-5)


def test_its_page_lists_what_is_paid_for(tmp_path, plain_run, browser):
    """The weights times the mean activations; over all features they are the mean margin. No host is asked."""
    folder, given = plain_run("bradley-terry-sae"), ["++mode=features"]
    evaluation.write_features(read_config(folder, given), folder, given)
    table = pq.read_table(folder / "features/paid.parquet").to_pydict()
    last = metrics(folder)[-1]
    assert sum(table["contribution"]) == pytest.approx(last["rewards_eval/margins"], rel=1e-3)
    model = models.load_model(folder / "LATEST", "eager", torch.device("cpu"), reward=True)
    weight = model.score.weight[0].detach()
    assert table["weight"] == pytest.approx(weight.tolist())
    loader = assembled(tmp_path, "loss=bradley-terry-sae", "model.layout=padded").loaders["eval"]
    with torch.no_grad():
        hidden = models.score_rewards(model, loader.batch(loader.used())).hidden
        chosen, rejected = model.score.encode(hidden).double().chunk(2)
    assert table["chosen_mean"] == pytest.approx(chosen.mean(0).tolist(), rel=1e-3, abs=1e-5)
    assert table["rejected_rate"] == pytest.approx((rejected > 0).double().mean(0).tolist(), abs=1e-5)
    t = 2.365  # the 97.5 % point of Student's t with 7 degrees of freedom; each pair has a prompt of its own
    expected = t * (weight * (chosen - rejected)).std(0) / len(chosen) ** 0.5
    assert table["contribution_error"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
    for width in (1200, 500):
        page, said = look_at(browser, folder / "features/paid.html", tmp_path / "browser", width)
        assert said == [] and "What bradley-terry-sae pays for" in page and page.count("<article>") >= 2
    assert "http" not in (folder / "features/paid.html").read_text().replace("http://www.w3.org/2000/svg", "")


def test_what_cannot_be_a_head_is_told(tmp_path):
    loss = ["loss=bradley-terry-sae", "exp_name=bad"]
    with pytest.raises(UserError, match="loss=bradley-terry-sae needs an SAE that fits the model"):
        assembled(tmp_path, *loss, "~sae")
    with pytest.raises(UserError, match=r"rewards the features of one SAE that reads the residual stream.*hook=mlp"):
        assembled(tmp_path, *loss, "sae=tiny", "++sae.hook=mlp")
    for reward_loss in ("bradley-terry-sae", "bradley-terry"):
        with pytest.raises(UserError, match=rf"loss={reward_loss} has to learn its head, .*: model\.use_peft=false"):
            assembled(tmp_path, f"loss={reward_loss}", "++model.use_peft=true")
    with pytest.raises(UserError, match=r"sae\.ablate: loss=bradley-terry-sae rewards the features that would be gone"):
        assembled(tmp_path, *loss, "++sae.ablate=[3]")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"d_sae": 0, "k": None}, r"config\.json: sae_head\.d_sae=0: has to be at least 1"),
        ({"d_sae": True, "k": None}, r"sae_head\.d_sae=true: has to be a whole number"),
        ({"d_sae": -(2**70), "k": None}, r"sae_head\.d_sae=-1180591620717411303424: has to be at least 1"),
        ({"d_sae": 10**30, "k": None}, r"sae_head\.d_sae=1000000\d*: has to be at most 1e\+09"),
        (
            {"d_sae": 10**9, "k": None},
            r"sae_head\.d_sae=1000000000 needs score\.W_enc \[128, 1000000000\], and .* has score\.W_enc \[128, 1024\]",
        ),
        ({"d_sae": 1024, "k": False}, r"sae_head\.k=false: has to be a whole number"),
        ({"d_sae": 1024, "k": 1025}, r"sae_head\.k=1025: more than its d_sae=1024"),
        ({"d_sae": 1024}, r"sae_head\.k is missing"),
        ([1024], r"sae_head=\[1024\]: has to be keys with values"),
    ],
)
def test_a_head_that_is_not_what_its_config_says(tmp_path, plain_run, described, message):
    with pytest.raises(UserError, match=message):
        models.outline(copy_of(plain_run("bradley-terry-sae"), tmp_path, sae_head=described), None, reward=True)


def copy_of(run, folder, **changes):
    """The export of a run with another config.json."""
    config = json.loads((run / "LATEST/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "model.safetensors").symlink_to(run / "LATEST/model.safetensors")
    return folder


def test_the_sae_of_a_head_is_the_one_that_it_was_trained_with(tmp_path, plain_run):
    """Of another size, of the same size with other weights, at another layer; for the page and for mode=eval."""
    folder = plain_run("bradley-terry-sae")
    own = load_sae(REPO / "assets/tiny-sae/params.npz")
    moved = copy.deepcopy(own)
    moved.b_enc[3] += 1e-3
    wanted = {"small": r"has d_sae=1024, not 48", "moved": "has another b_enc"}
    for (name, message), sae in zip(wanted.items(), (random_sae(128), moved)):
        save_sae(sae, tmp_path / f"{name}.npz")
        for work, mode in ((evaluation.write_features, "features"), (evaluation.write_metrics, "eval")):
            given = [f"++mode={mode}", f"++sae.path={tmp_path}/{name}.npz", "++sae.format=gemma_scope"]
            with pytest.raises(UserError, match=rf"{name}\.npz: not the SAE in the reward head of .*, which {message}"):
                work(read_config(folder, given), folder, given)
    given = ["++mode=features", "++sae.layer=1"]
    with pytest.raises(UserError, match=r"which has layer=2, not 1"):
        evaluation.write_features(read_config(folder, given), folder, given)
    trained = models.NewHead(moved, 2, trained=True)  # moves its SAE
    assembly.require_sae_of_head(folder / "LATEST", None, trained, None)


def test_what_a_reward_model_pays_for_is_compared_with_no_other_run(tmp_path, plain_run):
    folder = plain_run("bradley-terry-sae")
    for more, message in (
        ([], "compares it with no other run"),
        (["++data=[toy]"], "without data"),
        (["++probe=x"], ""),
    ):
        given = ["++mode=features", f"++compare_to={tmp_path}", *more]
        with pytest.raises(UserError, match=f"compare_to.*{message}"):
            evaluation.write_features(read_config(folder, given), folder, given)


def test_a_loss_does_not_train_the_head_of_another(tmp_path, plain_run, monkeypatch):
    """Neither as the model nor as its weights; and a refused command leaves nothing."""
    latest = plain_run("bradley-terry-sae") / "LATEST"
    monkeypatch.setattr(models, "load_weights", lambda *_: pytest.fail("weights were read"))
    dense = ["loss=bradley-terry", f"cache_dir={tmp_path}/out"]
    for own in (f"model.name_or_path={latest}", f"++model.load_from={latest}"):
        for mode in ("train", "plan"):
            with pytest.raises(UserError, match=r"reads an SAE's features, which loss=bradley-terry-sae trains"):
                train.train(settle(tmp_path, *dense, own, f"mode={mode}")[0])
    with pytest.raises(UserError, match=r"the weights do not fit the model\. .*left over: score\.W_dec"):
        train.train(settle(tmp_path, "loss=dpo", dense[1], f"++model.load_from={latest}")[0])
    assert not (tmp_path / "out").exists()


def test_before_a_step_all_rewards_are_equal_and_none_is_right(plain_run, capsys):
    folder = plain_run("bradley-terry-sae")
    lines = metrics(folder)
    there = ["rewards_eval/accuracies" in line or "rewards_train/accuracies" in line for line in lines]
    assert lines[0]["rewards_eval/margins"] == 0 and there[0] is False and there[-1] is True
    report.show_summary(folder)
    out = capsys.readouterr().out
    assert "reward accuracy after" in out and "reward accuracy before" not in out
    assert "completions" not in out and "LATEST/ (policy.pt and safetensors)" in out
