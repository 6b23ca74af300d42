"""Rounds of sampling, labelling and training."""

import json

import pytest
from composition import composed
from conftest import command

from launch import online, settings
from utils import UserError

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


def test_what_no_round_could_do_is_told(tmp_path):
    with pytest.raises(UserError, match=r"resume=never: to begin again, remove .*online"):
        rounds(tmp_path, "resume=never")
