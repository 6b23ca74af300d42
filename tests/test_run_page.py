"""What a person sees of a run: its page in a real browser, lines on the terminal, trackers."""

import importlib.util
import json
import re
from html import escape, unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import command, look_at
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import run, settle

from launch import report, settings
from training import metrics
from training.checkpoint import Run
from training.metrics import MetricName, MetricsLog, StepLines, evaluation_table
from utils import UserError, console

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
SAE = ["loss=sae", "loss.layer=[1,2]", "loss.d_sae=96", "loss.k=6", "loss.batch_tokens=60", "loss.buffer_tokens=150"]
RUNS = {name: [f"loss={name}"] for name in ("fpo", "kto", "ppo", "sft", "csft", "bradley-terry")} | {"sae": SAE}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A short run of each kind, with an evaluation on the way."""
    folder: Path = tmp_path_factory.mktemp("runs")
    for name, own in RUNS.items():
        run(folder, *own, f"exp_name={name}", "++eval_every=8", "++max_new_tokens=12")
    return folder


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def series_of(page: Path) -> list[dict[str, Any]]:
    data = data_of(page)
    return [series for chart in data["learning"] + data["machine"] for series in chart["series"]]


def made_up(folder: Path, lines: list[dict[str, Any]], text: str = "text") -> Path:
    """A run directory with these metrics, in which every text is `text`."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"exp_name": text, "loss": {"name": text}, "model": {"name": text}, "datasets": [text], text: text}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    prompt = {"messages": [{"role": "system", "content": text}, {"role": "user", "content": text}]}
    completions = {"max_new_tokens": 4, "prompts": [prompt | {"before": text, "after": text}]}
    (folder / "completions.json").write_text(json.dumps(completions))
    return report.write_run_page(folder)


# --------------------------------------------------------------------------------------------------------------- page


@pytest.mark.parametrize("name", RUNS)
def test_every_metric_has_a_curve(runs, name):
    lines = report.read_lines(runs / name / "metrics.jsonl")
    names = {name for line in lines for name in line} - set(report.UNDRAWN)
    page = runs / name / "report.html"
    assert len(series_of(page)) == len(names)
    charts = [chart for place in ("learning", "machine") for chart in data_of(page)[place]]
    assert len({chart["title"] for chart in charts}) == len(charts)
    assert all("_" not in chart["title"] for chart in charts), "a metric without a title in report.CHARTS"
    evaluations = [line for line in lines if "loss/eval" in line]
    assert len(evaluations) > 2 and evaluations[0]["step"] == 0
    drawn = [[step for step, _ in series["points"]] for series in series_of(page)]
    assert sorted(drawn) == sorted([line["step"] for line in lines if name in line] for name in names)
    text = page.read_text()
    assert f"<h1>{name}</h1>" in text and "So far" not in text and "finished in" in text
    assert "<td><code>optimizer</code></td><td><code>AdamW</code></td>" in text
    assert ("<h2>Completions</h2>" in text) == (name not in ("sae", "bradley-terry"))


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("name", ["fpo", "sae"])
def test_the_page_in_a_browser(runs, name, width, browser, tmp_path):
    """In a frame, for a window is never less than 500 pixels wide."""
    text = (runs / name / "report.html").read_text()
    frame = (
        f'<iframe id="frame" style="width: {width}px; border: 0" srcdoc="{escape(text)}"></iframe><pre id="dom"></pre>'
    )
    look = """onload = () => {
        const page = document.getElementById('frame').contentDocument, root = page.documentElement;
        document.getElementById('dom').textContent = page.body.innerHTML;
        document.body.dataset.beyond = root.scrollWidth - root.clientWidth;
    }"""
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{frame}<pre id='dom'></pre><script>{look}</script>")
    outer, said = look_at(browser, tmp_path / "page.html", tmp_path / "profile")
    assert said == []  # nor anything of a request, which the page forbids
    assert 'data-beyond="0"' in outer
    dom = unescape(outer.split('<pre id="dom">')[1])
    drawn = re.findall(r'<path class="line \w+" d="(.*?)"', dom)
    assert len(drawn) == len(series_of(runs / name / "report.html")) and "NaN" not in "".join(drawn)
    assert dom.count('<circle class="dot"') > 4
    widths = {int(found) for found in re.findall(r'<svg width="(\d+)"', dom)}
    assert min(widths) > 300 and max(widths) < width


def test_nothing_on_the_page_comes_from_a_network(runs):
    text = (runs / "fpo/report.html").read_text()
    assert set(re.findall(r'(?:src|href)="(.*?)"', text)) <= {*report.LINKED_FILES, *report.LINKED}
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text


