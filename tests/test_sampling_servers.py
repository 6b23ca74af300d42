"""Sampling from servers over loopback: transformers' own, and one that does all that goes wrong."""

import http.server
import json
import threading
import time

import pytest
from conftest import DATA, REPO, transformers_server
from test_sampling import TINY, write

import eval as evaluation
from judging import answers
from launch import settings
from launch.policies import read_config
from sampling import openai_server
from sampling.backends import ServerBackend
from sampling.generate import Decoding, Request, Sample
from utils import UserError, fingerprint

KEY = "sk-a-secret-of-mine"
SERVED = ["template=tulu", "++backend=openai", "++served_model=m", "++model.eval_batch_size=4"]


# ---------------------------------------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def real():
    """`transformers serve` with the built-in model."""
    with transformers_server(TINY) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("template", ["tulu", "chat"])
def test_a_server_writes_what_the_model_writes_here(tmp_path, real, template):
    """Greedily, for the server draws by its own rules; several turns too."""
    options = [f"template={template}", "++temperature=0", "++top_p=1.0", "++max_new_tokens=30"]
    here = write(tmp_path / "here", *options)
    there = write(
        tmp_path / "there", *options, "++backend=openai", f"++served_model={TINY}", f"++base_url={real}", "++samples=2"
    )
    assert [s["policy"] for s in there["samples"][::2]] == [s["policy"] for s in here["samples"]]
    assert [s["finish_reason"] for s in there["samples"][::2]] == [s["finish_reason"] for s in here["samples"]]
    assert len(there["samples"]) == 48 and there["sampling"]["policy"] == f"{TINY} at {real}"


# ---------------------------------------------------------------------------------------------------- one with faults


