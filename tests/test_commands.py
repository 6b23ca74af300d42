"""The commands as a user types them, and what is left when they are killed."""

import json
import signal

import pytest
import torch
from conftest import DATA, HH_100, REPO, command, look_at, metrics, new_python
from test_training import PAIRS

from data import toy


def files(folder, **splits):
    """Options that name JSONL files of pairs, written into `folder`."""
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"datasets=[{folder}/train.jsonl]", f"eval_datasets=[{folder}/test.jsonl]", f"cache_dir={folder}/out"]


QUICK = ["loss=fpo", "model=tiny", "optimizer=AdamW", "lr=1e-3", "model.batch_size=8", "model.eval_batch_size=8"]
QUICK += ["max_new_tokens=4"]

SMALL_SHARDS = """
import os, runpy, signal, sys
import training.reference
training.reference.SHARD = 16
sys.argv = ["train.py", *{arguments!r}]
{killer}
runpy.run_path("train.py", run_name="__main__")
"""
KILLER = """
import {module} as module
original, calls = module.{function}, 0
def dies(*args, **options):
    global calls
    calls += 1
    if calls == {call}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
module.{function} = dies
"""


def train(arguments, killer="", check=True):
    """Run train.py, with a shard of the cache for each 16 records."""
    return command("-c", SMALL_SHARDS.format(arguments=arguments, killer=killer), check=check)


def killed(arguments, module, function, call, before="pass"):
    """Run train.py and kill -9 it as it makes the n-th call of a function, `before` having been done."""
    killer = KILLER.format(module=module, function=function, call=call, before=before)
    done = train(arguments, killer, check=False)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


def test_killed_anywhere_and_resumed_equals_uninterrupted(tmp_path):
    """In the middle of the cache, of a step, of a state's file and of the export: nothing is lost."""
    rows = toy.preferences("train", seed=1, count=36)
    data = files(tmp_path, train=rows, test=PAIRS["test"])
    options = [*QUICK, *data, "n_examples=36", "model.batch_size=4", "save_every=8", "exp_name=cut"]
    half = "open(args[0], 'wb').write(b'half a file')"
    killed(options, "training.reference", "write_arrow", 2)  # the second of three shards
    killed(options, "torch.optim", "AdamW.step", 4)
    killed(options, "training.checkpoint", "write_safetensors", 1, half)
    killed(options, "modeling.weights", "safetensors_file", 1, half)
    out = train(options).stdout
    assert "resuming after 9 of 9 steps" in out
    cut = tmp_path / "out" / "cut"
    assert not list(tmp_path.rglob("*.part"))
    reference = tmp_path / "out" / ".cache" / "reference"
    assert sorted(len(list(folder.glob("*/rows.arrow"))) for folder in reference.iterdir()) == [1, 3]

    train([*options, "exp_name=whole", f"cache_dir={tmp_path}/other"])
    assert metrics(cut) == metrics(tmp_path / "other" / "whole")
    latest = [tmp_path / name / "LATEST" for name in ("out/cut", "other/whole")]
    assert (latest[0] / "model.safetensors").read_bytes() == (latest[1] / "model.safetensors").read_bytes()
    policies = [torch.load(folder / "policy.pt", weights_only=True) for folder in latest]
    assert policies[0]["metrics"] == policies[1]["metrics"]


def test_a_cache_killed_half_way_goes_on(tmp_path):
    data = files(tmp_path, train=toy.preferences("train", seed=1, count=36), test=PAIRS["test"])
    options = [*QUICK, *data, "n_examples=36", "model.batch_size=36"]
    killed(options, "training.reference", "write_arrow", 3)
    assert "going on after 2 of 3 shards" in train(options).stdout


