"""A run that goes on: from what it may go on, what it finds damaged or changed, and what it leaves alone."""

import json
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, metrics
from safetensors.torch import load_file, save_file
from test_training import PAIRS, assembled, losses, run

import models
import trainers
import utils
from autoencoders.formats import load_sae, save_sae
from autoencoders.training import SAETrainer
from data import tokenise
from distributed.parallel import Stopped
from launch import completions, report, resuming
from launch.policies import find_policy, read_config
from launch.settings import typed
from training import loop
from training.checkpoint import Run
from training.metrics import MetricAccumulator, MetricsLog, start_wandb
from utils import DIGESTS, Part, UserError, atomic_write, seal, sealed_folder

# Three steps, with a state after each, exports after each, and evaluations before the first and after the last two.
SFT = ["loss=sft", "++save_every=8", "++eval_every=16", "++intermediate_checkpoints=true", "++max_new_tokens=1"]


def weights(folder):
    return (folder / "LATEST/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a run has been made: `whole`."""
    folder = tmp_path_factory.mktemp("resuming")
    run(folder, *SFT, "exp_name=whole")
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    """Gives a copy of that run, finished or with its summary still to be written."""
    target = folder / tmp_path.name

    def copy(*, finished=True):
        shutil.copytree(folder / "whole", target, symlinks=True)
        if not finished:
            (target / "summary.json").unlink()
        return target

    yield copy
    shutil.rmtree(target, ignore_errors=True)


def again(path, *options):
    """Give the run's command again."""
    return run(path.parent, *SFT, f"exp_name={path.name}", *options)


@pytest.fixture
def no_weights(monkeypatch):
    def load_model(*_args, **_options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(models, "load_model", load_model)


# ------------------------------------------------------------------------------------------------- killed and stopped


class Killed(Exception):
    """Stands for the process's end."""


def files_of(path):
    """All that a run has left, by name, but for how long things took."""
    found = {}
    for file in sorted(path.rglob("*")):
        content = file.readlink() if file.is_symlink() else file.read_bytes() if file.is_file() else None
        if file.name in ("summary.json", "trainer.json"):
            own = ("seconds", "peak_rss_mb", "digest", "config")  # the configuration has the run's name
            content = {key: value for key, value in json.loads(content).items() if key not in own}
        if file.suffix == ".safetensors":  # the order of its metadata is random
            content = {key: tensor.numpy().tobytes() for key, tensor in load_file(file).items()}
        if file.name == "metrics.jsonl":
            content = metrics(file.parent)
        apart = (DIGESTS, "manifest.json", "config.yaml", "report.html")
        found[str(file.relative_to(path))] = None if file.name in apart else content
    return found


def test_killed_while_it_writes_a_run_leaves_what_an_undisturbed_one_does(folder, monkeypatch):
    """Each time at a later file, before or after it appears; as a kill does, that leaves what is half written."""
    finish, moment = Part.finish, ["", False]

    def dies(self):
        name, appeared = moment
        if self.target.name != name or appeared:
            finish(self)
        if self.target.name == name:
            raise Killed

    monkeypatch.setattr(Part, "finish", dies)
    monkeypatch.setattr(Part, "close", lambda self: os.close(self.lock))
    for moment[:] in [("step-000000002", True), ("step-000000003", True), ("step-24", True), ("summary.json", False)]:
        with pytest.raises((Killed, UserError)):  # UserError: where the state is written by another thread
            run(folder, *SFT, "exp_name=killed")
    assert list((folder / "killed").rglob(f"*{utils.PART}"))
    monkeypatch.undo()
    run(folder, *SFT, "exp_name=killed")
    found, expected = files_of(folder / "killed"), files_of(folder / "whole")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_a_signal_in_the_last_evaluation_ends_the_run_with_all_steps_saved(folder, monkeypatch, capsys):
    evaluate = loop.BasicTrainer.evaluate

    def signalled(self):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    monkeypatch.setattr(loop.BasicTrainer, "evaluate", signalled)
    with pytest.raises(Stopped) as stopped:
        run(folder, *SFT, "exp_name=signalled")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(folder, *SFT, "exp_name=signalled") == metrics(folder / "whole")
    assert "resuming after 3 of 3 steps" in capsys.readouterr().out
    assert weights(folder / "signalled") == weights(folder / "whole")


def test_a_failure_after_the_last_step_loses_nothing(folder, monkeypatch):
    def fails(_self):
        raise ValueError("of the evaluation")

    monkeypatch.setattr(loop.BasicTrainer, "evaluate", fails)
    with pytest.raises(ValueError, match="of the evaluation"):
        run(folder, "loss=sft", "do_first_eval=false", "++eval_every=24", "exp_name=failing")
    assert [state.name for state in Run(folder / "failing").saved()] == ["step-000000003"]


def test_a_step_draws_what_it_draws_whatever_came_before(tmp_path):
    """Dropout of adapters, for one: on each rank its masks are a function of the seed, the step and the rank."""
    trainer = assembled(tmp_path, "loss=sft", "++model.use_peft=true", "++model.peft.lora_dropout=0.5")
    batch = next(trainer.steps("train"))
    trainer.module.train()
    for parameter in trainer.module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    found = []
    for step in (0, 1, 0):
        torch.rand(step + 5)
        trainer.seed_step(step)
        found.append(trainer.compute_loss(batch[0], "train", MetricAccumulator()).sum().item())
    assert found[0] == found[2] != found[1]


# ------------------------------------------------------------------------------------------------- finished, longer


@pytest.mark.usefixtures("no_weights")
def test_a_finished_run_says_so_and_stays_as_it_is(copied, capsys):
    path = copied()
    before = {file: file.read_bytes() for file in path.glob("*.json*")}
    again(path, "++log_every=5", "++model.layout=padded")
    said = capsys.readouterr().out
    assert f"{path} is finished" in said and "held-out loss after" in said
    assert {file: file.read_bytes() for file in path.glob("*.json*")} == before


def test_an_export_that_a_finished_run_has_lost_is_made_again(copied, folder):
    path = copied()
    shutil.rmtree(path / "step-24")
    assert again(path) == metrics(folder / "whole")
    assert weights(path) == weights(folder / "whole") and (path / "summary.json").is_file()


def test_more_epochs_go_on_exactly(copied, folder, capsys):
    path = copied()
    lines = again(path, "++n_epochs=2", "++eval_every=32", "++intermediate_checkpoints=false")
    assert "resuming after 3 of 6 steps" in capsys.readouterr().out
    expected = run(folder, *SFT, "exp_name=long", "++n_epochs=2")
    assert weights(path) == weights(folder / "long") and losses(lines) == losses(expected)
    assert [line["step"] for line in lines if "loss/eval" in line] == [0, 2, 3, 4, 6]  # with those of before
    assert [file.name for file in path.glob("step-*")] == ["step-48"]


def test_a_last_step_that_a_longer_run_does_not_take_is_taken_back(folder, capsys):
    run(folder, *SFT, "++n_examples=20", "exp_name=cut")  # 8, 8 and 4
    path = shutil.copytree(folder / "cut", folder / "cut again", symlinks=True)
    assert losses(again(folder / "cut", "++n_examples=24")) == losses(metrics(folder / "whole"))
    assert "resuming after 2 of 3 steps" in capsys.readouterr().out
    assert weights(folder / "cut") == weights(folder / "whole")
    shutil.rmtree(path / "state/step-000000002")
    with pytest.raises(UserError, match="the last step there, 3, had fewer examples"):
        again(path, "++n_examples=24")
    with pytest.raises(UserError, match="has trained on 20 examples already"):
        again(path, "++n_examples=8")


def test_a_moved_end_of_the_schedule_is_told(copied, capsys):
    path = copied()
    state, *_ = Run(path).saved()
    place = json.loads((state / "trainer.json").read_text())
    (state / "trainer.json").write_text(json.dumps({**place, "config": {**place["config"], "lr_schedule": "cosine"}}))
    seal(state)
    lines = again(path, "++n_epochs=2", "++lr_schedule=cosine")
    assert "lr_schedule=cosine ended with step 3 and ends with step 6 now" in capsys.readouterr().out
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[3:] == pytest.approx([1e-3 * (1 + np.cos(np.pi * done / 4)) / 2 for done in (2, 3, 4)])


def test_more_data_for_an_sae_is_another_run():
    assert resuming.may_change("n_epochs", trainers.SFTTrainer)
    assert not resuming.may_change("n_epochs", SAETrainer)


def test_what_changes_no_step_may_differ(copied, folder):
    path = copied(finished=False)
    own = ["eval_batch_size=4", "gradient_accumulation_steps=2", "layout=padded", "attn_implementation=eager"]
    again(path, "++temperature=2", "++n_eval_examples=4", *(f"++model.{key}" for key in own))
    assert weights(path) == weights(folder / "whole")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "change", ["++seed=2", "++model.batch_size=4", "~sae", "++lr_schedule=linear", "template=tulu"]
)
def test_what_changes_steps_may_not(copied, change):
    with pytest.raises(UserError, match="holds a run with another configuration"):
        again(copied(finished=False), change)


@pytest.mark.parametrize("offline", [False, True])
def test_tokens_are_the_same_without_a_network(monkeypatch, offline):
    """Else a run that began with a network does not go on under HF_HUB_OFFLINE=1."""
    before = tokenise.tokenizer_digest(models.load_tokenizer(REPO / "assets/tiny"))
    monkeypatch.setattr("transformers.tokenization_utils_base.is_offline_mode", lambda: offline)
    assert tokenise.tokenizer_digest(models.load_tokenizer(REPO / "assets/tiny")) == before


# ------------------------------------------------------------------------------------------------- changed under it


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Where a run has been made from copies of everything that a run can be made from."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(REPO / "assets/tiny", folder / "start")
    shutil.copytree(REPO / "assets/tiny", folder / "reference")
    save_sae(load_sae(REPO / "assets/tiny-sae/params.npz"), folder / "sae/params.npz")
    (folder / "held.json").write_text('[{"index": 3, "weight": 2.0}]')
    run(folder, *from_inputs(folder))
    (folder / "fpo_tiny/summary.json").unlink()
    return folder


def from_inputs(folder):
    own = [f"++model.load_from={folder}/start", f"++model.reference_path={folder}/reference"]
    return ["loss=fpo", "do_first_eval=false", *own, f"sae.path={folder}/sae/params.npz",
            f"++loss.feature_weights={folder}/held.json"]  # fmt: skip


def change_weights(folder):
    found = load_file(folder / "model.safetensors")
    found["model.norm.weight"][0] += 1
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def change_sae(file):
    sae = load_sae(file)
    sae.b_enc[0] += 1
    save_sae(sae, file)


SWAPPED = {
    split: [{**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}, *rows[1:]]
    for split, rows in PAIRS.items()
}
CHANGES = {
    "the start weights": ("start", change_weights),
    "the reference": ("reference", change_weights),
    "the SAE of sae": ("sae/params.npz", change_sae),
    "loss.feature_weights": ("held.json", lambda file: file.write_text('[{"index": 3, "weight": 4.0}]')),
}


def refused(folder, name):
    with pytest.raises(UserError, match=rf"from other inputs than are there now:\n  {name} \([^\n]*\nPut back"):
        run(folder, *from_inputs(folder))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("name", "split"), [("the training data", "train"), ("the evaluation data", "test")])
