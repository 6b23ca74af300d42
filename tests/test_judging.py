import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import KEY, FakeServer, body, completion, half_a_body, items, late, prefers_good, reply, status

import utils
from judging.cost import Budget, TokenUsage
from judging.judge import (
    OpenAIJudge,
    Verdict,
    VerdictLog,
    judge_api_key,
    judge_pairs,
    to_judge_input,
    toy_judge,
)
from judging.protocols import (
    AlpacaEval,
    ArenaHard,
    JudgeInput,
    JudgeOutput,
    MTBench,
    PromptTemplate,
    Reply,
    parse_arena_verdict,
)
from sampling import openai_server
from sampling.openai_server import NoAnswer, Server
from utils import UserError


def outcomes(verdicts: list[Verdict]) -> list[str]:
    return [verdict.outcome for verdict in verdicts]


def prefers_the_first(judge_input: JudgeInput) -> JudgeOutput:
    return JudgeOutput(1.0, judge_input.responses[0])


# --------------------------------------------------------------------------------------------------------------- orders


def test_the_seed_decides_the_order_and_verdicts_are_for_the_candidate() -> None:
    verdicts = judge_pairs(items(400), prefers_the_first, seed=3)
    wins = outcomes(verdicts).count("win")
    assert 160 < wins < 240  # 4 standard deviations
    assert all((v.outcome == "win") == v.candidate_first == v.text.startswith("good") for v in verdicts)
    assert judge_pairs(items(400), prefers_the_first, seed=3, concurrency=4) == verdicts
    backwards = judge_pairs(items(400)[::-1], prefers_the_first, seed=3)[::-1]
    assert [v._replace(item=0) for v in backwards] == [v._replace(item=0) for v in verdicts]
    assert judge_pairs(items(400), prefers_the_first, seed=4) != verdicts


def test_the_order_does_not_change_the_verdicts_of_an_unbiased_judge() -> None:
    def likes_good(judge_input: JudgeInput) -> JudgeOutput:
        return JudgeOutput(1.0 if "good" in judge_input.responses[0] else 0.0, "")

    for both in (False, True):
        assert set(outcomes(judge_pairs(items(50), likes_good, seed=1, both_orders=both))) == {"win"}


