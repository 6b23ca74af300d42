"""What servers send, and what is made of it: answers, reasons in their own words, parameters that they refuse."""

import copy
import gzip
import json
import math
import random
import threading
import time

import pytest
from conftest import fuzzed
from hypothesis import given
from hypothesis import strategies as st
from judge_server import KEY, FakeServer, body, completion, half_a_body, late, status

from judging.protocols import AlpacaEval, PromptTemplate, Reply
from sampling import openai_server
from sampling.openai_server import Fault, NoAnswer, Server, ask_all, is_address
from utils import UserError, as_json, valid_unicode

CHAT = {"model": "m", "messages": [{"role": "user", "content": "good bad"}], "max_tokens": 5, "temperature": 0.5}
CHAT |= {"seed": 1, "top_p": 0.9, "stop": ["x"], "top_k": 3}
NOTES = dict.fromkeys(["top_p", "temperature", "max_tokens", "seed", "stop", "top_k"], "a note")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_WAIT", 0.001)
    with FakeServer(lambda _: completion("fine")).running() as server:
        yield server


def ask(server, **options):
    return Server(server.url, KEY, **{"timeout": 30, **options}).ask("/chat/completions", CHAT, NOTES)


def error(code, content):
    return lambda handler: handler.answer(code, content if isinstance(content, bytes) else json.dumps(content).encode())


# ------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("text", "text"),
        ("", ""),
        (None, None),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "a"}], "a"),
        ([], ""),
        ("half \ud83d", "half \ufffd"),
        (f"your key {KEY}", "your key [key]"),
    ],
)
def test_texts(server, content, text):
    server.faults = [body(json.dumps(completion(content)).encode())]
    answer = ask(server)
    assert (answer.text, answer.is_cut, answer.refusal, answer.usage) == (text, False, None, (100, 10))


@pytest.mark.parametrize("tokens", [-5, 10**400, 1.5, "7", None])
def test_tokens_that_cannot_be_counted_are_not(server, tokens):
    """They would lower the cost so far, or end the command."""
    server.rule = lambda _: completion("fine") | {"usage": {"prompt_tokens": 1, "completion_tokens": tokens}}
    assert ask(server)[0::4] == ("fine", None)


@pytest.mark.parametrize(
    ("reason", "is_cut", "is_refused"),
    [
        ("stop", False, False),
        ("length", True, False),
        ("MAX_TOKENS", True, False),
        ("eos_token", False, False),
        ("end", False, False),
        (None, False, False),
        ("content_filter", False, True),
        ("SAFETY", False, True),
    ],
)
def test_finish_reasons(server, reason, is_cut, is_refused):
    """One that is not known loses no text."""
    server.rule = lambda _: completion("words", finish_reason=reason)
    answer = ask(server)
    assert (answer.text, answer.is_cut, answer.refusal is not None) == ("words", is_cut, is_refused)


# ------------------------------------------------------------------------------------------------- reasons


@pytest.mark.parametrize(
    ("code", "content", "words"),
    [
        (400, {"error": {"message": "too long", "code": "context_length"}}, "too long (context_length)"),
        (400, {"error": "no such model"}, "no such model"),
        (400, {"detail": "Server is pinned to 'a'."}, "Server is pinned to 'a'."),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "too large"}, {"msg": "etc."}]}, "body.n: too large; etc."),
        (422, {"object": "error", "message": {"detail": [{"loc": ["body", "n"], "msg": "no"}]}}, "body.n: no"),
        (400, {"errors": ["one", {"message": "two"}]}, "one; two"),
        (400, ["one", "two"], "one; two"),
        (400, {"reason": 7}, '{"reason": 7}'),
        (403, b"<html>\n<b>Forbidden</b></html>", "<html> <b>Forbidden</b></html>"),
        (400, b"", ""),
        (404, b"\xff\x00", "\ufffd\x00"),
        (401, {"error": {"message": f"no such key: {KEY}"}}, "no such key: [key]"),
        (402, {"error": {"message": "half \ud83d"}}, "half \ufffd"),
        (413, {"error": {"message": "x" * 9000}}, "x" * openai_server.MOST_WORDS),
    ],
)  # fmt: skip
def test_the_servers_own_words(server, code, content, words):
    server.faults = [error(code, content)]
    with pytest.raises(NoAnswer) as found:
        ask(server)
    assert str(found.value) == f"HTTP {code}: {words}"
    assert len(server.requests) == 1  # it will not be another answer


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"error": {"message": "Insufficient credits", "code": 402}}, "HTTP 402: Insufficient credits"),
        ({"id": None, "choices": None, "error": {"message": "No", "code": "bad"}}, "HTTP 400: No (bad)"),
        ({"error": "overloaded"}, "HTTP 400: overloaded"),
    ],
)
def test_errors_with_status_200(server, said, reason):
    server.faults = [error(200, said)]
    with pytest.raises(NoAnswer) as found:
        ask(server)
    assert str(found.value) == reason and len(server.requests) == 1