def test_two_processes_do_not_share_a_run(tmp_path):
    import fcntl

    data = files(tmp_path, **PAIRS)
    folder = tmp_path / "out" / "taken"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = command("train.py", *QUICK, *data, "exp_name=taken", check=False)
    assert done.returncode == 2
    assert "another process is writing to this run" in done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart, with a seed that is not its own and half of its pairs."""
    folder = tmp_path_factory.mktemp("quickstart")
    own = ["seed=2", "n_examples=1280", "eval_every=null", f"cache_dir={folder}", "log_to=[tensorboard,wandb]"]
    done = new_python("train.py", "experiment=quickstart", *own)
    return folder / "quickstart", done.stdout


def test_quickstart_ends_with_the_figures(quickstart):
    """The policy is better than the start by more than chance."""
    run, out = quickstart
    figures = json.loads((run / "summary.json").read_text())
    assert figures["accuracy_after"] > figures["accuracy_before"] + 0.1
    assert figures["win_rate_low"] > 0.55
    assert figures["feature_drift"] > 0 and figures["kl"] > 0
    for words in ("preference accuracy before", "win rate", "95 % interval", "feature drift", "KL to the reference"):
        assert words in out
    assert str(run) in out.replace("\n", "")
    assert list(run.glob("wandb/offline-run-*")) and list(run.glob("tensorboard/events.*"))
    assert str(run / "report.html") in out and (run / "report.html").is_file()


def test_sample_and_judge(quickstart, tmp_path):
    """By a run directory, and by a copy of its config.yaml somewhere else."""
    run, _ = quickstart
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    for number, path in enumerate([run, "config.yaml"]):
        samples = tmp_path / f"samples{number}"
        options = ["++n_samples=20", "++model.eval_batch_size=16", f"++samples_dir={samples}/"]
        command(REPO / "eval.py", f"--config-path={path}", *options, cwd=tmp_path)
        content = json.loads((samples / "quickstart.json").read_text())
        assert content.keys() == {"sampled_at", "sampled_from", "config", "sampling", "samples", "digest"}
        assert len(content["samples"]) == 20
        for sample in content["samples"]:
            assert sample.keys() >= {"prompt", "messages", "chosen", "policy"}
    judge = ["-mc", "512", "-bk", "chosen", "-ck", "policy", "-r", tmp_path / "results.jsonl", "-j", "toy"]
    new_python("compare.py", "-f", samples / "quickstart.json", *judge)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert result["total"] == 20
    assert result["candidate"]["wins"] + result["baseline"]["wins"] + result["ties"] == 20


def test_the_report_on_its_features_in_a_browser(quickstart, browser, tmp_path):
    run, _ = quickstart
    command("eval.py", f"--config-path={run}", "++mode=features", "++n_samples=16")
    page, said = look_at(browser, run / "features/report.html", tmp_path / "browser")
    assert said == []
    assert "What fpo did to the features: quickstart" in page
    assert 'href="features/report.html"' in (run / "report.html").read_text()


def test_eval_mode_gives_the_last_evaluations_metrics(quickstart):
    run, _ = quickstart
    command("eval.py", f"--config-path={run}", "++mode=eval", "++n_samples=64", "++samples=2")
    last = [line for line in metrics(run) if "loss/eval" in line][-1]
    values = json.loads((run / "eval.json").read_text())
    own = {key: values.pop(key) for key in list(values) if key.startswith("samples/")}
    for key, value in values.items():
        assert value == pytest.approx(last[key], rel=1e-4, abs=1e-6), key
    assert (own["samples/number"], own["samples/temperature"], own["samples/top_p"]) == (128, 1.0, 1.0)
    assert 0.1 < own["samples/self_bleu"] < 0.9 and 0 < own["samples/distinct_1"] < own["samples/distinct_2"] < 1
    assert own["samples/entropy"] > own["samples/entropy_per_token"] > 0
    figures = json.loads((run / "summary.json").read_text())  # of as many other samples
    assert own["samples/kl"] == pytest.approx(figures["kl"], abs=0.5)
    assert not list(run.glob("*.partial*"))
    documented = (REPO / "docs/sampling.md").read_text()
    assert [key for key in own if f"`{key}`" not in documented] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["++mode=dream"], "mode=dream: not one of sample, eval"),
        (["++n_sample=3"], "n_sample is read by nothing (did you mean 'n_samples'?)"),
    ],
)
def test_eval_errors(quickstart, arguments, message):
    run, _ = quickstart
    done = command("eval.py", f"--config-path={run}", *arguments, check=False)
    assert done.returncode == 2
    assert message in done.stdout.replace("\n", " ")


def test_eval_without_a_run(tmp_path):
    done = command("eval.py", f"--config-path={tmp_path}", check=False)
    assert done.returncode == 2 and "no such run directory or YAML file" in done.stdout


def test_without_the_hub_one_message_says_what_to_do(tmp_path):
    done = command("train.py", "loss=fpo", "model=gemma2b", f"cache_dir={tmp_path}", check=False)
    assert done.returncode == 2
    for words in ("google/gemma-2-2b", "google/gemma-scope-2b-pt-res", "cannot be reached", "sae.path at a local copy"):
        assert words in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_the_lines_spelling_of_a_key_works(tmp_path):
    """`++config.intermediate_checkpoints=true`, as HALOs's FAQ has it."""
    options = [*QUICK, *files(tmp_path, **PAIRS), "++config.intermediate_checkpoints=true", "save_every=8"]
    command("train.py", *options)
    assert len(list((tmp_path / "out" / "fpo_tiny").glob("step-*"))) == 3


def test_help_lists_the_choices_and_the_keys_of_a_loss():
    out = command("train.py", "loss=fpo", "+term=[nll,features]", "--help").stdout
    for words in ("fpo-mse", "gemma2b", "quickstart", "  resume=auto", "  loss.alpha=0.5", "  term.nll.weight=1.0"):
        assert words in out
    assert "[number >= 0 or null]" in next(line for line in out.splitlines() if line.startswith("  lr=null"))


REAL = {
    "hh-100": ["datasets=[hh]", f"data_dir={HH_100}"],
    "hh": ["datasets=[hh]", f"data_dir={DATA}", "train_split=test", "eval_split=test"],
    "alpaca": [f"datasets=[{DATA}/alpaca_eval/preferences_test.jsonl.gz]"],
}


@pytest.mark.parametrize("name", REAL)
def test_fpo_on_real_preferences(tmp_path, name):
    """A slice of the documented command: every row read, a few of them trained on, sampled and judged."""
    if name != "hh-100" and not DATA.is_dir():
        pytest.skip(f"no real data in {DATA}")
    options = [*QUICK, *REAL[name], f"cache_dir={tmp_path}", f"exp_name={name}", "n_examples=8", "n_eval_examples=4"]
    out = command("train.py", *options).stdout
    if name == "hh":
        assert "9 of 2312 rows cannot be used" in out
        assert "4 x 'chosen' is empty" in out
        assert "harmless-base/test.jsonl.gz:" in out
    lines = metrics(tmp_path / name)
    assert lines[0]["loss/eval"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[1]["loss/train"] == pytest.approx(0.693147, abs=1e-5)
    assert all(value == value and abs(value) < float("inf") for line in lines for value in line.values())
    sampling = ["++n_samples=4", "++max_new_tokens=16", f"++samples_dir={tmp_path}"]
    command("eval.py", f"--config-path={tmp_path / name}", *sampling)
    command("compare.py", "-f", tmp_path / f"{name}.json", "-j", "toy", "-r", tmp_path / "results.jsonl")
    assert json.loads((tmp_path / "results.jsonl").read_text())["total"] == 4
