"""Judge pairs of answers: draw which one the judge sees first, send requests in parallel, and save every reply."""

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
from judging.cost import Budget, TokenUsage, estimate_usage
from judging.protocols import JudgeInput, JudgeOutput, PromptTemplate, Reply, Status
from sampling import openai_server
from sampling.openai_server import GIVE_UP_AFTER, Server
from utils import Message, UserError, console, fingerprint, progress_bar

INVALID_REPLY_TRIES = 3  # requests for one reply while the server sends something that is not a chat completion

Judge = Callable[[JudgeInput], JudgeOutput]  # may raise JudgeError


class JudgeError(Exception):
    """The judge sent no reply."""


class Item(NamedTuple):
    """A conversation and the two answers to its last message."""

    messages: list[Message]
    candidate: str
    baseline: str


class Verdict(NamedTuple):
    """A judge's decision on one item, whichever answer the judge saw first.

    `item`: the item's index. `preference`: for the candidate, from 0 to 1. `candidate_first`: None if unknown.
    """

    item: int
    status: Status
    preference: float | None
    weight: int
    candidate_first: bool | None
    text: str

    @property
    def outcome(self) -> Literal["win", "loss", "tie", "malformed", "refused", "failed"]:
        """The outcome for the candidate."""
        if self.status != "judged" or self.preference is None:
            return self.status if self.status != "judged" else "malformed"
        return "win" if self.preference > 0.5 else "loss" if self.preference < 0.5 else "tie"


def draw_orders(items: Sequence[Item], seed: int, both_orders: bool) -> list[tuple[int, bool]]:
    """A list of (item index, whether the judge sees the candidate first).

    The seed and the item decide which answer is first. With `both_orders`, the opposite order follows each.
    """
    drawn = [(index, int(fingerprint(seed, item), 16) % 2 == 0) for index, item in enumerate(items)]
    return [(index, first) for index, one in drawn for first in ([one, not one] if both_orders else [one])]


def to_judge_input(item: Item, candidate_first: bool) -> JudgeInput:
    """The item with its two answers in the given order."""
    pair = (item.candidate, item.baseline)
    return JudgeInput(item.messages, pair if candidate_first else pair[::-1])


def to_verdict(output: JudgeOutput, item: int, candidate_first: bool) -> Verdict:
    """Turn a preference for the first response into one for the candidate."""
    value = output.value
    preference = value if value is None or candidate_first else 1 - value
    return Verdict(item, output.status, preference, output.weight, candidate_first, output.text)


def judge_pairs(
    items: Sequence[Item], judge: Judge, seed: int = 0, concurrency: int = 1, both_orders: bool = False
) -> list[Verdict]:
    """One verdict per item, in the items' order. With `both_orders`, two per item, one after the other.

    Raises UserError if `GIVE_UP_AFTER` requests in a row fail.
    """
    orders = draw_orders(items, seed, both_orders)
    outputs = run_judge([to_judge_input(items[index], first) for index, first in orders], judge, concurrency)
    return [to_verdict(output, index, first) for output, (index, first) in zip(outputs, orders)]


def run_judge(judge_inputs: Sequence[JudgeInput], judge: Judge, concurrency: int = 1) -> list[JudgeOutput]:
    """The judge's outputs, in the order of the inputs. Equal inputs are judged once.

    Raises UserError if `GIVE_UP_AFTER` requests in a row fail, or all requests if there are fewer.
    """
    keys = [fingerprint(judge_input) for judge_input in judge_inputs]

    def ask(judge_input: JudgeInput) -> JudgeOutput:
        try:
            return judge(judge_input)
        except JudgeError as error:
            return JudgeOutput(None, str(error), "failed")

    outputs: dict[str, JudgeOutput] = {}
    failed_in_a_row = 0
    pool = ThreadPoolExecutor(concurrency)
    try:
        futures = {pool.submit(ask, one): key for key, one in dict(zip(keys, judge_inputs)).items()}
        with progress_bar("judging", len(futures), 0) as advance:
            for future in as_completed(futures):
                output = outputs[futures[future]] = future.result()
                advance(len(outputs), None)
                failed_in_a_row = failed_in_a_row + 1 if output.status == "failed" else 0
                if failed_in_a_row == min(GIVE_UP_AFTER, len(futures)):
                    raise UserError(
                        f"{failed_in_a_row} requests to the judge failed in a row; the last error: {output.text}\n"
                        "Check the server, the model's name and OPENAI_API_KEY. A rerun sends only what is missing."
                    )
    finally:
        pool.shutdown(cancel_futures=True)
    return [outputs[key] for key in keys]