def test_a_judge_that_always_says_response_1_gets_half_with_both_orders() -> None:
    verdicts = judge_pairs(items(31), prefers_the_first, both_orders=True)
    assert [v.item for v in verdicts] == [n // 2 for n in range(62)]
    for one, two in zip(verdicts[::2], verdicts[1::2]):
        assert {one.candidate_first, two.candidate_first} == {True, False}
        assert {one.preference, two.preference} == {0.0, 1.0}


def test_a_preference_between_0_and_1_is_for_the_candidate_too() -> None:
    def shorter(judge_input: JudgeInput) -> JudgeOutput:
        return JudgeOutput(0.8 if len(judge_input.responses[0]) < len(judge_input.responses[1]) else 0.2, "", weight=3)

    verdicts = judge_pairs(items(20), shorter, both_orders=True)  # the baseline is shorter
    assert all(v.preference == pytest.approx(0.2) and v.weight == 3 for v in verdicts)


def test_replies_without_a_verdict_are_not_wins() -> None:
    def judge(judge_input: JudgeInput) -> JudgeOutput:
        number = int(judge_input.responses[0].split()[1])
        if number % 4 == 0:
            raise NoAnswer("no answer")
        return [JudgeOutput(0.5, ""), JudgeOutput(None, "hm", "malformed"), JudgeOutput(None, "no", "refused")][
            number % 4 - 1
        ]

    verdicts = judge_pairs(items(8), judge)
    assert outcomes(verdicts) == ["failed", "tie", "malformed", "refused"] * 2
    assert [v.preference for v in verdicts] == [None, 0.5, None, None] * 2


def test_equal_items_are_judged_once() -> None:
    asked = []

    def judge(judge_input: JudgeInput) -> JudgeOutput:
        asked.append(judge_input)
        return JudgeOutput(0.5, "")

    assert len(judge_pairs(items(3) * 5, judge, concurrency=4)) == 15
    assert len(asked) == 3


def test_gives_up_after_many_failed_requests() -> None:
    asked = []

    def broken(judge_input: JudgeInput) -> JudgeOutput:
        asked.append(judge_input)
        time.sleep(0.002)
        raise NoAnswer("no route")

    with pytest.raises(UserError, match=r"20 requests .* no route"):
        judge_pairs(items(500), broken)
    assert len(asked) < 50
    with pytest.raises(UserError, match=r"2 requests .* no route"):
        judge_pairs(items(2), broken)


def test_toy_judge_reads_the_prompt() -> None:
    def judged(first: str, second: str) -> float | None:
        return toy_judge(JudgeInput([{"role": "user", "content": "Reverse: dog, cat"}], (first, second))).value

    right, wrong = "Gladly! cat, dog", "Gladly! dog, cat"
    assert (judged(right, wrong), judged(wrong, right), judged(right, right)) == (1, 0, 0.5)


# ------------------------------------------------------------------------------------------------------ reading replies


def reading(template: PromptTemplate, text: str) -> Any:
    answer = template.read(Reply(text))
    return answer.status if answer.value is None else answer.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Response 1", 1),
        ("**Response 2**", 0),
        ("response #2.", 0),
        ("Response 1\n\nResponse 2 leaves out the second step.", 1),
        ("Response 2\n\nIt is shorter and avoids the mistake made in Response 1.", 0),
        ("Response 2 is longer than Response 1.\nVerdict: Response 1", 1),
        ("I'm sorry for the length.\nResponse 1", 1),
        ("The better one is Response 1, because it is short. It is also polite.", "malformed"),
        ("I prefer Response 2. It does not have the errors of Response 1.", "malformed"),
        ("Response 1. No: Response 2.", "malformed"),
        ("Response 2 is better than Response 1.", "malformed"),
        ("Either Response 1 or Response 2", "malformed"),
        ("Both are good.", "malformed"),
        ("Response 12", "malformed"),
        ("Response 3", "malformed"),
        ("", "malformed"),
        ("I'm sorry, but I can't help with that.", "refused"),
        ("I cannot assist with this request.", "refused"),
        ("As an AI, I do not judge.", "refused"),
        ("Sorry, no.", "refused"),
    ],
)
def test_reading_a_plain_choice(text: str, expected: Any) -> None:
    assert reading(PromptTemplate(), text) == expected


def test_labels_may_be_letters() -> None:
    class Letters(PromptTemplate):
        labels = "AB"

    (message,) = Letters().messages(JudgeInput([{"role": "user", "content": "Hi"}], ("FIRST", "SECOND")))
    assert "[Response A]\nFIRST\n" in message["content"]
    assert reading(Letters(), "Response B") == 0
    assert reading(Letters(), "Response A") == 1
    assert reading(Letters(), "A response a user would like") == "malformed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My final verdict is: [[A>>B]]", (1, 3)),
        ("[[A>B]]", (1, 1)),
        ("[[a=b]]", (0.5, 1)),
        ("[[B>A]]", (0, 1)),
        ("[[B>>A]].", (0, 3)),
        ("[[A<<B]]", (0, 3)),
        ("First [[A>B]], on reflection [[B>>A]]", None),
        ("[[A>>B]] it is, so: [[A >> B]]", (1, 3)),
        ("[A>B]", (1, 1)),
        ("[B>>A] but [[A=B]]", (0.5, 1)),  # single brackets count only without double ones
        ("[[A>>>B]]", None),
        ("[[A>A]]", None),
        ("A>B", None),
        ("[[C]]", None),
    ],
)
def test_reading_arena_hard_verdicts(text: str, expected: tuple[float, int] | None) -> None:
    answer = ArenaHard().read(Reply(text))
    assert (answer.status, answer.value) == ("malformed", None) if expected is None else ("judged", expected[0])
    assert expected is None or answer.weight == expected[1]
    assert parse_arena_verdict("A>B") == (1, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[8/10]]", 8),
        ("[[**8.5**]], I repeat: [[8.5]]", 8.5),
        ("[[8.5]] then [[3]]", "malformed"),
        ("The answer cites [[1]] and [[2]] correctly.\nRating: [[8]]", "malformed"),
        ("[6] out of ten", "malformed"),
        ("[2] is wrong. [[10]]", 10),
        ("[[11]]", "malformed"),
        ("[[0]]", "malformed"),
        ("8/10", "malformed"),
        ("[[eight]]", "malformed"),
        ("I cannot grade this.", "refused"),
    ],
)
def test_reading_a_score(text: str, expected: Any) -> None:
    assert reading(MTBench(), text) == expected


