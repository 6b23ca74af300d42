"""Read files of answers, pair the answers of two models, and read verdicts that another judge recorded.

Known files: eval.py's samples, AlpacaEval's outputs, Arena-Hard's and MT-Bench's model answers, and rows with a prompt
and answers.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from judging.judge import Item, Verdict
from judging.protocols import JudgeInput, parse_arena_verdict
from utils import Message, UserError, console, fingerprint, in_words, json_lines, suggest, without_repeats, without_seal

SMALL, MOST_PACKED = 64 << 20, 100  # bytes, and times its size: what a .gz file of texts may unpack to
SINGLE_KEY = ""  # the key of the answers in a file with one answer per row


class Row(NamedTuple):
    """A conversation and the answers to its last message, by key.

    `question`: an id that all turns and samples of one question share. `reference`: a correct answer, or "".
    """

    messages: list[Message]
    answers: dict[str, str]
    question: str
    category: str = ""
    turn: int = 1
    reference: str = ""


class AnswerFile(NamedTuple):
    """A file of answers. `name`: of the run or model. `config`: of the run that sampled them, or {}."""

    path: Path
    name: str
    config: dict[str, Any]
    rows: list[Row]


class Comparison(NamedTuple):
    """Two models' answers to the same prompts.

    `candidate`, `baseline`: names of the models. `questions`: each item's question id. `skipped`: number of rows
    without both answers. `verdicts`: those that a file recorded, else None.
    """

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
    """The content of a .json or .jsonl file (a list of its lines), also with .gz. Raises UserError."""
    if path.is_char_device() or path.is_block_device():  # which may have no end
        raise UserError(f"cannot read {path}: a device, not a file")
    try:
        with unpacked(path) if path.suffix == ".gz" else path.open("rb") as file:
            if ".jsonl" not in path.suffixes:
                content = json.load(file, object_pairs_hook=without_repeats)
                if isinstance(content, dict) and "sampled_at" in content and without_seal(content) is None:
                    console.print(f"{path} was changed after eval.py wrote it", style="yellow")
                return content
            lines = dict(json_lines(file))
    except (OSError, ValueError, EOFError, RecursionError, zlib.error) as error:
        near = "" if path.exists() else suggest(path.name, [other.name for other in path.parent.glob("*.json*")])
        raise UserError(f"cannot read {path}{near}: {in_words(error)}") from None
    if None in lines.values():
        number = next(number for number, value in lines.items() if value is None)
        raise UserError(f"cannot read {path}: line {number} is no JSON, or has a key twice")
    return list(lines.values())


def unpacked(path: Path) -> IO[bytes]:
    """The content of a .gz file. Raises ValueError for a small file that would fill the memory."""
    most = max(SMALL, MOST_PACKED * path.stat().st_size)
    with gzip.open(path) as packed:
        content = packed.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it unpacks to more than {most >> 20:,} MiB, which no text does")
    return io.BytesIO(content)


def read_answers(
    path: Path, *, history_key: str = "prompt", questions: Path | None = None, references: Path | None = None
) -> AnswerFile:
    """Read a file of answers in any known layout. `questions` and `references` are files of MT-Bench or Arena-Hard.

    Raises UserError if the file has no known layout, or no answer.
    """
    found = _parse(path, history_key, questions, references)
    if not found.rows:
        raise UserError(f"{path}: its answers have no turn, so there is nothing to compare")
    return found


def _parse(path: Path, history_key: str, questions: Path | None, references: Path | None) -> AnswerFile:
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
                Row(
                    user_message(text_field(row, "instruction", path, i)),
                    {SINGLE_KEY: text_field(row, "output", path, i)},
                    row["instruction"],
                )
                for i, row in enumerate(content)
            ]
            return AnswerFile(path, str(content[0].get("generator", name_from(path))), {}, rows)
        case [{"model": str(name), "messages": [*_]}, *_] if all_objects(content):
            return AnswerFile(path, name, {}, [conversation_row(path, line) for line in content])
        case [{"choices": _}, *_] if all_objects(content):
            name = str(content[0].get("model_id", name_from(path)))
            return AnswerFile(path, name, {}, multi_turn_rows(path, content, questions, references))
        case [_, *_] if all_objects(content) and ("messages" in content[0] or history_key in content[0]):
            return AnswerFile(path, name_from(path), {}, sample_rows(path, content, {}, history_key))
    raise UserError(
        f"{path}: not a file of answers. Known layouts are eval.py's samples ({{config, samples}}), AlpacaEval's "
        "outputs ([{instruction, output, generator}]), Arena-Hard's and MT-Bench's model answers (JSONL with uid, "
        "model, messages or question_id, model_id, choices), and rows with `prompt` or `messages` and answers"
    )


def sample_rows(path: Path, samples: list[dict[str, Any]], config: dict[str, Any], history_key: str) -> list[Row]:
    """Rows of eval.py's samples, or of any objects with a conversation or a prompt, and answers."""
    rows = []
    for number, sample in enumerate(samples):
        messages = sample_conversation(sample, config, history_key, f"{path}, sample {number}")
        question = sample.get("question_id")
        question = fingerprint(messages) if question is None else str(question)
        answers = {key: value for key, value in sample.items() if isinstance(value, str) and key != history_key}
        rows.append(Row(messages, answers, question))
        match sample:  # with several turns, `policy` answers the first
            case {"followups": [_, *_] as prompts, "turns": [first, *later]}:
                for turn, (prompt, answer) in enumerate(zip(prompts, later), 2):
                    if not all(isinstance(text, str) for text in (first, prompt, answer)):  # a server never gave it
                        break
                    messages = [*messages, {"role": "assistant", "content": first}, *user_message(prompt)]
                    rows.append(Row(messages, {"policy": answer}, question, turn=turn))
                    first = answer
    return rows


