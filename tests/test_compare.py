import contextlib
import copy
import functools
import gzip
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, fuzzed, look_at, transformers_server
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import CONFIG, KEY, FakeServer, body, completion, items, prefers_good, reply, status, write_samples

import compare
from data.rows import BadRows, read_rows
from judging import alpaca_eval_official, answers
from judging.judge import VerdictLog
from judging.options import build_parser
from utils import REPO, UserError, fingerprint

ANNOTATIONS = DATA / "alpaca_eval/annotations"
EXTRA = importlib.util.find_spec("alpaca_eval")
with_the_extra = pytest.mark.skipif(EXTRA is None, reason="the extra `alpaca-eval` is not installed")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeServer().running() as server:
        yield server


def run(samples: Path, server: FakeServer, *options: str) -> dict[str, Any]:
    """Run the command, and return the line that it appends to the results file."""
    results = samples.parent / "results.jsonl"
    compare.main(["-f", str(samples), "-r", str(results), "-j", "m", "--base_url", server.url, *options])
    return json.loads(results.read_text().splitlines()[-1])


def error_of(*arguments: str | Path) -> str:
    """The error message of a command that exits with status 2."""
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as error:
        compare.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return error.getvalue()


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two lines are equal except for the date and the cost."""
    ignored = dict.fromkeys(("date", "requests", "tokens_in", "tokens_out", "cost"))
    return one | ignored == two | ignored


# ----------------------------------------------------------------------------------------------------- the command line


def test_compare_does_not_import_torch() -> None:
    heavy = {"torch", "transformers", "datasets"}
    code = f"import sys, compare; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_help_groups_the_flags(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        compare.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    titles = ["    python compare.py -f samples/my_experiment.json", "files and answers:", "the judge:"]
    titles += ["the protocol:", "cost and speed:", "output:"]
    places = [said.index(f"\n{title}") for title in titles]
    assert places == sorted(places)
    lines = said.split("files and answers:")[1].splitlines()
    helps = [below for flag, below in pairwise(lines) if flag.startswith("  -")]
    assert len(helps) == 29
    assert all(re.fullmatch(r"      \S.*\((default: .+|required)\)", line) for line in helps)


# ---------------------------------------------------------------------------------------------------- the results file


def test_a_line_of_results(tmp_path: Path, server: FakeServer) -> None:
    samples = write_samples(tmp_path, 10)
    server.faults = [reply("Neither."), reply("I'm sorry, I can't."), status(400)]
    result = run(samples, server, "-mc", "8", "--concurrency", "1", "-s", "3")
    assert {"date", "total", "seed", "exp_name", "judge", "candidate", "baseline", "config"} <= result.keys()
    assert (result["total"], result["malformed"], result["refused"], result["failed"]) == (5, 1, 1, 1)
    assert result["candidate"] == {"name": "policy", "wins": 5, "lengths": [2] * 5, "characters": 6.0}
    assert (result["baseline"]["name"], result["baseline"]["wins"], result["ties"]) == ("chosen", 0, 0)
    assert (result["win_rate"], result["win_rate_high"], result["sign_test_p"]) == (1, 1, 2 / 2**5)
    assert 0.4 < result["win_rate_low"] < 0.6
    assert (result["seed"], result["exp_name"], result["judge"], result["config"]) == (3, "run", "m", CONFIG)
    assert (result["requests"], result["tokens_in"], result["tokens_out"], result["cost"]) == (7, 700, 70, None)
    assert 0 <= result["first_shown"] <= 1
    assert result["orders_agree"] is None


def test_the_command_of_the_halos_line(tmp_path: Path, server: FakeServer) -> None:
    """The command as users type it; only the server's address differs."""
    (tmp_path / "samples").mkdir()
    write_samples(tmp_path / "samples", 5, "my_experiment.json", "my_experiment")
    typed = ["-f", "samples/my_experiment.json", "-mc", "512", "-bk", "chosen", "-ck", "policy", "-r", "results.jsonl"]
    environment = os.environ | {"OPENAI_BASE_URL": server.url}
    subprocess.run([sys.executable, REPO / "compare.py", *typed], cwd=tmp_path, env=environment, check=True)
    (line,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (line["judge"], line["exp_name"], line["win_rate"]) == ("gpt-4.1", "my_experiment", 1)
    assert line["cost"] == pytest.approx((500 * 2 + 50 * 8) / 1e6)
    assert sorted(path.name for path in tmp_path.glob("results*")) == [
        "results.html",
        "results.jsonl",
        "results.verdicts.jsonl",
    ]


def test_both_orders_and_a_judge_that_prefers_the_first_place(tmp_path: Path, server: FakeServer) -> None:
    server.rule = lambda _: completion("Response 1")
    samples = write_samples(tmp_path, 12)
    result = run(samples, server, "--both_orders")
    assert (result["win_rate"], result["total"], result["prompts"]) == (0.5, 24, 12)
    assert (result["first_shown"], result["orders_agree"]) == (1, 0)
    assert result["length_controlled_win_rate"] == pytest.approx(0.5)
    assert (len(server.requests), result["sign_test_p"]) == (24, 1.0)
    server.rule = prefers_good
    result = run(samples, server, "-j", "fair", "--both_orders")
    assert (result["win_rate"], result["first_shown"], result["orders_agree"]) == (1, 0.5, 1)


def test_a_rerun_sends_only_failed_requests(tmp_path: Path, server: FakeServer) -> None:
    samples = write_samples(tmp_path, 10)
    server.faults = [body(b"{}")] * 3 + [reply("Neither.")]
    first = run(samples, server, "--concurrency", "1")
    assert (first["failed"], first["requests"], len(server.requests)) == (1, 9, 12)
    second = run(samples, server)
    assert (second["total"], second["malformed"], second["failed"], second["requests"]) == (9, 1, 0, 1)
    assert run(samples, server) == second  # the third says nothing new, and adds no line
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2 and len(server.requests) == 13
    run(samples, server, "-j", "another")  # another judge shares no replies
    assert len(server.requests) == 23


def test_killed_in_the_middle_of_a_line(tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write_samples(tmp_path, 10)
    whole = run(samples, server)
    log = tmp_path / "results.verdicts.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:6]) + lines[6][:-20])
    assert same(run(samples, server), whole)
    assert len(server.requests) == 14
    assert "ignored 1 damaged or incomplete line" in capsys.readouterr().out
    run(samples, server)
    assert len(server.requests) == 14  # lines after the incomplete one are read


def test_killed_and_run_again(tmp_path: Path, server: FakeServer) -> None:
    server.delay = 0.1
    samples = write_samples(tmp_path, 40)
    log, results = tmp_path / "results.verdicts.jsonl", tmp_path / "results.jsonl"
    command = ["-f", str(samples), "-r", str(results), "-j", "m", "--base_url", server.url, "--concurrency", "2"]
    process = subprocess.Popen([sys.executable, "compare.py", *command, "--both_orders"], cwd=REPO)
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_bytes().splitlines()) < 20:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not results.exists()
    server.delay = 0
    kept, asked = log.read_bytes().count(b"\n"), len(server.requests)
    assert 20 <= kept < 80
    assert asked - kept <= 2  # only the two requests under way may be sent twice
    result = run(samples, server, "--both_orders")
    assert (result["requests"], len(server.requests)) == (80 - kept, asked + 80 - kept)
    elsewhere = tmp_path / "whole"
    elsewhere.mkdir()
    assert same(result, run(write_samples(elsewhere, 40), server, "--both_orders"))


def test_the_key_is_never_printed_or_saved(
    tmp_path: Path, server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = write_samples(tmp_path, 6)
    quoting = status(401, f"bad key {KEY}")
    server.faults = [quoting, reply(f"Your key {KEY}: Response 1"), quoting]
    run(samples, server, "--concurrency", "1", "--verbose")
    server.faults = [quoting] * 10
    with pytest.raises(SystemExit):
        run(samples, server, "-j", "another")
    out, err = capfd.readouterr()
    assert "bad key [key]" in out
    assert "6 requests failed in a row" in err
    written = [out, err, *(path.read_text() for path in tmp_path.iterdir())]
    assert len(written) == 6
    assert not any(KEY in text for text in written)


def test_a_password_in_the_address_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for address in (
        "http://me:hunter2@host/v1",
        "http://:hunter2@host/v1",
        "https://host/v1?key=hunter2",
        "host:8000/v1",
    ):
        said = error_of("-f", write_samples(tmp_path, 2), "-r", tmp_path / "r.jsonl", "--base-url", address)
        assert "base_url=http://HOST:PORT/v1" in said
        assert "hunter2" not in said


def test_a_placeholder_key_may_be_part_of_a_reply(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "1")  # must not be cut out of "Response 1"
    assert run(write_samples(tmp_path, 6), server)["total"] == 6


def test_ctrl_c_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", interrupted)
    with pytest.raises(SystemExit) as stop:
        compare.main(["-f", str(write_samples(tmp_path, 2))])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped; every reply so far is saved: run the same command again to continue\n"


def test_two_commands_do_not_write_one_results_file(tmp_path: Path, server: FakeServer) -> None:
    """They would pay twice; once the other has ended, its replies are there."""
    samples = write_samples(tmp_path, 3)
    with VerdictLog(tmp_path / "results.verdicts.jsonl"):
        said = error_of("-f", samples, "-r", tmp_path / "results.jsonl", "-j", "m", "--base_url", server.url)
    assert "results.verdicts.jsonl: another process is writing it" in said and not server.requests
    assert run(samples, server)["total"] == 3


def test_results_have_files_of_their_own(tmp_path: Path) -> None:
    """Whatever dots their names have."""
    samples = write_samples(tmp_path, 2)
    toy = ["-f", str(samples), "-j", "toy"]
    for name in ("run-0.1", "run-0.2", "x.html", "r.jsonl", "r.json"):
        compare.main([*toy, "-r", str(tmp_path / name)])
        assert len((tmp_path / name).read_text().splitlines()) == 1
    pages = sorted(path.name for path in tmp_path.glob("*.html") if path.read_text().startswith("<!"))
    assert pages == ["r.html", "r.json.html", "run-0.1.html", "run-0.2.html", "x.html.html"]
    for flags, clash in [
        (["-r", tmp_path / "y", "--page", tmp_path / "y"], "--page .*y would overwrite -r"),
        (["-r", samples], "-r .*samples.json would overwrite the file of answers"),
        (["-r", tmp_path / "y", "--page", samples], "--page .* would overwrite the file of answers"),
        (["-r", tmp_path / "y", "--page", tmp_path / "y.verdicts.jsonl"], "its verdicts .* would overwrite --page"),
    ]:
        assert re.search(clash, error_of(*toy, *flags))


@pytest.mark.parametrize("names", [("run", "run.jsonl"), ("run.jsonl", "run")])
def test_results_do_not_share_a_page(tmp_path: Path, names: tuple[str, str]) -> None:
    samples = write_samples(tmp_path, 2)
    compare.main(["-f", str(samples), "-j", "toy", "-r", str(tmp_path / names[0])])
    page = (tmp_path / "run.html").read_text()
    said = error_of("-f", samples, "-j", "toy", "-r", tmp_path / names[1])
    assert f"would share its page and its verdicts with {tmp_path / names[0]}" in said
    assert (tmp_path / "run.html").read_text() == page and not (tmp_path / names[1]).exists()


def test_answers_to_questions_without_a_turn_are_named(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "turns": []}')
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "model_id": "m", "choices": [{"turns": ["x"]}]}')
    said = error_of("-f", tmp_path / "a.jsonl", "--questions", tmp_path / "q.jsonl", "-j", "toy")
    assert f"{tmp_path}/a.jsonl: its answers have no turn" in said


def test_a_file_is_compared_once(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, 2)
    said = error_of("-f", samples, tmp_path / "." / ".." / tmp_path.name / samples.name, "-j", "toy")
    assert "-f names one file twice" in said


@pytest.mark.parametrize("place", range(3))
def test_killed_while_it_writes_results_it_adds_no_line_twice(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    """After each of its lines, and before its page; what was paid stays in the first line."""
    paths = [write_samples(tmp_path, 3, f"{name}.json", name) for name in ("one", "two")]
    asked = ["-f", *map(str, paths), "-r", str(tmp_path / "r.jsonl"), "-j", "m", "--base_url", server.url]
    done = iter(range(9))

    def dies(work: Any, *given: Any, **options: Any) -> Any:
        if next(done) == place:
            raise KeyboardInterrupt
        return work(*given, **options)

    for name in ("append_json_line", "write_text"):
        monkeypatch.setattr(compare, name, functools.partial(dies, getattr(compare, name)))
    with pytest.raises(SystemExit):
        compare.main(asked)
    monkeypatch.undo()
    compare.main(asked)
    assert ("results appended to" in capsys.readouterr().out) == (place < 2)
    compare.main(asked)
    assert "r.jsonl is as it was; verdicts to read" in capsys.readouterr().out.replace("\n", "")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["exp_name"] for line in lines] == ["one", "two"]
    assert (lines[0]["requests"] > 0) == (place > 0)
    compare.main([*asked, "-s", "1"])
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4


def test_a_place_that_cannot_be_written_costs_nothing(tmp_path: Path, server: FakeServer) -> None:
    samples = write_samples(tmp_path, 2)
    asked = ["-f", samples, "-j", "m", "--base_url", server.url]
    (tmp_path / "folder").mkdir()
    for flags in (["-r", samples / "r"], ["-r", tmp_path / "folder"], ["-r", tmp_path / "r", "--page", samples / "p"]):
        assert "cannot write" in error_of(*asked, *flags)
    assert not server.requests


def test_printing_loses_no_results(tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are saved before: here the disk behind the output is full."""
    samples = write_samples(tmp_path, 3)
    monkeypatch.setattr(compare, "print_verdicts", unprintable)
    said = error_of("-f", samples, "-r", tmp_path / "r.jsonl", "-j", "m", "--base_url", server.url, "-v")
    assert "No space left" in said
    assert json.loads((tmp_path / "r.jsonl").read_text())["total"] == 3 and (tmp_path / "r.html").is_file()


def unprintable(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_comparison_without_a_verdict_does_not_lose_the_others(tmp_path: Path, server: FakeServer) -> None:
    server.rule = lambda request: completion("Hm.") if "odd" in str(request["messages"]) else prefers_good(request)
    paths = [write_samples(tmp_path, 3, f"{name}.json", name) for name in ("one", "two", "three")]
    paths[1].write_text(paths[1].read_text().replace("question", "odd"))
    results = tmp_path / "r.jsonl"
    asked = ["-r", results, "-j", "m", "--base_url", server.url]
    said = error_of("-f", *paths, *asked)
    assert said.startswith("judge 'm' gave no verdict on two against chosen") and "three" not in said
    assert [json.loads(line)["exp_name"] for line in results.read_text().splitlines()] == ["one", "three"]
    assert "odd" not in (tmp_path / "r.html").read_text()
    assert "gave no verdict on policy" in error_of("-f", paths[1], *asked)


def test_hostile_names_and_texts(tmp_path: Path, server: FakeServer, capfd: pytest.CaptureFixture[str]) -> None:
    """In names, answers, verdicts and errors: nothing of it is obeyed, or stops the command."""
    hostile = "[/b] \x1b]0;t\x07 \x9b2J \ud83d \u2028 :smile:"
    server.rule = lambda _: completion(f"Response 1\n{hostile}")
    samples = [
        {"messages": [{"role": "user", "content": f"{hostile} {i}"}], "policy": f"a {hostile}", "chosen": "b"}
        for i in range(3)
    ]
    for name in ("one", "two"):
        content = {"config": {"exp_name": f"{name} {hostile}"}, "samples": samples}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    asked = ["-r", tmp_path / "r.jsonl", "-j", "m", "--base_url", server.url]
    compare.main([str(one) for one in ("-f", *files, *asked, "-v")])
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["exp_name"] for line in lines] == [f"one {hostile}", f"two {hostile}"]
    assert "\ufffd" in str(server.requests[0]["messages"]) and "\ud83d" not in str(server.requests[0]["messages"])
    server.rule = lambda _: status(400, hostile)
    with pytest.raises(SystemExit):
        compare.main([str(one) for one in ("-f", *files, *asked, "-j", hostile)])
    out, err = capfd.readouterr()
    assert "[/b] ]0;t 2J" in out and "[/b] ]0;t 2J" in err and ":smile:" in out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", re.sub(r"\x1b\[[\d;]*m", "", out + err))


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0c"])
def test_lines_of_answers_hold_any_line_break(tmp_path: Path, end: str) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"Reverse: dog{end}, cat {i}", "policy": f"cat{end}dog", "chosen": "b"} for i in range(2)]
    lines = "".join(json.dumps(row, ensure_ascii=False).replace("\\f", "\\u000c") + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    assert [row.answers["policy"] for row in answers.read_answers(path).rows] == [f"cat{end}dog"] * 2
    path.write_text(f"{lines}{{")
    with pytest.raises(UserError, match=r"answers.jsonl: line 3 is no JSON"):
        answers.read_answers(path)


def test_a_file_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "a/folder.json").mkdir(parents=True)
    for name, why in (("none.json", "No such file or directory"), ("a/folder.json", "Is a directory")):
        path = tmp_path / name
        said = error_of("-f", path, "-j", "toy", "-r", tmp_path / "r")
        assert said.replace("\n", "") == f"cannot read {path}: {why}"
        with pytest.raises(UserError, match=f"^{path} cannot be read: {why}$"):
            list(read_rows([path], BadRows("x")))


def test_a_misspelt_judge_is_not_taken_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    samples = write_samples(tmp_path, 2)
    for name, meant in (("Toy", "toy"), ("recoded", "recorded")):
        error = error_of("-f", samples, "-j", name, "-r", tmp_path / "r")
        assert error.startswith(f"-j {name}: no judge here (did you mean '{meant}'?)")
    server = ["--base_url", "http://127.0.0.1:9", "--dry_run"]
    compare.main(["-f", str(samples), "-j", "toys", *server, "-r", str(tmp_path / "r")])


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
def test_a_file_that_is_too_deep_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    assert f"cannot read {tmp_path / name}" in error_of("-f", tmp_path / name, "-j", "toy", "-r", tmp_path / "r")


def test_without_a_key_no_request_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    samples = write_samples(tmp_path, 2)
    assert "OPENAI_API_KEY" in error_of("-f", samples, "-r", tmp_path / "r.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["samples.json"]


# -------------------------------------------------------------------------------------------------------------- costs


def test_equal_answers_are_a_tie_without_a_request(
    tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write_samples(tmp_path, 4)
    samples.write_text(samples.read_text().replace("good 1", "bad 1"))
    result = run(samples, server, "--both_orders")
    assert (result["candidate"]["wins"], result["ties"], result["total"]) == (6, 2, 8)
    assert (result["requests"], len(server.requests)) == (6, 6)
    assert "6 requests to m (2 verdicts need none)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["--both_orders", "--max_cost", "1", "--dry_run"], ["--both-orders", "--max-cost", "1", "--dry-run"]),
        (
            ["-ck", "policy", "-bk", "chosen", "-hk", "prompt", "-mc", "3", "-st", "0", "-s", "0", "-l", "12", "-v"],
            [
                "--candidate_key",
                "policy",
                "--baseline_key",
                "chosen",
                "--history_key",
                "prompt",
                "--max_comp",
                "3",
                "--sleep_time",
                "0",
                "--seed",
                "0",
                "--labels",
                "12",
                "--verbose",
            ],
        ),
        (["--max_comparisons", "3", "-v", "True"], ["-mc", "3", "-v"]),
    ],
)
def test_flags_have_two_spellings(
    one: list[str], two: list[str], tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, said = write_samples(tmp_path, 4), []
    for options in (one, two):
        results = tmp_path / "results.jsonl"
        compare.main(
            [
                "--file",
                str(samples),
                "--results_file",
                str(results),
                "--judge",
                "m",
                "--base-url",
                server.url,
                "--prices",
                "1",
                "1",
                *options,
            ]
        )
        said.append(capsys.readouterr().out.split("about ")[1].split(" tokens in")[0])
        results.with_suffix(".verdicts.jsonl").unlink(missing_ok=True)
    assert said[0] == said[1]


def test_a_dry_run_sends_nothing_and_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.SyncAPIClient.request", lambda *_, **__: pytest.fail("a request"))
    samples = write_samples(tmp_path, 10)
    compare.main(["-f", str(samples), "-r", str(tmp_path / "r.jsonl"), "--dry_run", "--both-orders"])
    out = capsys.readouterr().out
    assert "20 requests to gpt-4.1 (0 verdicts need none)" in out
    tokens = int(out.split("about ")[1].split(" tokens in")[0].replace(",", ""))
    assert f"at most ${(tokens * 2 + 20 * 256 * 8) / 1e6:.2f}" in out
    assert "built-in list that may be out of date" in out
    assert "[Response 1]" in out  # the first request is printed
    assert [path.name for path in tmp_path.iterdir()] == ["samples.json"]


def test_the_cost_is_counted_and_limited(
    tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write_samples(tmp_path, 10)
    assert "no prices are known for 'm'" in error_of(
        "-f", samples, "-j", "m", "--base_url", server.url, "--max_cost", "1"
    )
    result = run(samples, server, "-mc", "4", "--prices", "10", "30")
    assert result["cost"] == pytest.approx((400 * 10 + 40 * 30) / 1e6)
    assert "this run: 4 requests, 400 tokens in, 40 out, $0.0052 (prices given" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(samples, server, "--prices", "10", "30", "--max_cost", "0.012", "--concurrency", "1")
    said = capsys.readouterr().err
    assert "--max_cost 0.012: stopped after" in said
    assert "6 requests to m (4 verdicts need none)" not in said
    paid = len(server.requests)
    assert paid < 10
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    assert run(samples, server, "--prices", "10", "30")["requests"] == 10 - paid


# --------------------------------------------------------------------------------------------------- files of answers


def test_a_samples_file_without_messages(tmp_path: Path, server: FakeServer) -> None:
    path = tmp_path / "old.json"
    prompt = "\n<|user|>\nHi\n<|assistant|>\nYes?\n<|user|>\nWhy\n<|assistant|>\n"
    samples = [{"prompt": prompt, "policy": "good", "chosen": "bad"}]
    path.write_text(json.dumps({"sampled_at": "now", "config": CONFIG | {"exp_name": "old"}, "samples": samples}))
    assert run(path, server)["candidate"]["wins"] == 1
    assert "Hi\n<|assistant|>\nYes?\n<|user|>\nWhy\n\n" in server.requests[0]["messages"][0]["content"]
    path.write_text(path.read_text().replace('"prompt"', '"history"'))
    server.rule = lambda _: completion("Response B")
    assert run(path, server, "-hk", "history", "-l", "AB", "--both_orders")["win_rate"] == 0.5
    assert "[Response A]\n" in server.requests[1]["messages"][0]["content"]


def test_two_runs_against_each_other(tmp_path: Path, server: FakeServer) -> None:
    one = write_samples(tmp_path, 6, "one.json", "first")
    two = write_samples(tmp_path, 8, "two.json", "second")
    two.write_text(two.read_text().replace('"good', '"bad'))
    result = run(one, server, "--against", str(two))
    assert (result["candidate"]["name"], result["baseline"]["name"]) == ("first", "second")
    assert (result["total"], result["win_rate"], result["skipped"]) == (6, 1, 0)


def test_runs_with_equal_names_are_named_by_their_paths(tmp_path: Path, server: FakeServer) -> None:
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path in paths:
        write_samples(tmp_path, 3, path.name)
    for options in (["--round_robin"], ["-bk", "chosen"]):
        compare.main(
            ["-f", *map(str, paths), "-r", str(tmp_path / "r.jsonl"), "-j", "m", "--base-url", server.url, *options]
        )
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    names = [(line["candidate"]["name"], line["baseline"]["name"]) for line in lines]
    one, two = map(str, paths)
    assert names == [(one, two), (one, "chosen"), (two, "chosen")]
    assert {line["exp_name"] for line in lines} == {"run"}


def rank(request: dict[str, Any]) -> dict[str, Any]:
    """Prefers the answer with the larger number in it."""
    first, second = (text.split("[End")[0] for text in request["messages"][-1]["content"].split("]\nanswer ")[1:])
    return completion("Response 1" if float(first) > float(second) else "Response 2")


def test_several_files_are_ranked(tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.rule = rank
    paths = []
    for name, quality in (("strong", 3), ("weak", 1)):
        samples = [
            {"messages": [{"role": "user", "content": f"q{i}"}], "policy": f"answer {quality}", "chosen": "answer 2"}
            for i in range(9)
        ]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"config": {"exp_name": name}, "samples": samples}))
    results = tmp_path / "results.jsonl"
    options = ["-r", str(results), "-j", "m", "--base_url", server.url]
    compare.main(["-f", *map(str, paths), *options, "--round-robin"])
    (line,) = [json.loads(line) for line in results.read_text().splitlines()]
    assert (line["candidate"]["name"], line["baseline"]["name"], line["win_rate"]) == ("strong", "weak", 1)
    compare.main(["-f", *map(str, paths), *options])
    lines = [json.loads(line) for line in results.read_text().splitlines()[1:]]
    assert [(one["candidate"]["name"], one["baseline"]["name"], one["win_rate"]) for one in lines] == [
        ("strong", "chosen", 1),
        ("weak", "chosen", 0),
    ]
    assert [place["name"] for place in lines[0]["leaderboard"]] == ["strong", "chosen", "weak"]
    assert lines[0]["leaderboard"] == lines[1]["leaderboard"]
    assert "leaderboard" in capsys.readouterr().out


def test_answer_files_of_the_benchmarks_are_read(tmp_path: Path) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines if name.endswith("l") else json.dumps(rows))
        return path

    outputs = [{"instruction": f"q{i}", "output": f"a{i}", "generator": "mine"} for i in range(3)]
    alpaca = answers.read_answers(write("model_outputs.json", outputs))
    assert (alpaca.name, [row.answers for row in alpaca.rows]) == ("mine", [{"": "a0"}, {"": "a1"}, {"": "a2"}])
    zipped = tmp_path / "other.json.gz"
    zipped.write_bytes(gzip.compress(json.dumps([row | {"generator": "other"} for row in outputs[:2]]).encode()))
    pair = answers.pair_files(alpaca, answers.read_answers(zipped), "policy", "policy")
    assert (pair.candidate, pair.baseline, len(pair.items), pair.skipped) == ("mine", "other", 2, 1)

    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"answer": "a"}}]
    arena = answers.read_answers(write("arena.jsonl", [{"uid": "u1", "model": "m", "messages": talk}]))
    assert (arena.name, arena.rows[0].messages, arena.rows[0].answers) == ("m", talk[:1], {"": "a"})

    questions = write("question.jsonl", [{"question_id": 101, "category": "math", "turns": ["one?", "two?"]}])
    right = [{"question_id": 101, "choices": [{"turns": ["ONE", "TWO"]}]}]
    given = [{"question_id": 101, "model_id": "m", "choices": [{"index": 0, "turns": ["1", "2"]}]}]
    path = write("mt.jsonl", given)
    bench = answers.read_answers(path, questions=questions, references=write("reference.jsonl", right))
    first, second = bench.rows
    assert (first.answers, first.turn, first.category, first.reference) == ({"": "1"}, 1, "math", "ONE")
    assert [message["content"] for message in second.messages] == ["one?", "1", "two?"]
    assert (second.answers, second.turn, second.reference, second.question) == ({"": "2"}, 2, "TWO", first.question)
    with pytest.raises(UserError, match="name the file of questions with --questions"):
        answers.read_answers(path)

    sampled = {"messages": talk[:1], "policy": "1", "followups": ["two?"], "turns": ["1", "2"]}
    own = answers.read_answers(write("own.jsonl", [sampled]))
    assert [(row.turn, row.answers) for row in own.rows] == [(1, {"policy": "1"}), (2, {"policy": "2"})]
    assert [message["content"] for message in own.rows[1].messages] == ["q", "1", "two?"]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
def test_the_real_questions_of_mt_bench(tmp_path: Path) -> None:
    folder, path = DATA / "mt_bench", tmp_path / "answers.jsonl"
    questions = [json.loads(line) for line in (folder / "question.jsonl").read_text().splitlines()]
    given = [{"question_id": q["question_id"], "model_id": "m", "choices": [{"turns": ["a", "b"]}]} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    found = answers.read_answers(
        path, questions=folder / "question.jsonl", references=folder / "reference_answer_gpt-4.jsonl"
    )
    assert (len(found.rows), len({row.question for row in found.rows})) == (160, 80)
    assert {row.category for row in found.rows if row.reference} == {"math", "reasoning", "coding"}
    assert sum(bool(row.reference) for row in found.rows) == 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ('{"config": {}, "config": {}}', "the key 'config' twice"),
        ("[]", "not a file of answers"),
        ({"config": {"exp_name": "e"}}, "needs `config` .* it holds"),
        ({"config": {}, "samples": [{"prompt": "p", "policy": "a", "chosen": "b"}]}, "exp_name"),
        ({"config": {"exp_name": "e"}, "samples": []}, "samples"),
        ({"config": {"exp_name": "e"}, "samples": [{"prompt": "p", "policy": "a"}]}, "'chosen'.* are \\['policy'\\]"),
        (
            {
                "config": {"exp_name": "e"},
                "samples": [{"prompt": "p", "policy": "a"}, {"prompt": "p", "chosen": "a"}],
            },
            "no sample .* text",
        ),
        ({"config": {"exp_name": "e"}, "samples": [{"policy": "a", "chosen": "b"}]}, "sample 0: needs `messages`"),
        (
            {"config": {"exp_name": "e"}, "samples": [{"messages": ["hi"], "policy": "a", "chosen": "b"}]},
            "sample 0: needs `messages`",
        ),
        ([{"instruction": "q", "output": "a"}, {"instruction": "q"}], "row 1: `output`"),
        ([{"instruction": "q", "output": "a"}], "--against"),
    ],
)
def test_a_bad_samples_file_is_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        answers.pair_keys(answers.read_answers(path), "policy", "chosen")
    assert str(path) in str(error.value)


def test_misspelt_names_are_suggested(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 1)
    assert "sample.json (did you mean 'samples.json'?)" in error_of("-f", tmp_path / "sample.json", "-j", "toy")
    assert "'polcy' (did you mean 'policy'?)" in error_of("-f", path, "-j", "toy", "-ck", "polcy")
    assert "did you mean 'arenahard'" in error_of("-f", path, "-p", "arenhard")
    assert "two different letters" in error_of("-f", path, "-l", "11")
    assert "compares two responses" in error_of("-f", path, "-p", "mtbench", "-j", "toy")


def test_a_custom_template(tmp_path: Path, server: FakeServer) -> None:
    (tmp_path / "mine.py").write_text(
        "from judging.protocols import PromptTemplate\n\n\nclass Shorter(PromptTemplate):\n"
        '    question = "Which response is shorter?"\n\n\nclass Other:\n    pass\n'
    )
    samples = write_samples(tmp_path, 3)
    assert run(samples, server, "-p", f"{tmp_path}/mine.py:Shorter")["win_rate"] == 1
    assert all(r["messages"][-1]["content"].endswith("Which response is shorter?") for r in server.requests)
    assert "not a subclass" in error_of("-f", samples, "-p", f"{tmp_path}/mine.py:Other")
    assert "did you mean 'Shorter'" in error_of("-f", samples, "-p", f"{tmp_path}/mine.py:Shortr")


# ---------------------------------------------------------------------------------------------------------- protocols


def test_arena_hard_strong_verdicts_count_three_times(tmp_path: Path, server: FakeServer) -> None:
    def strongly_for_good(request: dict[str, Any]) -> dict[str, Any]:
        text = request["messages"][-1]["content"]
        number = int(text.split("question ")[1].split("\n")[0])
        good_is_a = text.index("good") < text.index("bad")
        if number == 0:
            return completion("[[A>B]]" if not good_is_a else "[[B>A]]")  # one loss, twice
        return completion("My verdict: " + ("[[A>>B]]" if good_is_a else "[[B>>A]]"))

    server.rule = strongly_for_good
    result = run(write_samples(tmp_path, 4), server, "-p", "arenahard")
    assert (result["total"], result["candidate"]["wins"], result["baseline"]["wins"]) == (8, 6, 2)
    assert result["win_rate"] == 18 / 20
    assert server.requests[0]["messages"][0]["role"] == "system"


def test_mt_bench_grades_turns_and_categories(
    tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "question.jsonl"
    asked = [{"question_id": n, "category": ("math", "writing")[n % 2], "turns": ["one?", "two?"]} for n in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    path = tmp_path / "model.jsonl"
    given = [{"question_id": n, "model_id": "mine", "choices": [{"turns": [f"{n}", f"{n}"]}]} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))

    def grade(request: dict[str, Any]) -> dict[str, Any]:
        text = request["messages"][-1]["content"]
        return completion("Nine out of ten." if "last message\n\n5" in text else f"[[{8 if 'two?' in text else 6}]]")

    server.rule = grade
    result = run(path, server, "-p", "mtbench", "--questions", str(questions))
    assert (result["total"], result["malformed"], result["score"]) == (10, 2, 7)
    assert (result["turns"], result["categories"]) == ({"1": 6, "2": 8}, {"math": 7, "writing": 7})
    assert result["score_low"] == result["score_high"] == 7  # questions are clusters, and all have the same mean
    assert result["candidate"]["name"] == "mine"
    assert "mine: 10 answers graded, 0 of them with a reference answer" in capsys.readouterr().out
    (graded,) = data_of((tmp_path / "results.html").read_text())
    assert [item["candidate"] for item in graded["items"]] == [str(n) for n in range(6) for _ in range(2)]
    outcomes = [verdict["outcome"] for item in graded["items"] for verdict in item["verdicts"]]
    assert outcomes == ["grade 6", "grade 8"] * 5 + ["malformed"] * 2


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
def test_recorded_verdicts_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in sorted(ANNOTATIONS.glob("*.json.gz"))]
    compare.main(["-f", *files, "-j", "recorded", "-r", str(tmp_path / "r.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    for line in lines:
        assert 100 * line["win_rate"] == pytest.approx(line["alpaca_eval"]["win_rate"])
        assert line["win_rate_low"] < line["win_rate"] < line["win_rate_high"]
        assert (line["prompts"], line["protocol"], line["first_shown"]) == (805, "recorded", None)
    names = ["FuseChat-Gemma-2-9B-Instruct", "gpt4_1106_preview", "gemma-7b-it", "vicuna-13b"]
    assert [place["name"] for place in lines[0]["leaderboard"]] == names
    assert "win_rate 70.4971, standard_error 1.34264" in capsys.readouterr().out


def test_recorded_verdicts_of_arena_hard(tmp_path: Path) -> None:
    games = [[("A>>B", "A>>B")], [("B>A", "A>B")], [("A=B", None)]]  # the model is B, then A
    rows = [
        {
            "uid": n,
            "model": "m",
            "baseline": "b",
            "games": [{"score": one, "judgment": {"answer": "So."}}, {"score": two}],
        }
        for n, ((one, two),) in enumerate(games)
    ]
    path = tmp_path / "judgment.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare.main(["-f", str(path), "-j", "recorded", "-r", str(tmp_path / "r.jsonl")])
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert (line["candidate"]["wins"], line["baseline"]["wins"], line["ties"], line["malformed"]) == (3, 1, 1, 1)
    assert line["win_rate"] == pytest.approx((3 + 1 + 1 + 0.5) / 9)
    assert line["baseline"]["name"] == "b"
    assert data_of((tmp_path / "r.html").read_text())[0]["items"][0]["verdicts"][0]["text"] == "So."
    assert line["length_controlled_win_rate"] is None


def test_bad_files_of_recorded_verdicts(tmp_path: Path) -> None:
    row = {"instruction": "q", "output_1": "a", "output_2": "b"}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([row | {"preference": "m"}]))
    assert "row 0: `preference` is 'm', not a number" in error_of("-f", path, "-j", "recorded")
    path.write_text(json.dumps([row | {"preference": 1}]))
    other = shutil.copy(path, tmp_path / "other.json")
    assert "2 of the files hold verdicts on output_2 against output_1" in error_of("-f", path, other, "-j", "recorded")
    assert "holds no recorded verdicts" in error_of("-f", write_samples(tmp_path, 1), "-j", "recorded")


@pytest.mark.parametrize(
    ("completion", "words"),
    [("m", "m"), ({"text": "M", "logprobs": {}}, "M"), ({"message": {"content": "M"}}, "M"), (None, ""), ([], "")],
)
def test_recorded_preferences_of_alpaca_eval(
    completion: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 is a tie. Null, NaN and -1 are no verdict: they count in no rate, but the lengths of their answers count."""
    row = {"instruction": "q", "output_1": "a", "output_2": "bb", "raw_completion": completion, "generator_2": "mine"}
    rows = [row | {"preference": value} for value in (1.0, 0, None, 2.0, 1.25, -1, float("nan"))]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([*rows, row | {"output_2": "b" * 10, "generator_2": "mine-v2"}]))
    found = answers.read_recorded(path)
    assert [v.preference for v in found.verdicts or ()] == [0, 0.5, None, 1, 0.25, None, None, None]
    assert {v.text for v in found.verdicts or ()} == {words}
    assert (found.candidate, found.baseline) == ("mine", "output_1")
    assert "`generator_2` names 2 models; all its answers count as mine's" in capsys.readouterr().out
    compare.main(["-f", str(path), "-j", "recorded", "-r", str(tmp_path / "r.jsonl")])
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert (line["total"], line["malformed"]) == (4, 4)
    board = {"n_wins": 1, "n_wins_base": 2, "n_draws": 1, "n_total": 4, "avg_length": 3}
    assert board.items() <= line["alpaca_eval"].items()


# ----------------------------------------------------------------------------------------------- AlpacaEval's package


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
def test_the_official_length_control_needs_all_rows_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alpaca_eval_official, "import_package", lambda: None)
    path = ANNOTATIONS / "vicuna-13b.json.gz"
    found = answers.read_recorded(path)
    alpaca_eval_official.require_official_set(found)
    for wrong in (found.items[:804], found.items[::-1]):
        with pytest.raises(UserError, match="805 instructions in their own order"):
            alpaca_eval_official.require_official_set(found._replace(items=wrong))
    said = error_of("-f", path, "-j", "recorded", "--official_lc", "-mc", "5", "-r", tmp_path / "r.jsonl")
    assert "the 5 of vicuna-13b against gpt4_1106_preview differ from these" in said
    assert "-p alpacaeval, or -j recorded" in error_of("-f", path, "--official_lc")
    assert not (tmp_path / "r.jsonl").exists()
    capsys.readouterr()
    for is_told in (False, True):
        compare.main(["-f", str(path), "-j", "recorded", "-r", str(tmp_path / "r.jsonl"), *["-mc=5"][is_told:]])
        assert ("--official_lc adds its own" in " ".join(capsys.readouterr().out.split())) == is_told


