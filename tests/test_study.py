"""The plan of benchmarks/study.py, how it goes on where it stopped, and the statistics of its page; no model runs."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO
from scipy import stats

sys.path.append(str(REPO / "benchmarks"))  # not first: it has a sae.py of its own

import study as studies
import study_report
from study import DEFAULT, FULL, QUICK, Job, Study, Variant, plan

PROMPTS, TEST_PAIRS = 16, 30
SMALL = replace(DEFAULT, prompts=PROMPTS)


def made_up(study: Study, job: Job) -> dict:
    """Figures for a job, drawn at random by its name."""
    layers, draw = study.scale.layers, random.Random(job.name)

    def some(count: int, low: float, high: float) -> list[float]:
        return [draw.uniform(low, high) for _ in range(count)]

    fields = job.settings[0].fields() if len(job.settings) == 1 else job.options
    if job.kind == "machine":
        return {"kind_of_device": "cpu", "device": "CPU", "threads": 2, "dtype": "bfloat16", "numbers": study.numbers}
    if job.kind == "data":
        names = [f"{data}/{split}" for data in study.scale.pairs for split in studies.SPLITS]
        return {"rows": {name: {"pairs": TEST_PAIRS, "prompts": TEST_PAIRS} for name in names}}
    if job.kind == "train":
        names = ("l0", "fvu", "ce_recovered", "dead")
        evaluated = {f"sae_eval/layer_{layer}/{name}": 0.5 for layer in layers for name in names}
        evaluated["rewards_eval/accuracies"] = 0.7
        pace = {"seconds_per_step": draw.random(), "tokens_per_second": 100.0, "training_memory_gb": 4.0}
        return {"resumed": False, "cpu_seconds": 60.0, "evaluated": evaluated, **pace, **fields}
    if job.kind == "choose":
        tried = []
        for setting in job.settings:
            figures = {"dpo_loss": draw.random(), "accuracy": 0.6, "reward_accuracy": 0.6, "margin": 0.1}
            tried.append({"value": getattr(setting, job.options["what"]), **setting.fields(), **figures})
        return {"best": min(tried, key=lambda one: one["dpo_loss"])["value"], "tried": tried}
    if job.kind == "precision":
        return {"mean": 0.001, "largest": 0.01, "completions": 32}
    drifts = [f"drift_{layer}_{side}" for layer in layers for side in ("chosen", "rejected")]
    pairs = {name: some(TEST_PAIRS, 0, 1) for name in ("margin", *drifts)}
    for name in ("accuracy", "reward_accuracy"):
        pairs[name] = [float(value > 0.4) for value in some(TEST_PAIRS, 0, 1)]
    draws = PROMPTS * study.scale.draws
    samples = {"kl": some(PROMPTS, 0, 2), "surprisal": some(PROMPTS, 90, 110), "tokens": some(draws, 50, 64)}
    samples |= {"rewards": some(draws, -1, 1)} if "reward-alpaca" in job.uses else {}
    samples |= {"cut": 0.9, "distinct_1": 0.5, "distinct_2": 0.9, "self_bleu": 0.1}
    return {"pairs": pairs, "samples": samples, "saes": {str(n): {"fvu": 0.4, "l0": 32} for n in layers}, **fields}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(SMALL, "model", tmp_path, tmp_path / "runs", tmp_path / "small.jsonl")


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("scale", [DEFAULT, QUICK, FULL])
def test_every_job_reads_only_runs_that_come_before_it(scale):
    trained = set()
    for job in plan(scale, {}):
        assert set(job.uses) <= trained
        trained |= {job.name} if job.kind == "train" else set()


def test_names_are_unique_and_measures_follow_the_grid():
    jobs = plan(DEFAULT, {})
    assert len({job.name for job in jobs}) == len(jobs)
    measured = [job.settings[0] for job in jobs if job.kind == "measure" and job.settings]
    assert len(measured) == sum(seeds for _, _, seeds in DEFAULT.grid)
    assert {setting.seed for setting in measured if setting.variant == Variant("dpo")} == {1, 2, 3}


def test_default_takes_six_hours_as_counted():
    hours = sum(job.tflop for job in plan(DEFAULT, {})) / studies.SPEED / 3600
    assert 5 < hours < 6.5


def test_what_is_chosen_decides_the_runs_that_follow():
    results = {
        "choose beta of fpo": {"best": 5},
        "choose lr of fpo": {"best": 5e-6},
        "choose lr of dpo": {"best": 5e-5},
    }
    runs = {job.name for job in plan(DEFAULT, results) if job.kind == "train"}
    assert {"alpaca-fpo-beta5-lr5e-06-seed3", "alpaca-fpo-alpha0-beta5-lr5e-06-seed2"} <= runs
    assert {"alpaca-simpo-lr5e-06-seed1", "alpaca-tdpo2-lr5e-05-seed1", "alpaca-kto-lr5e-05-seed1"} <= runs
    assert {
        job.settings[0].beta
        for job in plan(DEFAULT, results)
        if job.kind == "measure" and job.settings and job.settings[0].variant.is_fpo
    } == {5}


def test_tried_runs_are_kept_until_the_choice():
    jobs = plan(DEFAULT, {})
    choice = next(job for job in jobs if job.name == "choose lr of dpo")
    done = jobs[: jobs.index(choice)]
    results = {job.name: {"kind": job.kind, "best": 1} for job in done}
    assert not set(choice.uses) & set(studies.unneeded(plan(DEFAULT, results), results))
    results[choice.name] = {"kind": "choose", "best": 5e-5}
    old = studies.unneeded(plan(DEFAULT, results), results)
    assert {name for name in old if "-dpo-" in name} == {"alpaca-dpo-lr5e-06-seed1", "alpaca-dpo-lr1.5e-05-seed1"}
    assert "start" not in old


def test_prompts_have_one_split_and_splits_their_share():
    found = [studies.split_of([{"role": "user", "content": f"prompt {n}"}]) for n in range(4000)]
    shares = [found.count(split) / len(found) for split in studies.SPLITS]
    assert shares == pytest.approx([0.25, 0.1, 0.25, 0.4], abs=0.03)
    assert found[0] == studies.split_of([{"role": "user", "content": "prompt 0"}])


def test_spread_takes_one_of_each_group_first():
    assert studies.spread([[1, 2, 3], [4], [5, 6]], 5) == [1, 4, 5, 2, 6]
    assert studies.spread([[1, 2], [3]], None) == [1, 3, 2]


# ------------------------------------------------------------------------------------------------------------- going on


def test_a_study_goes_on_where_it_stopped(study, capsys):
    done: list[str] = []

    def work(of: Study, job: Job) -> dict:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(job.name)
        return made_up(of, job)

    with pytest.raises(KeyboardInterrupt):
        studies.run(study, work)
    study.lines.write_text(study.lines.read_text() + '{"job": "half a li')  # killed while it wrote
    before = list(done)
    done.clear()
    studies.run(study, lambda of, job: done.append(job.name) or made_up(of, job))
    names = [json.loads(line)["job"] for line in study.lines.read_text().splitlines()]
    assert names == before + done and len(names) == len(set(names))
    assert {job.name for job in plan(SMALL, study.results())} <= set(names)
    assert " 0 jobs left" in capsys.readouterr().out


def test_runs_are_removed_when_nothing_reads_them(study):
    def work(of: Study, job: Job) -> dict:
        for name in job.uses:
            assert (of.folder / name / "step-8" / "model.safetensors").is_file(), f"{job.name} needs {name}"
        if job.kind == "train":
            step = of.folder / job.name / "step-8"
            for folder in (step, of.folder / job.name / "state"):
                folder.mkdir(parents=True)
            for name in ("model.safetensors", "policy.pt"):
                (step / name).touch()
            (of.folder / job.name / "LATEST").symlink_to("step-8")
        held = sum(path.is_dir() for path in of.folder.glob("*/step-8"))
        assert held <= 3 + 3 + 1  # start, SAEs, judge; three that are tried; the one in work
        return made_up(of, job)

    studies.run(study, work)
    assert not list(study.folder.glob("*/step-8")) and not list(study.folder.glob("*/state"))


def test_figures_of_other_numbers_are_refused(study):
    study.add({"job": "machine", "kind": "machine", **made_up(study, Job("machine", "machine", 0))})
    study.check()
    replace(study, scale=replace(SMALL, grid=())).check()
    with pytest.raises(SystemExit, match="other numbers"):
        replace(study, scale=replace(SMALL, batch_size=16)).check()


# ----------------------------------------------------------------------------------------------------------- statistics


def test_interval_of_one_seed_is_students():
    values = [0.2, 0.9, 0.4, 0.7, 0.1]
    found = study_report.over([values])
    low, high = stats.t.interval(0.95, 4, loc=found.estimate, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_interval_of_seeds_that_agree_is_over_prompts():
    values = [0.2, 0.9, 0.4, 0.7, 0.1]
    assert study_report.over([values] * 3) == pytest.approx(study_report.over([values]))


def test_interval_of_prompts_that_agree_is_over_seeds():
    seeds = [0.5, 0.6, 0.8]
    found = study_report.over([[value] * 50 for value in seeds])
    low, high = stats.t.interval(0.95, 2, loc=found.estimate, scale=stats.sem(seeds))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_intervals_cover_what_is_true():
    draw, covered, rounds = random.Random(0), 0, 400
    for _ in range(rounds):
        prompts = [draw.gauss(0, 1) for _ in range(30)]
        seeds = [draw.gauss(0, 0.2) for _ in range(3)]
        values = [[2 + seed + prompt + draw.gauss(0, 1) for prompt in prompts] for seed in seeds]
        found = study_report.over(values)
        covered += found.low < 2 < found.high
    assert 0.93 < covered / rounds <= 1


def test_win_rate_counts_ties_half_and_controls_length():
    def line(rewards: list[float], tokens: list[float]) -> dict:
        return {"samples": {"rewards": rewards, "tokens": tokens}}

    draw = random.Random(1)
    start = line([0.0] * 400, [50.0] * 400)
    longer = [draw.choice([-20.0, 20.0, 20.0, 20.0]) for _ in range(400)]
    wins = [1.0 if extra > 0 else -1.0 for extra in longer]  # length alone decides
    wins[0] = 0.0
    group = study_report.Group("x", [line(wins, [50 + extra for extra in longer])], [], start, SMALL)
    raw, fair = group.interval("win"), group.length_controlled()
    assert raw.estimate == pytest.approx((wins.count(1.0) + 0.5) / 400)
    assert raw.estimate > 0.7 and fair is not None and fair.low < 0.5 < fair.high
    assert group.preferences(group.lines[0])[0] == 0.5


# ------------------------------------------------------------------------------------------------------------- the page


def test_page_is_made_from_the_lines_alone_once_all_are_there(study, tmp_path):
    assert study_report.write_page(SMALL, study.results(), tmp_path).startswith("no page")
    studies.run(study, made_up)
    study_report.write_page(SMALL, study.results(), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert not list(study.folder.glob("*"))
    for label in ("DPO", "LN-DPO", "SimPO", "TDPO-2", "KTO", "FPO", "FPO-mse", "FPO, alpha 20", "FPO, layer 14"):
        assert f"| {label} |" in text
    assert "{" not in text and "nan" not in text.lower()
    assert len(tables(text)) >= 9
    assert all(len({row.count("|") for row in rows}) == 1 for rows in tables(text))
    for name in ("results-accuracy.svg", "results-diversity.svg", "results-cost.svg"):
        assert f"]({name})" in text and (tmp_path / name).read_text().startswith("<svg")


def tables(text: str) -> list[list[str]]:
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [block for block in blocks if block[0].startswith("|")]


def test_sentences_say_what_the_figures_do(study):
    studies.run(study, made_up)
    results = study.results()
    for name, line in results.items():
        if name.startswith("measure alpaca-fpo-beta"):  # FPO at alpha 0.5 and layer 29
            line["pairs"]["accuracy"] = [1.0] * TEST_PAIRS
        elif name.startswith("measure alpaca"):
            line["pairs"]["accuracy"] = [0.0] * (TEST_PAIRS - 1) + [1.0]
            line["samples"]["kl"] = [0.5] * PROMPTS
    groups = study_report.groups_of(SMALL, results)["alpaca"]
    peers = [groups["DPO"], groups["SimPO"]]
    assert study_report.ranked(groups["FPO"], peers, "accuracy") == "above DPO and SimPO"
    assert study_report.ranked(groups["DPO"], [groups["FPO"]], "accuracy") == "below FPO"
    assert study_report.ranked(groups["DPO"], [groups["SimPO"]], "KL") == "level with SimPO"
    assert "preferred by FPO." in study_report.in_short(groups, study_report.costs_of(results["machine"]))[0]


def test_rounding_keeps_four_digits_and_no_nan():
    assert studies.rounded({"a": [0.123456, math.nan], "b": 3, "c": "x"}) == {"a": [0.1235, None], "b": 3, "c": "x"}
