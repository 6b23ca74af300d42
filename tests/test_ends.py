"""The end of a run, and what it leaves: exports, states, the best export, and the memory that these take."""

import contextlib
import json
import os
import shutil
import threading
import zipfile

import pytest
import safetensors.torch
import torch
from conftest import REPO, command, metrics
from peft import PeftModel
from test_training import assembled, run, settle
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eval as evaluation
from launch import settings
from launch.policies import read_config
from modeling.tensor_files import TorchFile, write_safetensors
from sae import kl_terms
from training import checkpoint, loop
from utils import UserError

SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8}
LARGEST = 4 * 512 * 2048  # bytes of its largest tensor; its weights are 8 times that


def large_model(folder):
    """A model of 35 MB, which tells a copy of the weights from a copy of one tensor."""
    tokenizer = AutoTokenizer.from_pretrained(REPO / "assets/tiny")
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SHAPE)).save_pretrained(folder)
    return folder


def test_saving_and_exporting_take_the_memory_of_a_tensor_or_two(tmp_path):
    model = large_model(tmp_path / "model")
    _, options = settle(tmp_path, "loss=sft", "exp_name=run", "model.batch_size=1", "n_examples=5", "save_every=3")
    split = "model.policy_dtype=bfloat16"  # so by FSDP, as weights are in fp32
    command("train.py", *options, f"model.name_or_path={model}", split, "max_new_tokens=1")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    before = next(line["peak_memory_gb"] for line in lines if "loss/train" in line and line["step"] == 3) * 1e9
    after = json.loads((tmp_path / "run/summary.json").read_text())["peak_rss_mb"] * (1 << 20)
    assert after - before < 7 * LARGEST  # the allocator keeps some, and the end of a run imports more


TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "ü": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "across": torch.randn(4, 6).T,
    "mask": torch.ones(3, dtype=torch.bool),
}


def test_files_written_a_tensor_at_a_time_are_those_of_the_libraries(tmp_path):
    own = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(own, tmp_path / "theirs", {"format": "pt"})
    write_safetensors(tmp_path / "ours", TENSORS, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    file = TorchFile(tmp_path / "policy.pt", TENSORS, {"tied": "a"}, {"step_idx": 3})
    for name in reversed(TENSORS):
        file.write(name, TENSORS[name])
    file.close()
    for mapped in (False, True):
        found = torch.load(tmp_path / "policy.pt", weights_only=True, mmap=mapped)
        assert found["step_idx"] == 3 and found["state"]["tied"].data_ptr() == found["state"]["a"].data_ptr()
        assert all(torch.equal(found["state"][name], tensor) for name, tensor in TENSORS.items())
    assert zipfile.ZipFile(tmp_path / "policy.pt").testzip() is None  # checksums too


def test_an_optimiser_waits_until_its_tensors_are_in_the_state(tmp_path, monkeypatch):
    trainer = assembled(tmp_path, "loss=sft", "exp_name=a", "warmup_steps=0")
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    asked, write, wait = threading.Event(), checkpoint.write_safetensors, trainer.run.wait_until_read

    def late(*arguments):
        assert asked.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_safetensors", late)
    monkeypatch.setattr(trainer.run, "wait_until_read", lambda: asked.set() or wait())
    trainer.run.save_state(trainer.policy, trainer.optimizer, {"step": 1}, keep=1)
    trainer.optimise(0, next(trainer.steps("train")), loop.MetricAccumulator())
    trainer.run.finish_saving()
    assert not torch.equal(trainer.policy.lm_head.weight, before["model.embed_tokens.weight"])
    trainer.run.find_state()
    trainer.run.load_state(trainer.policy, trainer.optimizer)
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.named_parameters())


@pytest.mark.parametrize(("formats", "files"), [("policy_pt", "policy.pt"), ("hub", "model.safetensors")])
def test_one_format_is_enough(tmp_path, formats, files):
    """To evaluate, to sample, to measure features, to start from, and to go on from."""
    other = {"policy.pt", "model.safetensors"} - {files}
    run(tmp_path, "loss=ppo", "exp_name=first", f"export=[{formats}]", "n_examples=8", "++max_new_tokens=4")
    latest = tmp_path / "first/LATEST"
    assert (latest / files).is_file() and not (latest / other.pop()).exists()
    for mode, work in (("eval", evaluation.write_metrics), ("sample", evaluation.write_samples)):
        options = [f"++mode={mode}", "++n_samples=2", f"++samples_dir={tmp_path}"]
        work(read_config(latest.parent, options), latest.parent, options)
    measured = json.loads((latest.parent / "eval.json").read_text())["loss/eval"]
    assert measured == pytest.approx(metrics(latest.parent)[-1]["loss/eval"], rel=1e-5)
    own = ["loss=sft", "n_examples=8", "do_first_eval=true"]
    lines = run(tmp_path, *own, "exp_name=from", f"++model.load_from={tmp_path}/first")
    assert run(tmp_path, *own, "exp_name=model", f"model.name_or_path={latest}") == lines