def toy_judge(judge_input: JudgeInput) -> JudgeOutput:
    """Apply the toy language's rules to the last message and the two responses."""
    verdict = toy.judge(judge_input.messages[-1]["content"], *judge_input.responses)
    return JudgeOutput({"a": 1.0, "b": 0.0}.get(verdict, 0.5), verdict)


# ------------------------------------------------------------------------------------------------------ saved replies


class VerdictLog:
    """The file of replies so far, one JSON line each: key, model, messages, reply, refused, alternatives, cut, tokens.

    An incomplete line, left by a killed run, is reported and its request is sent again.
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
            console.print(f"{path}: ignored {damaged} incomplete line(s); sending those requests again", markup=False)

    def add(self, key: str, model: str, messages: list[Message], reply: Reply, used: TokenUsage) -> None:
        """Save a reply to disk, then keep it in memory."""
        record: dict[str, Any] = {"key": key, "model": model, "messages": messages, "reply": reply.text}
        record |= {"refused": reply.refused, "alternatives": reply.alternatives, "cut": reply.cut}
        record["tokens"] = list(used)
        with self._lock:
            append_json_line(self.path, record)
            self.replies[key] = reply


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and flush it to disk. If a killed run left half a line, start a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------- model judge


def judge_api_key(model: str, base_url: str | None) -> str:
    """The API key, or "" for a server that needs none. Raises UserError if it is missing or not valid."""
    key = openai_server.key_from_environment()
    if not key and not base_url:
        raise UserError(
            f"judge {model!r} needs an API key: set OPENAI_API_KEY, or name a server that needs no key with "
            "--base_url http://HOST:PORT/v1, or judge the toy language offline with -j toy"
        )
    return key


OPTIONAL_PARAMETERS = {  # reasoning models do not accept these; what happens without them
    "max_tokens": "max_completion_tokens is sent instead, and limits its reasoning too (--max_tokens)",
    "temperature": "it judges at its own temperature, so its verdicts may differ from run to run",
}


class OpenAIJudge:
    """A chat model behind OpenAI's API or a compatible server. Calling it raises JudgeError if a request fails.

    An invalid reply is requested up to `INVALID_REPLY_TRIES` times. Two equal responses are a tie without a request,
    as in AlpacaEval.
    """

    def __init__(self, model: str, template: PromptTemplate, log: VerdictLog, budget: Budget, server: Server) -> None:
        self.model, self.template, self.log, self.budget, self.server = model, template, log, budget, server
        self._warned_of_cut_replies = False

    def request(self, judge_input: JudgeInput) -> dict[str, Any]:
        """The parameters of /chat/completions."""
        template = self.template
        logprobs = {"logprobs": True, "top_logprobs": template.logprobs} if template.logprobs else {}
        return {
            "model": self.model,
            "messages": template.messages(judge_input),
            "temperature": template.temperature,
            "max_tokens": template.max_tokens,
            **logprobs,
        }

    def log_key(self, judge_input: JudgeInput) -> str:
        """The reply's key in the log: it depends on the server's address and the whole request."""
        return fingerprint(str(self.server.client.base_url), self.request(judge_input))

    def inputs_to_send(self, judge_inputs: Sequence[JudgeInput]) -> list[JudgeInput]:
        """The different inputs that need a request: no equal responses, and no reply in the log."""
        inputs = {self.log_key(one): one for one in judge_inputs if not responses_are_equal(one)}
        return [one for key, one in inputs.items() if key not in self.log.replies]

    def estimate(self, judge_input: JudgeInput) -> TokenUsage:
        """The usage of one request, estimated before it is sent."""
        return estimate_usage(self.template.messages(judge_input), self.template.max_tokens)

    def usage_fields(self) -> dict[str, Any]:
        """The fields of a results line on this run's requests, over all comparisons. `cost` is in US dollars."""
        return {
            "requests": self.budget.requests,
            "tokens_in": self.budget.used.input,
            "tokens_out": self.budget.used.output,
            "cost": self.budget.cost,
            "refused_parameters": self.server.refused_parameters,
        }

    def __call__(self, judge_input: JudgeInput) -> JudgeOutput:
        if responses_are_equal(judge_input):
            return JudgeOutput(0.5, "")
        reply = self._saved_or_new_reply(judge_input)
        output = self.template.read(reply)
        if reply.cut and output.status == "malformed" and not self.template.logprobs:
            self._warn_of_cut_reply()
        return output

    def _saved_or_new_reply(self, judge_input: JudgeInput) -> Reply:
        key = self.log_key(judge_input)
        if key not in self.log.replies:
            request = self.request(judge_input)
            reserved = self.budget.reserve(self.estimate(judge_input))
            used = None
            try:
                reply, used = self._send(request)
                self.log.add(key, self.model, request["messages"], reply, used)
            finally:
                self.budget.settle(reserved, used)
        return self.log.replies[key]

    def _warn_of_cut_reply(self) -> None:
        if not self._warned_of_cut_replies:
            self._warned_of_cut_replies = True
            console.print(
                f"{self.model}: a reply was cut at --max_tokens {self.template.max_tokens} before its verdict; "
                "a judge that reasons at length needs more tokens",
                style="yellow",
                markup=False,
            )

    def _send(self, request: dict[str, Any]) -> tuple[Reply, TokenUsage]:
        """Raises JudgeError if there is no valid reply, UserError if the server gives no log-probabilities."""
        for attempt in range(INVALID_REPLY_TRIES):
            try:
                return self._read_completion(self._complete(request), request)
            except openai.APIResponseValidationError:
                pass
            except openai.OpenAIError as error:
                raise JudgeError(self.server.reason(error)) from None
            except (AttributeError, IndexError, TypeError, ValueError):  # the client does not check what it receives
                pass
            time.sleep(0.2 * 2**attempt)
        raise JudgeError("the server's response is not a chat completion")

    def _complete(self, request: dict[str, Any]) -> Any:
        try:
            return self.server.chat(request, OPTIONAL_PARAMETERS)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            message = self.server.redact(str(error))
            if self.template.logprobs and "logprobs" in message:
                raise UserError(
                    f"judge {self.model!r} gives no log-probabilities, but this protocol needs them: {message}\n"
                    "Name another model or server, or judge with -p pairwise."
                ) from None
            raise

    def _read_completion(self, completion: Any, request: dict[str, Any]) -> tuple[Reply, TokenUsage]:
        choice = completion.choices[0]
        refused = bool(getattr(choice.message, "refusal", None)) or choice.finish_reason == "content_filter"
        text = choice.message.content or getattr(choice.message, "refusal", None) or ""
        if not isinstance(text, str):
            raise TypeError("the reply is not text")
        alternatives = None
        if self.template.logprobs and not refused:
            if not (choice.logprobs and choice.logprobs.content and choice.logprobs.content[0].top_logprobs):
                raise UserError(
                    f"judge {self.model!r} answered without log-probabilities, but this protocol needs them; name "
                    "another model or server, or judge with -p pairwise"
                )
            candidates = choice.logprobs.content[0].top_logprobs
            alternatives = {candidate.token: float(candidate.logprob) for candidate in candidates}
        usage = completion.usage  # not every server reports it
        known = usage is not None and isinstance(usage.prompt_tokens, int) and isinstance(usage.completion_tokens, int)
        estimate = estimate_usage(request["messages"], request["max_tokens"])
        used = TokenUsage(usage.prompt_tokens, usage.completion_tokens) if known else estimate
        return Reply(self.server.redact(text), refused, alternatives, choice.finish_reason == "length"), used


def responses_are_equal(judge_input: JudgeInput) -> bool:
    """Whether two responses are the same text, so that there is nothing to judge."""
    return len(judge_input.responses) == 2 and judge_input.responses[0] == judge_input.responses[1]