@with_the_extra
@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
def test_the_official_length_control_equals_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real difficulties are on the Hub, so this test makes some up: it checks our input to the package."""
    import pandas
    from alpaca_eval.metrics import glm_winrate

    path = ANNOTATIONS / "gemma-7b-it.json.gz"
    rows = json.loads(gzip.decompress(path.read_bytes()))
    gamed = pandas.DataFrame(
        {
            "model": "gamed",
            "index": range(805),
            "preference": [0.02 + 0.9 * (n % 7 == 0) for n in range(805)],
            "std_delta_len": [math.sin(n) for n in range(805)],
            "instruction_difficulty": [math.cos(n) for n in range(805)],
            "not_gamed_baseline": [n % 2 == 0 for n in range(805)],
        }
    )
    gamed.to_csv(tmp_path / "df_gamed.csv", index=False)
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(tmp_path / "df_gamed.csv"))
    compare.main(["-f", str(path), "-j", "recorded", "-r", str(tmp_path / "r.jsonl"), "--official_lc"])
    ours = json.loads((tmp_path / "r.jsonl").read_text())["alpaca_eval"]
    package = glm_winrate.get_length_controlled_winrate(
        [row | {"preference": float(row["preference"])} for row in rows], save_weights_dir=None
    )
    assert {"win_rate", "length_controlled_winrate", "lc_standard_error"} <= package.keys() & ours.keys()
    assert {key: ours[key] for key in package} == pytest.approx({k: float(v) for k, v in package.items()}, abs=1e-6)
    assert ours["length_controlled_winrate"] != ours["win_rate"]


@with_the_extra
@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
def test_the_alpaca_eval_row_equals_the_package_with_missing_preferences(tmp_path: Path) -> None:
    import pandas
    from alpaca_eval.metrics.winrate import get_winrate

    rows = json.loads(gzip.decompress((ANNOTATIONS / "gemma-7b-it.json.gz").read_bytes()))
    for number, value in enumerate((None, -1, 0, 1.5, 1, 2, 3.5)):
        for row in rows[number::40]:
            row["preference"] = value
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    compare.main(["-f", str(path), "-j", "recorded", "-r", str(tmp_path / "r.jsonl")])
    ours = json.loads((tmp_path / "r.jsonl").read_text())["alpaca_eval"]
    package = get_winrate(pandas.DataFrame(rows).astype({"preference": float}))
    assert {key: ours[key] for key in package} == pytest.approx({key: float(value) for key, value in package.items()})
    assert ours["n_total"] < 805


@with_the_extra
def test_the_official_prompt_is_that_of_the_package() -> None:
    judge_input = alpaca_eval_official.JudgeInput(
        [{"role": "user", "content": "Hi {output_1}"}], ("FIRST {output_2}", "SECOND")
    )
    system, request = alpaca_eval_official.OfficialPrompt().messages(judge_input)
    assert (system["role"], request["role"]) == ("system", "user")
    assert '"instruction": """Hi {output_1}"""' in request["content"]
    assert request["content"].index('"""FIRST {output_2}"""') < request["content"].index('"""SECOND"""')


# ------------------------------------------------------------------------------------------------------------ the page


def data_of(page: str) -> list[dict[str, Any]]:
    """The data in the page."""
    return json.loads(page.split('<script id="data" type="application/json">')[1].split("</script>")[0])


def test_the_page_is_complete_and_loads_nothing(tmp_path: Path, server: FakeServer) -> None:
    path = tmp_path / "samples.json"
    hostile = "</script><script>alert('good')</script> {{data}} <b>&amp;"
    samples = [{"messages": [{"role": "user", "content": hostile}], "policy": hostile, "chosen": "bad \u2028"}]
    path.write_text(json.dumps({"config": {"exp_name": "<i>run"}, "samples": samples}))
    server.rule = lambda _: completion(f"Response 1\n\n{hostile}")
    run(path, server, "-ck", "policy", "--both_orders")
    page = (tmp_path / "results.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2  # the data, the code
    names_svg = page.replace("http://www.w3.org/2000/svg", "")  # the name of a language, which nothing fetches
    assert not [word for word in ("http://", "https://", "src=", "@import", "url(") if word in names_svg]
    (comparison,) = data_of(page)
    assert comparison["items"][0]["candidate"] == hostile
    assert [verdict["outcome"] for verdict in comparison["items"][0]["verdicts"]].count("win") == 1


CLICKS = """<script>
function act(id, event, value) {
  at(id).value = value;
  at(id).dispatchEvent(new Event(event));
  log(at('count').textContent);
}
function log(text) { document.body.append(document.createElement('hr'), '[' + text + ']'); }
act('filter', 'change', 'orders disagree');
act('search', 'input', 'QUESTION 2');
act('filter', 'change', 'all');
act('search', 'input', '');
at('more').click();
log(document.querySelectorAll('article').length + ' shown');
</script></body>"""


def test_the_page_in_a_browser(tmp_path: Path, server: FakeServer, browser: str) -> None:
    """Chromium runs the page's script, uses its controls, and prints the resulting page."""
    server.faults = [reply("Neither."), reply("I'm sorry, I can't."), reply("Response 1"), reply("Response 1")]
    run(write_samples(tmp_path, 30), server, "--concurrency", "1", "--both_orders")
    page = tmp_path / "results.html"
    found, _ = look_at(browser, page, tmp_path / "browser")
    assert found.count("<article>") == 25
    assert "30 of 30 items" in found
    assert '<option value="malformed">malformed (1)</option>' in found
    assert '<option value="orders disagree">orders disagree (1)</option>' in found
    assert "policy · 2 words · preferred" in found
    page.write_text(page.read_text().replace("</body>", CLICKS))
    found, _ = look_at(browser, page, tmp_path / "browser")
    counts = [part.split("]")[0] for part in found.split("<hr>[")[1:]]
    assert counts == ["1 of 30 items", "0 of 30 items", "11 of 30 items", "30 of 30 items", "30 shown"]


