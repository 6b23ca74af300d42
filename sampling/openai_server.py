"""A client for OpenAI's API and compatible servers: what they send, why they send nothing, when they are asked again.

A request that the server may still be working on is never sent a second time: after a time-out, here or at a gateway,
it has failed, and only a later command asks again. All other failures that may pass are tried again after a while.
"""

import importlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import openai

from utils import MOST, UserError, as_json, console, valid_unicode

httpx: Any = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__)  # or httpx2, by its version
GIVE_UP_AFTER = 20  # failed requests in a row: then the server or the key is wrong, not the requests
TIMEOUT = 600.0  # seconds for an answer; most of them are spent in the server's queue
CONNECT_TIMEOUT = 10.0
TRIES, TRIES_OF_INVALID = 6, 3  # requests for one answer; while the server sends something that is no completion
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before it is asked again; twice as long each time, or as it says
SECONDS_BETWEEN_NOTES = 10.0
BEAT = 5.0  # seconds
MOST_BYTES = 64 << 20  # of an answer

TIMED_OUT = (408, 504, 524)  # a gateway no longer waits for the server, which may still be working
WORDS = ("error", "errors", "message", "detail", "msg", "metadata", "raw")  # where a server says what is wrong
MOST_WORDS, DEEPEST = 500, 20  # characters of it; levels of JSON
REFUSES = re.compile(
    r"not? (?:longer )?(?:support|permit|allow|accept|recogni[sz])|unsupported|unrecogni[sz]ed|unknown|unexpected|extra"
    r"|deprecated|cannot both|only the default|(?:invalid|not a valid) (?:parameter|argument|field)"
)
CUT = ("length", "max_tokens", "max_output_tokens", "max_completion_tokens", "token_limit")
WITHHELD = ("content_filter", "safety", "recitation", "blocklist", "prohibited_content", "refusal", "sensitive")

Question = TypeVar("Question")
Found = TypeVar("Found")


class NoAnswer(Exception):
    """A server gave no answer to a request. The message is why, in the server's own words."""


class Answer(NamedTuple):
    """What a server sent.

    `text` is None where it sent none. `is_cut`: it ends at the limit of tokens. `refusal`: why the server or the model
    withholds an answer; None where it does not. `alternatives`: the log-probabilities of the likeliest first tokens.
    `usage`: tokens of the request and of the answer, where the server counts them.
    """

    text: str | None
    is_cut: bool
    refusal: str | None
    alternatives: dict[str, float] | None
    usage: tuple[int, int] | None


class Fault(NamedTuple):
    """Why a request got no answer. `passes`: it may get one if it is sent again, after `wait` seconds if given."""

    reason: str
    passes: bool = False
    status: int = 0
    wait: float | None = None
    is_invalid: bool = False  # something came, but no completion


def key_from_environment() -> str:
    """The value of OPENAI_API_KEY, or "". Raises UserError if it cannot be a key."""
    key = os.environ.get("OPENAI_API_KEY", "")
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError("OPENAI_API_KEY is not a key: it holds a space, a line break or a character outside ASCII")
    return key


class BoundedBody(httpx.SyncByteStream):
    """What a server sends after its headers, which has to end: httpx's time-outs are for each piece of it."""

    def __init__(self, body: Any, seconds: float) -> None:
        self.body, self.seconds = body, seconds

    def __iter__(self) -> Iterator[bytes]:
        end, size = time.monotonic() + self.seconds, 0
        for piece in self.body:
            size += len(piece)
            if size > MOST_BYTES:
                raise httpx.RemoteProtocolError(f"its answer is longer than {MOST_BYTES >> 20} MiB")
            if time.monotonic() > end:
                raise httpx.ReadTimeout("its answer does not end")
            yield piece

    def close(self) -> None:
        self.body.close()


def is_address(base_url: str) -> bool:
    """Whether it is an HTTP address that holds neither a password nor a query."""
    try:
        url = urlsplit(base_url)
        has_host = bool(url.hostname) and url.port != 0  # both raise ValueError for what is none
    except ValueError:
        return False
    return has_host and url.scheme in ("http", "https") and "@" not in url.netloc and not url.query


