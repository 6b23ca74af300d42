"""Judge pairs of answers: draw which one the judge sees first, send requests in parallel, and save every reply."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

from data import toy
from judging.cost import Budget, TokenUsage, estimate_usage
from judging.protocols import JudgeInput, JudgeOutput, PromptTemplate, Reply, Status
from sampling import openai_server
from sampling.openai_server import GIVE_UP_AFTER, NoAnswer, Server, ask_all
from utils import (
    Message,
    UserError,
    console,
    fingerprint,
    json_lines_file,
    log_lines,
    progress_bar,
    write_log_lines,
)

Judge = Callable[[JudgeInput], JudgeOutput]  # may raise NoAnswer


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
    unique = dict(zip(keys, judge_inputs))
    places = list(unique)
    outputs: dict[str, JudgeOutput] = {}
    with progress_bar("judging", len(unique), 0) as advance:
        patience = min(GIVE_UP_AFTER, len(unique))
        for found in ask_all(judge, list(unique.values()), concurrency, give_up_after=patience):
            if found:
                place, said = found
                outputs[places[place]] = JudgeOutput(None, str(said), "failed") if isinstance(said, NoAnswer) else said
            advance(len(outputs), None)
    return [outputs[key] for key in keys]


def toy_judge(judge_input: JudgeInput) -> JudgeOutput:
    """Apply the toy language's rules to the last message and the two responses."""
    verdict = toy.judge(judge_input.messages[-1]["content"], *judge_input.responses)
    return JudgeOutput({"a": 1.0, "b": 0.0}.get(verdict, 0.5), verdict)


# ------------------------------------------------------------------------------------------------------ saved replies


class VerdictLog:
    """The file of replies so far, one JSON line each: key, model, messages, reply, refused, alternatives, cut, tokens.

    A line that is damaged, or left incomplete by a killed run, is reported and its request is sent again. Who `writes`
    has the file alone until the end of `with`, so that no reply is paid for twice: for another, UserError is raised. A
    file without a reply does not stay.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        self._lock = Lock()
        readable = path if path.exists() else Path(os.devnull)
        self._until_the_end = contextlib.ExitStack()
        self._file = self._until_the_end.enter_context(json_lines_file(path) if writes else readable.open("rb"))
        damaged = 0
        for record in log_lines(self._file):
            match record:
                case {"key": str(key), "reply": str(text), "refused": bool(refused), "cut": bool(cut)}:
                    assert record is not None
                    self.replies[key] = Reply(text, refused, record.get("alternatives"), cut)
                case _:
                    damaged += 1
        if damaged:
            console.print(f"{path}: ignored {damaged} damaged or incomplete line(s); sending those requests again")

    def __enter__(self) -> "VerdictLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._until_the_end.close()

    def add(self, key: str, model: str, messages: list[Message], reply: Reply, used: TokenUsage) -> None:
        """Save a reply to disk, then keep it in memory."""
        record: dict[str, Any] = {"key": key, "model": model, "messages": messages, "reply": reply.text}
        record |= {"refused": reply.refused, "alternatives": reply.alternatives, "cut": reply.cut}
        record["tokens"] = list(used)
        with self._lock:
            write_log_lines(self._file, record)
            os.fsync(self._file.fileno())
            self.replies[key] = reply


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
    """A chat model behind OpenAI's API or a compatible server. Calling it raises NoAnswer if a request fails.

    Two equal responses are a tie without a request, as in AlpacaEval.
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
            )

    def _send(self, request: dict[str, Any]) -> tuple[Reply, TokenUsage]:
        """Raises NoAnswer if there is no reply, UserError if the server gives no log-probabilities."""
        other = "Name another model or server, or judge with -p pairwise."
        try:
            answer = self.server.ask("/chat/completions", request, OPTIONAL_PARAMETERS)
        except NoAnswer as error:
            if self.template.logprobs and "logprobs" in str(error):
                raise UserError(
                    f"judge {self.model!r} gives no log-probabilities, but this protocol needs them: {error}\n{other}"
                ) from None
            raise
        if self.template.logprobs and answer.refusal is None and answer.alternatives is None:
            raise UserError(
                f"judge {self.model!r} answered without log-probabilities, but this protocol needs them. {other}"
            )
        used = TokenUsage(*answer.usage) if answer.usage else estimate_usage(request["messages"], request["max_tokens"])
        text = answer.text or answer.refusal or ""
        return Reply(text, answer.refusal is not None, answer.alternatives, answer.is_cut), used


def responses_are_equal(judge_input: JudgeInput) -> bool:
    """Whether two responses are the same text, so that there is nothing to judge."""
    return len(judge_input.responses) == 2 and judge_input.responses[0] == judge_input.responses[1]