def conversation_row(path: Path, line: dict[str, Any]) -> Row:
    """A row from a conversation that ends with the answer, the layout of Arena-Hard since version 2."""
    match line.get("messages"):
        case [*messages, {"role": "assistant", "content": {"answer": str(answer)} | str(answer)}] if is_conversation(
            messages
        ):
            return Row(messages, {SINGLE_KEY: answer}, question_id(line, path), str(line.get("category", "")))
    raise UserError(f"{path}, question {question_id(line, path)}: `messages` does not end with the assistant's answer")


def sample_conversation(sample: dict[str, Any], config: dict[str, Any], history_key: str, where: str) -> list[Message]:
    """The sample's `messages`. Older files have none: the prompt up to its last assistant prefix is one message."""
    match sample:
        case {"messages": messages} if is_conversation(messages):
            return list(messages)
        case _ if "messages" not in sample and isinstance(sample.get(history_key), str):
            history, prefix, rest = sample[history_key].rpartition(config.get("assistant_prefix", "\n<|assistant|>\n"))
            return user_message(
                (history if prefix else rest).removeprefix(config.get("human_prefix", "\n<|user|>\n")).strip()
            )
    raise UserError(
        f"{where}: needs `messages`, a list of objects with the texts `role` and `content`, or `{history_key}`, a text"
    )


def is_conversation(messages: Any) -> bool:
    """Whether it is a list of messages, at least one."""
    return (
        isinstance(messages, list)
        and all_objects(messages)
        and bool(messages)
        and all(isinstance(message.get(key), str) for message in messages for key in ("role", "content"))
    )


def multi_turn_rows(path: Path, lines: list[Any], questions: Path | None, references: Path | None) -> list[Row]:
    """One row per turn of each answer. The conversation of a later turn holds the model's own earlier answers."""
    if questions is None:
        raise UserError(
            f"{path} holds answers without their questions: name the file of questions with --questions question.jsonl"
        )
    asked = {question_id(line, questions): line for line in read_json(questions)}
    known = {}
    if references:
        known = {question_id(line, references): sampled_turns(line, references)[0] for line in read_json(references)}
    rows = []
    for line in lines:
        number = question_id(line, path)
        if number not in asked:
            raise UserError(f"{path}: question {number!r} is not in {questions}")
        turns = [asked[number]["prompt"]] if "prompt" in asked[number] else asked[number].get("turns")
        turns = turns if isinstance(turns, list) else []
        prompts: list[Any] = [turn.get("content") if isinstance(turn, dict) else turn for turn in turns]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"{questions}, question {number}: `prompt` or `turns` holds something else than text")
        category = str(asked[number].get("category", ""))
        for answers in sampled_turns(line, path):
            messages: list[Message] = []
            for turn, (prompt, answer) in enumerate(zip(prompts, answers), 1):
                messages = [*messages, *user_message(prompt)]
                reference = known.get(number, [])[turn - 1 : turn]
                rows.append(Row(messages, {SINGLE_KEY: answer}, number, category, turn, *reference))
                messages = [*messages, {"role": "assistant", "content": answer}]
    return rows