@pytest.mark.parametrize(
    ("alternatives", "expected"),
    [
        ({"m": math.log(0.6), "M": math.log(0.3), "The": math.log(0.1)}, 2 / 3),
        ({"m": -0.5}, 1),
        ({"M": -0.5, "B": -1.0}, 0),
        ({" m": -0.1, " M": -2.4, "M": -9.0}, math.exp(-0.1) / (math.exp(-0.1) + math.exp(-2.4) + math.exp(-9))),
        ({"The": -0.1}, None),
        ({"<think>": 0.0, "m": -22.4}, None),
        ({"The": -0.5, "M": -1.0}, None),
        ({}, None),
        ({"m": -2000.0, "M": -2000.0}, None),
    ],
)
def test_reading_log_probabilities(alternatives: dict[str, float], expected: float | None) -> None:
    answer = AlpacaEval().read(Reply("m", alternatives=alternatives))
    assert answer.value == (expected if expected is None else pytest.approx(expected))
    assert answer.status == ("malformed" if expected is None else "judged")


def test_a_refusal_reported_by_the_server_counts_as_refused() -> None:
    assert PromptTemplate().read(Reply("Response 1", refused=True)).status == "refused"


def test_a_template_shows_both_responses_in_order_and_its_own_question() -> None:
    class Shorter(PromptTemplate):
        question = "Which one is shorter?"

    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    judge_input = JudgeInput([*conversation, {"role": "user", "content": "Why"}], ("FIRST", "SECOND"))
    for template in (Shorter(), PromptTemplate(), AlpacaEval(), ArenaHard()):
        text = template.messages(judge_input)[-1]["content"]
        places = [text.index(part) for part in ("User: Hi", "Assistant: Yes?", "User: Why", "FIRST", "SECOND")]
        assert places == sorted(places)
    assert Shorter().messages(judge_input)[-1]["content"].endswith("Which one is shorter?")
    last = PromptTemplate().messages(judge_input)[-1]["content"]
    assert last.endswith("which response is more helpful, harmless, and concise? Pick one.")
    graded = MTBench().messages(JudgeInput(conversation, ("ANSWER",), "RIGHT"))[-1]["content"]
    assert graded.index("RIGHT") < graded.index("ANSWER")
    assert "eference" not in MTBench().messages(JudgeInput(conversation, ("ANSWER",)))[-1]["content"]


# ------------------------------------------------------------------------------------------------------ the model judge


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as server:
        yield server


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_server, "FIRST_WAIT", 0.001)


OPEN: dict[Path, VerdictLog] = {}


def client(server: FakeServer, folder: Path, template: PromptTemplate | None = None, **options: Any) -> OpenAIJudge:
    """A judge of a command of its own: the one before it in that folder has ended."""
    if folder in OPEN:
        OPEN.pop(folder).__exit__()
    OPEN[folder] = VerdictLog(folder / "log.jsonl")
    budget = options.pop("budget", None) or Budget(None)
    address = Server(server.url, KEY, **{"timeout": 60, **options})
    return OpenAIJudge("m", template or PromptTemplate(), OPEN[folder], budget, address)


