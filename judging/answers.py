"""Reading answers to judge: eval.py's samples, AlpacaEval's outputs, Arena-Hard's and MT-Bench's model answers, rows of
prompts with answers, and verdicts that others recorded."""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from judging.judge import Item, Verdict
from judging.protocols import arena_score
from utils import Message, UserError, console, fingerprint, suggest

ONLY = ""  # the key of an answer in a file that has one answer a row


class Row(NamedTuple):
    """A conversation and the answers to its last message, by key. `question`: equal for the turns and draws that belong
    together. `reference`: a right answer, or ""."""

    messages: list[Message]
    answers: dict[str, str]
    question: str
    category: str = ""
    turn: int = 1
    reference: str = ""


class AnswerFile(NamedTuple):
    """A file of answers. `config`: of the run that sampled them, as far as known."""

    path: Path
    name: str
    config: dict[str, Any]
    rows: list[Row]


class Comparison(NamedTuple):
    """Two models' answers to the same prompts. `questions`: which prompt each item belongs to. `skipped`: rows without
    both answers. `verdicts`: those that a file recorded, else None."""

    exp_name: str
    config: dict[str, Any]
    candidate: str
    baseline: str
    items: list[Item]
    questions: list[str]
    skipped: int
    verdicts: list[Verdict] | None = None


# ------------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> Any:
    """The value of a .json, .jsonl (a list of its lines), or one of these with .gz. Raises UserError."""
    try:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
        if ".jsonl" in path.suffixes:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError, EOFError) as error:
        near = "" if path.exists() else suggest(path.name, [other.name for other in path.parent.glob("*.json*")])
        raise UserError(f"cannot read {path}{near}: {error}") from None


def read_answers(
    path: Path, *, history_key: str = "prompt", questions: Path | None = None, references: Path | None = None
) -> AnswerFile:
    """A file of answers in any of the layouts. Raises UserError where it is none of them."""
    content = read_json(path)
    match content:
        case {"config": {"exp_name": str(name)} as config, "samples": [_, *_] as samples} if all_objects(samples):
            return AnswerFile(path, name, config, sample_rows(path, samples, config, history_key))
        case {"config": _} | {"samples": _}:
            raise UserError(
                f"{path} needs `config` with `exp_name`, and objects in a list `samples`; it holds {sorted(content)}"
            )
        case [{"instruction": str(), "output": str()}, *_] if all_objects(content):
            rows = [
                Row(user(text(row, "instruction", path, i)), {ONLY: text(row, "output", path, i)}, row["instruction"])
                for i, row in enumerate(content)
            ]
            return AnswerFile(path, str(content[0].get("generator", stem(path))), {}, rows)
        case [{"model": str(name), "messages": [*_]}, *_] if all_objects(content):
            return AnswerFile(path, name, {}, [answered_row(path, line) for line in content])
        case [{"choices": _}, *_] if all_objects(content):
            name = str(content[0].get("model_id", stem(path)))
            return AnswerFile(path, name, {}, turn_rows(path, content, questions, references))
        case [_, *_] if all_objects(content) and ("messages" in content[0] or history_key in content[0]):
            return AnswerFile(path, stem(path), {}, sample_rows(path, content, {}, history_key))
    raise UserError(
        f"{path}: not a file of answers. Known are eval.py's samples ({{config, samples}}), AlpacaEval's outputs "
        "([{instruction, output, generator}]), Arena-Hard's and MT-Bench's model answers (JSONL with uid, model, "
        "messages or question_id, model_id, choices), and rows with `prompt` or `messages` and answers"
    )


def sample_rows(path: Path, samples: list[dict[str, Any]], config: dict[str, Any], history_key: str) -> list[Row]:
    """Rows of eval.py, and of anything with a conversation or a prompt and answers beside it."""
    rows = []
    for number, sample in enumerate(samples):
        messages = sample_conversation(sample, config, history_key, f"{path}, sample {number}")
        question = sample.get("question_id")
        question = fingerprint(messages) if question is None else str(question)
        answers = {key: value for key, value in sample.items() if isinstance(value, str) and key != history_key}
        rows.append(Row(messages, answers, question))
        match sample:  # several turns: `policy` is the first one
            case {"followups": [_, *_] as prompts, "turns": [first, *later]}:
                for turn, (prompt, answer) in enumerate(zip(prompts, later), 2):
                    messages = [*messages, {"role": "assistant", "content": first}, *user(prompt)]
                    rows.append(Row(messages, {"policy": answer}, question, turn=turn))
                    first = answer
    return rows


def answered_row(path: Path, line: dict[str, Any]) -> Row:
    """A conversation whose last message is the answer, as Arena-Hard keeps it since its version 2."""
    match line.get("messages"):
        case [*messages, {"role": "assistant", "content": {"answer": str(answer)} | str(answer)}] if messages:
            return Row(messages, {ONLY: answer}, question_id(line, path), str(line.get("category", "")))
    raise UserError(f"{path}, question {question_id(line, path)}: `messages` does not end with the assistant's answer")


