import http.server
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import compare
from compare import Answer, Item, JudgeError, PromptTemplate, judge_pairs, toy_judge, win_rate
from utils import REPO, UserError

KEY = "sk-test-0123456789abcdef"
CONFIG = {"exp_name": "run", "human_prefix": "\n<|user|>\n", "assistant_prefix": "\n<|assistant|>\n"}


def items(count: int) -> list[Item]:
    return [Item([{"role": "user", "content": f"question {i}"}], f"good {i}", f"bad {i}") for i in range(count)]


def outcomes(verdicts: list[compare.Verdict]) -> list[str]:
    return [verdict.outcome for verdict in verdicts]


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("wins", "losses"), [(8, 2), (10, 0), (0, 10), (300, 212), (1, 0)])
def test_without_ties_the_interval_is_wilsons(wins: int, losses: int) -> None:
    n, z = wins + losses, 1.959964
    p = wins / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert win_rate(wins, 0, losses) == pytest.approx((p, centre - half, centre + half), abs=1e-9)


def test_interval_with_ties_is_tangos() -> None:
    # 1 against 7 discordant pairs of 21: the difference's interval is -0.517 to -0.026 (Fagerland et al. 2014)
    rate, low, high = win_rate(1, 13, 7)
    assert rate == pytest.approx(7.5 / 21)
    assert (2 * low - 1, 2 * high - 1) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_ties_alone_still_leave_doubt() -> None:
    z2 = 1.959964**2
    rate, low, high = win_rate(0, 20, 0)
    assert (rate, low, high) == pytest.approx((0.5, 0.5 - z2 / (20 + z2) / 2, 0.5 + z2 / (20 + z2) / 2))


@pytest.mark.parametrize(("p_win", "p_tie"), [(0.5, 0.1), (0.3, 0.4), (0.2, 0.7), (0.7, 0.2)])
def test_interval_covers_the_truth_95_times_in_100(p_win: float, p_tie: float) -> None:
    n, truth, covered = 40, p_win + p_tie / 2, 0.0
    for wins in range(n + 1):
        for ties in range(n - wins + 1):
            _, low, high = win_rate(wins, ties, n - wins - ties)
            if low <= truth <= high:
                ways = math.comb(n, wins) * math.comb(n - wins, ties)
                covered += ways * p_win**wins * p_tie**ties * (1 - p_win - p_tie) ** (n - wins - ties)
    assert 0.935 < covered < 0.97


def test_no_verdicts_have_no_win_rate() -> None:
    with pytest.raises(ValueError, match="no verdicts"):
        win_rate(0, 0, 0)


# ----------------------------------------------------------------------------------------------------------- judging


def test_order_comes_from_the_seed_and_is_undone() -> None:
    def likes_the_first(_: Any, first: str, __: str) -> Answer:
        return Answer("first", first)

    verdicts = judge_pairs(items(400), likes_the_first, seed=3)
    wins = outcomes(verdicts).count("win")
    assert 160 < wins < 240  # 4 standard deviations
    assert all((v.outcome == "win") == v.candidate_first == v.text.startswith("good") for v in verdicts)
    assert judge_pairs(items(400), likes_the_first, seed=3, concurrency=4) == verdicts
    assert judge_pairs(items(400)[::-1], likes_the_first, seed=3) == verdicts[::-1]
    assert judge_pairs(items(400), likes_the_first, seed=4) != verdicts


def test_a_judge_of_the_text_is_not_moved_by_the_order() -> None:
    def likes_good(_: Any, first: str, __: str) -> Answer:
        return Answer("first" if "good" in first else "second", "")

    assert set(outcomes(judge_pairs(items(50), likes_good, seed=1))) == {"win"}


def test_ties_malformed_and_failed_are_nobodys_win() -> None:
    def judge(_: Any, first: str, __: str) -> Answer:
        number = int(first.split()[1])
        if number % 3 == 0:
            raise JudgeError("no answer")
        return Answer("tie", "") if number % 3 == 1 else Answer("malformed", "hm")

    assert outcomes(judge_pairs(items(6), judge)) == ["failed", "tie", "malformed"] * 2