class Server:
    """OpenAI's own service, or the server at `base_url`.

    Requests start at least `pause` seconds apart. The key is never printed or saved.
    """

    def __init__(self, base_url: str | None, key: str, *, timeout: float = TIMEOUT, pause: float = 0) -> None:
        """Raises UserError for a base_url that is not an HTTP address, or that holds a password or a query."""
        if base_url is not None and not is_address(base_url):
            raise UserError(
                "write a server's address as base_url=http://HOST:PORT/v1, without a key or a password; "
                "put the key into OPENAI_API_KEY"
            )
        limits = openai.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT))

        def bound(response: Any) -> None:
            if (packing := response.headers.get("content-encoding", "identity")) != "identity":
                raise httpx.RemoteProtocolError(f"its answer is packed ({packing}), which no request asks for")
            response.stream = BoundedBody(response.stream, timeout)

        plain = {"accept-encoding": "identity"}  # else a small answer may unpack to one that fills the memory
        http = openai.DefaultHttpxClient(timeout=limits, headers=plain, event_hooks={"response": [bound]})
        own = {"api_key": key or "none", "base_url": base_url, "max_retries": 0, "timeout": limits}
        self.client = openai.OpenAI(**own, http_client=http)  # type: ignore[arg-type]
        self.refused_parameters: list[str] = []  # parameters of requests that the model does not take
        self._key, self._timeout, self._pause, self._next_start = key, timeout, pause, 0.0
        self._unsaid, self._next_note = 0, 0.0
        self._lock = Lock()

    def ask(self, path: str, request: dict[str, Any], optional: Mapping[str, str]) -> Answer:
        """The answer to a request for a completion, to `path` "/chat/completions" or "/completions".

        `optional`: parameters that the server may refuse, each with a note on what happens then. Without it the request
        is sent again (`max_tokens` becomes `max_completion_tokens`), and the note is printed once. If several are named
        in a refusal, the first of `optional` goes. Raises NoAnswer.
        """
        tries = invalid = 0
        while True:
            adapted = {name: value for name, value in request.items() if name not in self.refused_parameters}
            if "max_tokens" in request and "max_tokens" not in adapted:
                adapted["max_completion_tokens"] = request["max_tokens"]
            self._wait_for_a_turn()
            found = self._send(path, adapted)
            if isinstance(found, Answer):
                return found
            if name := refused_parameter(found, [name for name in optional if name in adapted]):
                self._stop_sending(name, f"{request['model']} does not take {name}: {optional[name]}")
                continue
            tries, invalid = tries + 1, invalid + found.is_invalid
            if not found.passes or tries == TRIES or invalid == TRIES_OF_INVALID:
                self._note(f"no answer from {request['model']}: {found.reason}")
                raise NoAnswer(found.reason)
            wait = min(FIRST_WAIT * 2 ** (tries - 1) if found.wait is None else found.wait, LONGEST_WAIT)
            self._note(f"{request['model']} is asked again in {wait:.3g} s: {found.reason}")
            time.sleep(wait)

    def models(self) -> list[str]:
        """The names of the server's models. Raises NoAnswer."""
        received = self._receive("get", "/models")
        if isinstance(received, Fault):
            raise NoAnswer(received.reason)
        match received:
            case {"data": [*models]}:
                return [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model]
        raise NoAnswer("what it sent is no list of models")

    def _send(self, path: str, request: dict[str, Any]) -> Answer | Fault:
        content = self._receive("post", path, body=valid_unicode(request))
        if isinstance(content, Fault):
            return content
        try:
            return self._read(content)
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
            if isinstance(content, dict) and content.get("error"):  # with status 200, as OpenRouter has it
                return self._fault(status_in(content["error"]), content)
            return Fault(f"what it sent is no completion: {self.redact(words_of(content))}", True, is_invalid=True)

    def _receive(self, method: str, path: str, **options: Any) -> Any:
        """The content of the server's response, read from JSON where it is any; a Fault if there is none."""
        try:
            return getattr(self.client, method)(path, cast_to=object, **options)
        except openai.APIStatusError as error:
            try:
                content = json.loads(error.response.text)
            except (ValueError, RecursionError):
                content = error.response.text
            return self._fault(error.status_code, content, wait_in(error.response.headers))
        except openai.APITimeoutError as error:
            if "Connect" in type(error.__cause__).__name__:
                return Fault("it cannot be reached (time-out)", passes=True)
            return Fault(f"nothing came for {self._timeout:g} s; it may still be working on it")
        except openai.APIConnectionError as error:
            return Fault(self.redact(f"{error} ({error.__cause__})"), passes=True)
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            return Fault(f"what it sent is no JSON ({self.redact(str(error))})", passes=True, is_invalid=True)

    def _fault(self, status: int, content: Any, wait: float | None = None) -> Fault:
        passes = status in (409, 429) or (status >= 500 and status not in TIMED_OUT)
        return Fault(f"HTTP {status}: {self.redact(words_of(content))}", passes, status, wait)

    def _read(self, content: Any) -> Answer:
        """The first choice of a completion. Raises one of several errors where it is none."""
        choice = content["choices"][0]
        message = choice.get("message") or {}
        text = text_in(message.get("content") if message else choice["text"])
        reason = str(choice.get("finish_reason") or "").lower()
        refusal = message.get("refusal") or (f"finish_reason: {reason}" if reason in WITHHELD else None)
        alternatives = usage = None
        match choice.get("logprobs"):
            case {"content": [{"top_logprobs": [_, *_] as likeliest}, *_]}:
                alternatives = likely_tokens(likeliest)
        match content.get("usage"):
            case {"prompt_tokens": int(tokens_in), "completion_tokens": int(tokens_out)}:
                counted = 0 <= min(tokens_in, tokens_out) <= max(tokens_in, tokens_out) <= MOST
                usage = (tokens_in, tokens_out) if counted else None
        text, refusal = (one if one is None else self.redact(str(one)) for one in (text, refusal))
        return Answer(text, reason in CUT, refusal, alternatives, usage)

    def _stop_sending(self, name: str, note: str) -> None:
        with self._lock:
            if name in self.refused_parameters:
                return
            self.refused_parameters.append(name)
        console.print(note, style="yellow")

    def _note(self, what: str) -> None:
        """Print why a request got no answer: the first of them, then at most one every SECONDS_BETWEEN_NOTES."""
        with self._lock:
            self._unsaid += 1
            now = time.monotonic()
            if now < self._next_note:
                return
            more = f" ({self._unsaid} such requests since the last line)" if self._unsaid > 1 else ""
            self._unsaid, self._next_note = 0, now + SECONDS_BETWEEN_NOTES
        console.print(what + more, style="yellow")

    def _wait_for_a_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + self._pause
        time.sleep(start - now)

    def redact(self, text: str) -> str:
        """The text without the key, because servers may quote it in error messages and elsewhere; in valid Unicode.

        Real keys are long. A short key (`EMPTY`, `x`) is a placeholder and may be part of an answer, so it stays.
        """
        text = text.replace(self._key, "[key]") if len(self._key) >= 16 else text
        return str(valid_unicode(text))