# ------------------------------------------------------------------------------------------------------ a real server


@pytest.fixture(scope="module")
def real_server() -> Iterator[str]:
    """`transformers serve` with the built-in model."""
    with transformers_server("assets/tiny") as address:
        yield address


@pytest.fixture
def ask_real(real_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def ask(samples: Path, *options: str) -> dict[str, Any]:
        command = ["-f", str(samples), "-r", str(tmp_path / "r.jsonl"), "-j", "assets/tiny", "--base_url", real_server]
        compare.main([*command, *options])
        return json.loads((tmp_path / "r.jsonl").read_text().splitlines()[-1])

    return ask


class ReadsAnyReply(compare.PromptTemplate):
    """Asks in the toy language, and reads a reply with a cat as a choice of the first response."""

    max_tokens = 12

    def request(self, _: compare.JudgeInput) -> str:
        return "Reverse: dog, cat"

    def verdict(self, reply: Any) -> tuple[float | None, int]:
        return (1.0 if "cat" in reply.text else None), 1


def test_a_real_server_with_replies_without_a_verdict(
    ask_real: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write_samples(tmp_path, 4)
    with pytest.raises(SystemExit):
        ask_real(samples, "--max_tokens", "8")
    assert "gave no verdict on policy against chosen; the last of its 4 replies (malformed)" in capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "r.verdicts.jsonl").read_text().splitlines()]
    assert len(log) == 4
    assert all(line["reply"] and line["tokens"][0] > 20 and 1 <= line["tokens"][1] <= 8 for line in log)