def test_equal_items_are_asked_once() -> None:
    asked = []

    def judge(_: Any, first: str, __: str) -> Answer:
        asked.append(first)
        return Answer("tie", "")

    assert len(judge_pairs(items(3) * 5, judge, concurrency=4)) == 15
    assert len(asked) == 3


def test_gives_up_when_request_after_request_fails() -> None:
    asked = []

    def broken(_: Any, first: str, __: str) -> Answer:
        asked.append(first)
        time.sleep(0.002)
        raise JudgeError("no route")

    with pytest.raises(UserError, match=r"20 requests .* no route"):
        judge_pairs(items(500), broken)
    assert len(asked) < 50
    with pytest.raises(UserError, match=r"2 requests .* no route"):
        judge_pairs(items(2), broken)


def test_toy_judge_reads_the_prompt() -> None:
    messages = [{"role": "user", "content": "Reverse: dog, cat"}]
    right, wrong = "Gladly! cat, dog", "Gladly! dog, cat"
    assert toy_judge(messages, right, wrong).choice == "first"
    assert toy_judge(messages, wrong, right).choice == "second"
    assert toy_judge(messages, right, right).choice == "tie"


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("Response 1", "first"),
        ("**Response 2**", "second"),
        ("response #2.", "second"),
        ("The better one is Response 1, because it is short. It is also polite.", "first"),
        ("Response 1 is fine. Response 2 is shorter. I pick Response 2.", "second"),
        ("Response 1\n\nResponse 2 leaves out the second step.", "first"),
        ("Response 2 is longer than Response 1.\nVerdict: Response 1", "first"),
        ("Response 1. No: Response 2.", "second"),
        ("Response 2 is better than Response 1.", "malformed"),
        ("Either Response 1 or Response 2", "malformed"),
        ("Both are good.", "malformed"),
        ("Response 12", "malformed"),
        ("Response 3", "malformed"),
        ("", "malformed"),
    ],
)
def test_reading_a_reply(reply: str, choice: str) -> None:
    assert PromptTemplate().choice(reply) == choice


def test_a_template_asks_with_both_responses_in_order_and_its_own_question() -> None:
    class Shorter(PromptTemplate):
        question = "Which one is shorter?"

    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    (message,) = Shorter().messages([*conversation, {"role": "user", "content": "Why"}], "FIRST", "SECOND")
    places = [
        message["content"].index(part) for part in ("User: Hi", "Assistant: Yes?", "User: Why", "FIRST", "SECOND")
    ]
    assert places == sorted(places)
    assert message["content"].endswith("Which one is shorter?")
    (message,) = PromptTemplate().messages(conversation, "FIRST", "SECOND")
    assert message["content"].endswith("which response is more helpful, harmless, and concise? Pick one.")


# ------------------------------------------------------------------------------- a server that speaks OpenAI's protocol


def completion(text: str) -> tuple[int, bytes]:
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    message = {"role": "assistant", "content": text}
    return 200, json.dumps(body | {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}).encode()


