"""Samples as the benchmarks' own tools read them.

    <samples_dir>/alpaca_eval/<name>/model_outputs.json           alpaca_eval --model_outputs=...
    <samples_dir>/arena-hard-v0.1/model_answer/<name>.jsonl       arena-hard-auto's data/
    <samples_dir>/mt_bench/model_answer/<name>.jsonl              FastChat's llm_judge's data/

AlpacaEval and Arena-Hard compare one answer a question, so they get the first of several draws; MT-Bench has `choices`.
Each answer's id is a function of what it says, so that the same samples give the same file. What a server did not
answer is left out.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sampling.samples import Conversation
from utils import atomic_write, fingerprint, write_json, write_json_lines


def answered(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those with an answer to each turn."""
    return [talk for talk in conversations if talk.failed is None]


def alpaca_eval(name: str, conversations: Sequence[Conversation], sampled_at: str) -> Any:  # noqa: ARG001
    """A list of {"instruction", "output", "generator"}, in the order of AlpacaEval's set."""
    return [
        {"instruction": talk.record["prompt"][-1]["content"], "output": talk.answers[0].text, "generator": name}
        for talk in answered(conversations)
        if talk.draw == 0
    ]


def arena_hard(name: str, conversations: Sequence[Conversation], sampled_at: str) -> list[dict[str, Any]]:
    """One line a question, as arena-hard-auto writes since v2.0, but for `metadata`: the token counts of OpenAI's
    tokenizer and the markdown, which its utils/add_markdown_info.py adds for style control."""
    return [
        {
            "uid": talk.record["benchmark"]["uid"],
            "ans_id": fingerprint(name, talk.answers[0].text),
            "model": name,
            "messages": [
                *talk.record["prompt"],
                {"role": "assistant", "content": {"answer": talk.answers[0].text}},
            ],
            "tstamp": datetime.fromisoformat(sampled_at).timestamp(),
        }
        for talk in answered(conversations)
        if talk.draw == 0
    ]


def mt_bench(name: str, conversations: Sequence[Conversation], sampled_at: str) -> list[dict[str, Any]]:
    """One line a question, as FastChat's gen_model_answer.py writes it, a choice for each draw."""
    questions: dict[Any, list[Conversation]] = {}
    for talk in answered(conversations):
        questions.setdefault(talk.record["benchmark"]["question_id"], []).append(talk)
    choices = {
        number: [{"index": talk.draw, "turns": [answer.text for answer in talk.answers]} for talk in talks]
        for number, talks in questions.items()
    }
    return [
        {
            "question_id": number,
            "answer_id": fingerprint(name, choices[number]),
            "model_id": name,
            "choices": choices[number],
            "tstamp": datetime.fromisoformat(sampled_at).timestamp(),
        }
        for number in sorted(choices)
    ]


FILES: dict[str, tuple[str, Callable[[str, Sequence[Conversation], str], Any]]] = {
    "alpacaeval": ("alpaca_eval/{name}/model_outputs.json", alpaca_eval),
    "arenahard": ("arena-hard-v0.1/model_answer/{name}.jsonl", arena_hard),
    "mtbench": ("mt_bench/model_answer/{name}.jsonl", mt_bench),
}


# What compare.py needs to judge them as the benchmark does.
JUDGED = {
    "alpacaeval": "-p alpacaeval --against BASELINE.json",
    "arenahard": "-p arenahard --against BASELINE.jsonl",
    "mtbench": "-p mtbench --questions question.jsonl --references reference_answer_gpt-4.jsonl",
}


def path_of(mode: str, name: str, folder: Path) -> Path | None:
    """Where the hand-over file of a benchmark's samples goes; None for what is no benchmark."""
    return folder / FILES[mode][0].format(name=name) if mode in FILES else None


def write_benchmark_file(
    mode: str, path: Path, name: str, conversations: Sequence[Conversation], sampled_at: str
) -> None:
    """The hand-over file of a benchmark's samples."""
    content = FILES[mode][1](name, conversations, sampled_at)
    if path.suffix == ".json":
        write_json(path, content)
    else:
        with atomic_write(path) as part, part.open("wb") as file:
            write_json_lines(file, *content)
