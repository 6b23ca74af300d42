"""Whole runs of the tiny model, in this process: what a step is, and what a resumed run is."""

import errno
import json
import math
import resource
import shutil
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from composition import composed
from conftest import REPO, metrics
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import dataloader
import eval as evaluation
import models
import train
import trainers
from data import toy
from launch import assembly, settings
from launch.policies import read_config
from sae import pooled_features
from training import checkpoint, loop
from training.checkpoint import Run
from training.metrics import MetricAccumulator
from training.reference import LiveReference
from utils import UserError

PAIRS = {split: toy.preferences(split, seed=0, count=count) for split, count in (("train", 24), ("test", 8))}
WITH_MORE = {"paired", "unpaired", "sae-finetune", "sae-difference"}  # need code, an SAE or a model beside the policy's
LOSSES = sorted({path.stem for path in (REPO / "config/loss").glob("*.yaml")} - WITH_MORE)
SMALL = [
    "model=tiny",
    "++model.batch_size=8",
    "++model.eval_batch_size=8",
    "++optimizer=AdamW",
    "++lr=1e-3",
    "++warmup_steps=2",
    "++max_new_tokens=4",
]


def settle(tmp_path, *overrides):
    """A composed configuration, as the command line would give it."""
    files = {split: tmp_path / f"{split}.jsonl" for split in PAIRS}
    for split, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[split]))
    data = [f"datasets=[{files['train']}]", f"eval_datasets=[{files['test']}]", f"cache_dir={tmp_path}"]
    overrides = [*SMALL, *data, *overrides]
    return composed(overrides), overrides


def run(tmp_path, *overrides):
    """Train, and give the lines of metrics.jsonl."""
    config, overrides = settle(tmp_path, *overrides)
    train.train(config)
    return metrics(tmp_path / config.exp_name)


def assembled(tmp_path, *overrides):
    """A trainer that is ready to start."""
    raw, overrides = settle(tmp_path, *overrides)
    config, classes = settings.check_config(raw)
    paths = settings.find_paths(config, classes.binding.needs)
    trainer = assembly.prepare(config, classes, paths, Run(tmp_path / config.exp_name))
    trainer.start_optimizer()
    return trainer


def test_a_warm_up_as_long_as_the_run_is_said(tmp_path, capsys):
    assembled(tmp_path, "loss=sft", "warmup_steps=2")
    assert "warm-up" not in capsys.readouterr().out
    assembled(tmp_path, "loss=sft", "warmup_steps=3")
    assert "The warm-up of 3 steps is as long as the run, which has 3: lr is never reached" in capsys.readouterr().out


def test_a_learning_rate_that_moves_nothing_is_said(tmp_path, capsys):
    assembled(tmp_path, "loss=sft", "lr=5e-6")
    assert "next to nothing" not in capsys.readouterr().out
    assembled(tmp_path, "loss=sft", "lr=5e-7")
    assert "lr=5e-07 in 3 steps moves no weight by more than about 2e-06, which changes" in capsys.readouterr().out


