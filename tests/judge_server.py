"""A fake OpenAI-compatible server that judges by a rule and sends faults on request."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from judging.judge import Item

KEY = "sk-test-0123456789abcdef"
CONFIG = {"exp_name": "run", "human_prefix": "\n<|user|>\n", "assistant_prefix": "\n<|assistant|>\n"}

Fault = Callable[["Handler"], None]  # writes a faulty response


def items(count: int) -> list[Item]:
    return [Item([{"role": "user", "content": f"question {i}"}], f"good {i}", f"bad {i}") for i in range(count)]


def write_samples(folder: Path, count: int, name: str = "samples.json", exp_name: str = "run") -> Path:
    samples = [{"prompt": "-", "messages": m, "policy": good, "chosen": bad} for m, good, bad in items(count)]
    path = folder / name
    path.write_text(json.dumps({"sampled_at": "now", "config": CONFIG | {"exp_name": exp_name}, "samples": samples}))
    return path


def completion(text: str, **choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text} | choice.pop("message", {})
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message} | choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


def prefers_good(request: dict[str, Any]) -> dict[str, Any]:
    text = request["messages"][-1]["content"]
    return completion("Response 1" if text.index("good") < text.index("bad") else "Response 2")


class Handler(http.server.BaseHTTPRequestHandler):
    server: "FakeServer"
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.starts.append(time.monotonic())
            fault = self.server.faults.pop(0) if self.server.faults else None
        time.sleep(self.server.delay)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has left
            response = fault or self.server.rule(request)
            if callable(response):
                response(self)
            else:
                self.answer(200, json.dumps(response).encode())
                with self.server.lock:
                    self.server.answered += 1

    def answer(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


Rule = Callable[[dict[str, Any]], dict[str, Any] | Fault]


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `faults`; when none is left, with what `rule` makes of the request.

    `answered` counts the replies of the rule.
    """

    daemon_threads = True

    def __init__(self, rule: Rule = prefers_good) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule, self.faults, self.delay, self.answered = rule, list[Fault](), 0.0, 0
        self.requests: list[dict[str, Any]] = []
        self.starts: list[float] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator["FakeServer"]:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with self:
            yield self
            self.shutdown()


def status(http: int, message: str = "", **error: Any) -> Fault:
    body = json.dumps({"error": {"message": message, **error}}).encode()
    return lambda handler: handler.answer(http, body)


def body(content: bytes) -> Fault:
    return lambda handler: handler.answer(200, content)


def reply(text: str, **choice: Any) -> Fault:
    return body(json.dumps(completion(text, **choice)).encode())


def half_a_body(handler: Handler) -> None:
    body = json.dumps(completion("Response 1")).encode()
    handler.answer(200, body[: len(body) // 2], length=len(body))
    handler.close_connection = True
    handler.wfile.flush()
    handler.connection.close()


def late(handler: Handler) -> None:
    time.sleep(1.5)
    handler.answer(200, json.dumps(completion("Response 1")).encode())