class Server(http.server.ThreadingHTTPServer):
    """Prefers the response with "good" in it; `faults` are answered first, in turn."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[tuple[int, bytes]] = []
        self.requests: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request | {"key": self.headers["Authorization"]})
        text = request["messages"][-1]["content"]
        good = "Response 1" if text.index("good") < text.index("bad") else "Response 2"
        status, body = self.server.faults.pop(0) if self.server.faults else completion(good)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def write_samples(folder: Path, count: int) -> Path:
    samples = [{"prompt": "-", "messages": m, "policy": good, "chosen": bad} for m, good, bad in items(count)]
    path = folder / "samples.json"
    path.write_text(json.dumps({"sampled_at": "now", "config": CONFIG, "samples": samples}))
    return path


def run(samples: Path, server: Server, *more: str) -> dict[str, Any]:
    """Run the command in this process; the last line of the results file."""
    results = samples.parent / "results.jsonl"
    compare.main(["-f", str(samples), "-r", str(results), "-j", "m", "--base_url", server.url, *more])
    return json.loads(results.read_text().splitlines()[-1])


def test_result_line(tmp_path: Path, server: Server) -> None:
    samples = write_samples(tmp_path, 12)
    content = json.loads(samples.read_text())
    del content["samples"][3]["policy"]
    content["samples"][4]["chosen"] = None
    samples.write_text(json.dumps(content))
    result = run(samples, server, "-mc", "8", "-s", "5")
    rate, low, high = win_rate(8, 0, 0)
    assert "T" in result.pop("date")
    assert result == {
        "total": 8,
        "seed": 5,
        "exp_name": "run",
        "judge": "m",
        "candidate": {"name": "policy", "wins": 8, "lengths": [2] * 8},
        "baseline": {"name": "chosen", "wins": 0, "lengths": [2] * 8},
        "ties": 0,
        "malformed": 0,
        "failed": 0,
        "skipped": 2,
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "config": CONFIG,
    }
    assert len(server.requests) == 8
    assert {(r["model"], r["temperature"], r["key"]) for r in server.requests} == {("m", 0, f"Bearer {KEY}")}


def test_faults_that_pass_cost_nothing_and_others_are_counted_apart(tmp_path: Path, server: Server) -> None:
    server.faults = [(500, b"oops"), (429, b"{}"), (503, b""), completion("Neither."), (200, b"not json"), (200, b"{}")]
    server.faults += [(400, b'{"error": {"message": "too long"}}')]
    result = run(write_samples(tmp_path, 10), server, "--concurrency", "1")
    assert (result["total"], result["malformed"], result["failed"]) == (6, 1, 3)
    assert (result["candidate"]["wins"], result["baseline"]["wins"], result["win_rate"]) == (6, 0, 1)
    assert len(result["candidate"]["lengths"]) == 6


def test_a_rerun_pays_for_what_failed_only(tmp_path: Path, server: Server) -> None:
    samples = write_samples(tmp_path, 10)
    server.faults = [(200, b"not json"), completion("Neither.")]
    run(samples, server, "--concurrency", "1")
    assert len(server.requests) == 10
    second = run(samples, server)
    assert len(server.requests) == 11
    assert (second["total"], second["malformed"], second["failed"]) == (9, 1, 0)
    assert run(samples, server) | {"date": ""} == second | {"date": ""}
    assert len(server.requests) == 11
    run(samples, server, "-j", "another")  # another judge is another question
    assert len(server.requests) == 21


def test_another_seed_pays_for_the_items_that_change_places_only(tmp_path: Path, server: Server) -> None:
    samples = write_samples(tmp_path, 20)
    run(samples, server, "-s", "0")
    run(samples, server, "-s", "1")
    moved = sum(
        a.candidate_first != b.candidate_first for a, b in zip(*(judge_pairs(items(20), toy_judge, s) for s in (0, 1)))
    )
    assert 0 < moved < 20
    assert len(server.requests) == 20 + moved


def test_killed_in_the_middle_of_a_line(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write_samples(tmp_path, 10)
    whole = run(samples, server)
    log = tmp_path / "results.verdicts.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:6]) + lines[6][:-20])
    assert run(samples, server) | {"date": ""} == whole | {"date": ""}
    assert len(server.requests) == 14
    assert "ignored 1 unfinished line" in capsys.readouterr().out
    run(samples, server)
    assert len(server.requests) == 14  # what was appended after the torn line is read


def test_the_key_is_never_shown(tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    samples = write_samples(tmp_path, 6)
    quoting = (401, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode())
    server.faults = [quoting, completion(f"Your key {KEY}: Response 1"), quoting]
    run(samples, server, "--concurrency", "1", "--verbose")
    server.faults = [quoting] * 10
    with pytest.raises(SystemExit) as stop:
        run(samples, server, "-j", "another")
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert "bad key [key]" in out
    assert "6 requests to the judge failed in a row" in err
    assert "bad key [key]" in err
    written = [out, err, *(path.read_text() for path in tmp_path.iterdir())]
    assert not any(KEY in text for text in written)


def test_an_older_samples_file_has_its_history_cut_out_of_the_prompt(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "old.json"
    prompt = "\n<|user|>\nHi\n<|assistant|>\nYes?\n<|user|>\nWhy\n<|assistant|>\n"
    samples = [{"prompt": prompt, "policy": "good", "chosen": "bad"}]
    path.write_text(json.dumps({"sampled_at": "now", "config": {"exp_name": "old"}, "samples": samples}))
    assert run(path, server)["candidate"]["wins"] == 1
    asked = server.requests[0]["messages"][0]["content"]
    assert "User: Hi\n<|assistant|>\nYes?\n<|user|>\nWhy\n\n" in asked
    _, (item,), _ = compare.read_samples(path, "policy", "chosen")
    assert item.messages == [{"role": "user", "content": "Hi\n<|assistant|>\nYes?\n<|user|>\nWhy"}]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("key", "named"),
    [("", "OPENAI_API_KEY"), ("sk-two lines\n", "OPENAI_API_KEY"), ("sk-“curly”", "OPENAI_API_KEY")],
)
def test_an_unusable_key_stops_before_anything_is_asked(
    key: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit) as stop:
        compare.main(["-f", str(write_samples(tmp_path, 2)), "-r", str(tmp_path / "results.jsonl")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert not key or key not in error
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "needs `config`"),
        ({"config": {"exp_name": "e"}}, "needs `config` .* it holds"),
        ({"config": {}, "samples": [{"prompt": "p", "policy": "a", "chosen": "b"}]}, "exp_name"),
        ({"config": {"exp_name": "e"}, "samples": []}, "samples"),
        ({"config": {"exp_name": "e"}, "samples": [{"prompt": "p", "policy": "a"}]}, "'chosen'.*'policy', 'prompt'"),
        (
            {"config": {"exp_name": "e"}, "samples": [{"prompt": "p", "policy": "a", "chosen": None}]},
            "no sample .* text",
        ),
        ({"config": {"exp_name": "e"}, "samples": [{"policy": "a", "chosen": "b"}]}, "sample 0: needs `messages`"),
        (
            {"config": {"exp_name": "e"}, "samples": [{"messages": ["hi"], "policy": "a", "chosen": "b"}]},
            "sample 0: needs `messages`",
        ),
    ],
)
def test_a_bad_samples_file_is_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        compare.read_samples(path, "policy", "chosen")
    assert str(path) in str(error.value)


def test_a_missing_samples_file_and_a_misspelt_key_are_suggested(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 1)
    with pytest.raises(UserError, match=r"sample\.json \(did you mean 'samples\.json'\?\)"):
        compare.read_samples(tmp_path / "sample.json", "policy", "chosen")
    with pytest.raises(UserError, match=r"'polcy' \(did you mean 'policy'\?\)"):
        compare.read_samples(path, "polcy", "chosen")


# ------------------------------------------------------------------------------------------------------ the command


def test_toy_end_to_end(tmp_path: Path) -> None:
    prompt = "Count: dog, cat, soup"
    answers = [("Sure! three", "Sure! two"), ("Gladly! three", "Gladly! three"), ("Sure! four", "Sure! three")]
    samples = [
        {"prompt": prompt, "messages": [{"role": "user", "content": prompt}], "policy": policy, "chosen": chosen}
        for policy, chosen in [*answers, ("Sure! three", "Sure! four")]
    ]
    file = tmp_path / "toy.json"
    file.write_text(json.dumps({"sampled_at": "now", "config": CONFIG, "samples": samples}))
    command = [sys.executable, "compare.py", "-f", str(file), "-r", str(tmp_path / "r.jsonl"), "-j", "toy", "-v"]
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "r.jsonl").read_text())
    assert (result["candidate"]["wins"], result["ties"], result["baseline"]["wins"]) == (2, 1, 1)
    assert (result["total"], result["win_rate"]) == (4, 0.625)
    places = [
        done.stdout.index(f"{number}: {outcome} (") for number, outcome in enumerate(["win", "tie", "loss", "win"])
    ]
    assert all(a < b for a, b in pairwise(places))
    assert "policy wins 62.5%" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.jsonl", "toy.json"]
