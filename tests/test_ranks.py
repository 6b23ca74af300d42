"""Several ranks on this machine: they give the same numbers as one rank, and a failed rank ends all."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import REPO, command, metrics, on_ranks, start_ranks
from forks import Fork
from safetensors.torch import load_file, save_file

from data import toy
from distributed import parallel

MANY_RUNS = REPO / "tests/many_runs.py"
SMALL = [
    "model=tiny",
    "++model.batch_size=8",
    "++model.eval_batch_size=8",
    "++optimizer=AdamW",
    "++lr=1e-3",
    "++warmup_steps=2",
    "++max_new_tokens=2",
]
LORA = ["++model.use_peft=true", "++model.peft.lora_r=4", "++model.peft.lora_dropout=0"]
IN_PARTS = ["++model.activation_checkpointing=selective", "++model.gradient_accumulation_steps=2"]
# One run for each kind of loss, and each sharding option that a CPU can test: options that do not hide one another
# share a run.
RUNS = {
    "fpo": ["loss=fpo"],
    "kto": ["loss=kto"],
    "bco": ["loss=bco"],
    "ppo": ["loss=ppo"],
    "csft": ["loss=csft"],
    "untied": ["loss=tdpo2", "++model.name_or_path={data}/untied"],
    "lora": ["loss=tdpo2", *LORA],
    "4-bit": ["loss=fpo", *LORA, "++model.load_in_4bit=true"],
    "offloaded": ["loss=fpo", *IN_PARTS, "++model.cpu_offload=true"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for split, count in (("train", 12), ("test", 10)):
        rows = toy.preferences(split, seed=0, count=count)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_untied(folder / "untied")
    return folder


def write_untied(folder):
    """Write the built-in model with a head that is not tied to its embeddings."""
    shutil.copytree(REPO / "assets/tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    head = embeddings + 0.01 * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})


def overrides(data, folder, *own):
    files = [f"datasets=[{data / 'train.jsonl'}]", f"eval_datasets=[{data / 'test.jsonl'}]", f"cache_dir={folder}"]
    return [*SMALL, *files, *(value.format(data=data) for value in own)]


def train_on(ranks, runs, nodes=1):
    return on_ranks(ranks, MANY_RUNS, json.dumps(runs), nodes=nodes)


@pytest.fixture(scope="module")
def trained(data):
    """Train each run on one rank and on two."""
    for ranks in (1, 2):
        train_on(ranks, [overrides(data, data / str(ranks), f"exp_name={name}", *RUNS[name]) for name in RUNS])
    return data


def assert_same_training(run, one, rel):
    assert_same_metrics(run, one, rel)
    weights, others = (load_file(folder / "LATEST/model.safetensors") for folder in (one, run))
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=0, atol=1e-5)


def assert_same_metrics(run, one, rel):
    for expected, found in zip(metrics(one), metrics(run), strict=True):
        assert expected.keys() == found.keys()
        for key in expected:
            assert found[key] == pytest.approx(expected[key], rel=rel, abs=1e-5), (key, expected["step"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_ranks_change_nothing(trained, name):
    assert_same_training(trained / "2" / name, trained / "1" / name, rel=1e-5)


@pytest.mark.slow
def test_compiled_layers_change_nothing(trained, tmp_path):
    train_on(1, [overrides(trained, tmp_path, "exp_name=fpo", *RUNS["fpo"], "++model.compile=true")])
    assert_same_metrics(tmp_path / "fpo", trained / "1/fpo", rel=1e-4)


def test_tied_weights_are_one_and_untied_ones_two(trained):
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    tied, untied = (load_file(trained / "2" / name / "LATEST/model.safetensors") for name in ("fpo", "untied"))
    assert embeddings in tied and head not in tied
    before = load_file(trained / "untied/model.safetensors")
    assert (untied[embeddings] - before[embeddings]).abs().max() > 1e-4
    assert (untied[head] - before[head]).abs().max() > 1e-4


def wait_for(condition, started):
    deadline = time.monotonic() + 240
    while not condition():
        assert started.process.is_alive() and time.monotonic() < deadline, started.result(0).stdout
        time.sleep(0.02)


# Long enough to be stopped on the way; the learning rate is so low that rounding errors do not grow.
LONG = ["exp_name=long", "loss=dpo", "lr=1e-5", "++n_epochs=6", "++save_every=16", "++n_eval_examples=4"]


@pytest.fixture(scope="module")
def undisturbed(data):
    """The metrics of a run that nothing stopped, on one rank."""
    train_on(1, [overrides(data, data / "undisturbed", *LONG)])
    return metrics(data / "undisturbed/long")


def assert_same_run(lines, expected):
    """The same steps, once each, with the same losses."""
    steps = [line for line in lines if "loss/train" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    whole = [line for line in expected if "loss/train" in line]
    assert [line["loss/train"] for line in steps] == pytest.approx([line["loss/train"] for line in whole], rel=2e-4)
    assert lines[-1]["loss/eval"] == pytest.approx(expected[-1]["loss/eval"], rel=2e-4)


@pytest.fixture(scope="module")
def stopped(data):
    """The folder of a run on two ranks that a SIGTERM stopped, as SLURM sends it to all; and how they ended."""
    folder = data / "cut"
    ranks, _store = start_ranks(2, MANY_RUNS, json.dumps([overrides(data, folder, *LONG)]))
    log = folder / "long/metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("loss/train") > 3, ranks[0])
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGTERM)
    return folder, [rank.result(120) for rank in ranks]


@pytest.mark.slow
def test_a_signal_to_the_ranks_stops_the_run(stopped):
    _, done = stopped
    assert [rank.returncode for rank in done] == [128 + signal.SIGTERM] * 2
    said = "".join(rank.stdout + rank.stderr for rank in done)
    assert said.count("stopped by SIGTERM after step") == 1 and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_stopped_and_resumed_on_other_ranks(data, undisturbed, stopped, tmp_path, ranks):
    """The run goes on where it was, and nothing is lost."""
    folder, _ = stopped
    run = shutil.copytree(folder, tmp_path / "copy", symlinks=True) / "long"
    last = metrics(run)[-1]["step"]
    resumed = train_on(ranks, [overrides(data, run.parent, *LONG)])
    assert f"resuming after {last} of" in resumed
    assert_same_run(metrics(run), undisturbed)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Starts a script whose launcher starts two ranks, each in a new Python, which sum over the ranks until SIGTERM.
    Gives the launcher and its ranks, in their order."""
    folder = tmp_path_factory.mktemp("launched")
    script = folder / "ranks.py"
    script.write_text(
        f"import os, signal, sys, time; sys.path.insert(0, {str(REPO)!r})\n"
        "from pathlib import Path\n"
        "import torch\nfrom distributed import parallel\n"
        "def work():\n"
        "    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))\n"
        "    stopped = []\n"
        "    while not parallel.sum_over_ranks(torch.tensor(float(bool(stopped)))):\n"
        "        Path(str(parallel.rank())).write_text(str(os.getpid()))\n"
        "        time.sleep(0.05)\n"
        "    sys.exit(128 + signal.SIGTERM)\n"
        "parallel.run(work, 2)\n"
    )

    def start():
        files = [folder / "0", folder / "1"]
        for file in files:
            file.unlink(missing_ok=True)
        launcher = Fork(script, cwd=folder)
        wait_for(lambda: all(file.is_file() and file.read_text() for file in files), launcher)
        return launcher, [int(file.read_text()) for file in files]

    return start