def test_hostile_text_stays_text(browser, tmp_path):
    page = made_up(
        tmp_path / "run",
        [{"step": n, "examples": n, f"loss/{s}": 1.0} for n in (1, 2) for s in ("train", "eval")],
        HOSTILE,
    )
    text = page.read_text()
    assert "<img" not in text and text.count("<script") == 2 == text.count("</script>")
    dom, said = look_at(browser, page, tmp_path / "profile")
    assert said == [] and "<img" not in dom and "<title>taken" not in dom
    assert dom.count("<article") == 1 and dom.count("&lt;img src=x") >= 10


def test_a_long_run_has_a_small_page(browser, tmp_path):
    """Means of as many lines each, and what was highest and lowest; a value that is no number is left out."""
    spike = 12_345
    lines = [
        {
            "step": n,
            "examples": n,
            "loss/train": 99.0 if n == spike else float(n % 2),
            "grad_norm": float("nan"),
            "lr": 0.1,
        }
        for n in range(1, 20_001)
    ]
    page = made_up(tmp_path / "run", lines)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 20001, "loss/tr')  # a killed run wrote no more
    report.write_run_page(tmp_path / "run")
    loss, lr = series_of(page)
    assert len(loss["points"]) == report.CURVE_POINTS and page.stat().st_size < 100_000
    assert loss["points"][0] == [40, 0.5, 0.0, 1.0] and loss["points"][-1][0] == 20_000
    (highest,) = [point for point in loss["points"] if point[3] == 99.0]
    assert highest[0] - 40 < spike <= highest[0]
    assert lr["points"][0] == [40, 0.1, 0.1, 0.1]
    dom, said = look_at(browser, page, tmp_path / "profile")
    assert said == [] and dom.count('class="band"') == 2 and "mean of 40 lines" in dom


def test_the_page_is_written_at_evaluations_but_seldom(tmp_path, monkeypatch):
    """Of a run that has just begun; what takes long is not done at each."""
    seconds, written = iter([100, 103, 103, 162, 163, 163, 163]), []
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(report, "write_run_page", written.append)
    page = report.RunPage(tmp_path)  # takes 3 seconds: not again within 60 s
    page.update()
    page.update()
    assert len(written) == 1
    page.update()
    assert len(written) == 2


def test_written_again_for_an_old_run(tmp_path):
    """With a link to the pages that are there now, and whatever an old configuration holds."""
    old = tmp_path / "old"
    made_up(old, [{"step": 0, "examples": 0, "loss/eval": 1.0}])
    (old / "config.yaml").write_text("exp_name: old\nwandb: {enabled: true}\n")
    (old / "features").mkdir()
    for name in ("features/report.html", "verdicts.html"):
        (old / name).touch()
    out = command("-m", "launch.report", old).stdout
    assert f"written to {old}/report.html" in out.replace("\n", "")
    text = (old / "report.html").read_text()
    assert 'href="features/report.html"' in text and 'href="verdicts.html"' in text
    assert "<code>wandb.enabled</code>" in text and "So far 0 steps" in text
    done = command("-m", "launch.report", tmp_path, check=False)
    assert done.returncode == 2 and "no metrics.jsonl there" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("loss", ["fpo-mse", "kto-surprisal", "tdpo2", "sae"])
def test_settings_that_were_not_changed_are_not_listed(tmp_path, loss):
    config, _ = settle(tmp_path, f"loss={loss}")
    saved: Any = OmegaConf.create(OmegaConf.to_yaml(config, resolve=True))
    changed = report.changed_settings(saved)
    assert not [key for key in changed if key.startswith("loss.")]
    assert changed["model.batch_size"] == ("8", "32") and changed["model.name_or_path"] == ("assets/tiny", "")
    assert ("exp_name" in changed, changed["warmup_steps"][0]) == (False, "2")


def test_completions_before_and_after(runs):
    path = runs / "sft/completions.json"
    found = json.loads(path.read_text())
    assert found["max_new_tokens"] == 12 and 2 <= len(found["prompts"]) <= 4
    for item in found["prompts"]:
        assert item.keys() == {"messages", "before", "after"} and item["messages"][-1]["role"] == "user"
    assert any(item["before"] != item["after"] for item in found["prompts"])
    run(runs, *RUNS["sft"], "exp_name=sft", "++eval_every=8", "++max_new_tokens=12")  # resumed, with nothing left to do
    assert json.loads(path.read_text()) == found


# ----------------------------------------------------------------------------------------------------------- terminal


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("loss/train", ("loss", "train", ())),
        ("rewards_eval/chosen", ("rewards", "eval", ("chosen",))),
        ("feature_drift_train/rejected", ("feature_drift", "train", ("rejected",))),
        ("sae_eval/layer_2/l0", ("sae", "eval", ("layer_2", "l0"))),
        ("tokens_per_second", ("tokens_per_second", None, ())),
    ],
)
def test_names_of_metrics(name, parts):
    assert MetricName.of(name) == parts