def test_a_model_is_trained_up_to_its_last_position(tmp_path, monkeypatch):
    """And its completions for the run page, of prompts that leave room for one token, end there."""
    tokenizer = AutoTokenizer.from_pretrained(REPO / "assets/tiny")
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "model")
    pair = {"prompt": "a " * 99, "chosen": "b", "rejected": "c"}
    monkeypatch.setitem(PAIRS, "train", [pair] * 8)
    monkeypatch.setitem(PAIRS, "test", [pair] * 8)
    lengths = ["model.max_length=64", "model.max_prompt_length=63"]
    lines = run(tmp_path, "loss=sft", f"model.name_or_path={tmp_path}/model", *lengths)
    assert all(math.isfinite(loss) for loss in losses(lines))
    assert json.loads((tmp_path / "sft_tiny/completions.json").read_text())["max_new_tokens"] <= 3


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path, monkeypatch):
    """As Gemma 3's. Whoever loads weights has embeddings for all of them: policy, live reference, start and sampler."""
    for split, pairs in PAIRS.items():
        monkeypatch.setitem(PAIRS, split, pairs[:4])
    folder, data = tmp_path / "model", tmp_path / "toy.jsonl"
    shutil.copytree(REPO / "assets/tiny", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    model = [f"model.name_or_path={folder}", "++toy_comparison=2", "++max_new_tokens=2"]
    run(tmp_path, "loss=tdpo2", *model, "exp_name=first")
    start = f"++model.load_from={tmp_path}/first"
    run(tmp_path, "loss=tdpo2", *model, start, "exp_name=second")
    rows = safetensors.torch.load_file(tmp_path / "second/LATEST/model.safetensors")["model.embed_tokens.weight"]
    assert len(rows) == len(tokenizer)
    data.write_text(json.dumps(PAIRS["test"][0] | {"prompt": "Repeat: <image>"}) + "\n")
    for own in ([], [start]):
        options = [f"eval_datasets=[{data}]", "++max_new_tokens=2", f"++samples_dir={tmp_path}/{len(own)}", *own]
        evaluation.write_samples(read_config(folder, options), folder, options)
        assert json.loads((tmp_path / f"{len(own)}/model.json").read_text())["samples"]


def losses(lines):
    return [line["loss/train"] for line in lines if "loss/train" in line]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_takes_steps(tmp_path, plain_run, loss):
    third = ["loss.d_sae=64", "loss.k=4", "loss.batch_tokens=106"]  # of the tokens
    lines = run(tmp_path, "loss=sae", *third) if loss == "sae" else metrics(plain_run(loss))
    unpaired = loss.startswith("kto") or loss in ("bco", "csft", "ppo")
    records = 48 if unpaired else 24  # both sides of each pair, or pairs
    assert len(losses(lines)) == records // 8 and all(map(math.isfinite, losses(lines)))
    assert [line["examples"] for line in lines if "loss/eval" in line] == [0, records]
    _, classes = settings.check_config(settle(tmp_path, f"loss={loss}")[0])
    assert lines[-1].keys() - {"step", "examples"} == set(classes.trainer.evaluated(classes.binding))


def test_ppo_logs_rewards_kl_and_value_loss(plain_run):
    first, train, *_, last = metrics(plain_run("ppo"))
    for split, line in (("eval", first), ("eval", last), ("train", train)):
        assert line[f"rewards_{split}/chosen"] == 1 and line[f"rewards_{split}/rejected"] == -1
        assert line[f"value_loss/{split}"] > 0 and line[f"kl/{split}"] >= 0
    assert first["kl/eval"] == pytest.approx(0, abs=1e-6) and last["kl/eval"] > 1e-6
    page = (plain_run("ppo") / "report.html").read_text()
    for title in ("Value loss", "KL to the reference", "Rewards chosen"):
        assert f"<td>{title}</td>" in page


@pytest.mark.parametrize("loss", ["dpo", "fpo", "fpo-mse"])
def test_step_0_is_log_2_without_drift(plain_run, loss):
    lines = metrics(plain_run(loss))
    for split, line in (("eval", lines[0]), ("train", lines[1])):
        assert line[f"loss/{split}"] == pytest.approx(math.log(2), abs=1e-5)
        for side in ("chosen", "rejected"):
            assert line[f"rewards_{split}/{side}"] == pytest.approx(0, abs=1e-5)
            if loss != "dpo":
                assert line[f"feature_drift_{split}/{side}"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["loss/eval"] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("loss", ["sft", "fpo", "kto"])
def test_accumulation_equals_the_big_batch(tmp_path, loss):
    own = [f"loss={loss}", "+term@term.nll=nll"]  # whose mean is over records; sft's is over tokens
    whole = run(tmp_path, *own, "exp_name=whole")
    split = run(tmp_path, *own, "exp_name=split", "++model.gradient_accumulation_steps=4")
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4)
    norms = [[line["grad_norm"] for line in lines if "grad_norm" in line] for lines in (whole, split)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_any_loss_takes_terms(tmp_path, plain_run):
    """One of this repo, and one of a file that gives the mean of its batch; each has its line in the metrics."""
    (tmp_path / "mine.py").write_text("def low(policy_mean_logps, *, by):\n    return by * policy_mean_logps.mean()\n")
    mine = f"+term.mine={{function: '{tmp_path}/mine.py:low', weight: 5, by: 2}}"
    found = run(tmp_path, "loss=kto", "exp_name=kto", "+term@term.features=features", "term.features.k=8", mine)
    alone = metrics(plain_run("kto"))
    assert found[0]["loss/eval"] == alone[0]["loss/eval"] and found[0]["term_eval/features"] == 0
    assert found[0]["term_eval/mine"] < 0
    assert found[-1]["term_eval/features"] > 0
    assert found[-1]["term_eval/mine"] < found[0]["term_eval/mine"] - 0.05
    with pytest.raises(UserError, match=r"term\.mine\.by is missing"):
        assembled(tmp_path, "loss=dpo", mine.replace(", by: 2", ""))


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_a_term_reads_log_probabilities_beside_log_ratios(tmp_path, loss):
    """Of the same mismatched completions: one mean does not stand for the other."""
    (tmp_path / "mine.py").write_text("def both(mismatched_logps, kl):\n    return mismatched_logps + 1000 * kl\n")
    trainer = assembled(tmp_path, f"loss={loss}", f"+term.mine={{function: '{tmp_path}/mine.py:both', weight: 1}}")
    micro_batches = next(trainer.loaders["train"].steps())
    trainer.before_step("train", 0, micro_batches)
    means = trainer.mismatched_means
    assert means.logratio == pytest.approx(0, abs=1e-4)  # the policy is the reference
    expected = torch.cat([trainer.score(batch, None)[1].mean_logps for batch in trainer.mismatched.batches("train", 0)])
    assert float(means.logps) == pytest.approx(float(expected.detach().mean()), rel=1e-5) and means.logps < -0.5
    values = trainer.term_values(trainer.binding.terms[0], loop.LossContext(micro_batches[0], None, mismatched=means))
    assert float(values[0]) == pytest.approx(float(means.logps), abs=0.2)


@pytest.mark.parametrize("given", ["policy_logps[:3]", "policy_logps[:0]", "policy_logps.unsqueeze(1)", "None", "1.0"])
def test_a_term_of_another_shape_is_told(tmp_path, given):
    (tmp_path / "mine.py").write_text(f"def odd(policy_logps):\n    return {given}\n")
    trainer = assembled(tmp_path, "loss=simpo", f"+term.mine={{function: '{tmp_path}/mine.py:odd', weight: 1}}")
    (batch,) = next(trainer.loaders["train"].steps())
    with pytest.raises(UserError, match=r"term\.mine gave .* for 8 records of 16 sequences; it has to give"):
        trainer.compute_loss(batch, "train", MetricAccumulator())


@pytest.mark.parametrize(
    "content", ["def f(:", "import no_such_module", "raise ValueError(3)", "import sys; sys.exit(0)"]
)
def test_code_that_cannot_be_run_is_named(tmp_path, content):
    (tmp_path / "mine.py").write_text(content)
    for own in (f"+term.mine={{function: '{tmp_path}/mine.py:f', weight: 1}}", f"loss.trainer={tmp_path}/mine.py:F"):
        with pytest.raises(UserError, match=r"mine\.py cannot be run \(\w+"):
            assembled(tmp_path, "loss=simpo", own)


class Killed(Exception):
    """Stands for the process's end."""


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    options = ["loss=fpo", "++n_epochs=2", "++save_every=16", "++eval_every=16"]
    whole = run(tmp_path, *options, "exp_name=whole")

    original = loop.BasicTrainer.optimise

    def dies_at_step_4(self, step, *rest):
        if step == 4:
            raise Killed
        return original(self, step, *rest)

    monkeypatch.setattr(loop.BasicTrainer, "optimise", dies_at_step_4)
    with pytest.raises(Killed):
        run(tmp_path, *options, "exp_name=cut")
    assert len(losses(metrics(tmp_path / "cut"))) == 4
    monkeypatch.undo()
    resumed = run(tmp_path, *options, "exp_name=cut")

    assert resumed == whole
    weights = [torch.load(tmp_path / name / "LATEST/policy.pt", weights_only=True) for name in ("whole", "cut")]
    for key, value in weights[0]["state"].items():
        assert torch.equal(value, weights[1]["state"][key]), key


def test_resuming_with_another_configuration_is_refused(tmp_path):
    run(tmp_path, "loss=dpo", "exp_name=one")
    with pytest.raises(UserError, match=r"loss\.beta: 0\.1 there, 0\.2 now"):
        run(tmp_path, "loss=dpo", "exp_name=one", "loss.beta=0.2")
    lines = run(tmp_path, "loss=dpo", "exp_name=one", "loss.beta=0.2", "resume=never")
    assert len(losses(lines)) == 3
    assert len(losses(run(tmp_path, "loss=dpo", "exp_name=one", "loss.beta=0.2"))) == 3  # finished: nothing to add


def test_a_second_run_finds_the_reference_cache(tmp_path, capsys):
    run(tmp_path, "loss=fpo", "exp_name=first")
    assert "reference cache: computing 24 records" in capsys.readouterr().out
    run(tmp_path, "loss=fpo", "exp_name=second", "loss.alpha=0.1")
    assert "reference cache: found 24 records" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        "template=tulu human_prefix=Q",
        "model.max_length=60 model.max_prompt_length=20",
        "sae.layer=0",
        "++sae.at=predicting",
    ],
)
def test_what_the_cached_numbers_depend_on_gives_a_new_cache(tmp_path, plain_run, capsys, change):
    folder = plain_run("fpo").parent
    capsys.readouterr()
    run(folder, "loss=fpo", f"exp_name={tmp_path.name}", *change.split())
    assert "reference cache: found" not in capsys.readouterr().out