def test_a_real_server_with_verdicts(ask_real: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = ask_real(
        write_samples(tmp_path, 4), "-p", f"{__file__}:ReadsAnyReply", "--both_orders", "--concurrency", "1"
    )
    assert (result["total"], result["win_rate"], result["first_shown"], result["requests"]) == (8, 0.5, 1, 1)


def test_a_real_server_without_log_probabilities(
    ask_real: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ask_real(write_samples(tmp_path, 4), "-p", "alpacaeval")
    assert "'assets/tiny' answered without log-probabilities, but this protocol needs them" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the toy judge


def test_toy_end_to_end(tmp_path: Path) -> None:
    prompt = "Count: dog, cat, soup"
    pairs = [("Sure! three", "Sure! two"), ("Gladly! three", "Gladly! three"), ("Sure! four", "Sure! three")]
    samples = [
        {"prompt": prompt, "messages": [{"role": "user", "content": prompt}], "policy": policy, "chosen": chosen}
        for policy, chosen in [*pairs, ("Sure! three", "Sure! four")]
    ]
    file = tmp_path / "toy.json"
    file.write_text(json.dumps({"sampled_at": "now", "config": CONFIG, "samples": samples}))
    command = [sys.executable, "compare.py", "-f", str(file), "-r", str(tmp_path / "r.jsonl"), "-j", "toy", "-v"]
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "r.jsonl").read_text())
    assert (result["candidate"]["wins"], result["ties"], result["baseline"]["wins"]) == (2, 1, 1)
    assert (result["total"], result["prompts"], result["win_rate"]) == (4, 1, 0.625)
    places = [done.stdout.index(f"{n}: {outcome} (") for n, outcome in enumerate(["win", "tie", "loss", "win"])]
    assert all(a < b for a, b in pairwise(places))
    assert "policy wins 62.5%" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.jsonl", "toy.json"]