@pytest.mark.slow
def test_a_killed_rank_ends_all(launched):
    launcher, ranks = launched()
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    done = launcher.result(60)
    assert time.monotonic() - began < 30
    assert done.returncode == 128 + signal.SIGKILL and "rank 1 was ended by SIGKILL" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr and "connection" not in done.stdout + done.stderr
    assert not Path(f"/proc/{ranks[0]}").exists()


@pytest.mark.slow
def test_a_signal_to_the_launcher_reaches_the_ranks(launched):
    launcher, _ = launched()
    os.kill(launcher.process.pid, signal.SIGTERM)
    done = launcher.result(60)
    assert done.returncode == 128 + signal.SIGTERM, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_dead_rank_is_noticed_whatever_its_number(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "GRACE_SECONDS", 0.2)
    ranks = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    ranks[2].kill()
    assert parallel.wait_for_ranks(ranks) == 128 + signal.SIGKILL
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 3  # not by themselves
    assert capsys.readouterr().out.splitlines() == ["rank 2 was ended by SIGKILL, so all are ended"]


def test_ranks_end_with_the_launcher_also_while_they_start(tmp_path):
    script = tmp_path / "slow_start.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "if 'RANK' in os.environ:\n"
        "    Path(os.environ['RANK']).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "from distributed import parallel\n"
        "parallel.run(lambda: None, 2)\n"
    )
    launcher = Fork(script, cwd=tmp_path)
    wait_until(lambda: all((tmp_path / rank).is_file() and (tmp_path / rank).read_text() for rank in "01"))
    launcher.process.kill()
    launcher.process.join()
    wait_until(lambda: not any(Path("/proc", (tmp_path / rank).read_text(), "cmdline").exists() for rank in "01"))
    wait_until(launcher.outputs[0].read_text)
    said = "the process that started the ranks was killed, so all are ended\n"
    assert launcher.result().stdout == said


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_others():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(closed.getsockname()[1])}
        done = Fork(REPO / "train.py", "loss=dpo", "model=tiny", "datasets=[toy]", **place).result(120)
    assert done.returncode == 1 and "the process that started this rank is gone" in done.stderr


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_lost_connection_is_told_in_one_line(capfd, monkeypatch):
    store = dist.HashStore()
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"
    assert parallel.report_error(RuntimeError(gloo), 0, store) == 1
    assert parallel.report_error(RuntimeError(gloo), 1, store) == 1  # the first has said it
    out, err = capfd.readouterr()
    assert out.splitlines() == ["rank 0 has lost the connection to another rank"] and not err
    with monkeypatch.context() as patch:
        patch.setenv(parallel.OWN_LAUNCHER, "True")
        assert parallel.report_error(RuntimeError(gloo), 0, dist.HashStore()) == parallel.LOST
    ranks = [subprocess.Popen(["sh", "-c", f"exit {code}"]) for code in (0, parallel.LOST)]
    assert parallel.wait_for_ranks(ranks) == 1
    out, err = capfd.readouterr()
    assert out.splitlines() == ["a rank has lost the connection to another, so all are ended"] and not err
    assert parallel.report_error(RuntimeError("of its own"), 0, dist.HashStore()) == 1
    assert "rank 0: " in (said := capfd.readouterr().err) and "RuntimeError: of its own" in said