def test_where_features_are_read_is_refused_where_nothing_reads_them_there(tmp_path):
    for own in (["loss=dpo"], ["loss=bradley-terry-sae"], ["loss=dpo", "++sae.ablate=[3]"]):
        with pytest.raises(UserError, match=rf"sae\.at=predicting: .* features are compared; {own[0]} compares none"):
            assembled(tmp_path, *own, "++sae.at=predicting")
    raw, _ = settle(tmp_path, "loss=fpo", "++sae.at=predicting", "++mode=features")
    with pytest.raises(UserError, match=r"mode=features reads them at the text itself: \+\+sae\.at=text"):
        settings.check_config(raw, modes=["features"])


def test_changed_weights_give_a_new_cache(plain_run, capsys):
    start, first = plain_run("sft"), plain_run("dpo")
    capsys.readouterr()
    run(first.parent, "loss=dpo", "exp_name=second", f"++model.load_from={start}/LATEST/policy.pt")
    assert "reference cache: found" not in capsys.readouterr().out


def test_the_cached_reference_equals_a_live_one(tmp_path):
    """Train away from the start, then compare what the loss saw with a model that is the start."""
    trainer = assembled(tmp_path, "loss=fpo")
    attention = trainer.policy.config._attn_implementation
    live = models.load_model(REPO / "assets/tiny", attention, torch.device("cpu"))
    tap = type(trainer.tap)(models.decoder_layers(live)[trainer.config.sae.layer])
    for (batch,) in trainer.loaders["eval"].steps():
        cached = trainer.references["eval"].attach(batch).reference
        with torch.no_grad():
            scores = models.score(live, batch, tap)
            features = pooled_features(trainer.sae, scores.residual, batch.read_lengths)
        torch.testing.assert_close(cached["logps"], scores.logps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cached["token_logps"], scores.token_logps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cached["features"], features, rtol=1e-4, atol=1e-4)
    assert not any(p.grad is not None for p in live.parameters())