def test_questions_are_fingerprints_of_the_prompts(tmp_path: Path) -> None:
    found = answers.pair_keys(answers.read_answers(write_samples(tmp_path, 2)), "policy", "chosen")
    assert found.questions == [fingerprint(item.messages) for item in items(2)]


def test_a_small_file_that_would_fill_the_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(65):
            file.write(bytes(1 << 20))
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl\.gz: it unpacks to more than 64 MiB"):
        answers.read_json(tmp_path / "a.jsonl.gz")


# ------------------------------------------------------------------------------------------------------- random files

TURN = {"role": "user", "content": "Opposite: sad"}
ANSWER = {"prompt": "q", "messages": [TURN], "policy": "a", "chosen": "b"}
GAMES = [{"score": "A>B", "user_prompt": "q", "judgment": "j"}, {"score": "B>A"}]
ANSWER_FILES: list[Any] = [
    {"config": {"exp_name": "run"}, "samples": [ANSWER, ANSWER | {"followups": ["x"], "turns": ["a", "b"]}]},
    [ANSWER],
    [{"instruction": "q", "output": "a", "generator": "g"}],
    [{"uid": "1", "model": "m", "messages": [TURN, {"role": "assistant", "content": {"answer": "a"}}]}],
    [{"question_id": 1, "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"]}]}],
    [{"preference": 1.2, "output_1": "a", "output_2": "b", "instruction": "q", "raw_completion": {"text": "m"}}],
    [{"question_id": "1", "model": "m", "games": GAMES}],
]
ODD = [None, True, 0, -1, 1.5, math.nan, 10**400, "", "a", "\ud800", "\x1b[31m[/b]\u2028", [], [1], [[]], {}, {"a": 1}]