@pytest.mark.slow
def test_lora_exports_load_elsewhere(trained):
    """The adapter through peft, and the merged model, give the same logits; states hold the adapter alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = trained / "2" / "lora"
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(REPO / "assets/tiny")
        before = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, run / "LATEST/adapter").eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "LATEST")(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 1e-2
    kept = {name for file in run.glob("state/*/*.safetensors") for name in load_file(file)}
    assert kept and all(".lora_" in name for name in kept - {"random_state"})


@pytest.mark.slow
def test_a_4_bit_model_is_exported_with_its_adapters(trained):
    """Dequantised, so it is close to the original, which it was loaded from."""
    run = trained / "2/4-bit"
    exported, original = (
        load_file(file) for file in (run / "LATEST/model.safetensors", REPO / "assets/tiny/model.safetensors")
    )
    assert exported.keys() == original.keys()
    for name, value in exported.items():
        assert torch.nn.functional.cosine_similarity(value.flatten(), original[name].flatten(), dim=0) > 0.98
    assert metrics(run)[0]["loss/eval"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_crash_on_one_rank_is_told_once_and_ends_all(tmp_path):
    script = tmp_path / "crash.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "import torch\nfrom distributed import parallel\n"
        "def work():\n"
        "    if parallel.rank() == 1:\n"
        "        raise ValueError('broken here')\n"
        "    parallel.wait_for_all()\n"
        "parallel.run(work, 2)\n"
    )
    done = command(script, check=False)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("Traceback") == 1 and "rank 1: Traceback" in done.stderr


def a_script(tmp_path):
    """A script that starts as train.py does, and imports less; and a port on which its launchers can meet."""
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "from launch import startup\nstartup.begin('', [])\n"
        "import torch\nfrom distributed import parallel\n"
        "def work():\n"
        "    total = parallel.sum_over_ranks(torch.ones(1))\n"
        "    print(f'rank {parallel.rank()} of {total.item():.0f}')\n"
        "parallel.run(work)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return script, free.getsockname()[1]


@pytest.mark.slow
def test_accelerate(tmp_path):
    script, port = a_script(tmp_path)
    ranks = ["--multi_gpu", "--num_processes=2", "--num_machines=1", f"--main_process_port={port}"]
    done = command("-m", "accelerate.commands.launch", *ranks, script)
    assert sorted(re.findall("rank . of .", done.stdout)) == ["rank 0 of 2", "rank 1 of 2"]


def test_slurm_places_are_read(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "9")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert parallel.launched_place() is None  # the step of a batch script
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    assert parallel.launched_place() == {"RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": 1}


@pytest.mark.slow
def test_two_nodes_with_hybrid_sharding(trained, tmp_path):
    """Two ranks on each node, all on this machine: split within a node, replicated across nodes, with two micro-batches
    a step, of which the last sums over the nodes. KTO exchanges completions between the ranks."""
    hybrid = ["++model.hybrid_sharding=true", "++model.gradient_accumulation_steps=2"]
    own = overrides(trained, tmp_path, "exp_name=kto", *RUNS["kto"], *hybrid)
    train_on(4, [own], nodes=2)
    assert_same_training(tmp_path / "kto", trained / "1/kto", rel=1e-5)