def test_a_model_with_its_adapters_off_is_what_the_cache_holds(tmp_path):
    """After training, so that the adapters do something."""
    trainer = assembled(tmp_path, "loss=fpo", "exp_name=lora", "++model.use_peft=true", "++model.peft.lora_r=4")
    trainer.run.folder.mkdir()
    trainer.train()
    live = LiveReference(trainer.policy, trainer.tap, trainer.sae)
    for (batch,) in trainer.loaders["eval"].steps():
        cached = trainer.references["eval"].attach(batch).reference
        again = live.attach(batch).reference
        for name, values in cached.items():
            torch.testing.assert_close(again[name], values, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            adapted = models.score(trainer.policy, batch).logps
        assert (adapted - cached["logps"]).abs().max() > 1e-2


def test_another_model_as_the_reference(tmp_path, plain_run):
    lines = run(tmp_path, "loss=dpo", f"++model.reference_path={plain_run('sft')}/LATEST")
    assert abs(lines[0]["loss/eval"] - math.log(2)) > 1e-4


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_step_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, log_every):
    original = trainers.DPOTrainer.loss

    def breaks_at_the_third_step(self, *args, **options):
        losses, *rewards = original(self, *args, **options)
        self.calls = getattr(self, "calls", 0) + self.policy.training
        return (losses * (float("nan") if self.calls == 3 else 1.0), *rewards)

    breaks_at_the_third_step.__signature__ = __import__("inspect").signature(original)
    monkeypatch.setattr(trainers.DPOTrainer, "loss", breaks_at_the_third_step)
    with pytest.raises(UserError, match=r"step 3: the loss is not finite") as error:
        run(tmp_path, "loss=dpo", "exp_name=nan", "++save_every=8", f"++log_every={log_every}")
    assert "train.jsonl:" in str(error.value)
    state, *_ = Run(tmp_path / "nan").saved()
    assert state.name == "step-000000002"
    assert str(state) in str(error.value)