class Server(http.server.ThreadingHTTPServer):
    """Answers each prompt with its own words; `faults` come first, in turn."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.models = [], [], ["m"]
        self.rule = lambda _: None  # the fault that a request meets, if any
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, json.dumps({"object": "list", "data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request | {"key": self.headers["Authorization"], "path": self.path})
        asked = request["prompt"] if "prompt" in request else request["messages"][-1]["content"]
        said = "To " + " ".join(asked.split())
        choice = {"text": said, "message": {"role": "assistant", "content": said}, "finish_reason": "stop", "index": 0}
        fault = self.server.faults.pop(0) if self.server.faults else self.server.rule(request)
        if fault == "late":
            time.sleep(1.0)
        elif fault is not None:
            return self.reply(*fault)
        self.reply(200, json.dumps({"id": "1", "choices": [choice]}).encode())

    def reply(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(body)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def served(server, folder, *overrides):
    return write(folder, *SERVED, f"++base_url={server.url}", *overrides)


def nothing_secret(folder, capsys):
    out, err = capsys.readouterr()
    for text in (out, err, *(path.read_text() for path in folder.rglob("*") if path.is_file())):
        assert KEY not in text
    return out


RETRIED = [
    (429, b'{"error": {"message": "slow down"}}'),
    (500, b"oops"),
    (503, b""),
    (200, b'{"id": "1", "choi', 4000),  # half a body
    (200, b"<html>garbage</html>"),
    (200, b'{"error": {"message": "Rate limit exceeded", "code": 429}}'),
]
FINAL = [
    (200, b"<html>garbage</html>"),
    (200, b'{"no": "choices"}'),
    (200, b'{"id": "1", "choices": []}'),
    (200, b'{"id": "1", "choices": [{"index": 0, "finish_reason": "stop", "text": null}]}'),
    (200, b'{"id": "1", "choices": [{"index": 0, "finish_reason": "content_filter", "text": ""}]}'),
    (400, f'{{"error": {{"message": "your key {KEY} is no good"}}}}'.encode()),
]


def test_faults_that_pass_are_tried_again(tmp_path, server, capsys):
    """429, 5xx, half a body: each prompt meets one of them twice, and is answered in the end."""

    def rule(request):
        met = prompts(server).count(request["prompt"])
        return RETRIED[int(fingerprint(request["prompt"]), 16) % len(RETRIED)] if met <= 2 else None

    server.rule = rule
    content = served(server, tmp_path)
    assert [s["policy"] for s in content["samples"]] == [
        "To " + " ".join(s["prompt"].split()) for s in content["samples"]
    ]
    assert len(server.requests) == 3 * 24
    assert {request["key"] for request in server.requests} == {f"Bearer {KEY}"}
    nothing_secret(tmp_path, capsys)


@pytest.mark.parametrize("fault", FINAL, ids=lambda fault: f"{fault[0]} {fault[1][:24].decode()}")
def test_faults_that_stay_lose_nothing_else(tmp_path, server, fault, capsys):
    """The others are kept, and a rerun asks only for what is missing."""
    server.rule = lambda request: fault if request["prompt"] in list(dict.fromkeys(prompts(server)))[:2] else None
    with pytest.raises(UserError, match=r"(?s)2 of 24 samples got no answer .* max_failed=0 allows 0") as error:
        served(server, tmp_path, "++max_failed=0")
    assert KEY not in str(error.value)
    asked = len(server.requests)
    assert len(set(prompts(server))) == 24 and not (tmp_path / "tiny.json").exists()
    nothing_secret(tmp_path, capsys)
    server.rule = lambda _: None
    assert len(served(server, tmp_path)["samples"]) == 24
    assert len(server.requests) == asked + 2 and len(set(prompts(server))) == 24
    nothing_secret(tmp_path, capsys)


def prompts(server):
    return [request["prompt"] for request in server.requests]


@pytest.mark.parametrize("mode", [[], ["++mode=mtbench", f"data_dir={DATA}", "++samples=2"]], ids=["sample", "mtbench"])
def test_what_a_server_never_answers_is_marked(tmp_path, server, mode, capsys):
    """And left out of the benchmarks' files and of judging; the same command asks for it, and for nothing else."""
    if mode and not DATA.is_dir():
        pytest.skip(f"no real data in {DATA}")
    server.rule = lambda request: TOO_LONG if is_chosen(request["prompt"]) else None
    content = served(server, tmp_path, *mode)
    failed = [entry for entry in content["samples"] if "failed" in entry]
    assert [entry["failed"] for entry in failed] == ["HTTP 400: maximum context length is 40"] * len(failed)
    assert 0 < len(failed) <= 0.05 * len(content["samples"]) + 1
    assert {entry["finish_reason"] for entry in failed} == {"failed"}
    out = capsys.readouterr().out
    assert f"{len(content['samples']) - len(failed)} samples in" in out and f"{len(failed)} more have no answer" in out
    if mode:
        handed = (tmp_path / "mt_bench/model_answer/tiny.jsonl").read_text().splitlines()
        assert len(handed) == 80 - len(failed) / 2
        assert sum(entry["policy"] is None for entry in failed) < len(failed)  # some failed in their second turn
    file = next(tmp_path.glob("tiny*.json"))
    read = answers.read_answers(file)
    texts = [text for entry in content["samples"] for text in entry.get("turns", [entry["policy"]])]
    assert sum("policy" in row.answers for row in read.rows) == len(texts) - texts.count(None)

    asked = len(server.requests)
    server.rule = lambda _: None
    whole = served(server, tmp_path, *mode)
    again = prompts(server)[asked:]
    assert {prompt for prompt in again if is_chosen(prompt)} and len(again) < 4 * len(failed)
    assert not any("failed" in entry for entry in whole["samples"])
    kept = [(old, new) for old, new in zip(content["samples"], whole["samples"]) if "failed" not in old]
    assert all(old == new for old, new in kept) and whole["sampled_at"] == content["sampled_at"]
    served(server, tmp_path, *mode)
    assert len(server.requests) == asked + len(again)
    assert "there already" in capsys.readouterr().out and not list(tmp_path.rglob("*.part*"))


TOO_LONG = (400, b'{"error": {"message": "maximum context length is 40"}}')


