"""Asking a judge: which response is shown first, many requests at a time, and what was paid for is kept."""

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import openai

from data import toy
from judging.protocols import Answer, PromptTemplate, Reply, Shown, Status
from sampling import openai_server
from sampling.openai_server import GIVE_UP_AFTER, Server
from utils import Message, UserError, console, fingerprint, progress_bar

GARBAGE_TRIES = 3  # requests for one reply where the server answers with something that is none

Judge = Callable[[Shown], Answer]  # may raise JudgeError


class JudgeError(Exception):
    """The judge gave no answer at all."""


class Item(NamedTuple):
    """A conversation and the two answers to its last message."""

    messages: list[Message]
    candidate: str
    baseline: str


class Verdict(NamedTuple):
    """An answer with the order undone. `item`: the number of the item. `preference`: for the candidate, from 0 to 1."""

    item: int
    status: Status
    preference: float | None
    weight: int
    candidate_first: bool | None  # None: not known
    text: str

    @property
    def outcome(self) -> Literal["win", "loss", "tie", "malformed", "refused", "failed"]:
        """The candidate's."""
        if self.status != "judged" or self.preference is None:
            return self.status if self.status != "judged" else "malformed"
        return "win" if self.preference > 0.5 else "loss" if self.preference < 0.5 else "tie"


def verdict_of(answer: Answer, item: int, candidate_first: bool) -> Verdict:
    """Undo the order."""
    value = answer.value
    preference = value if value is None or candidate_first else 1 - value
    return Verdict(item, answer.status, preference, answer.weight, candidate_first, answer.text)


def ask_all(shown: Sequence[Shown], judge: Judge, concurrency: int = 1) -> list[Answer]:
    """The judge's answers, in order. What is equal is asked once.

    Raises UserError when `GIVE_UP_AFTER` requests in a row (or all, if they are fewer) fail.
    """
    keys = [fingerprint(one) for one in shown]

    def ask(one: Shown) -> Answer:
        try:
            return judge(one)
        except JudgeError as error:
            return Answer(None, str(error), "failed")

    answers: dict[str, Answer] = {}
    failed_in_a_row = 0
    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = {pool.submit(ask, one): key for key, one in dict(zip(keys, shown)).items()}
        with progress_bar("judging", len(futures), 0) as advance:
            for future in as_completed(futures):
                answer = answers[futures[future]] = future.result()
                advance(len(answers), None)
                failed_in_a_row = failed_in_a_row + 1 if answer.status == "failed" else 0
                if failed_in_a_row == min(GIVE_UP_AFTER, len(futures)):
                    raise UserError(
                        f"{failed_in_a_row} requests to the judge failed in a row, the last: {answer.text}\n"
                        "Check the server, the model's name and OPENAI_API_KEY; a rerun asks only what is missing."
                    )
    finally:
        pool.shutdown(cancel_futures=True)
    return [answers[key] for key in keys]


def orders(items: Sequence[Item], seed: int, both: bool) -> list[tuple[int, bool]]:
    """What to show: (number of the item, is the candidate first?). Which is first is drawn from the seed and the item;
    with `both`, the other order follows."""
    drawn = [(number, int(fingerprint(seed, item), 16) % 2 == 0) for number, item in enumerate(items)]
    return [(number, first) for number, one in drawn for first in ([one, not one] if both else [one])]


def shown_as(item: Item, candidate_first: bool) -> Shown:
    pair = (item.candidate, item.baseline)
    return Shown(item.messages, pair if candidate_first else pair[::-1])


def judge_pairs(
    items: Sequence[Item], judge: Judge, seed: int = 0, concurrency: int = 1, both_orders: bool = False
) -> list[Verdict]:
    """One verdict per item, in the items' order, or, with `both_orders`, two, one after the other.

    Raises UserError when request after request fails.
    """
    games = orders(items, seed, both_orders)
    answers = ask_all([shown_as(items[number], first) for number, first in games], judge, concurrency)
    return [verdict_of(answer, number, first) for answer, (number, first) in zip(answers, games)]


def toy_judge(shown: Shown) -> Answer:
    """The toy language's rules, applied to the last message."""
    verdict = toy.judge(shown.messages[-1]["content"], *shown.responses)
    return Answer({"a": 1.0, "b": 0.0}.get(verdict, 0.5), verdict)


# ------------------------------------------------------------------------------------------------------- what is paid