def sample_conversation(sample: dict[str, Any], config: dict[str, Any], history_key: str, where: str) -> list[Message]:
    """The sample's `messages`; in the older line's files, the prompt up to its last assistant prefix as one message."""
    match sample:
        case {"messages": [_, *_] as messages} if all(
            isinstance(message, dict) and message.keys() >= {"role", "content"} for message in messages
        ):
            return messages
        case _ if "messages" not in sample and isinstance(sample.get(history_key), str):
            history, prefix, rest = sample[history_key].rpartition(config.get("assistant_prefix", "\n<|assistant|>\n"))
            return user((history if prefix else rest).removeprefix(config.get("human_prefix", "\n<|user|>\n")).strip())
    raise UserError(
        f"{where}: needs `messages`, a list of objects with `role` and `content`, or `{history_key}`, a text"
    )


def turn_rows(path: Path, lines: list[Any], questions: Path | None, references: Path | None) -> list[Row]:
    """A row for each turn of each answer; a turn's conversation holds the model's own earlier answers."""
    if questions is None:
        raise UserError(f"{path} holds answers without their questions: name these with --questions question.jsonl")
    asked = {question_id(line, questions): line for line in read_json(questions)}
    known = {}
    if references:
        known = {question_id(line, references): choices_of(line, references)[0] for line in read_json(references)}
    rows = []
    for line in lines:
        number = question_id(line, path)
        if number not in asked:
            raise UserError(f"{path}: question {number!r} is not in {questions}")
        prompts = [asked[number]["prompt"]] if "prompt" in asked[number] else asked[number].get("turns", [])
        prompts = [turn["content"] if isinstance(turn, dict) else turn for turn in prompts]
        category = str(asked[number].get("category", ""))
        for answers in choices_of(line, path):
            messages: list[Message] = []
            for turn, (prompt, answer) in enumerate(zip(prompts, answers), 1):
                messages = [*messages, *user(prompt)]
                reference = known.get(number, [])[turn - 1 : turn]
                rows.append(Row(messages, {ONLY: answer}, number, category, turn, *reference))
                messages = [*messages, {"role": "assistant", "content": answer}]
    return rows


def choices_of(line: dict[str, Any], path: Path) -> list[list[str]]:
    """The texts of all turns, for each draw of a model answer."""
    choices = line.get("choices")
    texts: list[list[Any]] = [
        [turn.get("content") if isinstance(turn, dict) else turn for turn in choice["turns"]]
        for choice in (choices if isinstance(choices, list) else [])
        if isinstance(choice, dict) and isinstance(choice.get("turns"), list)
    ]
    if not texts or not all(isinstance(text, str) for turns in texts for text in turns):
        raise UserError(f"{path}, question {question_id(line, path)}: needs choices: [{{turns: [...]}}] with texts")
    return texts


def question_id(line: Any, path: Path) -> str:
    for key in ("question_id", "uid"):
        if isinstance(line, dict) and key in line:
            return str(line[key])
    raise UserError(f"{path}: a line has neither `question_id` nor `uid`")


def all_objects(rows: list[Any]) -> bool:
    return all(isinstance(row, dict) for row in rows)


def text(row: dict[str, Any], key: str, path: Path, number: int) -> str:
    if not isinstance(row.get(key), str):
        raise UserError(f"{path}, row {number}: `{key}` is not a text")
    return row[key]


def user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def stem(path: Path) -> str:
    return path.name.split(".json")[0]


# -------------------------------------------------------------------------------------------------------------- pairing


def answer(row: Row, key: str) -> str | None:
    return row.answers.get(key, row.answers.get(ONLY))


def check_key(file: AnswerFile, key: str) -> None:
    """Raises UserError where no row has an answer under the key."""
    known = sorted({name for row in file.rows for name in row.answers})
    if key not in known and ONLY not in known:
        raise UserError(f"no sample of {file.path} has the key {key!r}{suggest(key, known)}; their keys are {known}")


def named_apart(files: Sequence[AnswerFile]) -> list[AnswerFile]:
    """The same files; those that share a name have their path for one."""
    names = Counter(file.name for file in files)
    return [file if names[file.name] == 1 else file._replace(name=str(file.path)) for file in files]


def within(file: AnswerFile, candidate: str, baseline: str) -> Comparison:
    """Two keys of one file against each other."""
    if file.rows[0].answers.keys() == {ONLY}:
        raise UserError(f"{file.path} has one answer a row; name the file of the other side with --against")
    for key in (candidate, baseline):
        check_key(file, key)
    both = [row for row in file.rows if candidate in row.answers and baseline in row.answers]
    if not both:
        raise UserError(f"no sample of {file.path} has text under both {candidate!r} and {baseline!r}")
    items = [Item(row.messages, row.answers[candidate], row.answers[baseline]) for row in both]
    questions = [row.question for row in both]
    skipped = len(file.rows) - len(both)
    return Comparison(exp_name(file), file.config, candidate, baseline, items, questions, skipped)


