"""Two hosts, each a network namespace on this machine: torchrun trains on both, one goes on alone, one is cut off."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, command, metrics

from data import toy

HOSTS = ("fpo-host-0", "fpo-host-1")
PORT = 29_511


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def remove_hosts():
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


@pytest.fixture
def hosts():
    """Two namespaces with a cable between them."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("only root makes network namespaces, by `ip`")
    remove_hosts()
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "cable0", "netns", HOSTS[0], "type", "veth", "peer", "name", "cable1", "netns", HOSTS[1])
        for number, host in enumerate(HOSTS):
            ip("-n", host, "address", "add", f"10.77.7.{number + 1}/24", "dev", f"cable{number}")
            for device in ("lo", f"cable{number}"):
                ip("-n", host, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        remove_hosts()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield HOSTS
    remove_hosts()


def start(number, folder, *arguments):
    """torchrun on one of the hosts, of one rank, in a session of its own; its output goes to a file."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    launcher += [f"--rdzv-endpoint=10.77.7.1:{PORT}", f"--rdzv-conf=is_host={1 - number}"]
    launcher += [f"--local-addr=10.77.7.{number + 1}", REPO / "train.py"]
    with (folder / f"host{number}.log").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", HOSTS[number], sys.executable, *map(str, launcher), *arguments],
            env=os.environ | {"GLOO_SOCKET_IFNAME": f"cable{number}"},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=REPO,
        )  # fmt: skip


def ranks(folder):
    """The processes that train there; torchrun's own take minutes more to see that they are alone."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            words = file.read_bytes().decode(errors="replace")
            found += [file.parent.name] if str(folder) in words and "torch.distributed.run" not in words else []
    return found


def output(folder):
    return "".join((folder / f"host{number}.log").read_text() for number in (0, 1))


@pytest.mark.slow
def test_two_hosts_train_together_and_end_when_one_is_cut_off(hosts, tmp_path):
    for split, count in (("train", 24), ("test", 8)):
        rows = toy.preferences(split, seed=0, count=count)
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"datasets=[{tmp_path}/train.jsonl]", f"eval_datasets=[{tmp_path}/test.jsonl]", f"cache_dir={tmp_path}"]
    own += ["loss=dpo", "model=tiny", "lr=1e-5", "warmup_steps=0", "exp_name=run", "max_new_tokens=1", "save_every=8"]
    own += ["++model.batch_size=8"]

    together = [start(number, tmp_path, *own, "n_epochs=2000", "eval_every=null") for number in (0, 1)]
    try:
        log = tmp_path / "run/metrics.jsonl"
        while not log.is_file() or log.read_text().count("loss/train") < 8:
            assert all(one.poll() is None for one in together), output(tmp_path)
            time.sleep(0.1)
        assert len(ranks(tmp_path)) == 2
        ip("-n", hosts[1], "link", "set", "cable1", "down")
        deadline = time.monotonic() + 180
        while ranks(tmp_path):
            assert time.monotonic() < deadline, output(tmp_path)
            time.sleep(0.1)
        assert "that host is down or cut off, so this one ends too" in output(tmp_path)
    finally:
        for one in together:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)

    alone = command("train.py", *own, "n_epochs=2000", "n_examples=240")
    assert "resuming after" in alone.stdout
    steps = [line["step"] for line in metrics(tmp_path / "run") if "loss/train" in line]
    assert steps == list(range(1, 31))