def is_chosen(prompt):
    return int(fingerprint(prompt), 16) % 30 == 0  # of these prompts few, first turns and second ones


def test_a_server_that_only_fails_is_given_up(tmp_path, server):
    server.faults = [(401, json.dumps({"error": {"message": f"no such key: {KEY}"}}).encode())] * 1000
    with pytest.raises(UserError, match=r"failed in a row, the last: .*401.*") as error:
        served(server, tmp_path, "++n_samples=200")
    assert "[key]" in str(error.value) and KEY not in str(error.value)
    assert 20 <= len(server.requests) < 100  # those under way when the twentieth is heard of are not counted on


def test_what_is_asked(tmp_path, server):
    settings = ["++temperature=0.5", "++top_p=0.9", "++top_k=4", "++max_new_tokens=9", "++stop=[END]", "++samples=2"]
    served(server, tmp_path, *settings)
    wanted = {"model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 4, "max_tokens": 9, "stop": ["END"]}
    for request in server.requests:
        assert wanted.items() <= request.items()
        assert request["path"] == "/v1/completions" and request["prompt"].endswith("\n<|assistant|>\n")
    assert len({request["seed"] for request in server.requests}) == 48
    server.requests.clear()
    served(server, tmp_path / "chat", "template=chat")
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions" and [m["role"] for m in request["messages"]] == ["user"]
        assert "top_k" not in request and "stop" not in request


def reasoning(request):
    """What a reasoning model of OpenAI's says to parameters that it does not take."""
    for name in ("max_tokens", "temperature", "top_p"):
        if name in request:
            said = {"message": f"Unsupported parameter: '{name}' is not supported with this model."}
            return 400, json.dumps({"error": said}).encode()
    return None


def test_a_model_that_takes_no_settings_is_asked_without_those_that_change_nothing(tmp_path, server, capsys):
    server.rule = reasoning
    content = served(server, tmp_path, "template=chat", "++top_p=1.0", "++model.eval_batch_size=1")
    assert len(content["samples"]) == 24 and len(server.requests) == 27  # three were refused, once each
    assert server.requests[-1].keys() == {"model", "messages", "seed", "max_completion_tokens", "key", "path"}
    assert capsys.readouterr().out.count("it is left out, being 1") == 2
    assert content["refused_parameters"] == ["max_tokens", "temperature", "top_p"]
    content = served(server, tmp_path / "other", "template=chat")
    assert "m does not take top_p: it draws as it does by itself, not with 0.95" in capsys.readouterr().out


def test_the_servers_only_model_needs_no_name(tmp_path, server):
    server.models = ["only"]
    content = served(server, tmp_path, "++served_model=null")
    assert content["sampling"]["policy"] == f"only at {server.url}"
    server.models = ["one", "two"]
    with pytest.raises(UserError, match=r"served_model= has to name one of .*: one, two"):
        served(server, tmp_path / "other", "++served_model=null")


def test_no_server_there(tmp_path):
    with pytest.raises(UserError, match="does not say which models it has"):
        write(tmp_path, "++backend=openai", "++base_url=http://127.0.0.1:9/v1")


def test_stop_texts_are_cut_here_too(server):
    """A server may leave them in."""
    config = read_config(TINY, [*SERVED, f"++base_url={server.url}"])
    backend = ServerBackend(settings.typed(config), 1)
    (found,) = backend.complete([Request((), 1.0, 0, "a b STOP c")], Decoding(5, 0, stop=("STOP",)))
    assert found == {0: Sample("To a b", [], "stop")}


def test_control_tokens_do_not_go_to_a_server(tmp_path, server):
    overrides = [*SERVED, f"++base_url={server.url}", f"++samples_dir={tmp_path}", "loss=csft", "model=tiny"]
    path = REPO / "config"
    with pytest.raises(UserError, match="loss=csft needs its control tokens"):
        evaluation.write_samples(read_config(path, overrides), path, overrides)
