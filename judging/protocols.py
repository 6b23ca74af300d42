"""The judge's prompts and how its replies are read: pairwise, AlpacaEval 2, Arena-Hard, MT-Bench, and your own.

This repo words every prompt itself. The question, the form of the verdict and its arithmetic follow the benchmarks.
docs/judging.md explains how far the results can be compared with the published leaderboards.
"""

import math
import re
from typing import Literal, NamedTuple

from utils import Message

Status = Literal["judged", "malformed", "refused", "failed"]


class JudgeInput(NamedTuple):
    """A conversation, one or two responses to its last message, and a reference answer or ""."""

    messages: list[Message]
    responses: tuple[str, ...]
    reference: str = ""


class Reply(NamedTuple):
    """The text that a judge model sent back.

    `refused`: the server reported a refusal. `alternatives`: log-probabilities of the likeliest first tokens.
    `cut`: the reply reached the limit of tokens.
    """

    text: str
    refused: bool = False
    alternatives: dict[str, float] | None = None
    cut: bool = False


class JudgeOutput(NamedTuple):
    """A judge's decision on one input.

    `value`: with two responses, the preference for the first one, from 0 to 1 (0.5 is a tie); with one, its score.
    None unless `status` is "judged". `text`: the judge's own words. `weight`: how many verdicts this one counts as.
    """

    value: float | None
    text: str
    status: Status = "judged"
    weight: int = 1


REFUSAL_OPENING = re.compile(
    r"\W*(?:i['’]?m (?:very |so )?sorry|sorry|i (?:apologi[sz]e|can ?not|can['’]t|won['’]t|am (?:unable|not able))"
    r"|i['’]m (?:unable|not able)|as an ai\b)",
    re.IGNORECASE,
)