PASSING = [
    status(429),
    status(500),
    status(503, "busy"),
    status(529),
    error(200, {"error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": "Too Many"}}}),
    error(200, {"error": {"message": "upstream", "code": "502"}}),
    error(200, b"<html>"),
    error(200, {"choices": []}),
    half_a_body,
]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_asked_again_with_growing_waits(server, monkeypatch, fault):
    waits = []
    monkeypatch.setattr(openai_server.time, "sleep", lambda seconds: waits.append(seconds) if seconds > 0 else None)
    server.faults = [fault] * 2
    assert ask(server).text == "fine"
    assert len(server.requests) == 3 and len(waits) >= 2
    server.faults = [fault] * 100
    with pytest.raises(NoAnswer):
        ask(server)
    assert len(server.requests) in (3 + openai_server.TRIES, 3 + openai_server.TRIES_OF_INVALID)


def test_waits_grow_or_are_the_servers(monkeypatch):
    waits = []
    monkeypatch.setattr(openai_server.time, "sleep", lambda seconds: waits.append(seconds) if seconds > 0 else None)
    asked = Server("http://127.0.0.1:9/v1", KEY, timeout=5)
    with pytest.raises(NoAnswer, match="refused"):
        asked.ask("/chat/completions", CHAT, {})
    assert waits == [0.5, 1, 2, 4, 8]
    assert [openai_server.wait_in(h) for h in ({}, {"retry-after": "7"}, {"retry-after": "Mon, 1 Jan"})] == [
        None,
        7,
        None,
    ]
    assert openai_server.wait_in({"retry-after-ms": "50", "retry-after": "7"}) == 0.05


@pytest.mark.parametrize("where", ["choices", "error", "other"])
def test_an_answer_that_is_nested_deeply(where):
    """json reads it, and a function that calls itself does not get to its bottom."""
    deep = json.loads("[" * 900 + "]" * 900)
    found = Server("http://127.0.0.1:9/v1", KEY)
    found._receive = lambda *_, **__: {where: deep}
    assert "..." in found._send("/chat/completions", {}).reason


def dripping(handler):
    """Spaces without an end, as some gateways send them to keep a connection."""
    handler.answer(200, b" ", length=10**6)
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.02)


def test_an_answer_that_does_not_end_is_not_waited_for(server, monkeypatch):
    server.faults = [dripping]
    with pytest.raises(NoAnswer, match=r"nothing came for 0.2 s; it may still be working on it"):
        ask(server, timeout=0.2)
    assert len(server.requests) == 1
    monkeypatch.setattr(openai_server, "MOST_BYTES", 20)
    with pytest.raises(NoAnswer, match=r"longer than 0 MiB"):
        ask(server)


def packed(handler):
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    content = gzip.compress(b" " * 10**6 + json.dumps(completion("fine")).encode())
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def test_an_answer_is_not_unpacked(server):
    """A small one can fill the memory."""
    server.faults = [packed] * openai_server.TRIES
    with pytest.raises(NoAnswer, match=r"its answer is packed \(gzip\), which no request asks for"):
        ask(server)


def test_a_time_out_says_that_the_server_may_go_on(server):
    server.faults = [late]
    with pytest.raises(NoAnswer, match=r"nothing came for 0.2 s; it may still be working on it"):
        ask(server, timeout=0.2)
    assert len(server.requests) == 1


# ------------------------------------------------------------------------------------------------- parameters

