"""benchmarks/gpu.py: how its jobs are run and what is written of them; some of its jobs, on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, replace_compile

sys.path.append(str(REPO / "benchmarks"))  # not first: it has a sae.py of its own

import gpu
import gpu_jobs
import throughput

from launch import settings

ROWS = [{"machine": {"device": "A GPU"}}, {"what": "x", "ms": 1.23456}, {"what": "y", "failed": "a | b\nc"}]
CODE = {
    "hangs": "import time; print('a line'); print('about to wait', flush=True); time.sleep(60)",
    "fails": "print('first'); raise ValueError('no such kernel')",
    "works": "import shutil, sys; shutil.copy('rows', sys.argv[1])",
}


def test_a_job_that_fails_or_hangs_costs_only_itself(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setattr(gpu, "REPO", tmp_path)  # where the commands run
    jobs = [gpu.Job(name, f"The title of {name}.", 1.0) for name in CODE]
    report = gpu.Report(tmp_path)
    gpu.run_all(jobs, report, 6.0, lambda job, file: [sys.executable, "-c", CODE[job.name], str(file)], tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text())
    ended = {name: job["ended"] for name, job in found["jobs"].items()}
    assert ended == {"hangs": "Killed at its limit of 2 s", "fails": "Failed with status 1", "works": "Done"}
    assert found["jobs"]["hangs"]["error"] == "a line\nabout to wait"
    assert found["jobs"]["fails"]["error"].endswith("ValueError: no such kernel")
    assert found["jobs"]["works"]["rows"] == ROWS[1:] and found["machine"] == {"device": "A GPU"}
    page = (tmp_path / "gpu.md").read_text()
    assert "| what | ms | failed |\n| --- | --- | --- |\n| x | 1.235 |  |\n| y |  | a \\| b c |" in page
    assert "The title of fails.\n\nFailed with status 1, " in page and "about to wait" in page
    assert capsys.readouterr().out.count("\n") == 3


def test_every_job_has_its_work():
    assert [job.name for job in gpu.JOBS] == list(gpu_jobs.WORK)
    assert sum(job.seconds for job in gpu.JOBS) == 540


@pytest.fixture
def place(tmp_path):
    return gpu_jobs.Place(torch.device("cpu"), tmp_path, tmp_path, tmp_path / "model", tmp_path)


def rows_of(work, place, *own):
    rows = []
    work(place, rows.append, *own)
    return rows


def test_attention_is_compared_with_segments_in_fp32(place):
    rows = rows_of(gpu_jobs.compare_attention, place)
    assert {(row["attention"], row["layout"]) for row in rows} >= {("segments", "shared_prefix"), ("eager", "padded")}
    for row in rows:
        assert row["tokens"] == 1 or (0 < row["log-probabilities off"] < 0.2 and 0 < row["gradient off"] < 0.05)


def test_a_part_that_fails_has_its_error_in_its_row():
    def broken():
        raise RuntimeError("out of order")

    assert gpu_jobs.attempt({"what": 1}, dict) == {"what": 1}
    assert gpu_jobs.attempt({"what": 1}, broken) == {"what": 1, "failed": "RuntimeError: out of order"}
    assert gpu_jobs.attempt({"what": 1}, sys.exit) == {"what": 1, "failed": "SystemExit: "}


def test_heads_are_compared_with_autograd(place, monkeypatch):
    replace_compile(monkeypatch, lambda function, **_: function)  # which takes a minute
    rows = rows_of(gpu_jobs.compare_heads, place)
    assert {"head.py, 32 at a time", "Liger", "cut-cross-entropy"} <= {row["way"] for row in rows}
    for row in rows:
        off = [value for name, value in row.items() if name.endswith(" off")]
        assert row.get("failed") == "absent" or (len(off) == 3 and max(off) < 1e-4)


@pytest.mark.parametrize("loss", ["fpo", "sae"])
def test_the_arguments_of_its_runs_are_those_of_the_commands(place, loss):
    arguments = gpu_jobs.arguments_of(place, "a-run", f"loss={loss}", "model.compile=true", *gpu_jobs.OWN.get(loss, ()))
    config, _ = settings.check_config(gpu_jobs.composed(arguments))
    assert (config.exp_name, config.model.policy_dtype, config.model.compile) == ("a-run", "bfloat16", True)
    assert Path(config.datasets[0]).is_file() and config.cache_dir == f"{place.folder}/runs"


def test_mfu_by_hand():
    """One pair a step. The middle one of the rates is 15 tokens in half a second; the peak is 6,000 a second."""
    shape = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    shape |= {"intermediate_size": 3, "vocab_size": 5}
    parameters = 2 * 2 * 2 + 2 * 2 * 2 + 3 * 2 * 3 + 5 * 2
    assert throughput.Work.of(shape).layers + throughput.Work.of(shape).head == parameters
    known = {"pairs": [(90, [9, 9]), (6, [1, 1]), (10, [3, 2]), (6, [1, 1])], "shape": shape, "rate": 6000.0}
    row = gpu_jobs.figures({"batch": 1}, known, {"each": [9.0, 0.5, 0.1], "peak": 1000.0, "reference": 0.2})
    assert row["MFU"] == pytest.approx(6 * parameters * 15 / 0.5 / 6000)
    assert row["MFU, prompts twice"] == pytest.approx(6 * parameters * 25 / 0.5 / 6000)
    assert (row["ms a pair"], row["tokens/s"], row["reference, ms a pair"]) == pytest.approx((500, 50, 50))
    assert row["peak GB"] == pytest.approx(1.048576)