def sampled_turns(line: dict[str, Any], path: Path) -> list[list[str]]:
    """[sample][turn] The texts of a model's answers to one question."""
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


def text_field(row: dict[str, Any], key: str, path: Path, number: int) -> str:
    if not isinstance(row.get(key), str):
        raise UserError(f"{path}, row {number}: `{key}` is not a text")
    return row[key]


def user_message(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def name_from(path: Path) -> str:
    return path.name.split(".json")[0]


# -------------------------------------------------------------------------------------------------------------- pairing


def answer_in(row: Row, key: str) -> str | None:
    """The row's answer under the key, or its single answer."""
    return row.answers.get(key, row.answers.get(SINGLE_KEY))


def check_key(file: AnswerFile, key: str) -> None:
    """Raises UserError if no row has an answer under the key."""
    known = sorted({name for row in file.rows for name in row.answers})
    if key not in known and SINGLE_KEY not in known:
        raise UserError(f"no sample of {file.path} has the key {key!r}{suggest(key, known)}; their keys are {known}")


def with_unique_names(files: Sequence[AnswerFile]) -> list[AnswerFile]:
    """The same files. Files that share a name are named by their paths instead."""
    names = Counter(file.name for file in files)
    return [file if names[file.name] == 1 else file._replace(name=str(file.path)) for file in files]


def pair_keys(file: AnswerFile, candidate: str, baseline: str) -> Comparison:
    """Compare the answers under two keys of one file. Raises UserError if no row has both."""
    if file.rows[0].answers.keys() == {SINGLE_KEY}:
        raise UserError(f"{file.path} has one answer per row; name the file of the baseline's answers with --against")
    for key in (candidate, baseline):
        check_key(file, key)
    both = [row for row in file.rows if candidate in row.answers and baseline in row.answers]
    if not both:
        raise UserError(f"no sample of {file.path} has text under both {candidate!r} and {baseline!r}")
    items = [Item(row.messages, row.answers[candidate], row.answers[baseline]) for row in both]
    questions = [row.question for row in both]
    skipped = len(file.rows) - len(both)
    return Comparison(experiment_name(file), file.config, candidate, baseline, items, questions, skipped)


def pair_files(file: AnswerFile, other: AnswerFile, candidate: str, baseline: str) -> Comparison:
    """Compare one key of each file on the prompts that both files have. Several answers to a prompt pair up in order.

    Raises UserError if there is no such prompt.
    """
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
        first = answer_in(row, candidate)
        second = answer_in(others[prompt], baseline) if prompt in others else None
        if first is not None and second is not None:
            items.append(Item(row.messages, first, second))
            questions.append(row.question)
    if not items:
        raise UserError(f"{file.path} and {other.path} share no prompt that both answer")
    skipped = len(file.rows) - len(items)
    return Comparison(experiment_name(file), file.config, file.name, other.name, items, questions, skipped)


def experiment_name(file: AnswerFile) -> str:
    return str(file.config.get("exp_name", file.name))


def first_items(comparison: Comparison, count: int | None) -> Comparison:
    """The comparison's first `count` items, with their recorded verdicts; all of them for None."""
    verdicts = comparison.verdicts
    if verdicts is not None and count is not None:
        verdicts = [verdict for verdict in verdicts if verdict.item < count]
    return comparison._replace(
        items=comparison.items[:count], questions=comparison.questions[:count], verdicts=verdicts
    )


# ------------------------------------------------------------------------------------------------------- single answers


class AnswerSet(NamedTuple):
    """One model's answers to grade: the rows of a file that have one under `key`."""

    name: str
    file: AnswerFile
    key: str
    rows: list[Row]

    def judge_inputs(self) -> list[JudgeInput]:
        """What the judge reads of each row."""
        return [JudgeInput(row.messages, (str(answer_in(row, self.key)),), row.reference) for row in self.rows]


def answer_sets(files: Sequence[AnswerFile], keys: Sequence[str], count: int | None) -> list[AnswerSet]:
    """Each key's answers in each file, at most `count` of each. Raises UserError if a file has none under a key."""
    sets = []
    for key in keys:
        for file in files:
            check_key(file, key)
            rows = [row for row in file.rows if answer_in(row, key) is not None][:count]
            named_by_file = len(files) > 1 or rows[0].answers.keys() == {SINGLE_KEY}
            sets.append(AnswerSet(file.name if named_by_file else key, file, key, rows))
    return sets


# ---------------------------------------------------------------------------------------------------- recorded verdicts


def read_recorded(path: Path) -> Comparison:
    """Read the verdicts of another judge: AlpacaEval's annotations or Arena-Hard's judgments.

    AlpacaEval's `preference` goes from 1 to 2: 2 prefers `output_2`, the candidate; 0 is a tie. Any other value (null,
    or -1 for a missing one) is a malformed verdict, and AlpacaEval's leaderboard does not count it in `n_total` either.
    Arena-Hard's judge sees the candidate as B in the first game and as A in the second. Raises UserError for other
    files.
    """
    content = read_json(path)
    match content:
        case [{"preference": _, "output_1": str(), "output_2": str(), "instruction": str()}, *_] if all_objects(
            content
        ):
            return alpaca_eval_verdicts(path, content)
        case [{"games": _}, *_] if all_objects(content):
            return arena_hard_verdicts(path, content)
    raise UserError(
        f"{path}: holds no recorded verdicts. Known layouts are AlpacaEval's annotations ([{{instruction, output_1, "
        "output_2, preference}]) and Arena-Hard's judgments (JSONL with question_id, model, games)"
    )


def alpaca_eval_verdicts(path: Path, rows: list[dict[str, Any]]) -> Comparison:
    items, verdicts = [], []
    for number, row in enumerate(rows):
        first, second = text_field(row, "output_1", path, number), text_field(row, "output_2", path, number)
        items.append(Item(user_message(text_field(row, "instruction", path, number)), second, first))
        text = judge_text(row.get("raw_completion"))
        try:
            value = float("nan") if row.get("preference") is None else float(row["preference"])
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{path}, row {number}: `preference` is {row['preference']!r}, not a number") from None
        value = 1.5 if value == 0 else value
        known = 1 <= value <= 2
        verdicts.append(
            Verdict(number, "judged" if known else "malformed", value - 1 if known else None, 1, None, text)
        )
    candidate, baseline = (model_name(rows, n, path) for n in (2, 1))
    questions = [fingerprint(item.messages) for item in items]
    return Comparison(candidate, {}, candidate, baseline, items, questions, 0, verdicts)


def judge_text(completion: Any) -> str:
    """The judge's reply in any form in which AlpacaEval or Arena-Hard saves it; "" if it is not there."""
    match completion:
        case str(text) | {"text": str(text)} | {"message": {"content": str(text)}} | {"answer": str(text)}:
            return text
    return ""


def model_name(rows: list[dict[str, Any]], side: int, path: Path) -> str:
    """The model behind `output_<side>`. If the rows name several, it is the most frequent one, with a warning."""
    names = Counter(str(row.get(f"generator_{side}", f"output_{side}")) for row in rows)
    name = max(names, key=lambda name: names[name])
    if len(names) > 1:
        console.print(
            f"{path}: `generator_{side}` names {len(names)} models; all its answers count as {name}'s",
            style="yellow",
        )
    return name


def arena_hard_verdicts(path: Path, rows: list[dict[str, Any]]) -> Comparison:
    items, verdicts = [], []
    for number, row in enumerate(rows):
        question = question_id(row, path)
        games = row["games"] if isinstance(row.get("games"), list) else []
        if not games or not all(isinstance(game, dict | None) for game in games):
            raise UserError(f"{path}, question {question}: `games` is not a list of objects")
        first, *others = [game or {} for game in games]  # null: the judge failed
        items.append(Item(user_message(str(first.get("user_prompt") or f"question {question}")), "", ""))
        for game, candidate_first in zip([first, *others], (False, True)):
            value, weight = parse_arena_verdict(str(game.get("score")))
            text = judge_text(game.get("judgment"))
            if value is None:
                verdicts.append(Verdict(number, "malformed", None, 1, candidate_first, text))
            else:
                preference = value if candidate_first else 1 - value
                verdicts.append(Verdict(number, "judged", preference, weight, candidate_first, text))
    name, baseline = str(rows[0].get("model", name_from(path))), str(rows[0].get("baseline", "baseline"))
    return Comparison(name, {}, name, baseline, items, [question_id(row, path) for row in rows], 0, verdicts)
