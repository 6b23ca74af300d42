"""Training data from samples and what a reward model or a judge says of them: pairs, labels, the best, advantages.

Rows are in the layouts of docs/data.md, so that `datasets=[labels.jsonl]` reads them. Beside `labels.jsonl` stands
`labels.made.json`, which says how it was made.
"""

import json
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from judging.answers import AnswerFile, AnswerSet, Comparison, answer_in
from judging.judge import Verdict
from judging.protocols import JudgeOutput
from utils import (
    Message,
    UserError,
    as_json,
    atomic_write,
    console,
    file_digest,
    fingerprint,
    require_writable,
    write_json,
)

Row = dict[str, Any]
NO_ANSWER, ONE_ANSWER, EQUAL, TOO_CLOSE = "no answer", "one answer", "equal rewards", "a margin below min_margin"
NO_SIDE = "neither above nor below"


class Recipe(NamedTuple):
    """What training data is made of rewards; the keys of judging/settings.py."""

    label_as: Literal["pairs", "binary", "best", "advantages"]
    rejected: Literal["worst", "random"] = "worst"
    min_margin: float = 0.0
    threshold: float | None = None
    seed: int = 0


ONLY_FOR = {"rejected": "pairs", "min_margin": "pairs", "threshold": "binary"}  # keys by the labels that they are for


def require_used(recipe: Recipe) -> None:
    """Raises UserError for a key that does nothing for these labels."""
    for key, kind in ONLY_FOR.items():
        if recipe.label_as != kind and getattr(recipe, key) != Recipe._field_defaults[key]:
            raise UserError(f"{key}={getattr(recipe, key)} does nothing with as={recipe.label_as}; it is for as={kind}")


class Text(NamedTuple):
    """An answer to the last message of a conversation, None where there is none, and where it is from."""

    messages: list[Message]
    answer: str | None
    place: str


class Scored(NamedTuple):
    """A prompt, the answers to it, and the reward of each."""

    messages: list[Message]
    answers: list[str]
    rewards: list[float]


@dataclass
class Labels:
    """Rows of training data, and figures on where they come from."""

    kind: str  # of the rows: a Recipe's label_as
    rows: list[Row] = field(default_factory=list)
    unit: str = "prompts"  # what they come from, or "comparisons" that a judge made,
    asked: int = 0  # and how many there were
    rewards: list[float] = field(default_factory=list)  # of all answers
    margins: list[float] = field(default_factory=list)  # of the pairs, where rewards made them
    without: Counter[str] = field(default_factory=Counter)  # why so many of `asked` gave no row
    left_out: Counter[str] = field(default_factory=Counter)  # why so many answers were of no use

    def figures(self) -> dict[str, Any]:
        """As JSON."""
        spreads = {"rewards": self.rewards, "margins": self.margins}
        return {
            self.unit: self.asked,
            "rows": len(self.rows),
            **{name: mean_and_deviation(values) for name, values in spreads.items() if values},
            "without": dict(self.without),
            "left_out": dict(self.left_out),
        }

    def line(self) -> str:
        """The figures in words."""
        parts = [f"{len(self.rows):,} rows ({self.kind}) from {self.asked:,} {self.unit}"]
        for name, values in (("rewards", self.rewards), ("margins", self.margins)):
            if values:
                parts.append(f"{name} " + ", ".join(f"{key} {x:.4g}" for key, x in mean_and_deviation(values).items()))
        for title, counts in (("without a row", self.without), ("answers left out", self.left_out)):
            if counts:
                parts.append(f"{title}: " + ", ".join(f"{count:,} ({reason})" for reason, count in counts.items()))
        return "; ".join(parts)


def mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    """The mean and the standard deviation of all these values, of which there is one at least."""
    return {"mean": statistics.fmean(values), "deviation": statistics.pstdev(values)}


# --------------------------------------------------------------------------------------------------------- from rewards


def texts_of(files: Sequence[AnswerFile]) -> list[Text]:
    """The policies' answers in files of them, in their order."""
    return [
        Text(row.messages, text if text and text.strip() else None, f"{file.path}, answer {number}")
        for file in files
        for number, row in enumerate(file.rows, 1)
        for text in [answer_in(row, "policy")]
    ]


def require_enough(texts: Sequence[Text], recipe: Recipe, where: str) -> None:
    """Raises UserError where there is no answer to label, or none to compare another one to the same prompt with."""
    answered = Counter(fingerprint(text.messages) for text in texts if text.answer is not None)
    if not answered:
        raise UserError(f"{where}: no answer to label")
    alone = recipe.label_as == "best" or (recipe.label_as == "binary" and recipe.threshold is not None)
    if not alone and max(answered.values()) == 1:
        other = "; as=binary ++threshold=NUMBER needs none" if recipe.label_as == "binary" else ""
        raise UserError(
            f"{where}: as={recipe.label_as} compares answers to the same prompt, and each prompt has one: eval.py "
            f"++samples=4 draws four{other}"
        )