class PromptTemplate:
    """A plain choice between two responses. A subclass may change any attribute or method.

    `max_tokens` limits the reply. `logprobs`: how many of the likeliest first tokens to ask for, 0 for none.
    """

    system = ""
    question = "Between the two, which response is more helpful, harmless, and concise? Pick one."
    labels = "12"
    max_tokens = 256
    temperature = 0
    logprobs = 0
    responses = 2  # in each input: 2 are compared, 1 is graded
    both_orders = False  # the default of --both_orders

    def request(self, judge_input: JudgeInput) -> str:
        """The user's message to the judge."""
        one, two = tuple(self.labels)
        first, second = judge_input.responses
        return (
            f"Here is a conversation with an assistant.\n\n{transcript(judge_input.messages)}\n\n"
            "The assistant could go on in two ways.\n\n"
            f"[Response {one}]\n{first}\n[End of Response {one}]\n\n"
            f"[Response {two}]\n{second}\n[End of Response {two}]\n\n"
            f'Reply with "Response {one}" or "Response {two}" and nothing else. {self.question}'
        )

    def messages(self, judge_input: JudgeInput) -> list[Message]:
        """All messages to the judge."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.request(judge_input)}]

    def read(self, reply: Reply) -> JudgeOutput:
        """The decision in a reply. A reply without a verdict is refused or malformed; nothing is guessed."""
        value, weight = (None, 1) if reply.refused else self.verdict(reply)
        if value is not None:
            return JudgeOutput(value, reply.text, weight=weight)
        refused = reply.refused or REFUSAL_OPENING.match(reply.text)
        return JudgeOutput(None, reply.text, "refused" if refused else "malformed")

    def verdict(self, reply: Reply) -> tuple[float | None, int]:
        """(preference for the first response, weight). The preference is None if the reply states none.

        A reply that names one response chooses it. If a reply names both, the last sentence or line that names only
        one and ends with its name decides ("I pick Response 2.").
        """
        name = rf"(?i:\bresponse)\W{{0,3}}([{re.escape(self.labels)}])"

        def named(text: str) -> set[str]:
            return set(re.findall(rf"{name}\b", text))

        chosen = named(reply.text)
        if len(chosen) == 2:
            sentences = re.split(r"\n+|(?<=[.!?])\s+", reply.text)
            ends = [one for one in sentences if len(named(one)) == 1 and re.search(rf"{name}\W*$", one)]
            chosen = named(ends[-1]) if ends else set()
        return (float(chosen == {self.labels[0]}) if chosen else None), 1


class AlpacaEval(PromptTemplate):
    """AlpacaEval 2's weighted verdict: one token, `m` or `M`, and the judge's probability of each.

    The preference for the first response is P(m) / (P(m) + P(M)). A token that is not among the candidates has
    probability 0; if both are missing, the reply is malformed (alpaca_eval 0.6.6, `logprob_parser`).
    """

    question = "Which model gave the better response, as a careful human reader would see it?"
    max_tokens = 1
    temperature = 1  # has no influence on log-probabilities
    logprobs = 5
    both_orders = True

    def request(self, judge_input: JudgeInput) -> str:
        first, second = judge_input.responses
        return (
            f"Two models were given the same instruction.\n\n# Instruction\n\n{transcript(judge_input.messages)}\n\n"
            f"# Response of model m\n\n{first}\n\n# Response of model M\n\n{second}\n\n# Task\n\n{self.question} "
            "Answer with the name of that model, m or M: exactly this one letter and nothing else."
        )

    def verdict(self, reply: Reply) -> tuple[float | None, int]:
        first, second = (math.exp((reply.alternatives or {}).get(token, -math.inf)) for token in "mM")
        return (first / (first + second) if first + second else None), 1


class ArenaHard(PromptTemplate):
    """Arena-Hard's five verdicts: [[A>>B]], [[A>B]], [[A=B]], [[B>A]], [[B>>A]]. A strong one (>>) counts three times.

    The last verdict in the reply counts. Single brackets count if there are no double ones.
    """

    system = (
        "You judge the answers of two assistants, A and B, to a user's prompt, impartially. First write your own "
        "answer to the prompt. Then compare both answers with yours: point out mistakes, correct them, and weigh "
        "whether each is helpful, relevant and concise, whether it should have asked back, and what is missing. "
        "Neither the order of the answers nor their length is a merit. "
        "End with exactly one of these verdicts:\n"
        "[[A>>B]] A is much better\n[[A>B]] A is slightly better\n[[A=B]] they are about equal\n"
        "[[B>A]] B is slightly better\n[[B>>A]] B is much better"
    )
    max_tokens = 4096
    both_orders = True

    def request(self, judge_input: JudgeInput) -> str:
        first, second = judge_input.responses
        return (
            f"# Prompt\n\n{transcript(judge_input.messages)}\n\n# Answer of assistant A\n\n{first}\n\n"
            f"# Answer of assistant B\n\n{second}"
        )

    def verdict(self, reply: Reply) -> tuple[float | None, int]:
        text = reply.text.upper()
        found = re.findall(r"\[\[([AB<>=]+)\]\]", text) or re.findall(r"\[([AB<>=]+)\]", text)
        return parse_arena_verdict(found[-1]) if found else (None, 1)


def parse_arena_verdict(label: str) -> tuple[float | None, int]:
    """(preference for A, weight) of a verdict such as `A>>B`. The preference is None for any other text."""
    if label in ("A=B", "B=A"):
        return 0.5, 1
    match = re.fullmatch(r"([AB])(>{1,2}|<{1,2})([AB])", label)
    if not match or match[1] == match[3]:
        return None, 1
    return float((match[1] == "A") == (match[2][0] == ">")), 3 if len(match[2]) == 2 else 1


class MTBench(PromptTemplate):
    """MT-Bench's grade of a single answer, from 1 to 10: the first [[n]], else the first [n].

    The judge also sees the reference answer if the question has one (mathematics, reasoning, coding).
    """

    system = "You grade answers of an assistant, impartially."
    max_tokens = 2048
    responses = 1

    def request(self, judge_input: JudgeInput) -> str:
        (response,) = judge_input.responses
        reference = f"# Reference answer\n\n{judge_input.reference}\n\n" if judge_input.reference else ""
        compare = " Compare it with the reference answer and name its mistakes." if judge_input.reference else ""
        return (
            f"# Conversation\n\n{transcript(judge_input.messages)}\n\n{reference}"
            f"# The assistant's answer to the last message\n\n{response}\n\n"
            "# Task\n\nHow helpful, relevant, accurate, deep, creative and detailed is this answer?"
            f"{compare} Explain briefly, then grade it from 1 to 10 in exactly this form: [[grade]], say [[5]]."
        )

    def verdict(self, reply: Reply) -> tuple[float | None, int]:
        found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply.text) or re.search(r"\[(\d+\.?\d*)\]", reply.text)
        score = float(found[1]) if found else None
        return (score if score is not None and 1 <= score <= 10 else None), 1


PROTOCOLS = {"pairwise": PromptTemplate, "alpacaeval": AlpacaEval, "arenahard": ArenaHard, "mtbench": MTBench}


def transcript(messages: list[Message]) -> str:
    """A conversation as text, with the role before each message. A single message has no role before it."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