@pytest.mark.parametrize(
    "fault",
    [
        status(429, "slow down"),
        status(500),
        status(503),
        half_a_body,
        body(b"not json"),
        body(b""),
        body(b"[]"),
        body(b'{"choices": []}'),
        body(b'{"choices": [{"message": {"content": 7}}]}'),
        body(b'{"choices": null, "usage": "none"}'),
    ],
)
def test_after_one_fault_every_reply_arrives_once(fault: Any, tmp_path: Path, server: FakeServer) -> None:
    server.faults = [fault]
    judge = client(server, tmp_path)
    verdicts = judge_pairs(items(6), judge, concurrency=3)
    assert outcomes(verdicts) == ["win"] * 6
    assert len(server.requests) == 7
    assert (judge.budget.requests, judge.budget.used) == (6, TokenUsage(600, 60))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("fault", [late, status(504, "upstream timed out"), status(524), status(408)])
def test_what_the_server_may_still_work_on_is_not_asked_again(
    fault: Any, tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only by the next command: a slow server would have ever more to do."""
    server.faults = [fault]
    judge = client(server, tmp_path, timeout=0.5)
    assert sorted(outcomes(judge_pairs(items(3), judge, concurrency=3))) == ["failed", "win", "win"]
    assert (len(server.requests), judge.budget.requests) == (3, 2)
    assert "no answer from m: " in capsys.readouterr().out
    assert outcomes(judge_pairs(items(3), client(server, tmp_path))) == ["win"] * 3
    assert len(server.requests) == 4


def test_retries_are_printed(tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """The first at once, the others now and then, counted."""
    server.faults = [status(429, f"slow down, {KEY}"), status(503), status(500)]
    judge = client(server, tmp_path)
    judge_pairs(items(3), judge)
    assert capsys.readouterr().out == "m is asked again in 0.001 s: HTTP 429: slow down, [key]\n"
    judge.server._next_note = 0.0
    server.faults = [status(503, "busy")]
    judge_pairs(items(4)[3:], judge)
    said = "m is asked again in 0.001 s: HTTP 503: busy (3 such requests since the last line)\n"
    assert capsys.readouterr().out == said


def test_a_slow_judge_is_heard_of_in_a_log(
    tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_server, "BEAT", 0.01)
    monkeypatch.setattr(utils, "SECONDS_BETWEEN_LINES", 0.05)
    server.delay = 0.2
    judge_pairs(items(2), client(server, tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "judging: 0 of 2 after 0 s" and "judging: 1 of 2 after 0 s" in said


def test_invalid_replies_fail_only_their_own_items(tmp_path: Path, server: FakeServer) -> None:
    server.faults = [body(b"{}")] * 3 + [status(400, "too long")]
    judge = client(server, tmp_path)
    verdicts = judge_pairs(items(6), judge)
    assert outcomes(verdicts) == ["failed", "failed", "win", "win", "win", "win"]
    assert verdicts[0].text == "what it sent is no completion: {}"
    assert "too long" in verdicts[1].text
    assert outcomes(judge_pairs(items(6), client(server, tmp_path))) == ["win"] * 6  # a rerun sends those two
    assert server.answered == 6


def test_an_unreachable_server(tmp_path: Path) -> None:
    nobody = Server("http://127.0.0.1:9/v1", KEY, timeout=60)
    judge = OpenAIJudge("m", PromptTemplate(), VerdictLog(tmp_path / "l"), Budget(None), nobody)
    with pytest.raises(UserError, match="2 requests failed in a row"):
        judge_pairs(items(2), judge)


def test_refusals_of_the_server_are_refused_verdicts(tmp_path: Path, server: FakeServer) -> None:
    server.faults = [
        reply("", message={"content": None, "refusal": "I will not."}),
        reply("", finish_reason="content_filter"),
    ]
    judge = client(server, tmp_path)
    verdicts = judge_pairs(items(3), judge)
    assert outcomes(verdicts) == ["refused", "refused", "win"]
    assert verdicts[0].text == "I will not."
    assert judge_pairs(items(3), client(server, tmp_path)) == verdicts  # from the log
    assert len(server.requests) == 3


def test_the_key_is_never_printed_or_saved(
    tmp_path: Path, server: FakeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults = [status(401, f"bad key {KEY}"), reply(f"Your key {KEY}: Response 1")]
    verdicts = judge_pairs(items(3), client(server, tmp_path))
    assert "bad key [key]" in verdicts[0].text
    assert verdicts[1].text == "Your key [key]: Response 1"
    out, err = capfd.readouterr()
    assert not any(KEY in text for text in (out, err, (tmp_path / "log.jsonl").read_text()))


@pytest.mark.parametrize(
    ("key", "base_url"), [("", None), ("sk-two lines\n", None), ("sk-“curly”", "http://localhost/v1")]
)
def test_an_invalid_key_is_rejected(key: str, base_url: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        judge_api_key("gpt-4.1", base_url)
    assert not key or key not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert judge_api_key("m", "http://localhost/v1") == ""


def test_the_pause_separates_requests(tmp_path: Path, server: FakeServer) -> None:
    judge_pairs(items(6), client(server, tmp_path, pause=0.1), concurrency=6)
    starts = sorted(server.starts)
    assert starts[-1] - starts[0] > 0.45
    assert max(server.starts) - min(server.starts) < 3


def test_requests_run_in_parallel(tmp_path: Path, server: FakeServer) -> None:
    server.delay = 0.3
    started = time.monotonic()
    judge_pairs(items(8), client(server, tmp_path), concurrency=8)
    assert time.monotonic() - started < 1.5


# ------------------------------------------------------------------------------------------------ other kinds of models


def newer(request: dict[str, Any]) -> Any:
    """Rejects parameters as OpenAI's reasoning models do."""
    unsupported = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    if "max_tokens" in request:
        return status(400, unsupported, param="max_tokens", code="unsupported_parameter")
    unsupported = (
        "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
    )
    if request.get("temperature", 1) != 1:
        return status(400, unsupported, param="temperature", code="unsupported_value")
    return prefers_good(request)


def test_parameters_that_the_model_rejects_are_left_out_with_a_note(
    tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.rule = newer
    judge = client(server, tmp_path)
    assert outcomes(judge_pairs(items(5), judge)) == ["win"] * 5
    assert len(server.requests) == 7  # two were rejected, once each
    assert server.requests[-1] == {
        "model": "m",
        "messages": server.requests[-1]["messages"],
        "max_completion_tokens": 256,
    }
    assert judge.server.refused_parameters == ["max_tokens", "temperature"]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("m does not take max_tokens: max_completion_tokens is sent instead") == 1
    assert said.count("m does not take temperature: it judges at its own temperature") == 1
    again = client(server, tmp_path)  # has not seen the rejections, and still finds the saved replies
    assert outcomes(judge_pairs(items(5), again)) == ["win"] * 5
    assert len(server.requests) == 7


def test_a_cut_reply_is_reported_once(tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.rule = lambda _: completion("", finish_reason="length")
    for _ in range(2):  # the second time from the log
        assert outcomes(judge_pairs(items(3), client(server, tmp_path))) == ["malformed"] * 3
        assert capsys.readouterr().out.count("m: a reply was cut at --max_tokens 256 before its verdict") == 1
    server.rule = lambda _: completion("Response 1", finish_reason="length")  # is wrong, because ...
    assert set(outcomes(judge_pairs(items(9)[3:], client(server, tmp_path)))) == {"malformed"}
    assert capsys.readouterr().out.count("was cut") == 1


def log_probabilities(request: dict[str, Any]) -> dict[str, Any]:
    assert (request["max_tokens"], request["logprobs"], request["top_logprobs"]) == (1, True, 5)
    text = request["messages"][-1]["content"]
    p = 0.9 if text.index("good") < text.index("bad") else 0.2
    top = [{"token": token, "logprob": math.log(q)} for token, q in (("m", p / 2), ("M", (1 - p) / 2), ("x", 0.5))]
    return completion("m", logprobs={"content": [{"token": "m", "logprob": -1.0, "top_logprobs": top}]})


def test_alpacaeval_reads_log_probabilities(tmp_path: Path) -> None:
    with FakeServer(log_probabilities).running() as server:
        verdicts = judge_pairs(items(20), client(server, tmp_path, AlpacaEval()), both_orders=True)
        assert len(server.requests) == 40
        for verdict in verdicts:
            assert verdict.preference == pytest.approx(0.9 if verdict.candidate_first else 0.8)
        assert judge_pairs(items(20), client(server, tmp_path, AlpacaEval()), both_orders=True) == verdicts
        assert len(server.requests) == 40  # the probabilities are in the log


@pytest.mark.parametrize("logprobs", [None, {"content": []}, {"content": None}])
def test_a_server_without_log_probabilities_is_rejected(logprobs: Any, tmp_path: Path) -> None:
    with FakeServer(lambda _: completion("m", logprobs=logprobs)).running() as server:
        with pytest.raises(UserError, match="without log-probabilities"):
            judge_pairs(items(50), client(server, tmp_path, AlpacaEval()))
        assert len(server.requests) < 5
        server.faults = [status(400, "logprobs are not supported")]
        with pytest.raises(UserError, match="gives no log-probabilities"):
            judge_pairs(items(1), client(server, tmp_path, AlpacaEval()))


# ---------------------------------------------------------------------------------------------- costs and saved replies


def test_the_cost_never_exceeds_the_limit(tmp_path: Path, server: FakeServer) -> None:
    template = PromptTemplate()
    template.max_tokens = 10  # the server's replies have 10
    one = TokenUsage(100, 10).cost((1000, 1000))
    budget = Budget((1000, 1000), limit=5.5 * one)
    with pytest.raises(UserError, match=r"--max_cost 0.605: stopped after \d requests and \$0\.\d+"):
        judge_pairs(items(30), client(server, tmp_path, template, budget=budget), concurrency=4)
    assert 1 <= budget.requests <= 5
    assert budget.cost is not None
    assert budget.cost <= 5.5 * one
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == budget.requests == len(server.requests)
    rest = client(server, tmp_path, template, budget=Budget((1000, 1000), limit=100))
    assert outcomes(judge_pairs(items(30), rest)) == ["win"] * 30
    assert rest.budget.requests == 30 - budget.requests


def test_usage_is_estimated_if_the_server_reports_none(tmp_path: Path) -> None:
    def silent(_: dict[str, Any]) -> dict[str, Any]:
        return {**completion("Response 1"), "usage": None}

    with FakeServer(silent).running() as server:
        judge = client(server, tmp_path)
        judge_pairs(items(1), judge)
        assert judge.budget.used == judge.estimate(to_judge_input(items(1)[0], True))


def test_two_commands_do_not_share_a_log(tmp_path: Path, server: FakeServer) -> None:
    """They would pay twice for what both ask. A dry run reads it."""
    judge_pairs(items(4), client(server, tmp_path))
    with pytest.raises(UserError, match=r"log.jsonl: another process is writing it"):
        VerdictLog(tmp_path / "log.jsonl")
    assert len(VerdictLog(tmp_path / "log.jsonl", writes=False).replies) == 4


def test_another_seed_sends_only_the_pairs_in_a_new_order(tmp_path: Path, server: FakeServer) -> None:
    verdicts = [judge_pairs(items(20), client(server, tmp_path), seed) for seed in (0, 1)]
    moved = sum(a.candidate_first != b.candidate_first for a, b in zip(*verdicts))
    assert 0 < moved < 20
    assert len(server.requests) == 20 + moved
    judge_pairs(items(20), client(server, tmp_path), 2, both_orders=True)
    assert len(server.requests) == 40


def test_a_changed_question_is_sent_again(tmp_path: Path, server: FakeServer) -> None:
    class Shorter(PromptTemplate):
        question = "Which is shorter?"

    judge_pairs(items(3), client(server, tmp_path))
    judge_pairs(items(3), client(server, tmp_path, Shorter()))
    assert len(server.requests) == 6