def test_rows_that_changed_under_a_run_are_named(inputs, monkeypatch, name, split):
    monkeypatch.setitem(PAIRS, split, SWAPPED[split])
    refused(inputs, name)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", CHANGES)
def test_files_that_changed_under_a_run_are_named(inputs, tmp_path, name):
    file, change = inputs / CHANGES[name][0], CHANGES[name][1]
    kept = (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / "kept")
    change(file)
    refused(inputs, name)
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    shutil.move(kept, file)


# ------------------------------------------------------------------------------------------------- damaged


def flip(file):
    """Flip a byte in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:100])


def test_damaged_caches_are_named_and_made_again(tmp_path, capsys):
    options = ["loss=dpo", "do_first_eval=false", "++max_new_tokens=1"]
    before = run(tmp_path, *options, "exp_name=one")
    files = sorted(
        (tmp_path / ".cache").rglob("*.arrow")
    )  # of tokens and of the reference, to train on and to evaluate
    kept = {file: file.read_bytes() for file in files}
    for file, damage in zip(files, (flip, cut, flip, cut), strict=True):
        damage(file)
    capsys.readouterr()
    assert run(tmp_path, *options, "exp_name=two") == before
    said = capsys.readouterr().out
    for file in files:
        assert f"{file.parent} is damaged ({file.name}) and made again" in said
    assert {file: file.read_bytes() for file in files} == kept


def test_a_damaged_export_is_named(copied):
    path = copied()
    overrides = ["++mode=eval"]
    policy = find_policy(path, typed(read_config(path, overrides)), overrides)
    assert policy.run == path
    flip(path / "step-24/policy.pt")
    with pytest.raises(UserError, match=r"LATEST: damaged \(policy\.pt\)"):
        find_policy(path, typed(read_config(path, overrides)), overrides)
    flip(path / "step-24/model.safetensors")
    for source in ("", "LATEST", "step-24"):
        with pytest.raises(UserError, match=r"damaged \(model\.safetensors\).*remove digests\.json"):
            run(path.parent, "loss=sft", f"++model.load_from={path}/{source}", "exp_name=from")
    (path / "step-24/digests.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged \(digests\.json\)"):
        run(path.parent, "loss=sft", f"++model.load_from={path}", "exp_name=from")


def test_a_damaged_saes_file_is_named(tmp_path):
    with sealed_folder(tmp_path / "step-8") as folder:
        (folder / "layer_2/width_1k/average_l0_9").mkdir(parents=True)
        shutil.copy(REPO / "assets/tiny-sae/params.npz", folder / "layer_2/width_1k/average_l0_9")
    file = tmp_path / "step-8/layer_2/width_1k/average_l0_9/params.npz"
    sae = load_sae(file)
    sae.b_enc[0] += 1
    save_sae(sae, file)
    with pytest.raises(UserError, match=r"step-8: damaged \(params\.npz\)"):
        run(tmp_path, "loss=fpo", f"sae.path={file}", "sae.layer=2")


@pytest.mark.parametrize("what", ["as it was", "longer", "moved", "changed", "cut", "a link"])
def test_a_log_goes_on_from_what_it_was(tmp_path, capsys, what):
    tracked, log, before = Run(tmp_path), tmp_path / "metrics.jsonl", '{"step": 0}\n{"step": 1}\n'
    tracked.state = tmp_path / "state"
    tracked.state.mkdir()
    (tracked.state / "metrics.jsonl").write_text(before)
    (tmp_path / "other").write_text("mine")
    there = {"as it was": before, "longer": before + '{"step": 2}\n', "changed": before.replace("1", "7"), "cut": "{"}
    if what in there:
        log.write_text(there[what])
    elif what == "a link":
        log.symlink_to(tmp_path / "other")
    goes_on = MetricsLog(tracked, SimpleNamespace(log_to=[]), 1)
    goes_on.write({"step": 2, "loss/train": 0.5})
    goes_on.close()
    assert log.read_text() == before + '{"step": 2, "loss/train": 0.5}\n'
    told = f"{log} is not as the run wrote it: made again" in capsys.readouterr().out
    assert told == (what not in ("as it was", "longer"))
    assert (tmp_path / "other").read_text() == "mine"


def test_a_finished_run_that_has_lost_its_log_makes_it_again(copied, folder, capsys):
    path = copied()
    (path / "metrics.jsonl").rename(path / "moved.jsonl")
    assert again(path) == metrics(folder / "whole")
    assert "metrics.jsonl is not as the run wrote it: made again" in capsys.readouterr().out
    assert weights(path) == weights(folder / "whole") and (path / "summary.json").is_file()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["LATEST", "metrics.jsonl", "completions.json"])
def test_a_directory_in_the_place_of_a_file_is_named(copied, name):
    path = copied(finished=False)
    (path / name).unlink()
    (path / name).mkdir()  # as a copy that follows links makes of LATEST
    with pytest.raises(UserError, match=rf"{name} is a directory, and a run writes a (link|file) there; move it away"):
        again(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"prompts": 3}', '{"prompts": [{}]}', '{"max_new_tokens": "x"}'])
def test_a_page_goes_without_damaged_completions(content, tmp_path):
    (tmp_path / "completions.json").write_text(content)
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\n[1]\n{"step": 1, "examples": 8, "loss/train": 0.5}\n{"st')
    page = report.write_run_page(tmp_path).read_text()
    assert "<h2>Completions" not in page and '"steps": 1' in page


def test_damaged_completions_are_named(tmp_path, capsys):
    (tmp_path / "completions.json").write_text("{")
    assert completions.known_prompts(tmp_path / "completions.json") == []
    assert "completions.json is damaged" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- what is not its own


def test_starting_over_removes_what_the_run_wrote_and_nothing_else(copied, folder):
    path = copied()
    mine = ["notes.txt", "step-by-step/plan.txt", "step-99/policy.pt", "below/config.yaml", "below/state/step-1/a"]
    of_the_run = ["eval.json", "features/report.html"]
    for file in (path / name for name in mine + of_the_run):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("written by hand")
    first = Run(path).id()
    assert again(path, "resume=never", "++intermediate_checkpoints=false") == metrics(folder / "whole")
    assert Run(path).id() != first
    assert [name for name in mine + of_the_run if (path / name).exists()] == mine
    assert sorted(export.name for export in path.glob("step-*")) == ["step-24", "step-99", "step-by-step"]


def test_a_copy_of_a_state_stays(copied, folder):
    """And a run that goes on does not take it for its own."""
    path = copied(finished=False)
    (newest, *_) = Run(path).saved()
    copy = newest.with_name(f"{newest.name}.bak")
    shutil.copytree(newest, copy)
    (path / "state" / "step-notes").write_text("mine")
    assert Run(path).saved()[0] == newest
    assert again(path) == metrics(folder / "whole")
    assert copy.is_dir() and (path / "state" / "step-notes").is_file()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["state/b", "LATEST/b", "step-24/b/c", "features"])
def test_a_run_inside_of_what_another_one_writes(copied, name):
    path = copied()
    with pytest.raises(UserError, match=rf"belongs to the run .*{path.name}; use another exp_name"):
        run(path.parent, "loss=sft", f"exp_name={path.name}/{name}", "resume=never")
    assert not list(path.rglob("b"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("there", ["features/mine.txt", "step-8/mine.txt", "config.yaml"])
def test_a_directory_that_is_no_run_is_left_alone(tmp_path, resume, there):
    file = tmp_path / "work" / there
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=rf"work holds {there.split('/')[0]}, and no manifest\.json"):
        run(tmp_path, "loss=sft", "exp_name=work", f"resume={resume}")
    assert file.read_text() == "mine"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("content", ["{", "[]", '{"id": "a", "files": ["../other"]}', '{"id": "a", "files": [".."]}'])
def test_a_manifest_that_names_other_files_is_not_followed(tmp_path, content):
    (tmp_path / "work").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "work/manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: does not list the files of a run"):
        run(tmp_path, "loss=sft", "exp_name=work", "resume=never")
    assert (tmp_path / "other").is_dir()


@pytest.mark.parametrize("key", ["loss.trainer", "loss.dataloader", "+term.own"])
def test_code_that_changed_under_a_run_is_named(tmp_path, key):
    code = tmp_path / "mine.py"
    code.write_text(
        "from dataloader import PairedPreferenceDataLoader\nfrom trainers import SimPOTrainer\n"
        "class Mine(SimPOTrainer): pass\nclass Data(PairedPreferenceDataLoader): pass\n"
        "def own(policy_logps): return -policy_logps\n"
    )
    named = {"loss.trainer": "Mine", "loss.dataloader": "Data", "+term.own": "own"}[key]
    value = f"{code}:{named}" if key != "+term.own" else f"{{function: '{code}:own', weight: 1}}"
    options = ["loss=simpo", "n_examples=8", "do_first_eval=false", "++max_new_tokens=1", "exp_name=own"]
    run(tmp_path, *options, f"{key}={value}")
    code.write_text(code.read_text() + "# another\n")
    what = "term.own.function" if key == "+term.own" else key
    with pytest.raises(UserError, match=rf"the code of {what} \(.*mine\.py:{named}\)"):
        run(tmp_path, *options, f"{key}={value}")


@pytest.mark.parametrize("change", ["edited", "cut"])
def test_a_summary_that_was_changed_is_made_again(copied, folder, change, capsys):
    path = copied()
    text = (path / "summary.json").read_text()
    changed = text[:-9] if change == "cut" else re.sub(r'"loss_after": [\d.]+', '"loss_after": 0.1', text)
    assert changed != text
    (path / "summary.json").write_text(changed)
    assert "0.1</td>" not in report.run_page(path, report.read_lines(path / "metrics.jsonl"))
    again(path)
    assert f"{path}/summary.json is not what the run wrote" in capsys.readouterr().out
    apart = ("seconds", "peak_rss_mb")
    found, expected = (report.read_summary(own) for own in (path, folder / "whole"))
    assert {k: v for k, v in found.items() if k not in apart} == {k: v for k, v in expected.items() if k not in apart}


def test_a_refused_run_leaves_no_directory(tmp_path):
    """A run that is there stays, and so does what somebody else put into the new directory."""
    with pytest.raises(UserError):
        run(tmp_path, "loss=fpo", "exp_name=a/b", "loss.k=5000")
    assert not (tmp_path / "a").exists()
    mine = Run(tmp_path / "a/b")
    with pytest.raises(KeyError), mine.writing():
        (tmp_path / "a/note").touch()
        raise KeyError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["note"]
    (tmp_path / "a/b").mkdir()
    with pytest.raises(KeyError), mine.writing():
        raise KeyError
    assert (tmp_path / "a/b").is_dir()


def test_what_is_trained_is_not_replaced_for_want_of_a_state(copied):
    path = copied(finished=False)
    shutil.rmtree(path / "state")
    with pytest.raises(UserError, match="holds what a run has trained, and no state"):
        again(path)
    assert weights(path)


def test_only_litter_whose_writer_is_gone_is_removed(tmp_path):
    (tmp_path / ".user.part").mkdir()
    (tmp_path / f".dead.12345678{utils.PART}").mkdir()
    with atomic_write(tmp_path / "a") as living:
        with atomic_write(tmp_path / "b") as other:
            other.write_text("b")
        living.write_text("a")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".user.part", "a", "b"]


def test_a_resumed_run_goes_on_in_its_wandb_run(copied, monkeypatch):
    path, begun = copied(), []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: begun.append(given), Settings=dict))
    config = SimpleNamespace(exp_name="a", wandb=SimpleNamespace(project="p", entity=None), model_dump=dict)
    for anew in (False, False, True):
        tracked = Run(path)
        tracked.start(SimpleNamespace(resume="never" if anew else "auto", keep_checkpoints=2, model_dump=dict))
        start_wandb(tracked, config, 0)
    first, second, third = (given["id"] for given in begun)
    assert first == second != third and {given["resume"] for given in begun} == {"allow"}
