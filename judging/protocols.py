"""What a judge is asked, and how its reply is read: pairwise, AlpacaEval 2, Arena-Hard, MT-Bench, and yours.

The wording of every prompt is this repo's own; what is asked, the form of the verdict and its arithmetic are the
benchmarks'. docs/judging.md says what that means for comparing with their boards.
"""

import math
import re
from typing import Literal, NamedTuple

from utils import Message

Status = Literal["judged", "malformed", "refused", "failed"]


class Shown(NamedTuple):
    """What a judge is shown: a conversation, one or two responses to its last message, a reference answer or ""."""

    messages: list[Message]
    responses: tuple[str, ...]
    reference: str = ""


class Reply(NamedTuple):
    """What a model sent back. `alternatives`: log-probabilities of the likeliest candidates for its first token.
    `refused`: the service itself says that there is no answer. `cut`: it reached its bound of tokens."""

    text: str
    refused: bool = False
    alternatives: dict[str, float] | None = None
    cut: bool = False


class Answer(NamedTuple):
    """What a judge says. `value`: how far it prefers the first response, from 0 to 1 (0.5: a tie), or the score of the
    only one; None unless `status` is "judged". `weight`: how many verdicts it counts as. `text`: its own words."""

    value: float | None
    text: str
    status: Status = "judged"
    weight: int = 1


REFUSAL = re.compile(
    r"\W*(?:i['’]?m (?:very |so )?sorry|sorry|i (?:apologi[sz]e|can ?not|can['’]t|won['’]t|am (?:unable|not able))"
    r"|i['’]m (?:unable|not able)|as an ai\b)",
    re.IGNORECASE,
)


class PromptTemplate:
    """A plain choice between two responses. A subclass may change any attribute or method.

    `max_tokens` bounds the reply; `logprobs`, when above 0, asks for that many candidates of its first token.
    """

    system = ""
    question = "Between the two, which response is more helpful, harmless, and concise? Pick one."
    labels = "12"
    max_tokens = 256
    temperature = 0
    logprobs = 0
    responses = 2  # shown at a time
    both_orders = False  # unless the command line says otherwise

    def request(self, shown: Shown) -> str:
        """The user's message to the judge."""
        one, two = tuple(self.labels)
        first, second = shown.responses
        return (
            f"Here is a conversation with an assistant.\n\n{transcript(shown.messages)}\n\n"
            "The assistant could go on in two ways.\n\n"
            f"[Response {one}]\n{first}\n[End of Response {one}]\n\n"
            f"[Response {two}]\n{second}\n[End of Response {two}]\n\n"
            f'Reply with "Response {one}" or "Response {two}" and nothing else. {self.question}'
        )

    def messages(self, shown: Shown) -> list[Message]:
        """All messages to the judge."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.request(shown)}]

    def read(self, reply: Reply) -> Answer:
        """The verdict in a reply. Nothing is guessed: without a verdict it is refused or malformed."""
        value, weight = (None, 1) if reply.refused else self.verdict(reply)
        if value is not None:
            return Answer(value, reply.text, weight=weight)
        return Answer(None, reply.text, "refused" if reply.refused or REFUSAL.match(reply.text) else "malformed")

    def verdict(self, reply: Reply) -> tuple[float | None, int]:
        """(preference for the first response, weight); the preference is None where the reply does not say.

        A reply that names one response chooses it. In a reply that names both, the last sentence or line that names
        one and ends there counts ("I pick Response 2.").
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

    The preference for the first response is P(m) / (P(m) + P(M)), a token that is not among the candidates counting as
    0 (alpaca_eval 0.6.6, `logprob_parser`). Without either the reply is malformed.
    """

    question = "Which model gave the better response, as a careful human reader would see it?"
    max_tokens = 1
    temperature = 1  # has no influence on log-probabilities
    logprobs = 5
    both_orders = True

    def request(self, shown: Shown) -> str:
        first, second = shown.responses
        return (
            f"Two models were given the same instruction.\n\n# Instruction\n\n{transcript(shown.messages)}\n\n"
            f"# Response of model m\n\n{first}\n\n# Response of model M\n\n{second}\n\n# Task\n\n{self.question} "
            "Answer with the name of that model, m or M: exactly this one letter and nothing else."
        )

    def verdict(self, reply: Reply) -> tuple[float | None, int]:
        first, second = (math.exp((reply.alternatives or {}).get(token, -math.inf)) for token in "mM")
        return (first / (first + second) if first + second else None), 1


class ArenaHard(PromptTemplate):
    """Arena-Hard's verdict of five: [[A>>B]], [[A>B]], [[A=B]], [[B>A]], [[B>>A]]; a strong one counts as three.

    The last one of the reply counts; single brackets where there are no double ones.
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

    def request(self, shown: Shown) -> str:
        first, second = shown.responses
        return (
            f"# Prompt\n\n{transcript(shown.messages)}\n\n# Answer of assistant A\n\n{first}\n\n"
            f"# Answer of assistant B\n\n{second}"
        )

    def verdict(self, reply: Reply) -> tuple[float | None, int]:
        text = reply.text.upper()
        found = re.findall(r"\[\[([AB<>=]+)\]\]", text) or re.findall(r"\[([AB<>=]+)\]", text)
        return arena_score(found[-1]) if found else (None, 1)


def arena_score(label: str) -> tuple[float | None, int]:
    """(preference for A, weight) of a five-way label such as `A>>B`; the preference is None for any other text."""
    if label in ("A=B", "B=A"):
        return 0.5, 1
    match = re.fullmatch(r"([AB])(>{1,2}|<{1,2})([AB])", label)
    if not match or match[1] == match[3]:
        return None, 1
    return float((match[1] == "A") == (match[2][0] == ">")), 3 if len(match[2]) == 2 else 1


class MTBench(PromptTemplate):
    """MT-Bench's single-answer grading, 1 to 10: the first [[n]], else the first [n]. A reference answer is shown where
    the question has one (mathematics, reasoning, coding)."""

    system = "You grade answers of an assistant, impartially."
    max_tokens = 2048
    responses = 1

    def request(self, shown: Shown) -> str:
        (response,) = shown.responses
        reference = f"# Reference answer\n\n{shown.reference}\n\n" if shown.reference else ""
        compare = " Compare it with the reference answer and name its mistakes." if shown.reference else ""
        return (
            f"# Conversation\n\n{transcript(shown.messages)}\n\n{reference}# The assistant's answer to the last message"
            f"\n\n{response}\n\n# Task\n\nHow helpful, relevant, accurate, deep, creative and detailed is this answer?"
            f"{compare} Explain briefly, then grade it from 1 to 10 in exactly this form: [[grade]], say [[5]]."
        )

    def verdict(self, reply: Reply) -> tuple[float | None, int]:
        found = re.search(r"\[\[(\d+\.?\d*)\]\]", reply.text) or re.search(r"\[(\d+\.?\d*)\]", reply.text)
        score = float(found[1]) if found else None
        return (score if score is not None and 1 <= score <= 10 else None), 1


PROTOCOLS = {"pairwise": PromptTemplate, "alpacaeval": AlpacaEval, "arenahard": ArenaHard, "mtbench": MTBench}


def transcript(messages: list[Message]) -> str:
    """A conversation as text; a single message as it is."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