def by_prompt(texts: Sequence[Text], rewards: Sequence[float | None]) -> list[Scored]:
    """The answers with a reward, those to one prompt together, from whatever file they are."""
    found: dict[str, Scored] = {}
    for text, reward in zip(texts, rewards, strict=True):
        own = found.setdefault(fingerprint(text.messages), Scored(text.messages, [], []))
        if text.answer is not None and reward is not None:
            own.answers.append(text.answer)
            own.rewards.append(reward)
    return list(found.values())


def label(prompts: Iterable[Scored], recipe: Recipe) -> Labels:
    """The training data that the recipe names, from what reward each answer got."""
    found = Labels(recipe.label_as)
    for prompt in prompts:
        found.asked += 1
        found.rewards += prompt.rewards
        rows, reason = MAKERS[recipe.label_as](prompt, recipe, found)
        found.rows += rows
        if not rows:
            found.without[reason] += 1
    return found


def pairs(prompt: Scored, recipe: Recipe, found: Labels) -> tuple[list[Row], str]:
    """The best answer, and one that is worse by at least `min_margin`: the worst, or any, drawn at random."""
    if reason := nothing_to_compare(prompt):
        return [], reason
    rewards = prompt.rewards
    best = rewards.index(max(rewards))
    worse = [i for i, reward in enumerate(rewards) if reward < rewards[best]]
    worse = [i for i in worse if rewards[best] - rewards[i] >= recipe.min_margin]
    if not worse:
        return [], TOO_CLOSE
    if recipe.rejected == "random":
        other = random.Random(fingerprint(recipe.seed, prompt.messages)).choice(worse)
    else:
        other = min(worse, key=rewards.__getitem__)
    found.margins.append(rewards[best] - rewards[other])
    scores = {"score_chosen": rewards[best], "score_rejected": rewards[other]}
    return [pair_row(prompt.messages, prompt.answers[best], prompt.answers[other]) | scores], ""


def binary(prompt: Scored, recipe: Recipe, found: Labels) -> tuple[list[Row], str]:
    """Each answer above the threshold, or the mean of its prompt, as a good one, each below as a bad one."""
    middle = recipe.threshold
    if middle is None:
        if reason := nothing_to_compare(prompt):
            return [], reason
        middle = statistics.mean(prompt.rewards)
    labelled = [(text, reward) for text, reward in zip(prompt.answers, prompt.rewards) if reward != middle]
    if ties := len(prompt.answers) - len(labelled):
        found.left_out[NO_SIDE] += ties
    rows = [labelled_row(prompt.messages, text, reward > middle, reward) for text, reward in labelled]
    return rows, NO_SIDE if prompt.answers else NO_ANSWER


def best(prompt: Scored, recipe: Recipe, found: Labels) -> tuple[list[Row], str]:  # noqa: ARG001
    """The best answer, of several with the same reward the first."""
    if not prompt.answers:
        return [], NO_ANSWER
    reward = max(prompt.rewards)
    text = prompt.answers[prompt.rewards.index(reward)]
    return [{"messages": [*prompt.messages, {"role": "assistant", "content": text}], "score": reward}], ""


def advantages(prompt: Scored, recipe: Recipe, found: Labels) -> tuple[list[Row], str]:  # noqa: ARG001
    """Each answer; its score is its reward less the prompt's mean, in standard deviations (of n - 1; Shao et al. 2024,
    2402.03300, Sec. 4.1.2), and its label whether that is above 0."""
    if reason := nothing_to_compare(prompt):
        return [], reason
    mean, deviation = statistics.mean(prompt.rewards), statistics.stdev(prompt.rewards)
    scored = [(text, reward, (reward - mean) / deviation) for text, reward in zip(prompt.answers, prompt.rewards)]
    return [labelled_row(prompt.messages, text, score > 0, score) | {"reward": r} for text, r, score in scored], ""


MAKERS = {"pairs": pairs, "binary": binary, "best": best, "advantages": advantages}


def nothing_to_compare(prompt: Scored) -> str:
    """Why the answers of a prompt cannot be told apart; empty if they can."""
    if len(prompt.answers) < 2:
        return ONE_ANSWER if prompt.answers else NO_ANSWER
    return EQUAL if len(set(prompt.rewards)) == 1 else ""


def pair_row(messages: list[Message], chosen: str, rejected: str) -> Row:
    return {"prompt": messages, "chosen": chosen, "rejected": rejected}