@settings(fuzzed, max_examples=max(1, fuzzed.max_examples // 4))
@given(st.integers(0, 2**40))
def test_any_file_of_answers_is_compared_or_named(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    draw, folder = random.Random(seed), tmp_path_factory.getbasetemp() / "answers"
    paths = []
    for number in range(2):
        content = copy.deepcopy(draw.choice(ANSWER_FILES))
        for _ in range(draw.choice([0, 1, 1, 2])):
            section: Any = content
            while section:
                key = draw.choice([*(section if isinstance(section, dict) else range(len(section)))])
                if not isinstance(section[key], dict | list) or draw.random() < 0.3:
                    section[key] = copy.deepcopy(draw.choice(ODD))
                    break
                section = section[key]
        paths.append(folder / f"{number}.json")
        folder.mkdir(exist_ok=True)
        paths[-1].write_text(json.dumps(content))
    questions = folder / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "turns": ["x", "y"]}))
    (folder / "results.jsonl").unlink(missing_ok=True)  # whose every line is read before one is added
    more = draw.choice([[], ["--against", str(paths[1])], ["--round_robin"], ["-v"]])
    files = paths if draw.random() < 0.3 else paths[:1]
    flags = ["-f", *map(str, files), "-j", draw.choice(["toy", "recorded"]), "-r", str(folder / "results.jsonl")]
    try:
        compare.main([*flags, *more, "--questions", str(questions)])
    except SystemExit as stopped:
        assert stopped.code == 2


@pytest.mark.parametrize(
    "flags",
    ["--timeout 0", "--timeout nan", "--sleep_time -1", "--sleep_time nan", "--prices -1 1", "--prices nan 1",
     "--prices 1e308 1", "--max_cost -1", "--max_cost inf", "--threshold nan", "-r .", "--page /", "--concurrency 0"],
)  # fmt: skip
def test_numbers_and_names_that_are_none(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A price below 0, for one, would let no cost reach its limit."""
    with pytest.raises(SystemExit):
        build_parser(None).parse_args(["-f", "a.json", *flags.split()])
    assert re.search(r"is not|is below 0", capsys.readouterr().err)


def test_a_device_is_no_file_of_answers() -> None:
    with pytest.raises(UserError, match=r"/dev/zero: a device, not a file"):
        answers.read_answers(Path("/dev/zero"))