def test_a_finished_run_can_change_its_formats(tmp_path):
    options = ["loss=sft", "exp_name=a", "n_examples=8"]
    run(tmp_path, *options, "export=[hub]")
    weights = (tmp_path / "a/LATEST/model.safetensors").read_bytes()
    run(tmp_path, *options)
    assert (tmp_path / "a/LATEST/model.safetensors").read_bytes() == weights
    assert torch.load(tmp_path / "a/LATEST/policy.pt", weights_only=True)["step_idx"] == 1
    with pytest.raises(UserError, match=r"export=.*: has to be a list that is not empty"):
        run(tmp_path, *options, "export=[]")


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        run(tmp_path, "loss=ppo", "exp_name=a", "n_examples=8", "++model.use_peft=true")
    finally:
        os.umask(before)
    exported = [path for path in (tmp_path / "a").rglob("*") if path.is_file() and path.name != ".lock"]
    assert {"model.safetensors", "policy.pt", "value_head.safetensors"} <= {path.name for path in exported}
    assert {oct(path.stat().st_mode & 0o777) for path in exported} == {"0o640"}


def test_adapters_are_merged_and_beside_the_export(tmp_path):
    run(tmp_path, "loss=sft", "exp_name=a", "n_examples=8", "++model.use_peft=true", "warmup_steps=0", "lr=0.1")
    latest, ids = tmp_path / "a/LATEST", torch.arange(3, 11).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained(latest)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(REPO / "assets/tiny"), latest / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(REPO / "assets/tiny")
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-3)
        assert not torch.allclose(merged(ids).logits, plain(ids).logits, atol=1e-1)


# ------------------------------------------------------------------------------------------------- no state is kept


def test_a_run_that_ended_well_keeps_no_state_if_asked(tmp_path, monkeypatch, capsys):
    options = ["loss=sft", "exp_name=a", "++save_every=8", "keep_checkpoints=0"]
    counts, save = [], loop.BasicTrainer.save

    def counted(self, step, examples):
        save(self, step, examples)
        self.run.finish_saving()
        counts.append(len(self.run.saved()))

    monkeypatch.setattr(loop.BasicTrainer, "save", counted)
    lines = run(tmp_path, *options)
    assert counts == [1, 1, 1] and not (tmp_path / "a/state").exists()
    assert run(tmp_path, *options) == lines
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no state that it could go on from \(keep_checkpoints=0 leaves none\)"):
        run(tmp_path, *options, "n_epochs=2")
    shutil.rmtree((tmp_path / "a/LATEST").resolve())
    (tmp_path / "a/LATEST").unlink()
    with pytest.raises(UserError, match="no state that it could go on from"):  # and does not train anew
        run(tmp_path, *options)


def test_the_states_of_a_finished_run_go_if_asked(tmp_path):
    run(tmp_path, "loss=sft", "exp_name=a", "n_examples=8")
    assert (tmp_path / "a/state").is_dir()
    run(tmp_path, "loss=sft", "exp_name=a", "n_examples=8", "keep_checkpoints=0")
    assert not (tmp_path / "a/state").exists() and (tmp_path / "a/LATEST").is_dir()


# ------------------------------------------------------------------------------------------------- the best export

EVERY = ["loss=dpo", "++eval_every=8", "++save_every=16", "n_epochs=2"]


def best_by(lines, metric):
    """The examples after which an evaluation was best, and the value. Step 1 has a learning rate of 0."""
    sign = -1 if metric.startswith("-") else 1
    found = [(line["examples"], line[metric.lstrip("-")]) for line in lines if "loss/eval" in line and line["step"] > 1]
    return max(found, key=lambda point: sign * point[1])