PRICES = {  # US dollars per million tokens, (input, output): third parties' lists of 2026, not read from OpenAI
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4-turbo": (10.0, 30.0),
    "gpt-4-1106-preview": (10.0, 30.0),
    "gpt-4": (30.0, 60.0),
    "gpt-4-0613": (30.0, 60.0),
    "gpt-5": (1.25, 10.0),
    "gpt-5-mini": (0.25, 2.0),
    "gpt-5-nano": (0.05, 0.4),
}


class Tokens(NamedTuple):
    """Counts of a request's tokens."""

    input: int
    output: int

    def cost(self, prices: tuple[float, float]) -> float:
        """US dollars; prices are per million."""
        return (self.input * prices[0] + self.output * prices[1]) / 1e6


def expected_tokens(messages: list[Message], max_tokens: int) -> Tokens:
    """A guess at a request's tokens before it is sent: 4 bytes of UTF-8 each, and a reply of full length."""
    return Tokens(sum(len(message["content"].encode()) // 4 + 8 for message in messages), max_tokens)


class Budget:
    """What the requests of this run cost, and a limit that they do not pass.

    A request is let through only while what was spent and what is set aside for all on their way stay within the
    limit. Without prices tokens are counted, and nothing else.
    """

    def __init__(self, prices: tuple[float, float] | None, limit: float | None = None) -> None:
        self.prices, self.limit = prices, limit
        self.requests, self.spent = 0, Tokens(0, 0)
        self._reserved = 0.0
        self._lock = Lock()

    @property
    def cost(self) -> float | None:
        """US dollars spent; None where no prices are known."""
        return self.spent.cost(self.prices) if self.prices else None

    def reserve(self, expected: Tokens) -> float:
        """The dollars set aside for a request: twice its expected input, since the guess may fall short, and its
        longest reply. Raises UserError where they are not there any more."""
        amount = Tokens(2 * expected.input, expected.output).cost(self.prices) if self.prices else 0.0
        with self._lock:
            if self.limit is not None and (self.cost or 0.0) + self._reserved + amount > self.limit:
                raise UserError(
                    f"--max_cost {self.limit:g}: stopped after {self.requests:,} requests and ${self.cost or 0:.4f}; "
                    "the next one could pass the limit. All verdicts are kept: a rerun with a higher limit goes on."
                )
            self._reserved += amount
        return amount

    def settle(self, reserved: float, used: Tokens | None) -> None:
        """A request is done and cost this (None: it failed, and nothing says that it cost anything)."""
        with self._lock:
            self._reserved -= reserved
            if used is not None:
                self.requests += 1
                self.spent = Tokens(self.spent.input + used.input, self.spent.output + used.output)


class VerdictLog:
    """The replies paid for so far, one JSON line each: key, model, messages, reply, refused, alternatives, cut, tokens.

    A line that is not whole (its run was killed) is reported and asked again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        self._lock = Lock()
        damaged = 0
        with (path if path.exists() else Path(os.devnull)).open(errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    reply = Reply(record["reply"], record["refused"], record["alternatives"], record["cut"])
                    self.replies[record["key"]] = reply
                except (ValueError, KeyError, TypeError):
                    damaged += 1
        if damaged:
            console.print(f"{path}: ignored {damaged} unfinished line(s); asking again", markup=False)

    def add(self, key: str, model: str, messages: list[Message], reply: Reply, tokens: Tokens) -> None:
        """Keep a reply, on disk first."""
        record: dict[str, Any] = {"key": key, "model": model, "messages": messages, "reply": reply.text}
        record |= {"refused": reply.refused, "alternatives": reply.alternatives, "cut": reply.cut}
        record["tokens"] = list(tokens)
        with self._lock:
            append_line(self.path, record)
            self.replies[key] = reply


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and flush it, on a line of its own even where a killed run left half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# --------------------------------------------------------------------------------------------------------- the client


def judge_key(model: str, base_url: str | None) -> str:
    """The key; "" for a server of one's own that asks for none. Raises UserError where it cannot do."""
    key = openai_server.key_from_environment()
    if not key and not base_url:
        raise UserError(
            f"judge {model!r} needs an API key: set OPENAI_API_KEY, or name a server that asks for none with "
            "--base_url http://HOST:PORT/v1, or judge the toy language offline with -j toy"
        )
    return key


OPTIONAL = {  # parameters that reasoning models do not take
    "max_tokens": "max_completion_tokens is sent in its place, and bounds its reasoning too (--max_tokens)",
    "temperature": "it judges at its own temperature, so that its verdicts may differ from run to run",
}


class OpenAIJudge:
    """A chat model behind OpenAI's API or a server that speaks it; raises JudgeError when a request fails for good.

    A reply that is no chat completion is asked for again twice. Two equal answers are a tie that nobody is asked about,
    as in AlpacaEval.
    """

    def __init__(self, model: str, template: PromptTemplate, log: VerdictLog, budget: Budget, server: Server) -> None:
        self.model, self.template, self.log, self.budget, self.server = model, template, log, budget, server
        self._said_that_replies_are_cut = False

    def request(self, shown: Shown) -> dict[str, Any]:
        """What is asked, in the API's words."""
        template = self.template
        logprobs = {"logprobs": True, "top_logprobs": template.logprobs} if template.logprobs else {}
        return {
            "model": self.model,
            "messages": template.messages(shown),
            "temperature": template.temperature,
            "max_tokens": template.max_tokens,
            **logprobs,
        }

    def key(self, shown: Shown) -> str:
        """The reply's name in the log."""
        return fingerprint(str(self.server.client.base_url), self.request(shown))

    def missing(self, shown: Sequence[Shown]) -> list[Shown]:
        """Those that have to be asked, each once: they differ, and the log has no reply to them."""
        asked = [one for one in shown if not even(one)]
        return list({key: one for one in asked if (key := self.key(one)) not in self.log.replies}.values())

    def expected(self, shown: Shown) -> Tokens:
        return expected_tokens(self.template.messages(shown), self.template.max_tokens)

    def __call__(self, shown: Shown) -> Answer:
        if even(shown):
            return Answer(0.5, "")
        key = self.key(shown)
        if key not in self.log.replies:
            request = self.request(shown)
            reserved = self.budget.reserve(self.expected(shown))
            tokens = None
            try:
                reply, tokens = self._ask(request)
                self.log.add(key, self.model, request["messages"], reply, tokens)
            finally:
                self.budget.settle(reserved, tokens)
        reply = self.log.replies[key]
        answer = self.template.read(reply)
        too_short = reply.cut and answer.status == "malformed" and not self.template.logprobs
        if too_short and not self._said_that_replies_are_cut:
            self._said_that_replies_are_cut = True
            console.print(
                f"{self.model}: a reply without a verdict was cut at --max_tokens {self.template.max_tokens}; "
                "a judge that reasons at length needs more",
                style="yellow",
                markup=False,
            )
        return answer

    def _ask(self, request: dict[str, Any]) -> tuple[Reply, Tokens]:
        for attempt in range(GARBAGE_TRIES):
            try:
                return self._reply(self._create(request), request)
            except openai.APIResponseValidationError:
                pass
            except openai.OpenAIError as error:
                raise JudgeError(self.server.reason(error)) from None
            except (AttributeError, IndexError, TypeError, ValueError):  # the client does not check what it is sent
                pass
            time.sleep(0.2 * 2**attempt)
        raise JudgeError("what the server sent is not a chat completion")

    def _create(self, request: dict[str, Any]) -> Any:
        """Send it. Raises UserError where the server has no log-probabilities to give."""
        try:
            return self.server.chat(request, OPTIONAL)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            message = self.server.redact(str(error))
            if self.template.logprobs and "logprobs" in message:
                raise UserError(
                    f"judge {self.model!r} gives no log-probabilities, which this protocol reads: {message}\n"
                    "Name another model or server, or judge with -p pairwise."
                ) from None
            raise

    def _reply(self, completion: Any, request: dict[str, Any]) -> tuple[Reply, Tokens]:
        choice = completion.choices[0]
        refused = bool(getattr(choice.message, "refusal", None)) or choice.finish_reason == "content_filter"
        text = choice.message.content or getattr(choice.message, "refusal", None) or ""
        if not isinstance(text, str):
            raise TypeError("the reply is not text")
        alternatives = None
        if self.template.logprobs and not refused:
            if not (choice.logprobs and choice.logprobs.content and choice.logprobs.content[0].top_logprobs):
                raise UserError(
                    f"judge {self.model!r} answered without log-probabilities, which this protocol reads; name another "
                    "model or server, or judge with -p pairwise"
                )
            candidates = choice.logprobs.content[0].top_logprobs
            alternatives = {candidate.token: float(candidate.logprob) for candidate in candidates}
        usage = completion.usage  # not every server reports it
        known = usage is not None and isinstance(usage.prompt_tokens, int) and isinstance(usage.completion_tokens, int)
        expected = expected_tokens(request["messages"], request["max_tokens"])
        tokens = Tokens(usage.prompt_tokens, usage.completion_tokens) if known else expected
        return Reply(self.server.redact(text), refused, alternatives, choice.finish_reason == "length"), tokens


def even(shown: Shown) -> bool:
    """Whether there is nothing to choose between."""
    return len(shown.responses) == 2 and shown.responses[0] == shown.responses[1]
