"""vLLM itself, on CPUs, with SmolLM2-135M-Instruct. FPO_VLLM names a Python with it, as scripts/vllm_cpu makes one."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
from conftest import HH_100, REPO, command

import eval as evaluation
from launch.policies import read_config
from sampling.backends import ServerBackend
from utils import UserError

PYTHON = os.environ.get("FPO_VLLM", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="FPO_VLLM names no Python with vLLM; scripts/vllm_cpu makes one"),
]
# 1 GiB of keys and values; nothing compiled, which takes longer than these few tokens.
SMALL = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
DATA = ["datasets=[hh]", f"data_dir={HH_100}"]
SHORT = ["++model.max_prompt_length=64", "++max_new_tokens=16", "++model.policy_dtype=float32", "++n_samples=4"]
WHOLE = ["++model.max_prompt_length=512"]  # a server gets prompts as they are
GREEDY = ["++temperature=0", "++top_p=1.0"]


def with_vllm(*arguments):
    """One of the repo's commands in the environment that has vLLM."""
    done = subprocess.run(
        [PYTHON, *map(str, arguments)], cwd=REPO, env=SMALL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def texts(file):
    return [(sample["policy"], sample["finish_reason"]) for sample in json.loads(file.read_text())["samples"]]


# ------------------------------------------------------------------------------------------------- in the same process


@pytest.fixture(scope="module")
def adapted(smollm2, tmp_path_factory):
    """A run with adapters that have learnt something: its export is merged, with the adapter beside it."""
    folder = tmp_path_factory.mktemp("lora")
    own = [f"model={smollm2}", *DATA, "loss=dpo", "++model.use_peft=true", "export=[hub]", f"cache_dir={folder}"]
    own += [
        "++model.batch_size=2",
        "n_examples=8",
        "n_eval_examples=2",
        "++lr=3e-3",
        "++warmup_steps=0",
        "exp_name=lora",
    ]
    command("train.py", *own, "++model.max_length=64", "++model.max_prompt_length=40", "++model.policy_dtype=float32")
    return folder / "lora" / "LATEST"


def test_greedy_completions_are_those_of_transformers(smollm2, adapted, tmp_path):
    """Of a model, of a merged export, which vLLM reads where the run left it, and of its adapter by path."""
    own = [*DATA, *SHORT, *GREEDY, f"++samples_dir={tmp_path}"]
    for name, path in (("base", smollm2), ("merged", adapted.parent)):
        command("eval.py", f"--config-path={path}", *own, f"++exp_name={name}")
    expected = {name: texts(tmp_path / f"{name}.json") for name in ("base", "merged")}
    assert expected["base"] != expected["merged"]

    own += ["++backend=vllm", "template=chat"]
    with_vllm("eval.py", f"--config-path={adapted.parent}", *own, "++exp_name=merged-vllm")
    assert texts(tmp_path / "merged-vllm.json") == expected["merged"]
    adapter = f"++model.load_from={adapted / 'adapter'}"
    with_vllm("eval.py", f"--config-path={smollm2}", *own, adapter, "++exp_name=adapter-vllm")
    assert texts(tmp_path / "adapter-vllm.json") == expected["merged"]


def test_draws_are_the_seeds_own_and_end_at_stops(smollm2):
    """Several completions of a prompt; the same in other company; greedy ones end where transformers' do."""
    said = with_vllm(REPO / "tests/vllm_draws.py", smollm2, *DATA, *SHORT)
    drawn = json.loads(next(line for line in said.splitlines() if line.startswith('{"together"')))
    assert drawn["alone"] == drawn["together"][::-1][:3]
    assert drawn["other seed"] != drawn["together"]
    first, second = drawn["together"][:4], drawn["together"][4:]
    assert all(one != two for one, two in zip(first, second))
    assert all(" the" not in text for text, _ in drawn["stopped"]) and "stop" in {why for _, why in drawn["stopped"]}
    assert drawn["stopped"] == drawn["stopped by transformers"]


# ----------------------------------------------------------------------------------------------------------- a server


@contextmanager
def serving(model, port):
    """What `vllm serve` starts, on a port, as a process. (The program itself asks for the version of a package `vllm`;
    that for CPUs has another name.)"""
    program = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    program += ["--host", "127.0.0.1"]
    program += ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "2", "--served-model-name", "m"]
    server = subprocess.Popen(program, env=SMALL, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        for _ in range(3000):
            assert server.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.1)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def served(folder, model, port, *overrides):
    """The file of samples that eval.py writes, in this process, of what the server says."""
    overrides = [*DATA, *SHORT, *WHOLE, "template=chat", f"++samples_dir={folder}", "++exp_name=served", *overrides]
    overrides += [
        "++served_model=m",
        "++backend=openai",
        f"++base_url=http://127.0.0.1:{port}/v1",
        "++model.eval_batch_size=4",
    ]
    evaluation.write_samples(read_config(model, overrides), model, overrides)
    return folder / "served.json"


def test_a_server_is_sampled_judges_and_is_outlived(smollm2, tmp_path, monkeypatch):
    """Busy: it takes two requests at a time of four. Slow: it is stopped for a while. Killed, and started again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command(
        "eval.py", f"--config-path={smollm2}", *DATA, *SHORT, *WHOLE, *GREEDY, f"++samples_dir={tmp_path}",
        "++exp_name=here",
    )  # fmt: skip
    with serving(smollm2, port) as server:
        file = served(tmp_path / "greedy", smollm2, port, *GREEDY, "++samples=2")
        assert texts(file)[::2] == texts(file)[1::2] == texts(tmp_path / "here.json")
        first, second = (texts(served(tmp_path / name, smollm2, port, "++samples=2")) for name in ("one", "two"))
        assert first == second and first[::2] != first[1::2]

        judge = ["-j", "m", "--base_url", f"http://127.0.0.1:{port}/v1", "-p", "alpacaeval"]
        pair = [
            "-f",
            tmp_path / "one/served.json",
            "--against",
            tmp_path / "here.json",
            "-r",
            tmp_path / "results.jsonl",
        ]
        command("compare.py", *judge, *pair, check=False)  # so small a judge may give no verdict
        replies = [json.loads(line) for line in (tmp_path / "results.verdicts.jsonl").read_text().splitlines()]
        assert len(replies) == 8 and all(len(reply["alternatives"]) >= 5 for reply in replies)

        os.killpg(server.pid, signal.SIGSTOP)
        threading.Timer(5, os.killpg, (server.pid, signal.SIGCONT)).start()
        assert texts(served(tmp_path / "slow", smollm2, port, "++samples=2")) == first
        os.killpg(server.pid, signal.SIGSTOP)
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=r"8 of 8 samples got no answer from .*, the last: nothing came for 2 s"),
        ):
            patch.setattr(ServerBackend.__init__, "__defaults__", (2.0,))
            served(tmp_path / "killed", smollm2, port, "++samples=2")
    with serving(smollm2, port):
        assert texts(served(tmp_path / "killed", smollm2, port, "++samples=2")) == first