def test_the_best_export_is_kept(tmp_path, capsys):
    metric = "-rewards_eval/margins"  # which the training makes worse
    lines = run(tmp_path, *EVERY, "exp_name=a", f"++eval_best={metric}")
    examples, value = best_by(lines, metric)
    folder = tmp_path / "a"
    assert (folder / "BEST").resolve().name == f"step-{examples}"
    assert {path.name for path in folder.glob("step-*")} == {f"step-{examples}", "step-48"}
    figures = json.loads((folder / "summary.json").read_text())["best"]
    assert figures == {"metric": metric, "value": value, "step": examples // 8, "examples": examples}
    assert f"BEST/: {metric} is best after step {examples // 8}" in capsys.readouterr().out
    best = torch.load(folder / "BEST/policy.pt", weights_only=True)
    assert best["step_idx"] == examples // 8 and best["metrics"][metric.lstrip("-")] == value
    options = [
        "++n_samples=1",
        f"++samples_dir={tmp_path}",
        "++max_new_tokens=2",
        f"eval_datasets=[{tmp_path}/test.jsonl]",
    ]
    evaluation.write_samples(read_config(folder / "BEST", options), folder / "BEST", options)
    assert (tmp_path / "a-BEST.json").is_file()  # another run has another file
    run(tmp_path, "loss=sft", "exp_name=b", f"++model.load_from={folder}/BEST", "n_examples=8")


class Killed(Exception):
    pass


def test_the_best_export_survives_kills(tmp_path, monkeypatch):
    """Killed before the export of a better evaluation, within it, and after it but before the next state."""
    options = [*EVERY, "++eval_best=rewards_eval/margins", "exp_name=cut"]
    keep, write = loop.BasicTrainer.keep_best, loop.BasicTrainer.write_export

    def dies_before(self):
        if self.step == 2:
            raise Killed
        keep(self)

    def dies_within(self, folder, step):
        if step == 3:
            raise Killed
        write(self, folder, step)

    def dies_after(self):
        keep(self)
        if self.step == 5:
            raise Killed

    for name, dies in (("keep_best", dies_before), ("write_export", dies_within), ("keep_best", dies_after)):
        with monkeypatch.context() as patched:
            patched.setattr(loop.BasicTrainer, name, dies)
            with contextlib.suppress(Killed):
                run(tmp_path, *options)
                pytest.fail("it was not killed")
    assert (tmp_path / "cut/BEST").resolve().name == "step-40"  # the state is of step 4
    lines = run(tmp_path, *options)
    examples, _ = best_by(lines, "rewards_eval/margins")
    assert (tmp_path / "cut/BEST").resolve().name == f"step-{examples}"
    assert {path.name for path in (tmp_path / "cut").glob("step-*")} == {f"step-{examples}", "step-48"}


def test_a_metric_that_the_loss_has_not_is_refused(tmp_path):
    raw, _ = settle(tmp_path, "loss=bradley-terry", "eval_best=rewards_eval/margin")
    with pytest.raises(UserError) as error:
        settings.check_config(raw)
    assert "loss=bradley-terry has no such metric (did you mean 'rewards_eval/margins'?); it has loss/eval, " in str(
        error.value
    )
    with pytest.raises(UserError, match=r"early_stop is read by nothing \(here it is eval_best"):
        settings.check_overrides(["++early_stop=3"])


# ------------------------------------------------------------------------------------------------- the figures


def test_ppo_figures_by_hand(tmp_path):
    """The value head starts at 0, so its loss is half the mean square of the returns; the KL is that of log-ratios."""
    trainer = assembled(tmp_path, "loss=ppo", "++loss.gamma=1", "++loss.lam=1")
    micro_batches, means = next(trainer.steps("train")), loop.MetricAccumulator()
    trainer.before_step("train", 0, micro_batches)
    with torch.no_grad():
        for batch in micro_batches:
            batch.reference["token_logps"] = batch.reference["token_logps"] - 0.5
            trainer.compute_loss(batch, "train", means)
    found, tokens = means.read(), sum(sum(batch.lengths) for batch in micro_batches)
    assert found["value_loss/train"] == pytest.approx(0.5)  # each return is 1 or -1
    each = torch.tensor(0.5).expm1() - 0.5
    assert found["kl/train"] == pytest.approx(float(each) * tokens / 8, rel=1e-3)


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_reward_accuracy_is_left_out_while_the_policy_is_the_reference(tmp_path, loss):
    """As before the first step, and in the first two steps with a warm-up, which begins with a rate of 0."""
    lines = run(tmp_path, f"loss={loss}", "exp_name=a", "++model.policy_dtype=bfloat16", "++eval_every=8")
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 2, 3, 3]
    there = [any(name.startswith("rewards") and name.endswith("/accuracies") for name in line) for line in lines]
    assert there == ([False] * 4 + [True] * 3 if loss == "dpo" else [True] * 7)


def test_another_reference_gives_an_accuracy_from_the_start(tmp_path):
    lines = run(tmp_path, "loss=dpo", "exp_name=a", "n_examples=8", f"++model.reference_path={REPO}/assets/tiny")
    assert "rewards_eval/accuracies" in lines[0]


def test_drift_is_never_negative():
    torch.manual_seed(0)
    before = torch.rand(200, 64) * torch.rand(200, 1)
    for other in (before, before * (1 + 1e-7 * torch.randn_like(before)), before.bfloat16().float()):
        assert (kl_terms(other, before, torch.ones_like(before)) >= 0).all()