# ---------------------------------------------------------------------------------------------------- what servers send


def text_in(content: Any) -> str | None:
    """The text of a message, which may come in parts; parts that are no text, such as reasoning, are left out."""
    if content is None or isinstance(content, str):
        return content
    kinds = ("text", "output_text")
    return "".join(part["text"] for part in content if part.get("type", "text") in kinds)


def likely_tokens(likeliest: list[Any]) -> dict[str, float]:
    """Tokens and their log-probabilities; one of probability 0 is as one that is not there. Raises one of several
    errors for what are none."""
    found = {str(one["token"]): float(one["logprob"]) for one in likeliest}
    if not all(logprob < 1e-3 for logprob in found.values()):  # the rest of a rounding may be above 0
        raise ValueError("log-probabilities above 0")
    return {token: logprob for token, logprob in found.items() if logprob > -math.inf}


def words_of(content: Any, depth: int = 0) -> str:
    """What a server says is wrong, without the JSON around it, whatever its shape."""
    if isinstance(content, str):
        return " ".join(content.split())[:MOST_WORDS]
    if depth == DEEPEST:
        return "..."
    if isinstance(content, list):
        return "; ".join(words_of(item, depth + 1) for item in content[:10])[:MOST_WORDS]
    if not isinstance(content, dict) or not any(content.get(key) for key in WORDS):
        try:
            return as_json(content)[:MOST_WORDS]
        except RecursionError:
            return "..."
    said = "; ".join(dict.fromkeys(words_of(content[key], depth + 1) for key in WORDS if content.get(key)))
    if isinstance(content.get("loc"), list):  # as FastAPI names a parameter
        said = f"{'.'.join(map(str, content['loc']))}: {said}"
    return f"{said} ({content['code']})" if isinstance(content.get("code"), str) else said