def against(file: AnswerFile, other: AnswerFile, candidate: str, baseline: str) -> Comparison:
    """Two files against each other, on the prompts that both have. Several answers to a prompt are paired in order."""
    check_key(file, candidate)
    check_key(other, baseline)

    def by_prompt(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
        seen: Counter[str] = Counter()
        found = {}
        for row in rows:
            prompt = fingerprint(row.messages)
            found[prompt, seen[prompt]] = row
            seen[prompt] += 1
        return found

    others = by_prompt(other.rows)
    items, questions = [], []
    for prompt, row in by_prompt(file.rows).items():
        one = answer(row, candidate)
        two = answer(others[prompt], baseline) if prompt in others else None
        if one is not None and two is not None:
            items.append(Item(row.messages, one, two))
            questions.append(row.question)
    if not items:
        raise UserError(f"{file.path} and {other.path} have answers to no prompt in common")
    skipped = len(file.rows) - len(items)
    return Comparison(exp_name(file), file.config, file.name, other.name, items, questions, skipped)


def exp_name(file: AnswerFile) -> str:
    return str(file.config.get("exp_name", file.name))


# ---------------------------------------------------------------------------------------------- verdicts that are there


def read_recorded(path: Path) -> Comparison:
    """Verdicts that someone else's judge gave: AlpacaEval's annotations or Arena-Hard's judgments.

    AlpacaEval's `preference` is 1 to 2, 2 for `output_2`, the candidate; 0 is a tie. Anything else (none, or the -1
    that it writes for none) is a malformed verdict, which its board leaves out of `n_total` as well.
    Arena-Hard shows the candidate as B in the first game and as A in the second. Raises UserError on other files.
    """
    content = read_json(path)
    match content:
        case [{"preference": _, "output_1": str(), "output_2": str(), "instruction": str()}, *_] if all_objects(
            content
        ):
            return recorded_annotations(path, content)
        case [{"games": _}, *_] if all_objects(content):
            return recorded_games(path, content)
    raise UserError(
        f"{path}: holds no recorded verdicts. Known are AlpacaEval's annotations ([{{instruction, output_1, output_2, "
        "preference}]) and Arena-Hard's judgments (JSONL with question_id, model, games)"
    )


def recorded_annotations(path: Path, rows: list[dict[str, Any]]) -> Comparison:
    items, verdicts = [], []
    for number, row in enumerate(rows):
        first, second = text(row, "output_1", path, number), text(row, "output_2", path, number)
        items.append(Item(user(text(row, "instruction", path, number)), second, first))
        said = words_of(row.get("raw_completion"))
        try:
            value = float("nan") if row.get("preference") is None else float(row["preference"])
        except (TypeError, ValueError):
            raise UserError(f"{path}, row {number}: `preference` is {row['preference']!r}, not a number") from None
        value = 1.5 if value == 0 else value
        known = 1 <= value <= 2
        verdicts.append(
            Verdict(number, "judged" if known else "malformed", value - 1 if known else None, 1, None, said)
        )
    candidate, baseline = (one_name(rows, n, path) for n in (2, 1))
    questions = [fingerprint(item.messages) for item in items]
    return Comparison(candidate, {}, candidate, baseline, items, questions, 0, verdicts)


def words_of(completion: Any) -> str:
    """The judge's reply in any of the forms that the two have kept it in; "" where they have not."""
    match completion:
        case str(words) | {"text": str(words)} | {"message": {"content": str(words)}} | {"answer": str(words)}:
            return words
    return ""


def one_name(rows: list[dict[str, Any]], side: int, path: Path) -> str:
    """Whose answers `output_<side>` are; where the rows differ in that, the most frequent name, and a line says so."""
    names = Counter(str(row.get(f"generator_{side}", f"output_{side}")) for row in rows)
    name = max(names, key=lambda name: names[name])
    if len(names) > 1:
        console.print(
            f"{path}: `generator_{side}` names {len(names)} models; all its answers count as {name}'s",
            style="yellow",
            markup=False,
        )
    return name


def recorded_games(path: Path, rows: list[dict[str, Any]]) -> Comparison:
    items, verdicts = [], []
    for number, row in enumerate(rows):
        question = question_id(row, path)
        games = row["games"] if isinstance(row.get("games"), list) else []
        if not games:
            raise UserError(f"{path}, question {question}: no games")
        items.append(Item(user(str((games[0] or {}).get("user_prompt") or f"question {question}")), "", ""))
        for game, candidate_first in zip(games, (False, True)):
            value, weight = arena_score(str((game or {}).get("score")))
            said = words_of((game or {}).get("judgment"))
            if value is None:
                verdicts.append(Verdict(number, "malformed", None, 1, candidate_first, said))
            else:
                preference = value if candidate_first else 1 - value
                verdicts.append(Verdict(number, "judged", preference, weight, candidate_first, said))
    name, baseline = str(rows[0].get("model", stem(path))), str(rows[0].get("baseline", "baseline"))
    return Comparison(name, {}, name, baseline, items, [question_id(row, path) for row in rows], 0, verdicts)
