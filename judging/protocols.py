"""The judge's prompts and how its replies are read: pairwise, AlpacaEval 2, Arena-Hard, MT-Bench, and your own.

This repo words every prompt itself. The question, the form of the verdict and its arithmetic follow the benchmarks.
docs/judging.md explains how far the results can be compared with the published leaderboards.
"""

import math
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeVar

from utils import Message

T = TypeVar("T")
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


REASONING = r"(?i)[<\[]{}(?:think|thinking|thought|reasoning)[>\]]"  # the tags around it, with / or without
LEAD = r"(?:(?:my |the )?(?:final )?(?:answer|choice|decision|judge?ment|pick|verdict)(?: is)?:?[\s*_\"'`]{0,4})?"
LEAST_MASS = 0.5  # probability of both names of AlpacaEval's models; GPT-4's published verdicts have 0.72 and more

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
        """The decision in a reply. A reply without a verdict is refused or malformed; nothing is guessed.

        A reply that was cut has no verdict, unless log-probabilities of its first token are all that is asked for.
        Verdicts in the judge's reasoning (`<think>` and the like) do not count.
        """
        if reply.cut and not self.logprobs:
            return JudgeOutput(None, reply.text, "refused" if reply.refused else "malformed")
        said = reply._replace(text=without_reasoning(reply.text))
        value, weight = (None, 1) if reply.refused else self.verdict(said)
        if value is not None:
            return JudgeOutput(value, reply.text, weight=weight)
        refused = reply.refused or REFUSAL_OPENING.match(said.text)
        return JudgeOutput(None, reply.text, "refused" if refused else "malformed")

    def verdict(self, reply: Reply) -> tuple[float | None, int]:
        """(preference for the first response, weight). The preference is None if the reply states none.

        A verdict is a line that is nothing but the name of a response, be it in bold, in quotes or after "Verdict:". If
        several lines name different responses, there is none.
        """
        name = re.compile(rf"(?i:{LEAD}response)[\s#*_]{{1,3}}([{re.escape(self.labels)}])")
        lines = re.sub(r":[\s*_]*\n\s*", ": ", reply.text).splitlines()  # a colon's line goes on in the next
        found = [name.fullmatch(line.strip(" \t*_`.!\"'“”‘’")) for line in lines]
        label = the_one(match[1] for match in found if match)
        return (None if label is None else float(label == self.labels[0])), 1


class AlpacaEval(PromptTemplate):
    """AlpacaEval 2's weighted verdict: one token, `m` or `M`, and the judge's probability of each.

    The preference for the first response is P(m) / (P(m) + P(M)). A token that is not among the candidates has
    probability 0 (alpaca_eval 0.6.6, `logprob_parser`). Where both together have less than LEAST_MASS, the judge was
    about to say something else, and the reply is malformed.
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
        likely = dict.fromkeys("mM", 0.0)
        for token, logprob in (reply.alternatives or {}).items():
            if token.strip() in likely:
                likely[token.strip()] += math.exp(logprob)
        mass = sum(likely.values())
        return (likely["m"] / mass if mass >= LEAST_MASS else None), 1


class ArenaHard(PromptTemplate):
    """Arena-Hard's five verdicts: [[A>>B]], [[A>B]], [[A=B]], [[B>A]], [[B>>A]]. A strong one (>>) counts three times.

    Single brackets count if there are no double ones. A reply with different verdicts has none (as in arena-hard-auto
    until v0.1; v2.0 takes the last).
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
        for brackets in (2, 1):
            verdicts = [parse_arena_verdict(mark.upper()) for mark in marks(reply.text, brackets)]
            if given := [verdict for verdict in verdicts if verdict[0] is not None]:
                return the_one(given) or (None, 1)
        return None, 1


def parse_arena_verdict(label: str) -> tuple[float | None, int]:
    """(preference for A, weight) of a verdict such as `A>>B`. The preference is None for any other text."""
    if label in ("A=B", "B=A"):
        return 0.5, 1
    match = re.fullmatch(r"([AB])(>{1,2}|<{1,2})([AB])", label)
    if not match or match[1] == match[3]:
        return None, 1
    return float((match[1] == "A") == (match[2][0] == ">")), 3 if len(match[2]) == 2 else 1


class MTBench(PromptTemplate):
    """MT-Bench's grade of a single answer, from 1 to 10: [[n]]. A reply with different grades has none (FastChat takes
    the first, which may be a citation).

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
        grades = [re.fullmatch(r"(\d{1,2}(?:\.\d+)?)(?:/10)?", mark, re.ASCII) for mark in marks(reply.text, 2)]
        score = the_one(float(grade[1]) for grade in grades if grade)
        return (score if score is not None and 1 <= score <= 10 else None), 1


def without_reasoning(text: str) -> str:
    """What a judge says once it has thought: after the last end of a block such as <think>, before one that is open.

    The block's beginning may be missing, since some models' prompts end with it.
    """
    after = re.split(REASONING.format("/"), text)[-1]
    return re.split(REASONING.format(""), after, maxsplit=1)[0]


def marks(text: str, brackets: int) -> list[str]:
    """What stands between so many square brackets, without spaces and markdown."""
    found = re.findall(r"\[" * brackets + r"([^\[\]\n]{1,20})" + r"\]" * brackets, text)
    return [re.sub(r"[\s*_`$]", "", mark) for mark in found]


def the_one(found: Iterable[T]) -> T | None:
    """What all that was found is; None if it differs, or nothing was."""
    different = set(found)
    return different.pop() if len(different) == 1 else None


PROTOCOLS = {"pairwise": PromptTemplate, "alpacaeval": AlpacaEval, "arenahard": ArenaHard, "mtbench": MTBench}


def transcript(messages: list[Message]) -> str:
    """A conversation as text, with the role before each message. A single message has no role before it."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