def status_in(error: Any) -> int:
    """The HTTP status that an error object names; 400 where it names none."""
    code = str(error.get("code") if isinstance(error, dict) else error)
    return int(code) if re.fullmatch("[45][0-9][0-9]", code) else 400


def wait_in(headers: Mapping[str, str]) -> float | None:
    """The seconds to wait that a response asks for; None where it does not say."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if re.fullmatch(r"\d+(\.\d+)?", headers.get(name, "")):
            return float(headers[name]) * unit
    return None


def refused_parameter(fault: Fault, names: Sequence[str]) -> str | None:
    """The first of the parameters that a server says it does not take."""
    said = fault.reason.lower()
    if fault.status not in (400, 422) or not REFUSES.search(said):
        return None
    return next((name for name in names if re.search(rf"\b{name}\b", said)), None)


# ---------------------------------------------------------------------------------------------------- many requests


def ask_all(
    ask: Callable[[Question], Found], questions: Sequence[Question], at_a_time: int, *, give_up_after: int
) -> Iterator[tuple[int, Found | NoAnswer] | None]:
    """Ask all questions, some at a time. Gives the place of each with what was found, or with why nothing was, as it
    comes; and None whenever nothing has come for BEAT seconds.

    If `give_up_after` in a row find nothing, or `ask` raises something else than NoAnswer, no other question is asked;
    once those under way have been given, UserError is raised, or that.
    """
    done: SimpleQueue[tuple[int, Found | BaseException]] = SimpleQueue()
    places, lock, stop = iter(range(len(questions))), Lock(), Event()
    asked = given = in_a_row = 0
    fatal: BaseException | None = None

    def work() -> None:
        nonlocal asked
        while True:
            with lock:
                place = None if stop.is_set() else next(places, None)
                if place is None:
                    return
                asked += 1
            try:
                done.put((place, ask(questions[place])))
            except BaseException as error:
                done.put((place, error))

    for _ in range(min(at_a_time, len(questions))):
        Thread(target=work, daemon=True).start()  # the end of the command does not wait for them
    try:
        while given < (asked if stop.is_set() else len(questions)):
            try:
                place, found = done.get(timeout=BEAT)
            except Empty:
                yield None
                continue
            given += 1
            if isinstance(found, NoAnswer):
                in_a_row += 1
                if in_a_row == give_up_after:
                    fatal = fatal or UserError(
                        f"{in_a_row} requests failed in a row, the last: {found}\n"
                        "Check the server, the model's name and OPENAI_API_KEY. A rerun asks only for what is missing."
                    )
            elif isinstance(found, BaseException):
                fatal = fatal or found
            else:
                in_a_row = 0
            if fatal:
                with lock:
                    stop.set()
            if isinstance(found, NoAnswer) or not isinstance(found, BaseException):
                yield place, found
    finally:
        with lock:
            stop.set()
    if fatal:
        raise fatal