REFUSALS = [
    ("seed", 422, {"message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"],
                                           "msg": "Extra inputs are not permitted", "input": 1}]}}),
    ("seed", 400, {"error": {"message": "Unrecognized request argument supplied: seed"}}),
    ("temperature", 400, {"error": {"message": "`temperature` is deprecated for this model."}}),
    ("temperature", 400, {"error": {"message": "Unsupported value: 'temperature' does not support 0.5."}}),
    ("max_tokens", 400, {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported here."}}),
    ("stop", 400, {"detail": "Unknown parameter: stop"}),
    ("seed", 400, {"error": "Invalid parameter: seed"}),
    ("top_k", 422, {"detail": [{"loc": ["body", "top_k"], "msg": "extra fields not permitted"}]}),
    ("top_k", 200, {"error": {"message": "unexpected keyword top_k", "code": 400}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "code", "content"), REFUSALS)
def test_a_refused_parameter_is_left_out_and_that_is_said(server, capsys, name, code, content):
    server.rule = lambda request: error(code, content) if name in request else completion("fine")
    asked = Server(server.url, KEY)
    for _ in range(2):
        assert asked.ask("/chat/completions", CHAT, NOTES).text == "fine"
    assert len(server.requests) == 3 and asked.refused_parameters == [name]
    assert capsys.readouterr().out == f"m does not take {name}: a note\n"
    left = CHAT.keys() - {name} | ({"max_completion_tokens"} if name == "max_tokens" else set())
    assert server.requests[-1].keys() == left


def test_of_two_parameters_that_exclude_each_other_the_first_goes(server):
    said = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
    server.rule = lambda r: status(400, said) if {"temperature", "top_p"} <= r.keys() else completion("fine")
    assert ask(server).text == "fine"
    assert "top_p" not in server.requests[-1] and "temperature" in server.requests[-1]


@pytest.mark.parametrize(
    "said", ["max_tokens is too large: 5000", "context length is 40; you asked for max_tokens=5", "no"]
)
def test_other_complaints_are_told(server, said):
    server.rule = lambda _: status(400, said)
    with pytest.raises(NoAnswer, match=said):
        ask(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("address", ["http://h/v1", "https://h:8000/v1", "http://[::1]:80/v1"])
def test_addresses(address):
    assert is_address(address)


@pytest.mark.parametrize(
    "address",
    ["", "h:80/v1", "ftp://h", "http://", "http://h:x/v1", "http://[::1", "http://a:b@h/v1", "http://h/?key=1"],
)
def test_no_addresses(address):
    with pytest.raises(UserError, match=r"base_url=http://HOST:PORT/v1"):
        Server(address, KEY)


# ------------------------------------------------------------------------------------------------- many requests


def test_all_are_asked_so_many_at_a_time():
    under_way, most = set(), []

    def square(number):
        under_way.add(number)
        most.append(len(under_way))
        time.sleep(0.002)
        under_way.discard(number)
        if number % 5 == 0:
            raise NoAnswer(f"not {number}")
        return number**2

    found = dict(filter(None, ask_all(square, range(40), 4, give_up_after=20)))
    assert {place: value for place, value in found.items() if place % 5} == {n: n**2 for n in range(40) if n % 5}
    assert [str(found[n]) for n in range(0, 40, 5)] == [f"not {n}" for n in range(0, 40, 5)]
    assert 1 < max(most) <= 4


def test_those_under_way_are_given_before_the_end():
    """What they cost is paid."""
    gate = threading.Barrier(3)

    def answer(number):
        if number < 3:
            gate.wait(5)
        if number == 0:
            raise UserError("stop")
        time.sleep(0.02)
        return number

    found = []
    with pytest.raises(UserError, match="stop"):
        found.extend(ask_all(answer, range(100), 3, give_up_after=20))
    assert {1, 2} <= {place for place, _ in found} and len(found) <= 4


def test_a_failure_now_and_then_is_no_reason_to_give_up():
    def answer(number):
        if number % 3:
            raise NoAnswer("busy")
        return number

    assert len(list(ask_all(answer, range(90), 1, give_up_after=3))) == 90
    with pytest.raises(UserError, match="2 requests failed in a row, the last: busy"):
        list(ask_all(answer, range(90), 1, give_up_after=2))


# ------------------------------------------------------------------------------------------------- random answers

WHOLE = completion("fine") | {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "Response 1"}}]}
LIKELY = {"content": [{"token": "m", "top_logprobs": [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -3}]}]}
ODD = [None, True, -1, 1e3, math.nan, -math.inf, 10**400, "", "a", "429", "half \ud83d", [], ["a"], [[]], {}, {"a": 1}]
ODD += [
    {"type": "text"},
    [{"type": "text", "text": "a"}],
    [{"type": "text", "text": None}],
    {"message": {"raw": ["no"]}},
]


NOWHERE = Server("http://127.0.0.1:9/v1", KEY)


def answer_of(draw):
    """What a server might send: a completion or an error, with something in it replaced."""
    choice = WHOLE["choices"][0] | draw.choice([{}, {"logprobs": LIKELY}, {"text": "a", "message": None}])
    content = copy.deepcopy(
        draw.choice([WHOLE | {"choices": [choice]}] * 3 + [{"error": {"message": "no", "code": 429}}])
    )
    for _ in range(draw.randrange(3)):
        section = content
        while section[key := draw.choice([*(section if isinstance(section, dict) else range(len(section)))])] and (
            isinstance(section[key], dict | list) and draw.random() < 0.8
        ):
            section = section[key]
        section[key] = copy.deepcopy(draw.choice(ODD))
    return content if draw.random() < 0.95 else draw.choice(ODD)


@fuzzed
@given(st.integers(0, 2**40))
def test_any_answer_is_an_answer_or_a_fault(seed):
    draw = random.Random(seed)
    content = answer_of(draw)
    NOWHERE._receive = lambda *_, **__: content
    found = NOWHERE._send("/chat/completions", {})
    if isinstance(found, Fault):
        assert found.reason == valid_unicode(found.reason) and len(found.reason) < 1200
        return
    assert found.text is None or found.text == valid_unicode(found.text)
    reply = Reply(found.text or "", found.refusal is not None, found.alternatives, found.is_cut)
    saved = json.loads(as_json(reply._asdict()))
    for template in (PromptTemplate(), AlpacaEval()):
        assert template.read(reply) == template.read(Reply(**saved))
