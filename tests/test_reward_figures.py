"""How good a reward model is: by hand, by brute force, and as a run's own evaluation has it."""

import itertools
import json
import random
from statistics import mean

import pyarrow
import pytest
from pyarrow import parquet
from test_label import ANSWERS, asked, write_samples

import eval as evaluation
from data import toy
from judging import reward_figures
from judging.labels import Scored
from judging.reward_figures import Pair, accuracies, best_of, best_of_n_curve
from launch.policies import read_config
from utils import UserError


def figures(run, folder, *overrides):
    given = ["++mode=rewards", f"++samples_dir={folder}", *overrides]
    evaluation.write_reward_figures(read_config(run, given), run, given)
    return json.loads((folder / f"{run.name}-rewards.json").read_text())


def test_accuracies_by_hand():
    """Equal rewards are not right; a pair with an answer that could not be read is not counted."""
    pairs = [Pair(subset, asked(str(i)), "a", "b", "-") for i, subset in enumerate("xxxyy")]
    found = accuracies(pairs, [2.0, 1.0, 1.0, 1.0, 0.0, 1.0, 3.0, 0.0, None, 1.0])
    assert list(found) == ["x", "y", "all"]
    assert [own["pairs"] for own in found.values()] == [3, 1, 4]
    assert [own["accuracy"] for own in found.values()] == pytest.approx([1 / 3, 1, 1 / 2])
    assert [own["margin"] for own in found.values()] == pytest.approx([0, 3, 3 / 4])
    assert found["all"]["accuracy_low"] < 0.5 < found["all"]["accuracy_high"]


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_n_is_the_mean_over_all_subsets(seed):
    """With equal rewards, of which any may be taken."""
    draw = random.Random(seed)
    rewards, values = [draw.randrange(4) for _ in range(7)], [draw.random() for _ in range(7)]
    for n in range(1, 8):
        best = []
        for subset in itertools.combinations(range(7), n):
            top = max(rewards[i] for i in subset)
            best.append(mean(values[i] for i in subset if rewards[i] == top))
        # equal rewards: each is the best of as many subsets, so the mean over their subsets is that of the group
        assert best_of(n, rewards, rewards) == pytest.approx(
            mean(max(rewards[i] for i in subset) for subset in itertools.combinations(range(7), n))
        )
        assert best_of(n, rewards, values) == pytest.approx(mean(best))


def test_a_curve_by_hand():
    """Rewards 0, 1, 2, 3: the best of 1, 2 and 4 are 1.5, 2 + 1/3 and 3. A prompt with fewer answers is left out."""
    prompts = [Scored(asked("p"), list("abcd"), [3.0, 0.0, 2.0, 1.0]), Scored(asked("q"), ["a"], [9.0])]
    assert best_of_n_curve("x", prompts) == {
        "prompts": 1,
        "prompts_left_out": 1,
        "samples": 4,
        "curve": [
            {"n": 1, "reward": pytest.approx(1.5), "reward_error": None},
            {"n": 2, "reward": pytest.approx(7 / 3), "reward_error": None},
            {"n": 4, "reward": pytest.approx(3), "reward_error": None},
        ],
    }


def test_the_toy_languages_truth_is_beside_the_reward():
    """A reward that is the truth upside down: the best by reward is the worst."""
    rows = toy.preferences("test", seed=3, count=6)
    answers = [[row["chosen"], row["rejected"], row["chosen"]] for row in rows]
    truth = [[toy.toy_score(row["prompt"], text) for text in own] for row, own in zip(rows, answers)]
    prompts = [
        Scored(asked(row["prompt"]), own, [-score for score in scores])
        for row, own, scores in zip(rows, answers, truth)
    ]
    curve = best_of_n_curve("x", prompts)["curve"]
    assert [point["n"] for point in curve] == [1, 2, 3]
    assert curve[0]["true_score"] == pytest.approx(mean(mean(own) for own in truth))
    assert curve[-1]["true_score"] == pytest.approx(mean(map(min, truth)))
    assert [point["true_score"] for point in curve] == pytest.approx([-point["reward"] for point in curve])


def test_held_out_pairs_are_judged_as_in_the_runs_own_evaluation(plain_run, tmp_path):
    run = plain_run("bradley-terry")
    found = figures(run, tmp_path)["accuracy"]
    last = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss/eval" in line]
    assert list(found) == ["test", "all"] and found["all"]["pairs"] == 8
    assert found["all"]["accuracy"] == pytest.approx(last[-1]["rewards_eval/accuracies"])
    assert found["all"]["margin"] == pytest.approx(last[-1]["rewards_eval/margins"], rel=1e-4)


def test_files_of_rewardbenchs_layout_and_samples(plain_run, tmp_path, capsys):
    rows = [{**row, "subset": f"part-{i % 2}", "id": i} for i, row in enumerate(toy.preferences("test", 0, 9))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "bench.parquet")
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({**row, "subset": None}) + "\n" for row in rows[:4]))
    samples = write_samples(tmp_path / "x.json", ANSWERS)
    named = f"++files=[{tmp_path}/bench.parquet,{tmp_path}/plain.jsonl,{samples}]"
    found = figures(plain_run("bradley-terry"), tmp_path, named)
    counts = {name: own["pairs"] for name, own in found["accuracy"].items()}
    assert counts == {"part-0": 5, "part-1": 4, "plain": 4, "all": 13}
    (curve,) = found["best_of_n"].values()
    assert (curve["prompts"], curve["samples"], [point["n"] for point in curve["curve"]]) == (12, 4, [1, 2, 4])
    rising = [point["reward"] for point in curve["curve"]]
    assert rising == sorted(rising) and all("true_score" in point for point in curve["curve"])
    said = capsys.readouterr().out
    assert "part-1" in said and "x.json: 12 prompts, 4 samples each" in said


def test_a_file_without_pairs_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(UserError, match=r"x\.jsonl: no pairs, which have `prompt, chosen, rejected`"):
        reward_figures.read_pairs(tmp_path / "x.jsonl", 0.01)