def test_lines_of_steps(monkeypatch, capsys):
    """The first, then one in 30 seconds with the means since, then the last."""
    clock = {"now": 1000.0}
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock["now"]))
    lines = StepLines(total=107, done=7, headline=lambda values: f"loss {values['loss/train']:.3g}")
    for step in range(8, 108):
        clock["now"] += 10
        lines.add(step, {"loss/train": step, "lr": 1e-6, "seconds": 10.0, "tokens_per_second": 500.0 * step})
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "step 8/107  loss 8  lr 1e-06  4,000 tokens/s  16:30 left"
    assert out[1] == "step 11/107  loss 10  lr 1e-06  5,000 tokens/s  16:00 left"
    assert out[-2] == "step 104/107  loss 103  lr 1e-06  51,500 tokens/s  0:30 left"
    assert out[-1] == "step 107/107  loss 106  lr 1e-06  53,000 tokens/s"
    assert len(out) == 34
    assert report.clock(3723) == "1:02:03"


def test_an_evaluation_is_a_small_table(capsys):
    values = {
        "loss/eval": 0.5,
        "rewards_eval/chosen": 0.25,
        "rewards_eval/rejected": -1e-3,
        "rewards_eval/margins": 0.251,
    }
    console.print(evaluation_table(20, 1640, values))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "held-out data after 20 steps (1,640 examples)"
    assert [line.split() for line in out[1:]] == [
        ["chosen", "rejected"],
        ["loss", "0.5"],
        ["rewards", "0.25", "-0.001"],
        ["rewards/margins", "0.251"],
    ]
    assert max(map(len, out)) < 60
    console.print(evaluation_table(1, 8, {"sae_eval/layer_1/l0": 8.0, "sae_eval/layer_3/l0": 9.0}))
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["layer_1", "layer_3"],
        ["sae/l0", "8", "9"],
    ]


def test_a_run_tells_how_it_goes(tmp_path, capsys):
    run(tmp_path, "loss=dpo")
    out = capsys.readouterr().out
    assert re.search(
        r"^step 1/3  loss 0.6931  margin \S+  lr 0.0005  [\d,]+ tokens/s  0:\d\d left$", out, re.M
    )  # of a policy that is its reference no accuracy
    assert re.search(r"^step 3/3  loss 0.\d+  accuracy \S+  margin \S+  lr 0.001  [\d,]+ tokens/s$", out, re.M)
    assert re.search(r"^ logps +-\S+ +-\S+ *$", out, re.M)


# ----------------------------------------------------------------------------------------------------------- trackers


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_the_metrics_of_the_file(tmp_path):
    lines = run(tmp_path, "loss=sft", "log_to=[tensorboard]")
    for name in ("loss/train", "loss/eval", "lr"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        found = scalars(tmp_path / "sft_tiny", name)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])


def test_a_resumed_run_replaces_what_the_killed_one_logged(tmp_path):
    config: Any = SimpleNamespace(log_to=["tensorboard"])
    (tmp_path / "config.yaml").write_text("exp_name: a")
    run = Run(tmp_path)
    killed = MetricsLog(run, config, step=0)
    for step in (1, 2, 3, 4):
        killed.write({"step": step, "loss/train": 1.0})
        if step == 2:
            run.state = tmp_path / "state"
            run.state.mkdir()
            (run.state / "metrics.jsonl").write_bytes(killed.content())
    killed.close()
    resumed = MetricsLog(run, config, step=2)
    resumed.write({"step": 3, "loss/train": 2.0})
    resumed.close()
    assert [line["loss/train"] for line in report.read_lines(tmp_path / "metrics.jsonl")] == [1.0, 1.0, 2.0]
    assert scalars(tmp_path, "loss/train") == [(1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["log_to=[tensorbord]"],
            r"log_to=\[\"tensorbord\"\]: not one of tensorboard, wandb \(did you mean 'tensorboard'\?\)",
        ),
        (["log_to=wandb"], "log_to=wandb: has to be a list"),
        (["++wandb.enabled=true"], "wandb.enabled is read by nothing"),
    ],
)
def test_what_log_to_takes(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, "loss=sft", *overrides)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else known(name))
    with pytest.raises(
        UserError, match=r"log_to=\[tensorboard\] needs the package tensorboard: pip install tensorboard"
    ):
        run(tmp_path, "loss=sft", "log_to=[wandb,tensorboard]")


def test_an_old_key_is_told_what_to_write():
    with pytest.raises(UserError, match=r"wandb\.enabled is read by nothing \(here it is log_to=\[wandb\]\)"):
        settings.check_overrides(["wandb.enabled=true"])
