"""Rounds of sampling, labelling and training."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest
from composition import composed
from conftest import command

from launch import online, settings
from utils import REPO, UserError

SMALL = ["experiment=online", "online.rounds=2", "online.prompts=6", "online.samples=3"]
SMALL += ["n_samples=4", "n_eval_examples=4", "max_new_tokens=8", "online.reward=['n_examples=16','n_eval_examples=4']"]


def rounds(folder, *arguments):
    given = [*SMALL, f"cache_dir={folder}", *arguments]
    config, classes = settings.check_config(composed(given), modes=["online"])
    online.run(config, classes.binding, given)


def test_rounds_that_are_stopped_go_on_and_name_their_parents(tmp_path, monkeypatch, capsys):
    done = []

    def do(program, *given):
        if len(done) == 6:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(command(program, *given, toy_rows=400).stdout)

    monkeypatch.setattr(online, "do", do)
    with pytest.raises(KeyboardInterrupt):
        rounds(tmp_path)
    home = tmp_path / "online"
    first = (home / "samples/round-1.json").stat().st_mtime_ns
    rounds(tmp_path)
    assert (home / "samples/round-1.json").stat().st_mtime_ns == first
    lines = json.loads((home / "rounds.json").read_text())
    assert [line["round"] for line in lines] == [0, 1, 2] and all(-5 < line["reward"] < 5 for line in lines)
    assert all(line["true_score"] >= 0 for line in lines) and all(line["kl"] > -1 for line in lines[1:])
    parents = [settings.saved_config(home / f"round-{number}").model.load_from for number in (1, 2)]
    assert parents == [None, str(home / "round-1")]
    assert lines[2]["pairs"] == len((home / "data/round-2.jsonl").read_text().splitlines())
    assert all(line["drift"] >= 0 for line in lines[1:])
    assert "true score" in capsys.readouterr().out


STEP = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
open({ready!r}, "w").close()
time.sleep(60)
"""


def tell(ready, number):
    """Send the signal to whom `ready` tells of, itself or this process, when it is there."""
    while not ready.exists():
        time.sleep(0.01)
    os.kill(int(ready.read_text() or os.getpid()), number)


def test_a_signal_reaches_the_step_that_runs(tmp_path):
    """It saves its state and stops, and the rounds with it, by its status."""
    step, ready = tmp_path / "step.py", tmp_path / "ready"
    step.write_text(STEP.format(ready=str(ready)))
    threading.Thread(target=tell, args=(ready, signal.SIGUSR1)).start()
    with pytest.raises(SystemExit) as stopped:
        online.do(str(step))
    assert stopped.value.code == 138


def test_the_job_of_rounds_is_queued_again_before_its_limit(tmp_path):
    """scripts/online.sh, with a shell for Python and for SLURM."""
    ready = tmp_path / "ready"
    says = f'echo "$*" > {tmp_path}'
    waits = f"trap 'sleep 0.2; exit 138' USR1; sleep 0.3; echo $PPID > {ready}; while :; do sleep 0.05; done"
    for name, does in {"python": f"{says}/asked; {waits}", "scontrol": f"{says}/told"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    threading.Thread(target=tell, args=(ready, signal.SIGUSR1)).start()
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run([REPO / "scripts/online.sh", "model=tiny"], env=environment, timeout=60, check=False)
    assert done.returncode == 138 and (tmp_path / "told").read_text() == "requeue 17\n"
    assert (tmp_path / "asked").read_text() == "train.py experiment=online model=tiny\n"


def test_what_no_round_could_do_is_told(tmp_path):
    with pytest.raises(UserError, match="backend=openai: a server has one policy"):
        rounds(tmp_path, "backend=openai", "base_url=http://127.0.0.1:1/v1")
    with pytest.raises(UserError, match=r"resume=never: to begin again, remove .*online"):
        rounds(tmp_path, "resume=never")