def test_activation_checkpointing_changes_nothing(tmp_path, plain_run):
    checkpointed = run(tmp_path, "loss=fpo", "++model.activation_checkpointing=true")
    assert losses(checkpointed) == pytest.approx(losses(metrics(plain_run("fpo"))), rel=1e-5)


def test_bfloat16_trains_fp32_weights(tmp_path, plain_run):
    lines = run(tmp_path, "loss=fpo", "++model.policy_dtype=bfloat16")
    assert losses(lines)[0] == pytest.approx(math.log(2), abs=1e-2)
    assert losses(lines) == pytest.approx(losses(metrics(plain_run("fpo"))), abs=1e-2)
    state = torch.load(tmp_path / "fpo_tiny/LATEST/policy.pt", weights_only=True)["state"]
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_exports_load_elsewhere(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(tmp_path, "loss=dpo", "exp_name=one", "++save_every=8", "++intermediate_checkpoints=true")
    folder = tmp_path / "one"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-16", "step-24", "step-8"]
    assert (folder / "LATEST").resolve().name == "step-24"
    model = AutoModelForCausalLM.from_pretrained(folder / "LATEST")
    AutoTokenizer.from_pretrained(folder / "LATEST")
    policy = torch.load(folder / "LATEST/policy.pt", weights_only=True)
    assert policy["step_idx"] == 3 and "loss/eval" in policy["metrics"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, policy["state"][key])
    for source in ("LATEST/policy.pt", "LATEST", ""):  # all that model.load_from may name
        lines = run(tmp_path, "loss=dpo", f"exp_name=from{source[-3:]}", f"++model.load_from={folder}/{source}")
        assert lines[0]["loss/eval"] == pytest.approx(math.log(2), abs=1e-5)


def test_schedules_and_optimisers(tmp_path):
    lines = run(tmp_path, "loss=sft", "lr_schedule=linear", "optimizer=SGD", "++optimizer_options.momentum=0.9")
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([5e-4, 1e-3, 0])
    lines = run(tmp_path, "loss=sft", "exp_name=b", "lr_schedule=constant", "optimizer=RMSprop")
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_summary_holds_the_figures(tmp_path):
    run(tmp_path, "loss=fpo", "++toy_comparison=16", "++max_new_tokens=24")
    figures = json.loads((tmp_path / "fpo_tiny/summary.json").read_text())
    wanted = "accuracy_before accuracy_after win_rate win_rate_low win_rate_high feature_drift kl seconds peak_rss_mb"
    assert set(wanted.split()) <= figures.keys()
    assert 0 <= figures["win_rate_low"] <= figures["win_rate"] <= figures["win_rate_high"] <= 1


def test_a_damaged_state_is_passed_over(tmp_path, capsys):
    whole = run(tmp_path, "loss=dpo", "exp_name=whole", "++save_every=8", "++keep_checkpoints=3")
    run(tmp_path, "loss=dpo", "exp_name=cut", "++save_every=8", "++keep_checkpoints=3")
    newest, older, oldest = Run(tmp_path / "cut").saved()
    weights = next(newest.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    weights.write_bytes(content)
    place = json.loads((older / "trainer.json").read_text())
    (older / "trainer.json").write_text(json.dumps({**place, "step": 1}))
    (tmp_path / "cut/summary.json").unlink()  # else the run is finished
    capsys.readouterr()
    assert run(tmp_path, "loss=dpo", "exp_name=cut", "++save_every=8", "++keep_checkpoints=3") == whole
    said = capsys.readouterr().out
    assert f"{newest} is damaged and passed over ({weights.name})" in said
    assert f"{older} is damaged and passed over (trainer.json)" in said
    assert f"from {oldest}" in said
    for state in Run(tmp_path / "cut").saved():
        (state / "digests.json").unlink()
    (tmp_path / "cut/summary.json").unlink()
    with pytest.raises(UserError, match="every state there is damaged; resume=never starts over"):
        run(tmp_path, "loss=dpo", "exp_name=cut", "++save_every=8", "++keep_checkpoints=3")


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    """The limit on the size of a file, which the second state meets, stands for the disk."""
    save, limits = loop.BasicTrainer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_up(self, step, examples):
        self.run.finish_saving()
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        save(self, step, examples)
        self.run.finish_saving()

    monkeypatch.setattr(loop.BasicTrainer, "save", fills_up)
    try:
        with pytest.raises(UserError) as error:
            run(tmp_path, "loss=dpo", "exp_name=full", "++save_every=8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state = tmp_path / "full/state/step-000000001"
    assert "cannot write the state" in str(error.value) and str(state) in str(error.value)
    assert "File too large" in str(error.value)
    assert [path.name for path in (tmp_path / "full/state").iterdir()] == [state.name]
    monkeypatch.undo()
    assert run(tmp_path, "loss=dpo", "exp_name=full", "++save_every=8") == run(
        tmp_path, "loss=dpo", "exp_name=other", "++save_every=8"
    )


def test_an_export_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    run(tmp_path, "loss=dpo", "exp_name=a", "++n_examples=16")
    before = (tmp_path / "a/LATEST").resolve()

    def fails(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "write_weights", fails)
    trainer = assembled(tmp_path, "loss=dpo", "exp_name=a", "++n_examples=16")
    with pytest.raises(UserError, match="No space left on device"):
        trainer.export(3, 24)
    assert (tmp_path / "a/LATEST").resolve() == before and not (tmp_path / "a/step-24").exists()
    assert not list((tmp_path / "a").glob(".*.part"))


def test_a_save_does_not_see_the_steps_after_it(tmp_path, monkeypatch):
    """The state is finished while training goes on; what is in it is what was there when the save began."""
    trainer = assembled(tmp_path, "loss=sft", "exp_name=a")
    place = {"step": 1}
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    goes_on, seal = threading.Event(), checkpoint.seal

    def late(*arguments):
        assert goes_on.wait(60)
        seal(*arguments)

    monkeypatch.setattr(checkpoint, "seal", late)
    trainer.run.save_state(trainer.policy, trainer.optimizer, place, keep=1)
    trainer.run.wait_until_read()
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.zero_()
    assert not trainer.run.pending.done() and not trainer.run.saved()
    goes_on.set()
    trainer.run.finish_saving()
    trainer.run.find_state()
    trainer.run.load_state(trainer.policy, trainer.optimizer)
    assert trainer.run.place["step"] == 1
    for name, parameter in trainer.policy.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_lock_is_held_until_the_state_is_written(tmp_path, monkeypatch):
    """Also where training ends in an error: the next run removes what it finds half written."""
    trainer = assembled(tmp_path, "loss=sft", "exp_name=a")
    seal = checkpoint.seal

    def slow(*arguments):
        time.sleep(0.2)
        seal(*arguments)

    monkeypatch.setattr(checkpoint, "seal", slow)
    with pytest.raises(Killed), trainer.run.writing():
        trainer.run.save_state(trainer.policy, trainer.optimizer, {"step": 1}, keep=1)
        assert not trainer.run.saved()
        raise Killed
    assert [state.name for state in trainer.run.saved()] == ["step-000000001"]


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(REPO / "assets/tiny", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.extra.weight"] = torch.zeros(2)
    weights["model.norm.weight"] = torch.zeros(7)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as error:
        models.load_model(folder, "eager", torch.device("cpu"))
    for part in (
        "missing: model.layers.0.mlp.up_proj.weight",
        "left over: model.extra.weight",
        "of another shape: model.norm.weight ([7], the model's is [128])",
    ):
        assert part in str(error.value)


class Waits(TorchDispatchMode):
    """Counts the operations for whose outcome the host would have to wait, were their tensors on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_truth = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if by_truth or unsized or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", sorted({*LOSSES} - {"sae"}))
def test_a_step_waits_for_nothing(tmp_path, monkeypatch, loss):
    """What was found of it is read when a line is logged, in one piece."""
    few = ["model.gradient_accumulation_steps=2", "n_examples=8", "n_eval_examples=4"]
    trainer = assembled(tmp_path, f"loss={loss}", *few)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # on a CPU it reads its own counters, which lie there
    monkeypatch.setattr(trainer.schedule, "step", lambda: None)
    trainer.module.train()
    read, tolist = [], torch.Tensor.tolist
    for step, micro_batches in enumerate(list(trainer.steps("train"))):
        monkeypatch.setattr(torch.Tensor, "tolist", lambda values: read.append(values) or tolist(values))
        with Waits() as waits:
            trainer.optimise(step, micro_batches, MetricAccumulator())
        assert read == []
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        of_hosts = {"_local_scalar_dense": 2 * trainer.passes}  # what the ranks' records count for, on the host
        assert waits.found == of_hosts
    norms = [float(update.norm) for update in trainer.unchecked]
    assert len(norms) == trainer.passes * len(trainer.loaders["train"])
    assert trainer.check_updates() == pytest.approx(norms[-1]) and not trainer.unchecked


def test_what_comes_before_the_first_step_changes_no_step(tmp_path):
    """Passes without a step leave FSDP's parameters gathered; the optimiser has to see their slices."""
    trained = []
    for first in ("true", "false"):
        options = ["++model.policy_dtype=bfloat16", f"do_first_eval={first}", f"exp_name=first-{first}"]
        trained.append([line for line in run(tmp_path, "loss=dpo", *options) if "loss/train" in line])
    assert trained[0] == trained[1]


def test_what_a_step_reads_is_ready_before_it(tmp_path):
    trainer = assembled(tmp_path, "loss=kto")
    micro_batches = next(trainer.steps("train"))
    for batch in [*micro_batches, *trainer.mismatched.prepared["train", 0]]:
        assert len(batch.reference["logps"]) == batch.num_sequences


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (3, 7), (7, 7), (9, 7)])
def test_schedules_equal_transformers(name, warmup, steps):
    from transformers import get_scheduler

    theirs = {"constant": "constant_with_warmup"}.get(name, name)
    rates = []
    for make in (
        lambda o: loop.make_schedule(SimpleNamespace(lr_schedule=name, warmup_steps=warmup), o, steps),
        lambda o: get_scheduler(theirs, o, num_warmup_steps=warmup, num_training_steps=steps),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
        schedule = make(optimizer)
        rates.append([])
        for _ in range(steps):
            rates[-1].append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    assert rates[0] == pytest.approx(rates[1])


# ---------------------------------------------------------------------------------------------------- data sets apart


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_each_evaluation_set_is_reported_by_its_name(tmp_path, loss, capsys):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("near", "far")}
    for seed, (name, count) in enumerate({"near": 5, "far": 7}.items(), 1):
        rows = toy.preferences("test", seed=seed, count=count)
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"loss={loss}", "++model.eval_batch_size=4", "n_examples=8"]

    def evaluated(exp_name, *sets):
        paths = ",".join(str(files[name]) for name in sets)
        return run(tmp_path, *own, f"eval_datasets=[{paths}]", f"exp_name={exp_name}")[0]

    both = evaluated("both", "near", "far")
    assert "near after 0 steps" in capsys.readouterr().out
    of_sets = {key for key in both if "eval/near" in key or "eval/far" in key}
    for name in files:
        alone = evaluated(name, name)
        assert alone.keys() == both.keys() - of_sets
        for metric in ("logps_eval/chosen", "logps_eval/rejected"):
            assert both[metric.replace("eval", f"eval/{name}")] == pytest.approx(alone[metric], rel=1e-5)
    weights = {"near": 5 / 12, "far": 7 / 12}
    together = sum(weight * both[f"logps_eval/{name}/chosen"] for name, weight in weights.items())
    assert both["logps_eval/chosen"] == pytest.approx(together, rel=1e-5)


def test_data_sets_with_the_same_file_name_are_told_apart():
    names = dataloader.short_names(["hh", "/data/a/test.jsonl", "/data/b/test.jsonl", "new/chats.jsonl.gz"])
    assert list(names.values()) == ["hh", "data.a.test.jsonl", "data.b.test.jsonl", "chats"]
