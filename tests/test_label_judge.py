"""Verdicts and grades of a judge as training data."""

import contextlib
import io
import json

import pytest
from judge_server import KEY, FakeServer, completion, reply, write_samples
from test_label import asked, rows_of

import compare
import dataloader
from judging import labels
from judging.answers import Comparison
from judging.judge import Item, Verdict


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeServer().running() as server:
        yield server


def run(server, samples, *options):
    results = samples.parent / "results.jsonl"
    compare.main(["-f", str(samples), "-r", str(results), "-j", "m", "--base_url", server.url, *options])


def verdict(item, preference, status="judged"):
    return Verdict(item, status, preference, 1, True, "")


def test_pairs_of_verdicts_by_hand():
    """Both orders have to agree; ties, replies without a verdict and answers without text are counted apart."""
    texts = [(f"candidate {i}", f"baseline {i}") for i in range(7)] + [("", "only one")]
    items = [Item(asked(f"question {i}"), *pair) for i, pair in enumerate(texts)]
    comparison = Comparison("run", {}, "policy", "chosen", items, ["-"] * 8, 0)
    verdicts = [
        *(verdict(0, 0.9), verdict(0, 0.6)),  # the candidate in both orders
        *(verdict(1, 0.0), verdict(1, 0.3)),  # the baseline
        *(verdict(2, 1.0), verdict(2, 0.0)),  # they disagree
        *(verdict(3, 1.0), verdict(3, 0.5)),
        *(verdict(4, 0.5), verdict(4, 0.5)),  # a tie
        *(verdict(5, 1.0), verdict(5, None, "malformed")),  # asked, and not answered
        verdict(6, 0.2),  # one order alone
        verdict(7, 1.0),
    ]
    found = labels.pairs_of_verdicts([comparison], [verdicts])
    assert found.rows == [
        {"prompt": asked("question 0"), "chosen": "candidate 0", "rejected": "baseline 0"},
        {"prompt": asked("question 1"), "chosen": "baseline 1", "rejected": "candidate 1"},
        {"prompt": asked("question 6"), "chosen": "baseline 6", "rejected": "candidate 6"},
    ]
    assert found.asked == 8
    assert found.without == {"orders disagree": 2, "tie": 1, "malformed": 1, "no answer": 1}


def test_verdicts_are_not_paid_for_again(tmp_path, server, capsys):
    samples, pairs = write_samples(tmp_path, 10), tmp_path / "pairs.jsonl"
    server.faults = [reply("Neither.")]
    run(server, samples, "--both_orders", "--concurrency", "1")
    assert len(server.requests) == 20
    run(server, samples, "--both_orders", "--write_pairs", str(pairs))
    assert len(server.requests) == 20
    assert "pairs.jsonl: 9 rows (pairs) from 10 comparisons; without a row: 1 (malformed)" in capsys.readouterr().out
    rows = rows_of(pairs)
    assert {row["chosen"][:4] for row in rows} == {"good"} and {row["rejected"][:3] for row in rows} == {"bad"}
    made = json.loads((tmp_path / "pairs.made.json").read_text())["made"]
    assert (made["judge"], made["protocol"], made["both_orders"], list(made["files"])) == (
        *("m", "pairwise", True),
        [str(samples)],
    )
    records = dataloader.PairedPreferenceDataLoader.records(dataloader.read_file(pairs))
    assert [record["completions"] for record in records] == [[row["chosen"], row["rejected"]] for row in rows]


def test_a_judge_that_likes_the_first_place_gives_no_pairs(tmp_path, server):
    """The command says so, after the results, and exits with status 2; nothing is written."""
    server.rule = lambda _: completion("Response 1")
    error = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(error):
        run(server, write_samples(tmp_path, 4), "--both_orders", "--write_pairs", str(tmp_path / "pairs.jsonl"))
    assert stop.value.code == 2
    assert "pairs.jsonl: 0 rows (pairs) from 4 comparisons; without a row: 4 (orders disagree)" in error.getvalue()
    assert not (tmp_path / "pairs.jsonl").exists()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def grades(request):
    """good 3: [[3]], bad 3: [[1]]; of question 2 nothing."""
    text = request["messages"][-1]["content"]
    if "question 2" in text:
        return completion("Rating: none")
    number = int(text.split("good ")[1][0]) if "good" in text else 1
    return completion(f"Rating: [[{max(number, 1)}]]")


def test_grades_as_labels(tmp_path, server, capsys):
    """Of the prompt's mean: 3 against 1 and so on; question 0 and 1 have equal grades."""
    server.rule = grades
    samples, target = write_samples(tmp_path, 5), tmp_path / "binary.jsonl"
    options = ["-p", "mtbench", "-bk", "chosen", "--write_binary", str(target)]
    run(server, samples, *options)
    found = [(row["prompt"][0]["content"], row["completion"], row["label"], row["score"]) for row in rows_of(target)]
    assert found == [
        ("question 3", "good 3", True, 3.0),
        ("question 3", "bad 3", False, 1.0),
        ("question 4", "good 4", True, 4.0),
        ("question 4", "bad 4", False, 1.0),
    ]
    assert "without a row: 2 (equal rewards), 1 (no answer); answers left out: 2 (malformed)" in capsys.readouterr().out
    asked_for = len(server.requests)
    run(server, samples, *options, "--threshold", "3.5")
    assert [row["completion"] for row in rows_of(target) if row["label"]] == ["good 4"]
    assert len(rows_of(target)) == 8 and len(server.requests) == asked_for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "mtbench", "--write_pairs", "x.jsonl"], "--write_pairs takes verdicts on two answers, but -p mtbench"),
        (["--write_binary", "x.jsonl"], "--write_binary takes grades, but -p pairwise compares two answers"),
        (["--threshold", "5"], "--threshold is for --write_binary"),
        (["--write_pairs", "pairs.json"], "--write_pairs pairs.json: the name of a file of training data has to end"),
        (["--write_pairs", "{folder}/results.jsonl"], "results.jsonl is a file that this command reads, or writes"),
        (["--write_pairs", "{folder}/mine.jsonl"], "mine.jsonl is there already, and no mine.made.json"),
    ],
)
def test_places_and_flags_that_do_not_fit(options, message, tmp_path, server):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    error, given = io.StringIO(), [option.format(folder=tmp_path) for option in options]
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(error):
        run(server, write_samples(tmp_path, 2), *given)
    assert stop.value.code == 2 and message in error.getvalue() and server.requests == []
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"