def labelled_row(messages: list[Message], text: str, is_good: bool, score: float) -> Row:
    return {"prompt": messages, "completion": text, "label": is_good, "score": score}


# --------------------------------------------------------------------------------------------------------- from a judge


def pairs_of_verdicts(comparisons: Sequence[Comparison], verdicts: Sequence[list[Verdict]]) -> Labels:
    """A pair for each item whose verdicts all prefer the same answer: both orders, where both were asked."""
    found = Labels("pairs", unit="comparisons")
    for comparison, group in zip(comparisons, verdicts, strict=True):
        by_item: dict[int, list[Verdict]] = {}
        for verdict in group:
            by_item.setdefault(verdict.item, []).append(verdict)
        found.asked += len(by_item)
        for index, own in by_item.items():
            item, outcomes = comparison.items[index], {verdict.outcome for verdict in own}
            unjudged = [verdict.status for verdict in own if verdict.preference is None]
            if unjudged or len(outcomes) > 1 or outcomes == {"tie"}:
                found.without[unjudged[0] if unjudged else "tie" if len(outcomes) == 1 else "orders disagree"] += 1
            elif not (item.candidate.strip() and item.baseline.strip()):
                found.without[NO_ANSWER] += 1
            else:
                chosen, rejected = (item.candidate, item.baseline)[:: 1 if outcomes == {"win"} else -1]
                found.rows.append(pair_row(item.messages, chosen, rejected))
    return found


def labels_of_grades(graded: Sequence[tuple[AnswerSet, list[JudgeOutput]]], threshold: float | None) -> Labels:
    """Each graded answer as a good or a bad one: above or below the threshold, or the mean grade of its prompt."""
    texts, values = [], []
    unjudged: Counter[str] = Counter()
    for answers, grades in graded:
        for row, grade in zip(answers.rows, grades, strict=True):
            texts.append(Text(row.messages, answer_in(row, answers.key) or None, ""))
            values.append(grade.value)
            if grade.value is None:
                unjudged[grade.status] += 1
    found = label(by_prompt(texts, values), Recipe("binary", threshold=threshold))
    found.left_out += unjudged
    return found


# ------------------------------------------------------------------------------------------------------------ the file


def beside(path: Path, what: str) -> Path:
    """A file beside training data: made.json, which says how it was made, or the log of rewards."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.{what}")


def require_place(path: Path, flag: str, others: Sequence[Path], *, writes: bool = True) -> None:
    """Raises UserError where training data cannot be written, or would replace what was not made so, such as one of the
    other files."""
    if path.suffix != ".jsonl":
        raise UserError(f"{flag}{path}: the name of a file of training data has to end in .jsonl")
    require_no_link(path, beside(path, "made.json"), beside(path, "rewards.jsonl"))
    if path.resolve() in {other.resolve() for other in others}:
        raise UserError(f"{flag}{path} is a file that this command reads, or writes; name another one")
    require_made_here(beside(path, "made.json"), "made")
    if path.exists() and not (made := beside(path, "made.json")).is_file():
        raise UserError(f"{flag}{path} is there already, and no {made.name} beside it says that it was made so")
    if writes:
        require_writable(path, beside(path, "made.json"))


def require_no_link(*paths: Path) -> None:
    """Raises UserError for a link, which writing would replace, or follow to anywhere."""
    for path in paths:
        if path.is_symlink():
            raise UserError(f"{path} is a link to {path.readlink()}; move it, or write to another place")


def require_made_here(path: Path, key: str, identity: dict[str, Any] | None = None) -> None:
    """Raises UserError where a file would replace one that is no JSON object with that key; or, given the reward
    model's `identity`, one that another reward model made: two directories may have one name."""
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or key not in found:
        raise UserError(f"{path} is there already, and not of this command; move it, or write to another place")
    own, other = ((identity or {}).get("reward_model"), found.get("reward_model"))
    if identity is not None and other != own and found.get("weights") != identity["weights"]:
        raise UserError(f"{path} is of {other}, not of {own}; ++exp_name=NAME names a file for these figures")


def publish(path: Path, labels: Labels, how: dict[str, Any]) -> None:
    """Write training data, and beside it how it was made, with the digest of the file; print the figures.

    Raises UserError where there is none.
    """
    if not labels.rows:
        raise UserError(f"nothing to write to {path}: {labels.line()}")
    with atomic_write(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{as_json(row)}\n" for row in labels.rows)
        file.flush()
        digest = file_digest(part)
        write_json(beside(path, "made.json"), {"sha256": digest, "made": how, "figures": labels.figures()})
    console.print(f"{path}: {labels.line()}")
