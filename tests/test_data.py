"""Data: from files in each data set's own layout to the batches of a step."""

import csv
import gzip
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import DATA, HH_100, fuzzed
from datasets import Dataset as HfDataset
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import dataloader
from data import hub, rows, tokenise
from data.batch import Batch, collate
from data.rows import BadRow
from data.settings import DataSettings
from data.tokenise import ChatTemplate, PrefixTemplate
from dataloader import (
    DataLoader,
    Dataset,
    PairedPreferenceDataLoader,
    SFTDataLoader,
    TokenisedData,
    UnpairedPreferenceDataLoader,
)
from utils import UserError, checked

real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")

BOS, EOS = 1, 2
PLAIN = PrefixTemplate("", "", "", "")
TULU = PrefixTemplate("\n<|user|>\n", "", "\n<|assistant|>\n", "")
CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(merges: int = 0, bos: str | None = "<s>", chat: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE; without merges a token is a byte, so lengths are counted by hand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259 + merges,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a question and an answer, then another question and another answer"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token=bos, eos_token="</s>")
    fast.chat_template = chat
    return fast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def make_config(tmp_path: Path, **changes: Any) -> DataSettings:
    values: dict[str, Any] = {
        "datasets": ["toy"],
        "eval_datasets": None,
        "data_dir": None,
        "train_split": "train",
        "eval_split": "test",
        "held_out": 0.05,
        "max_bad_rows": 0.01,
        "max_row_mb": 16,
        "train_on": "targets",
        "seed": 1,
        "cache_dir": str(tmp_path / "cache"),
        "template": "tulu",
        "human_prefix": TULU.human_prefix,
        "human_suffix": "",
        "assistant_prefix": TULU.assistant_prefix,
        "assistant_suffix": "",
    }
    return checked(DataSettings, {**values, **changes})


def changed(config: DataSettings, **changes: Any) -> DataSettings:
    return checked(DataSettings, {**config.model_dump(), **changes})


def load_tokens(*arguments: Any, **options: Any) -> dataloader.TokenisedData:
    return dataloader.load_tokens(*arguments, **{"max_length": 512, "max_prompt_length": 256, **options})


def write_jsonl(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.write(text)
    return path


def write_parquet(path: Path, values: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(values), path)
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pairs(data: Dataset) -> list[tuple[str, str, str]]:
    """(last turn of the prompt, preferred, dispreferred) of every pair."""
    return [
        (example.prompt[-1]["content"], example.generations[i], example.generations[j])
        for example in data
        for i, j in example.pairs
    ]


def pair_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"q{i}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(count)]


# ------------------------------------------------------------------------------------------------------------ examples


def test_a_data_set_keeps_one_example_for_each_prompt_however_it_is_written() -> None:
    data = Dataset("mine")
    data["hello"].add_pair("a", "b", source="f:1")
    data[[user("hello")]].add_pair("a", "c", source="f:2")
    data[[user("hello"), assistant("yes?"), user("bye")]].add_pair("d", "e")
    first, second = data
    assert len(data) == 2
    assert first.prompt == [user("hello")]
    assert first.generations == ["a", "b", "c"], "an identical generation is stored once"
    assert first.pairs == [(0, 1), (0, 2)]
    assert first.sources == ["f:1", "f:1", "f:2"]
    assert second.prompt[-1] == user("bye")


def test_the_same_text_with_two_labels_is_two_generations() -> None:
    example = Dataset("mine")["q"]
    assert [example.add_generation("a", label) for label in (True, False, None)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (" ", "empty"),
        (3, "neither text nor a list"),
        ([assistant("hi")], "does not end with the user"),
        ([{"role": "robot", "content": "hi"}], "role"),
        ([{"role": "user", "content": None}], "not text"),
        ("lone surrogate \ud800", "not valid Unicode"),
    ],
)
def test_a_prompt_that_is_no_conversation_is_refused_and_leaves_no_example(prompt: Any, reason: str) -> None:
    data = Dataset("mine")
    with pytest.raises(BadRow, match=reason):
        _ = data[prompt]
    assert len(data) == 0


# --------------------------------------------------------------------------------------------- data sets with a name


def test_shp_filters_and_samples_training_pairs_only(tmp_path: Path) -> None:
    def row(post: str, i: int, ratio: float, label: int) -> dict[str, Any]:
        return {
            "history": post,
            "human_ref_A": f"{post} A{i}",
            "human_ref_B": f"{post}  \t B{i}",
            "labels": label,
            "score_A": 4 + 10 * i,
            "score_B": 2,
            "score_ratio": ratio,
        }

    content = [row("many", i, 2.0, 1) for i in range(7)] + [row("few", 0, 3.0, 0), row("close", 0, 1.9, 1)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "stanfordnlp/SHP/askbakers" / f"{split}.json", content)
    train = dataloader.get_shp("train", data_dir=str(tmp_path))
    assert Counter(prompt for prompt, _, _ in pairs(train)) == {"many": 5, "few": 1}
    assert len(set(pairs(train))) == 6
    assert pairs(train)[-1] == ("few", "few B0", "few A0"), "labels == 0 means B is preferred; spaces are collapsed"
    assert rows.collapse("a\tb  c \td") == "a\tb c d"
    many = train["many"]
    assert [many.generations[i] for i in many.targets()] == ["many A6"]  # the best, whichever pairs are drawn
    few = train["few"]
    assert few.scores == [4, 2]
    assert (few.generations[few.targets()[0]], few.truncation_mode) == ("few A0", "keep_start")
    assert pairs(train) == pairs(dataloader.get_shp("train", data_dir=str(tmp_path)))
    assert Counter(p for p, _, _ in pairs(dataloader.get_shp("test", data_dir=str(tmp_path)))) == {
        "many": 7,
        "few": 1,
        "close": 1,
    }


def hh_row(
    chosen: str, rejected: str, before: str = "\n\nHuman: hi\n\nAssistant: hey \n\nHuman: more"
) -> dict[str, str]:
    return {"chosen": f"{before}\n\nAssistant: {chosen}", "rejected": f"{before}\n\nAssistant: {rejected}"}


def test_hh_splits_turns_and_counts_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(
        tmp_path / "hh/harmless-base/train.jsonl.gz",
        [
            hh_row(" fine,  thanks", "go away"),
            hh_row("fine, thanks", "no"),
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: other\n\nAssistant: c"},
            hh_row("", "c"),
            {"chosen": "hello", "rejected": "\n\nHuman: a\n\nAssistant: b"},
            {"chosen": "\n\nHuman: a\n\nAssistant: b"},
            {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
            "{broken",
        ],
    )
    data = dataloader.get_hh("train", data_dir=str(tmp_path))
    assert [example.prompt for example in data] == [[user("hi"), assistant("hey"), user("more")]]
    assert pairs(data) == [("more", "fine, thanks", "go away"), ("more", "fine, thanks", "no")]
    (example,) = data
    assert (example.truncation_mode, example.targets()) == ("keep_end", [0])
    assert data.bad.total == 8
    assert data.bad.places == {
        "the prompts of 'chosen' and 'rejected' differ": [f"{file}:3"],
        "'chosen' is empty": [f"{file}:4"],
        "'chosen' does not start with a turn of Human or Assistant": [f"{file}:5"],
        "'rejected' is missing": [f"{file}:6"],
        "'chosen' does not end with the assistant's turn": [f"{file}:7"],
        "the row is malformed": [f"{file}:8"],
    }
    assert "helpful-base, helpful-online, helpful-rejection-sampled not found" in capsys.readouterr().out
    assert len(dataloader.get_hh_harmless("train", data_dir=str(tmp_path / "hh"))) == 1
    with pytest.raises(UserError, match="holds no copy of Anthropic/hh-rlhf"):
        dataloader.get_hh_helpful("train", data_dir=str(tmp_path))


def test_oasst_pairs_neighbouring_ranks_of_english_answers(tmp_path: Path) -> None:
    def message(name: str, parent: str | None, role: str, rank: int | None, lang: str = "en") -> dict[str, Any]:
        text = f"text  {name}"
        return {"message_id": name, "parent_id": parent, "role": role, "rank": rank, "lang": lang, "text": text}

    tree = [
        message("root", None, "prompter", None),
        message("a2", "root", "assistant", 2),
        message("a0", "root", "assistant", 0),
        message("a1", "root", "assistant", 1),
        message("u0", "a1", "prompter", 0),
        message("u1", "a1", "prompter", 1),
        message("b0", "u0", "assistant", 0),
        message("b1", "u0", "assistant", 1),
        message("c0", "u1", "assistant", 0),
        message("c2", "u1", "assistant", 2),
        message("raíz", None, "prompter", None, "es"),
        message("d0", "raíz", "assistant", 0),
        message("d1", "raíz", "assistant", 1),
    ]
    write_parquet(tmp_path / "oasst1/data/validation-00000-of-00001.parquet", tree)
    data = dataloader.get_oasst("test", data_dir=str(tmp_path))
    assert pairs(data) == [
        ("text root", "text a0", "text a1"),
        ("text root", "text a1", "text a2"),
        ("text u0", "text b0", "text b1"),
    ]
    first, second = data
    assert second.prompt == [user("text root"), assistant("text a1"), user("text u0")]
    assert first.generations[first.targets()[0]] == "text a0", "the best answer is the one to imitate"
    assert first.truncation_mode == "keep_end"
    assert data.bad.places == {}


def test_ultrafeedback_and_ultrachat(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "HuggingFaceH4/ultrafeedback_binarized/data/train_prefs-00000-of-00001.parquet",
        [
            {"prompt": "q", "chosen": [user("q"), assistant("good  one")], "rejected": [user("q"), assistant("bad")]},
            {"prompt": "q", "chosen": [user("q"), assistant("")], "rejected": [user("q"), assistant("bad")]},
        ],
    )
    data = dataloader.get_ultrabin("train", data_dir=str(tmp_path))
    assert pairs(data) == [("q", "good one", "bad")]
    assert next(iter(data)).truncation_mode == "keep_start"
    assert [(reason, len(places)) for reason, places in data.bad.places.items()] == [("a turn of 'chosen' is empty", 1)]

    talk = [user("a"), assistant("b"), user("c"), assistant("d  d")]
    write_parquet(tmp_path / "ultrachat_200k/data/test_sft-00000-of-00001.parquet", [{"prompt": "a", "messages": talk}])
    (record,) = SFTDataLoader.records(dataloader.get_ultrachat("test", data_dir=str(tmp_path)))
    assert (record["prompt"], record["completions"]) == (talk[:3], ["d  d"])


def test_alpacaeval_is_for_testing_only(tmp_path: Path) -> None:
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([{"instruction": "do", "output": "done", "generator": "g"}]))
    data = dataloader.get_alpacaeval("test", data_dir=str(tmp_path))
    (record,) = dataloader.prompt_records(data)
    assert (record["prompt"], record["completions"]) == ([user("do")], ["done"])
    assert record["source"].endswith("alpaca_eval.json row 1")
    with pytest.raises(UserError, match=r"alpacaeval has a test split only.*eval_datasets"):
        dataloader.get_alpacaeval("train")


def test_toy_and_its_demonstrations() -> None:
    train, test = dataloader.get_toy("train"), dataloader.get_toy("test")
    assert len(PairedPreferenceDataLoader.records(train)) == 10_000
    assert len(PairedPreferenceDataLoader.records(test)) == 2_000
    assert not set(train.examples) & set(test.examples)
    example = next(iter(train))
    assert example.targets() == [example.pairs[0][0]]
    assert SFTDataLoader.records(dataloader.get_toy_sft("test"))[0]["source"] == "toy_sft[test] row 1"
    with pytest.raises(UserError, match="splits train and test, not 'dev'"):
        dataloader.get_toy("dev")


@real_data
def test_real_hh_every_row_is_a_pair_or_accounted_for() -> None:
    data = dataloader.get_hh("test", data_dir=str(DATA))
    assert data.bad.total == 2312
    assert {reason: len(places) for reason, places in data.bad.places.items()} == {
        "'chosen' is empty": 4,
        "the prompts of 'chosen' and 'rejected' differ": 5,
    }
    assert len(pairs(data)) == 2312 - 9
    with pytest.raises(UserError, match=r"no 'train' split.*harmless-base/test.jsonl.gz.*\n.*train_split=test"):
        dataloader.get_hh("train", data_dir=str(DATA))


@real_data
def test_real_benchmarks() -> None:
    arena, mt = (dataloader.named_loaders()[name]("test", data_dir=str(DATA)) for name in ("arenahard", "mtbench"))
    assert (len(arena), len(mt)) == (500, 80)
    assert all(len(example.followups) == 1 for example in mt)
    assert next(iter(mt)).followups[0].startswith("Rewrite your previous response")
    alpaca = dataloader.read_file(DATA / "alpaca_eval/preferences_train.jsonl.gz")
    assert (len(pairs(alpaca)), alpaca.bad.places) == (5731, {})


def test_the_hub_is_asked_for_one_split_and_its_refusal_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "helpful-base/test.jsonl.gz", [hh_row("a", "b")])
    asked: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert len(dataloader.get_hh_helpful("test")) == 1
    assert asked == [("Anthropic/hh-rlhf", {"repo_type": "dataset", "allow_patterns": ["helpful-base/test.jsonl.gz"]})]

    def refuse(repo: str, **options: Any) -> str:
        raise ConnectionError(f"no route to {repo} {options}")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"Anthropic/hh-rlhf cannot be fetched.*no route(.|\n)*data_dir"):
        dataloader.get_hh_helpful("test")


# ---------------------------------------------------------------------------------------------------------- local files


def test_every_kind_of_file_gives_the_same_pairs_with_their_places(tmp_path: Path) -> None:
    content = [{"prompt": "q,1", "chosen": "a\nb", "rejected": "é", "extra": "x"}, *pair_rows(2)]
    content[1:] = [{**row, "extra": "x"} for row in content[1:]]
    (tmp_path / "list.json").write_text("\n [" + ",\n".join(map(json.dumps, content)) + "]")
    with gzip.open(tmp_path / "list.json.gz", "wt") as file:
        json.dump(content, file)
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8-sig") as table:
        writer = csv.DictWriter(table, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    write_jsonl(tmp_path / "lines.jsonl", content)
    write_jsonl(tmp_path / "lines.jsonl.gz", content)
    write_jsonl(tmp_path / "lines.json", content)
    write_parquet(tmp_path / "table.parquet", content)
    third = {"list.json": " row 3", "list.json.gz": " row 3", "table.parquet": " row 3", "table.csv": ":5"}
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for path in files:
        data = dataloader.read_file(path)
        assert pairs(data) == [("q,1", "a\nb", "é"), ("q0", "good0", "bad0"), ("q1", "good1", "bad1")]
        places = [record["source"] for record in PairedPreferenceDataLoader.records(data)]
        assert places[2] == f"{path}{third.get(path.name, ':3')}"


def test_pairs_may_be_chat_messages(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "be kind"}, user("hi")]
    file = write_jsonl(
        tmp_path / "chat.jsonl",
        [
            {"prompt": talk, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
            {"prompt": talk, "chosen": "better", "rejected": "bad"},
            {"chosen": [*talk, assistant("best")], "rejected": [*talk, assistant("bad")]},
            {"chosen": [user("hi"), assistant("best")], "rejected": [user("ho"), assistant("bad")]},
            {"prompt": talk, "chosen": [user("hi")], "rejected": "bad"},
        ],
    )
    data = dataloader.read_file(file)
    (example,) = data
    assert example.prompt == talk
    assert [chosen for _, chosen, _ in pairs(data)] == ["good", "better", "best"]
    assert list(data.bad.places) == [
        "the prompts of 'chosen' and 'rejected' differ",
        "'chosen' does not end with the assistant's turn",
    ]


SYSTEM = {"role": "system", "content": "be kind"}


@pytest.mark.parametrize(
    ("given", "before", "prompt"),
    [
        ("q ", [user(" q")], [user("q ")]),  # said twice
        ("q", [SYSTEM, user("q")], [SYSTEM, user("q")]),
        ([SYSTEM, user("q")], [user("q")], [SYSTEM, user("q")]),
        ("a", [user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("c")]),
        ([user("a"), assistant("b")], [user("c")], [user("a"), assistant("b"), user("c")]),  # goes on
        ([SYSTEM], [user("c")], [SYSTEM, user("c")]),
        ("a", [assistant("b"), user("c")], [user("a"), assistant("b"), user("c")]),
        ("another", [user("q")], None),
        ([user("q"), assistant("a"), user("b")], [user("c")], None),
        (None, [user("q")], [user("q")]),
        ("", [user("q")], [user("q")]),
        (7, [user("q")], None),
    ],
)
def test_a_prompt_beside_a_conversation_is_not_dropped(tmp_path: Path, given: Any, before: Any, prompt: Any) -> None:
    talk, other = [*before, assistant("good")], [*before, assistant("bad")]
    for i, row in enumerate(
        [{"chosen": talk, "rejected": other}, {"completion": talk, "label": 1}, {"messages": talk}]
    ):
        file = write_jsonl(tmp_path / f"{i}.jsonl", [*pair_rows(1), {"prompt": given, **row}])
        data = dataloader.read_file(file)
        assert [example.prompt for example in data][1:] == ([prompt] if prompt else [])
        assert len(data.bad.places) == (0 if prompt else 1)


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "reasoning", "reasoning_content", "thinking", "tools"])
def test_what_would_not_be_rendered_is_a_bad_row(tmp_path: Path, key: str) -> None:
    of_row = key == "tools"
    said = [{"function": {"name": "look_up"}}]
    content = [
        {"messages": [user("a"), assistant("b") | ({} if of_row else {key: value})], **({key: value} if of_row else {})}
        for value in (said, None, [])
    ]
    data = dataloader.read_file(write_jsonl(tmp_path / "a.jsonl", content))
    assert [places for reason, places in data.bad.places.items() if repr(key) in reason] == [[f"{tmp_path}/a.jsonl:1"]]
    assert len(SFTDataLoader.records(data)) == 2


def test_every_row_counts(tmp_path: Path) -> None:
    content = [{"prompt": "q", "chosen": f"good{i // 2}", "rejected": f"bad{i}"} for i in range(4)]
    data = dataloader.read_file(write_jsonl(tmp_path / "pairs.jsonl", content))
    assert [record["completions"] for record in SFTDataLoader.records(data)] == [["good0"], ["good1"]]
    assert len(PairedPreferenceDataLoader.records(data)) == 4

    content = [{"prompt": "q", "completion": "c", "label": label, "score": i} for i, label in enumerate([1, 1, 0])]
    data = dataloader.read_file(write_jsonl(tmp_path / "labels.jsonl", content))
    assert [record["score"] for record in UnpairedPreferenceDataLoader.records(data)] == [0, 1, 2]
    assert [record["score"] for record in SFTDataLoader.records(data)] == [0, 1]

    data = dataloader.read_file(write_jsonl(tmp_path / "sft.jsonl", [{"messages": [user("q"), assistant("a")]}] * 2))
    assert len(SFTDataLoader.records(data)) == 2


def test_what_a_file_holds_beside_its_layout_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [user("a") | {"name": "Ann"}, assistant("b")]
    rows = [{"messages": [user(f"{i}"), *talk], "id": 7, "date": None} for i in range(9)]
    for file in (write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)):
        config = make_config(tmp_path, datasets=[str(file)])
        for split in ("train", "test"):
            dataloader.load_datasets(config, split)
        said = capsys.readouterr().out
        assert said.count("not used") == 1
        assert set(said.strip().removeprefix(f"{file}: not used are ").split(", ")) == {"id", "date", "messages.name"}


def test_samples_of_eval_are_told_from_data(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    sample = {"prompt": "q", "messages": [user("q")], "policy": "a"}
    file.write_text(json.dumps({"sampled_at": "2026-11-28", "config": {}, "samples": [sample]}, indent=2))
    with pytest.raises(
        UserError, match=rf"holds samples that eval\.py wrote.*`python compare\.py -f {file}` judges them"
    ):
        dataloader.read_file(file)


# ------------------------------------------------------------------------------------------------------------ odd files


@pytest.fixture
def short_rows() -> Iterator[None]:
    """Rows of at most 1 MiB."""
    before = rows.longest_row.set(1 << 20)
    yield
    rows.longest_row.reset(before)


LONG = {"prompt": "q", "chosen": "x" * (1 << 20), "rejected": "b"}


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_row_that_is_too_long_is_a_bad_row(tmp_path: Path, name: str) -> None:
    content = [*pair_rows(2), LONG, {**LONG, "chosen": LONG["chosen"] * 3}, *pair_rows(3)[2:]]
    write: Any = write_parquet if name == "a.parquet" else write_jsonl
    data = dataloader.read_file(write(tmp_path / name, content))
    (found,) = data.bad.places.items()
    assert found[0] == "the row is longer than max_row_mb=1"
    assert [place[-1] for place in found[1]] == ["3", "4"]
    assert [prompt for prompt, _, _ in pairs(data)] == ["q0", "q1", "q2"]


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.csv.gz"])
def test_a_file_with_a_row_that_is_too_long_is_not_read(tmp_path: Path, name: str) -> None:
    """What follows it cannot be told from it: a missing quote or bracket may be the reason."""
    content = [*pair_rows(2), {**LONG, "chosen": "x\n" * (1 << 20)}]
    if name == "a.json":
        (tmp_path / name).write_text(json.dumps(content))
    else:
        opener: Any = gzip.open if name.endswith("gz") else open
        with opener(tmp_path / name, "wt") as file:
            writer = csv.DictWriter(file, list(LONG))
            writer.writeheader()
            writer.writerows(content)
    with pytest.raises(UserError, match=r"a\..* cannot be read: .*longer than max_row_mb=1"):
        dataloader.read_file(tmp_path / name)


@pytest.mark.parametrize("row", ['{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}',
                                 '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'])  # fmt: skip
def test_a_row_with_a_key_twice_is_a_bad_row(tmp_path: Path, row: str) -> None:
    """json would take the last, and nobody would know."""
    (tmp_path / "a.jsonl").write_text(f"{row}\n{json.dumps(pair_rows(1)[0])}\n")
    data = dataloader.read_file(tmp_path / "a.jsonl")
    assert data.bad.counts == {f"the row has the key {'chosen' if 'chosen' in row else 'content'!r} twice": 1}
    (tmp_path / "a.json").write_text(f"[{json.dumps(pair_rows(1)[0])}, {row}]")
    with pytest.raises(UserError, match=r"a\.json cannot be read: an item of the list has the key '\w+' twice"):
        dataloader.read_file(tmp_path / "a.json")


def test_a_line_is_not_read_whole_to_find_that_it_is_too_long(tmp_path: Path) -> None:
    """What a file of a few kilobytes can be unpacked to need not fit into memory."""
    file = tmp_path / "a.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        for _ in range(200):
            stream.write(bytes(1 << 20))
        stream.write(b"\n" + json.dumps(pair_rows(1)[0]).encode())
    tracemalloc.start()
    data = dataloader.read_file(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.bad.counts == {"the row is longer than max_row_mb=16": 1} and len(data) == 1
    assert peak < 100 << 20


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.parquet"])
def test_a_small_file_that_would_fill_the_memory_row_by_row(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = tmp_path / name, [{**row, "chosen": "x" * 100_000} for row in pair_rows(200)]
    if name == "a.parquet":
        parquet.write_table(pa.Table.from_pylist(content), file, compression="zstd")
    elif name == "a.csv.gz":
        with gzip.open(file, "wt") as stream:
            writer = csv.DictWriter(stream, [*content[0]])
            writer.writeheader()
            writer.writerows(content)
    else:
        write_jsonl(file, content if "jsonl" in name else [content])
    assert len(dataloader.read_file(file)) == 200
    monkeypatch.setattr(rows, "MOST_UNPACKED", 1 << 20)
    with pytest.raises(UserError, match=rf"{name} cannot be read: it unpacks to more than 100 times"):
        dataloader.read_file(file)


def test_a_list_is_read_an_item_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = [*pair_rows(20), [], {}, None, "[]", {**pair_rows(1)[0], "extra": {"deep": [1, "]", "\\"]}}]
    for piece in (1, 7, 64):
        monkeypatch.setattr(rows, "PIECE", piece)
        (tmp_path / "a.json").write_text("\ufeff " + json.dumps(content, indent=1) + "\n")
        found = list(rows.read_rows([tmp_path / "a.json"], bad := rows.BadRows("a")))
        assert [row for _, row in found] == [item for item in content if isinstance(item, dict)]
        assert bad.places == {"the row is malformed": [f"{tmp_path}/a.json row {n}" for n in (21, 23, 24)]}
        assert found[-1][0] == f"{tmp_path}/a.json row 25"
        for text in ("[1, 2", "[1 2]", "[1],", "[,]", "[", "[{]", '[{"a": 1},]', "[1]2"):
            (tmp_path / "a.json").write_text(text)
            with pytest.raises(UserError, match=r"a\.json cannot be read: "):
                list(rows.read_rows([tmp_path / "a.json"], bad))
    for text, expected in (("[]", []), (" [ ] ", []), ("[{}]", [{}])):
        (tmp_path / "a.json").write_text(text)
        assert [row for _, row in rows.read_rows([tmp_path / "a.json"], bad)] == expected


def test_deep_nesting_is_a_bad_row(tmp_path: Path) -> None:
    deep = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + ', "chosen": "a", "rejected": "b"}'
    data = dataloader.read_file(write_jsonl(tmp_path / "a.jsonl", [deep, *pair_rows(1)]))
    assert data.bad.places == {"the row is nested too deeply": [f"{tmp_path}/a.jsonl:1"]}
    (tmp_path / "a.json").write_text(f"[{deep}]")
    with pytest.raises(UserError, match="cannot be read: it is nested too deeply"):
        dataloader.read_file(tmp_path / "a.json")
    levels = 900  # json reads it, and a function that calls itself does not get to the bottom of it
    shallower = {"prompt": "q", "chosen": json.loads("[" * levels + "]" * levels), "rejected": "b"}
    write_parquet(tmp_path / "ultrabin/data/train_prefs-0.parquet", pair_rows(1))
    assert len(pairs(dataloader.get_ultrabin("train", data_dir=str(tmp_path)))) == 1
    bad = rows.BadRows("a")
    with bad.at("here"):
        rows.collapse(shallower)
    assert bad.places == {"the row is nested too deeply": ["here"]}


def test_columns_that_are_not_used_cannot_break_a_table(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(pair_rows(3))
    odd = {
        "zone": pa.array([0, 1, 2], pa.timestamp("us", tz="No/Where")),
        "late": pa.array([2**60] * 3, pa.timestamp("us")),
        "bytes": pa.StringArray.from_buffers(
            3, pa.py_buffer(np.array([0, 1, 2, 3], "int32")), pa.py_buffer(b"\xff" * 3)
        ),
    }
    for name, column in odd.items():
        table = table.append_column(name, column)
    parquet.write_table(table, tmp_path / "a.parquet")
    data = dataloader.read_file(tmp_path / "a.parquet")
    assert len(pairs(data)) == 3 and list(data.bad.unused) == list(odd)

    mixed = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 1, 2, 3], "int32")), pa.py_buffer(b"a\xffc"))
    table = pa.table({"prompt": ["q"] * 3, "chosen": mixed, "rejected": ["b"] * 3})
    parquet.write_table(table, tmp_path / "b.parquet")
    data = dataloader.read_file(tmp_path / "b.parquet")
    assert [chosen for _, chosen, _ in pairs(data)] == ["a", "c"]
    assert data.bad.places == {"the row holds a value that cannot be read": [f"{tmp_path}/b.parquet row 2"]}


def test_of_many_bad_rows_the_first_are_kept(tmp_path: Path) -> None:
    content = [{"prompt": "q"}] * 1000 + [{"messages": [user("a"), {"role": "user", "content": 1}]}] + pair_rows(1)
    data = dataloader.read_file(write_jsonl(tmp_path / "a.jsonl", content))
    assert data.bad.counts == {"the row has no known layout": 1000, "a turn of 'messages' is not text": 1}
    assert [len(places) for places in data.bad.places.values()] == [100, 1]
    bad = rows.BadRows("a", total=200)
    for n in range(200):
        bad.add(f"reason {n}", "here")
    assert len(bad.counts) == 51 and bad.counts["other reasons"] == 150
    again = rows.BadRows.from_report("a", 200, json.loads(json.dumps(bad.report())))
    assert (again.summary(), again.counts) == (bad.summary(), bad.counts)


def test_two_columns_of_one_name_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,chosen,rejected\nq,a,b,c\n")
    with pytest.raises(UserError, match=r"a\.csv cannot be read: several columns are called 'chosen'"):
        dataloader.read_file(tmp_path / "a.csv")


WORDS = ["", " ", "a", "\u2028", "\ud800", "\x00", "0", "true", "[]", None, True, 1, 0.5, float("nan"), 10**30, 10**400]


def random_value(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON, or what a field of a row may be."""
    kind = draw.randrange(8 if depth < 3 else 4)
    if kind < 4:
        return draw.choice(WORDS)
    if kind < 6:
        roles = (*rows.ROLES, "user", "assistant", "tool", None)
        return [{"role": draw.choice(roles), "content": random_value(draw, 3)} for _ in range(draw.randrange(4))]
    if kind < 7:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(3))]
    return {draw.choice(["role", "content", "tool_calls", "x"]): random_value(draw, depth + 1) for _ in range(2)}


def random_row(draw: random.Random) -> Any:
    layout = draw.choice([("prompt", "chosen", "rejected"), ("prompt", "completion", "label", "score"), ("messages",)])
    row = {name: random_value(draw) for name in layout if draw.random() < 0.9}
    return draw.choice([row, row, row, row | {draw.choice(dataloader.FILE_COLUMNS): "a"}, random_value(draw)])


@given(st.integers(0, 2**40))
@fuzzed
def test_whatever_a_file_holds_each_row_is_used_or_counted_as_bad(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    draw = random.Random(seed)
    suffix = draw.choice([suffix for suffix in rows.SUFFIXES if suffix != ".parquet"])
    lines = [json.dumps(random_row(draw)) for _ in range(draw.randrange(6))]
    if suffix.startswith(".csv"):
        lines = ["prompt,chosen,rejected", *(line.replace(": ", '"",').strip("{}") for line in lines)]
    text = ("[" + ",".join(lines) + "]" if suffix.startswith(".json") and seed % 2 else "\n".join(lines)).encode()
    if draw.random() < 0.3:
        cut = draw.randrange(len(text) + 1)
        text = text[:cut] + draw.randbytes(draw.randrange(3)) + text[cut + draw.randrange(3) :]
    file = tmp_path_factory.getbasetemp() / f"random{suffix}"
    file.write_bytes(gzip.compress(text, 1)[: draw.choice([None, None, -3])] if suffix.endswith(".gz") else text)
    expect_rows_accounted_for(file)


def expect_rows_accounted_for(file: Path) -> None:
    try:
        data = dataloader.read_file(file)
    except UserError as error:
        assert str(file) in str(error)
    else:
        labelled = sum(label is not None for example in data for label in example.desirable)
        used = labelled + sum(len(example.pairs) + len(example.sft_targets) for example in data)
        assert used and used + data.bad.counts.total() == data.bad.total


TALK = [user("q"), assistant("a")]
NAMED = {  # a row of each data set of the Hub
    "shp": {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 9, "score_B": 2, "labels": 1,
            "score_ratio": 4.5},
    "hh": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "oasst": {"lang": "en", "role": "assistant", "text": "a", "message_id": "m1", "parent_id": "m0", "rank": 0},
    "ultrabin": {"prompt": "q", "chosen": TALK, "rejected": [user("q"), assistant("b")]},
    "ultrachat": {"prompt": "q", "messages": TALK},
    "alpacaeval": {"instruction": "q", "output": "a"},
    "arenahard": {"uid": "1", "prompt": "q"},
    "mtbench": {"question_id": 81, "category": "math", "turns": ["q", "r"]},
}  # fmt: skip
OTHERS = {"oasst": [{"role": "prompter", "parent_id": None}, {"message_id": "m2", "rank": 1}, {"message_id": "m0"}]}


@given(st.integers(0, 2**40))
@fuzzed
def test_whatever_a_data_set_of_the_hub_holds_it_is_read(seed: int) -> None:
    """Rows of a known one, with some values replaced: by each other's, by those of other rows, by anything."""
    draw = random.Random(seed)
    name = draw.choice([*NAMED])
    content = [NAMED[name] | draw.choice([{}, *OTHERS.get(name, [])]) for _ in range(draw.randrange(1, 6))]
    for row in draw.choices(content, k=draw.randrange(4)):
        row[draw.choice([*row])] = draw.choice([random_value(draw), *draw.choice(content).values()])
    replacing = {"HH_PARTS": ["train"], "hub_files": mock.DEFAULT, "read_rows": mock.DEFAULT}
    with mock.patch.multiple(dataloader, **replacing) as replaced:
        replaced["hub_files"].return_value = [Path("train/a.json")]
        replaced["read_rows"].return_value = ((f"row {n}", row) for n, row in enumerate(content))
        data = dataloader.named_loaders()[name]("test")
    for example in data:
        assert rows.parse_conversation(example.prompt, "the prompt")[-1]["role"] == "user"
        texts = [*example.generations, *example.followups]
        assert all(rows.checked_text(text, "a completion") for text in texts)
        assert all(score is None or isinstance(score, float) for score in example.scores)
        assert not example.benchmark or isinstance(example.benchmark.get("uid", ""), str)
    assert data.bad.counts.total() <= data.bad.total == len(content)


def test_messages_that_answer_each_other_in_a_circle(tmp_path: Path) -> None:
    tree = [NAMED["oasst"] | {"parent_id": "m2", "rank": rank} for rank in (0, 1)]
    tree.append({"lang": "en", "role": "prompter", "text": "q", "message_id": "m2", "parent_id": "m1", "rank": None})
    write_parquet(tmp_path / "oasst/data/train-0.parquet", tree)
    data = dataloader.get_oasst("train", data_dir=str(tmp_path))
    assert not len(data) and data.bad.counts == {"the message answers itself": 1}


def test_two_columns_of_one_name_in_a_table(tmp_path: Path) -> None:
    names = ["prompt", "chosen", "chosen", "rejected"]
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names=names), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: several columns are called 'chosen'"):
        dataloader.read_file(tmp_path / "a.parquet")


TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.null())]))
KINDS = [
    *[pa.string()] * 8, pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string()), pa.int8(), pa.uint64(),
    pa.float32(), pa.bool_(), pa.null(), pa.timestamp("us", tz="No/Where"), pa.timestamp("s"), pa.date64(),
    pa.duration("ns"), pa.decimal128(30, 2), pa.list_(pa.string()), pa.map_(pa.string(), pa.string()), TURNS, TURNS,
]  # fmt: skip


def random_column(draw: random.Random, kind: pa.DataType, count: int) -> pa.Array:
    """Values of a kind, some of them none; numbers and dates of any size, texts that may be no UTF-8."""
    if kind == TURNS:
        turns: list[Any] = [user("q"), assistant("a"), {"role": "tool", "content": None}, {}]
        values = [draw.choices(turns, k=draw.randrange(4)) if draw.random() < 0.9 else None for _ in range(count)]
        return pa.array(values, kind)
    if kind == pa.string() and draw.random() < 0.1:
        offsets = np.arange(count + 1, dtype="int32")
        return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(draw.randbytes(count)))
    if pa.types.is_temporal(kind) or pa.types.is_integer(kind):
        bits = kind.bit_width
        sizes = [draw.choice([0, 1, 2 ** (bits - 1) // 1001]) for _ in range(count)]  # to be written as thousandths
        return pa.array(sizes, {8: pa.int8(), 64: pa.int64()}[bits]).view(kind)
    words = [word for word in WORDS if isinstance(word, str) and word != "\ud800"]
    texts = [draw.choice([*words, "a", "true", None]) for _ in range(count)]
    if kind in (pa.list_(pa.string()), pa.map_(pa.string(), pa.string())):
        return pa.array([[text] if kind == pa.list_(pa.string()) else [("k", text)] for text in texts], kind)
    if kind in (pa.string(), pa.large_string(), pa.binary()) or pa.types.is_dictionary(kind):
        return pa.array(texts, pa.string()).cast(kind)
    numbers = [draw.choice([None, 0, 1]) for _ in range(count)]
    return pa.array([None] * count if kind == pa.null() else numbers).cast(kind)


@given(st.integers(0, 2**40))
@fuzzed
def test_whatever_a_table_holds_each_row_is_used_or_counted_as_bad(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    draw = random.Random(seed)
    layout = draw.choice([("prompt", "chosen", "rejected"), ("prompt", "completion", "label", "score"), ("messages",)])
    count = draw.randrange(6)
    columns = {name: random_column(draw, draw.choice(KINDS), count) for name in (*layout, "other")}
    file = tmp_path_factory.getbasetemp() / "random.parquet"
    parquet.write_table(pa.table(columns), file)
    if draw.random() < 0.3:
        content = file.read_bytes()
        cut = draw.randrange(len(content))
        file.write_bytes(content[:cut] + draw.randbytes(draw.randrange(3)) + content[cut + draw.randrange(3) :])
    expect_rows_accounted_for(file)


def test_labels_and_messages(tmp_path: Path) -> None:
    labels = [True, "false", 1, "0", "maybe", None, 1.0]
    content = [{"prompt": f"q{i}", "completion": "c", "label": label, "score": i} for i, label in enumerate(labels)]
    content.append({"prompt": "q", "completion": "c", "label": True, "score": "high"})
    data = dataloader.read_file(write_jsonl(tmp_path / "labels.jsonl", content))
    records = UnpairedPreferenceDataLoader.records(data)
    assert [record["desirable"] for record in records] == [True, False, True, False, True]
    assert [record["score"] for record in records] == [0, 1, 2, 3, 6]
    assert {reason.split(" (")[0]: len(places) for reason, places in data.bad.places.items()} == {
        "'label' is neither true nor false": 1,
        "'label' is missing": 1,
        "'score' is not a number": 1,
    }
    assert len(SFTDataLoader.records(data)) == 3, "desirable completions are demonstrations"

    talk = [user("a"), assistant("b")]
    demos = [{"messages": talk}, {"messages": [user("a"), assistant("c")]}, {"messages": [assistant("d")]}]
    data = dataloader.read_file(write_jsonl(tmp_path / "sft.jsonl", demos))
    assert [record["completions"] for record in SFTDataLoader.records(data)] == [["b"], ["c"]]
    assert sum(map(len, data.bad.places.values())) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"question": "q", "answer": "a"}\n' * 3,
            r"(?s)3 of 3 rows.*Columns found: question, answer.*messages",
        ),
        ("a.jsonl", '{"prompt": "q", "chosen": "a"}\n', "1 x 'rejected' is missing: .*a.jsonl:1"),
        ("a.csv", "prompt,chosen,rejected\nq,a\n", "1 x the row is malformed: .*a.csv:2"),
        ("a.json", "[{", "a.json cannot be read: "),
        ("a.jsonl.gz", "not gzip", "a.jsonl.gz cannot be read: "),
        ("a.parquet", "not parquet", "a.parquet cannot be read: "),
        ("a.jsonl", "", "Columns found: none"),
        (
            "a.json",
            '{\n  "sampled_at": "2026-01-01",\n  "samples": []\n}',
            r"samples that eval\.py wrote.* compare\.py -f",
        ),
        ("a.json", '{"sampled_at": "2026-01-01", "samples": []}', r"samples that eval\.py wrote.* compare\.py -f"),
    ],
)
def test_a_file_without_a_usable_row_is_one_clear_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        dataloader.read_file(tmp_path / name)


# ------------------------------------------------------------------------------------ from the configuration to tokens


def test_data_sets_are_checked_before_any_is_loaded(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", pair_rows(2))
    for entry, message in {
        "ultrabim": "did you mean 'ultrabin'",
        "missing/file.jsonl": "missing/file.jsonl is no file here",
        "./": r"\./ is a folder: name files in it, such as ",
        str(Path(__file__)): "of no known kind; known are .json",
        str(tmp_path): r"is a folder: name files in it, such as .*/a\.jsonl",
        "org/some_data": r"is no file here.*On the Hub only some data sets are known.*hf download org/some_data ",
    }.items():
        for key in ("datasets", "eval_datasets"):
            with pytest.raises(UserError, match=message):
                dataloader.check_datasets(make_config(tmp_path, **{key: ["hh", entry]}))
    for key in ("datasets", "eval_datasets"):
        with pytest.raises(UserError, match=rf"{key}=\[\]: has to be text or a list that is not empty"):
            make_config(tmp_path, **{key: []})
    dataloader.check_datasets(make_config(tmp_path, datasets="shp"))


def test_testing_on_training_rows_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", pair_rows(2)))
    dataloader.check_datasets(make_config(tmp_path, datasets=[file, "toy"]))
    assert capsys.readouterr().out == ""
    dataloader.check_datasets(make_config(tmp_path, datasets=[file, "toy"], eval_datasets=[file, "hh"]))
    assert "a.jsonl is trained on and tested on" in capsys.readouterr().out
    dataloader.check_datasets(make_config(tmp_path, datasets=["hh"], train_split="test"))
    assert "hh: tests use 5.0% of the prompts of its test split" in capsys.readouterr().out


def test_what_is_held_out(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", pair_rows(100)))

    def prompts(split: str, **changes: Any) -> list[str]:
        return [p for data in dataloader.load_datasets(make_config(tmp_path, **changes), split) for p in data.examples]

    train, test = prompts("train", datasets=[file]), prompts("test", datasets=[file])
    assert (len(train), len(test), len({*train, *test})) == (95, 5, 100)
    reordered = str(write_jsonl(tmp_path / "b.jsonl", pair_rows(100)[::-1]))
    assert set(prompts("test", datasets=[reordered])) == set(test), "the order of the file plays no part"
    assert len(prompts("test", datasets=[file], held_out=0.001)) == 1
    assert len(prompts("train", datasets=[file], eval_datasets=["toy"])) == 100
    assert len(prompts("test", datasets=["toy"], eval_datasets=[file])) == 100

    for count, what in ((1, "one prompt is"), (3, "3 prompts are all")):
        few = str(write_jsonl(tmp_path / "few.jsonl", pair_rows(count)))
        with pytest.raises(UserError, match=rf"few\.jsonl: its {what} held out .*held_out=0\.9.* give eval_datasets"):
            prompts("train", datasets=[few], held_out=0.9)
        assert len(prompts("train", datasets=[few], eval_datasets=["toy"])) == count

    write_jsonl(tmp_path / "hh/harmless-base/test.jsonl.gz", [hh_row("a", "b", f"\n\nHuman: {i}") for i in range(40)])
    changes: dict[str, Any] = {"datasets": ["hh"], "data_dir": str(tmp_path), "train_split": "test"}
    train, test = prompts("train", **changes), prompts("test", **changes)
    assert (len(train), len(test), len({*train, *test})) == (38, 2, 40), "one split for both is divided"


def test_two_data_sets_with_the_same_prompt_are_both_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", pair_rows(3))) for name in "ab"]
    config = make_config(tmp_path, datasets=files, eval_datasets=["toy"])
    tokens = load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader)
    assert tokens.rows["source"] == [f"{file}:{line}" for file in files for line in (1, 2, 3)]


def test_a_custom_data_set_is_found_by_name_and_given_what_it_asks_for(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_custom_dataset(split: str, human_prefix: str, seed: int = 0, flavour: str = "plain") -> Dataset:
        data = Dataset("custom")
        data["hello"].add_pair(f"{split} {seed} {flavour}", human_prefix)
        return data

    monkeypatch.setattr(dataloader, "get_custom_dataset", get_custom_dataset, raising=False)
    config = make_config(tmp_path, datasets=["custom_dataset"], seed=7)
    tokens = load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader)
    assert tokens.rows[0]["completions"] == ["train 7 plain", "\n<|user|>\n"]


def test_bad_rows_are_reported_and_too_many_stop_the_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    content: list[Any] = pair_rows(200)
    content[6]["chosen"] = " "
    content[9] = {"prompt": "q", "chosen": 7, "rejected": "b"}
    file = write_jsonl(tmp_path / "a.jsonl", content)
    config = make_config(tmp_path, datasets=[str(file)], eval_datasets=["toy"])
    tokens = load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader)
    assert len(tokens.rows) == 198
    said = capsys.readouterr().out
    assert "2 of 200 rows" in said
    assert f"1 x 'chosen' is empty: {file}:7" in said
    report = json.loads((tokens.path / "report.json").read_text())["left_out"]
    assert report[str(file)]["'chosen' is neither text nor a list of messages"] == {"rows": 1, "first": [f"{file}:10"]}

    content[100]["rejected"] = "an </s> inside"  # found when tokenised, and counted apart
    write_jsonl(file, content)
    tokens = load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader)
    report = json.loads((tokens.path / "report.json").read_text())["left_out"]
    (found,) = report["tokenising"].values()
    assert found == {"rows": 1, "first": [f"{file}:101"]}

    content[50] = {"prompt": "q"}
    write_jsonl(file, content)
    with pytest.raises(UserError, match=r"(?s)3 of 200 rows.*is empty: .*:7.*more: max_bad_rows=0.016$") as stopped:
        load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader)
    assert f"1 x the row has no known layout: {file}:51" in str(stopped.value)
    load_tokens(changed(config, max_bad_rows=0.02), "train", tokenizer, PairedPreferenceDataLoader)


def test_a_data_set_without_what_the_loss_needs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "c", "label": True}] * 2)
    config = make_config(tmp_path, datasets=[str(file)], eval_datasets=["toy"])
    with pytest.raises(UserError, match=r"1 prompts but no pairs, which PairedPreferenceDataLoader works on"):
        load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader)


def test_tokens_are_cached_until_something_they_depend_on_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", pair_rows(5))
    config = make_config(tmp_path, datasets=[str(file)], eval_datasets=["toy"])

    def load(config: DataSettings = config, max_length: int = 512, **options: Any) -> TokenisedData:
        tokenizer = make_tokenizer(chat=CHAT, **options)
        return load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader, max_length=max_length)

    first = load()
    assert first.path == tmp_path / "cache" / ".cache" / "tokens" / first.fingerprint
    assert "found in" not in capsys.readouterr().out
    again = load()
    assert (again.fingerprint, again.rows.to_list()) == (first.fingerprint, first.rows.to_list())
    assert f"found in {first.path}" in capsys.readouterr().out

    others = [load(merges=5), load(bos=None), load(max_length=511), load(changed(config, template="chat"))]
    others.append(load(changed(config, human_suffix="\n")))
    write_jsonl(file, [*pair_rows(4), {"prompt": "q4", "chosen": "good4", "rejected": "worse"}])
    others.append(load())
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 7


# ------------------------------------------------------------------------------------------------------------- tokens


def record(prompt: str | list[dict[str, str]], *completions: str, mode: str = "keep_start") -> dict[str, Any]:
    messages = [user(prompt)] if isinstance(prompt, str) else prompt
    return {
        "prompt": messages,
        "completions": list(completions),
        "desirable": None,
        "score": None,
        "truncation_mode": mode,
        "source": "here:1",
    }


def tokenised(tokenizer: PreTrainedTokenizerFast, template: tokenise.Template, *records: dict[str, Any]) -> list[Any]:
    tokens, tally = tokenise.tokenise(records, tokenizer, template, max_length=512, max_prompt_length=256)
    assert (tally.left_out.places, tally.remarks(512, 256)) == ({}, "")
    return tokens.to_list()


def test_tulu_rendering_and_the_exact_boundary() -> None:
    tokenizer = make_tokenizer(merges=40)
    talk = [{"role": "system", "content": "be brief"}, user("one"), assistant("two"), user("a question")]
    (row,) = tokenised(tokenizer, TULU, record(talk, " and an answer", "another answer"))
    rendered = "\n<|system|>\nbe brief\n<|user|>\none\n<|assistant|>\ntwo\n<|user|>\na question\n<|assistant|>\n"
    assert row["prompt"] == rendered
    assert json.loads(row["messages"]) == talk
    assert row["prompt_ids"] == [BOS, *tokenizer(rendered, add_special_tokens=False)["input_ids"]]
    assert len(row["prompt_ids"]) < len(rendered.encode()), "merges are in use"
    for ids, text in zip(row["completion_ids"], (" and an answer", "another answer"), strict=True):
        assert tokenizer.decode(ids[:-1]) == text
        assert ids == [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
    (sampled,) = tokenise.tokenise_prompts([record(talk)], tokenizer, TULU, max_prompt_length=256)
    assert sampled["prompt_ids"] == row["prompt_ids"], "training and sampling see the same prompt"


def test_suffixes_follow_the_text_of_their_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    template = PrefixTemplate("U:", "|", "A:", "!")
    (row,) = tokenised(tokenizer, template, record([user("a"), assistant("b"), user("c")], "d"))
    assert row["prompt"] == "U:a|A:b!U:c|A:"
    assert tokenizer.decode(row["completion_ids"][0]) == "d!</s>"


@pytest.mark.parametrize("bos", ["<s>", None])
def test_chat_template_has_one_bos_and_one_eos(bos: str | None) -> None:
    tokenizer = make_tokenizer(bos=bos, chat=CHAT)
    talk = [user("a"), assistant("b"), user("c")]
    (row,) = tokenised(tokenizer, ChatTemplate(tokenizer), record(talk, "d"))
    assert tokenizer.decode(row["prompt_ids"]) == (bos or "") + "[user]a\n[assistant]b</s>\n[user]c\n[assistant]"
    assert tokenizer.decode(row["completion_ids"][0]) == "d</s>"


def test_chat_template_errors(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        tokenise.make_template(make_config(tmp_path, template="chat"), tokenizer)
    with pytest.raises(UserError, match="template=alpaca: not one of tulu, chat"):
        make_config(tmp_path, template="alpaca")
    counting = make_tokenizer(chat="{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="does not begin a conversation with the rendering of its prompt"):
        tokenised(counting, ChatTemplate(counting), record("a", "b"))
    chat = make_tokenizer(chat=CHAT)
    refused = record([{"role": "system", "content": "s"}, user("a")], "b")
    options = {"max_length": 99, "max_prompt_length": 9}
    tokens, tally = tokenise.tokenise([refused, record("a", "b")], chat, ChatTemplate(chat), **options)
    assert len(tokens) == 1
    assert tally.left_out.places == {"the chat template refuses the conversation: no system turn": ["here:1"]}
    with pytest.raises(BadRow, match=r"1 of 1 rows cannot be used\n  1 x the chat template refuses .*: here:1"):
        tokenise.tokenise_prompts([refused], chat, ChatTemplate(chat), max_prompt_length=9)


def test_without_a_bos_token_there_is_none() -> None:
    tokenizer = make_tokenizer(bos=None)
    (row,) = tokenised(tokenizer, PLAIN, record("ab", "cd"))
    assert tokenizer.decode(row["prompt_ids"]) == "ab"


@pytest.mark.parametrize(
    # a byte is a token, BOS and EOS come on top; max_length 12, max_prompt_length 6
    ("prompt", "completions", "mode", "expected"),
    [
        ("abcdefgh", ["xy"], "keep_start", ["<s>abcdefgh", "xy</s>"]),  # 9 + 3 = 12: fits, though the prompt is long
        ("abcdefgh", ["xyz"], "keep_start", ["<s>abcde", "xyz</s>"]),  # 9 + 4: the prompt is cut to 6
        ("abcdefgh", ["xyz"], "keep_end", ["<s>defgh", "xyz</s>"]),
        ("abcdefgh", ["uvwxy"], "keep_end", ["<s>defgh", "uvwxy</s>"]),  # 6 + 6 = 12: fits again
        ("abcdefgh", ["uvwxyz"], "keep_end", ["<s>defgh", "uvwxyz"]),  # a cut completion has no EOS
        ("abcde", ["uvwxyzuvwxyz"], "keep_end", ["<s>abcde", "uvwxyz"]),  # a prompt of 6 is not cut
        ("abc", ["uvwxyzuvwxyz"], "keep_end", ["<s>abc", "uvwxyzuv"]),
        ("abcdefgh", ["x", "uvwxyz"], "keep_end", ["<s>defgh", "x</s>", "uvwxyz"]),  # the longer one decides for both
    ],
)
def test_truncation(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completions: list[str], mode: str, expected: list[str]
) -> None:
    item = record(prompt, *completions, mode=mode)
    tokens, _ = tokenise.tokenise([item], tokenizer, PLAIN, max_length=12, max_prompt_length=6)
    row = tokens[0]
    assert [tokenizer.decode(ids) for ids in (row["prompt_ids"], *row["completion_ids"])] == expected
    assert (row["prompt"], row["completions"]) == (prompt, completions), "the text is kept whole"


def test_prompts_to_sample_from_are_cut_to_max_prompt_length(tokenizer: PreTrainedTokenizerFast) -> None:
    items = [record("abcdefgh", "reference", mode=mode) for mode in ("keep_start", "keep_end")]
    sampled = tokenise.tokenise_prompts(items, tokenizer, PLAIN, max_prompt_length=6)
    assert [tokenizer.decode(item["prompt_ids"]) for item in sampled] == ["<s>abcde", "<s>defgh"]
    assert sampled[0]["completions"] == ["reference"]


CHATS = {  # what chat templates do with the system turn, and with what a turn says
    "says what the system is": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>system: be kind</s>{% endif %}"
        "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
    ),
    "strips": (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
    "has the system in the first turn, which has to be the user's": (
        "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' %}"
        "{% for m in messages[1 if system else 0:] %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('whose turn?') }}{% endif %}"
        "{{ '[user]' if m.role == 'user' else '[model]' }}{{ system ~ '|' if system and loop.first }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
    ),
    "has no system turn": CHAT,
}
TALKS = {
    "one turn": [user(" a question of some length ")],
    "several turns": [user("first"), assistant("second"), user("third and longer"), assistant("fourth"), user("fifth")],
    "system": [{"role": "system", "content": "short"}, user("first"), assistant("second"), user("third, the longest")],
}


@pytest.mark.parametrize(("talk", "mode"), [("one turn", "keep_start"), *((talk, "keep_end") for talk in TALKS)])
@pytest.mark.parametrize("chat", [*CHATS, "tulu"])
def test_only_what_messages_say_is_cut(chat: str, talk: str, mode: str) -> None:
    if (chat, talk) == ("has no system turn", "system"):
        return
    tokenizer = make_tokenizer(chat=CHATS.get(chat))
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else TULU

    def ids(*messages: dict[str, str]) -> list[int]:
        text = template.prompt(messages).removeprefix("<s>")
        return [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]

    system, turns = ([m for m in TALKS[talk] if (m["role"] == "system") == is_system] for is_system in (True, False))
    said = turns[-1]["content"]
    parts = [said[:n] if mode == "keep_start" else said[-n:] for n in range(len(said), 0, -1)]
    tried = [ids(*system, *turns[start:]) for start in range(0, len(turns), 2)]
    tried += [ids(*system, user(part)) for part in parts if part.strip()]
    whole = tried[0]
    for limit in [4, *range(len(tried[-1]) - 1, len(whole) + 1, 7)]:
        expected = next((found for found in tried if len(found) <= limit), None)
        item, limits = record(TALKS[talk], "so", mode=mode), {"max_length": len(whole) + 2, "max_prompt_length": limit}
        tokens, tally = tokenise.tokenise([item], tokenizer, template, **limits)
        assert [row["prompt_ids"] for row in tokens] == ([expected] if expected else [])
        assert tally.left_out.counts.total() == (expected is None)
        assert tally.cut_prompts == (expected not in (None, whole))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("is_fast", [True, False])
def test_a_cut_prompt_fills_its_room_nearly(mode: str, is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(merges=60, chat=CHATS["strips"])
    monkeypatch.setattr(type(tokenizer), "is_fast", is_fast)  # a slow one does not tell where its tokens are
    said = "another question, an answer and äöü 漢字 👍 " * 20
    for limit in range(30, 100, 9):
        item = record(said, mode=mode)
        (row,) = tokenise.tokenise_prompts([item], tokenizer, ChatTemplate(tokenizer), max_prompt_length=limit)
        text = tokenizer.decode(row["prompt_ids"])
        assert text.startswith("<s>[user]") and text.endswith("[assistant]")
        assert text.removeprefix("<s>[user]").removesuffix("[assistant]") in said
        assert limit - 4 <= len(row["prompt_ids"]) <= limit


def test_what_is_cut_or_of_no_use_is_said_also_of_cached_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    content = [
        *pair_rows(2),
        {"prompt": "long" * 9, "chosen": "a" * 9, "rejected": "b" * 99},
        {"prompt": "q", "chosen": "the same", "rejected": "the same"},
        {"prompt": "q", "chosen": "a" * 99 + "b", "rejected": "a" * 99 + "c"},  # they differ where they are cut
    ]
    file = write_jsonl(tmp_path / "a.jsonl", content)
    config = make_config(tmp_path, datasets=[str(file)], eval_datasets=["toy"])
    limits = {"max_length": 90, "max_prompt_length": 40}
    for _ in range(2):
        load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader, **limits)
        assert (
            "Tokens (train): prompts cut to model.max_prompt_length=40: 1 of 5; "
            "completions cut at model.max_length=90, so without EOS: 3 of 10; "
            "pairs whose chosen and rejected are the same: 2 of 5"
        ) in capsys.readouterr().out
    load_tokens(config, "train", tokenizer, SFTDataLoader)
    assert "Tokens" not in capsys.readouterr().out


@pytest.mark.parametrize("max_prompt_length", [0, 12, 13])
def test_lengths_that_leave_no_room_are_refused(tokenizer: PreTrainedTokenizerFast, max_prompt_length: int) -> None:
    with pytest.raises(UserError, match=f"max_prompt_length={max_prompt_length} .* below model.max_length=12"):
        tokenise.tokenise([record("a", "b")], tokenizer, PLAIN, max_length=12, max_prompt_length=max_prompt_length)


def test_an_eos_in_the_text_is_a_bad_row_and_one_at_its_end_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    items = [record("a", "b</s>c"), record("a", "b</s>\n")]
    tokens, tally = tokenise.tokenise(items, tokenizer, PLAIN, max_length=12, max_prompt_length=6)
    assert [tokenizer.decode(row["completion_ids"][0]) for row in tokens] == ["b</s>"]
    reason = "the completion holds the end-of-sequence token </s> inside its text"
    assert tally.left_out.places == {reason: ["here:1"]}


# ---------------------------------------------------------------------------------------------------------- batches


def made_of(count: int, completions: int = 2, **columns: list[Any]) -> TokenisedData:
    """Tokens whose record i has the prompt [BOS, 100 + i]."""
    values = [
        {
            "prompt_ids": [BOS, 100 + i],
            "completion_ids": [[50 + c] * (1 + i % 3) + [EOS] for c in range(completions)],
            "desirable": columns.get("desirable", [None] * count)[i],
            "score": columns.get("score", [None] * count)[i],
        }
        for i in range(count)
    ]
    features = type(tokenise.FEATURES)({name: tokenise.FEATURES[name] for name in values[0]})
    return TokenisedData(HfDataset.from_list(values, features=features), "", Path())


def make_loader(count: int = 10, batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(made_of(count), batch_size=batch_size, pad_id=0, eos_id=EOS, **options)


def seen(loader: DataLoader, start: int = 0) -> list[list[int]]:
    """The records of each step, in the order of its micro-batches."""
    return [[i for batch in step for i in batch.index] for step in loader.steps(start)]


def test_steps_cover_each_epoch_once_and_keep_the_partial_batch() -> None:
    loader = make_loader(n_epochs=2)
    steps = seen(loader)
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    assert len(loader) == 6
    epochs = [[i for step in steps[e : e + 3] for i in step] for e in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1], "reshuffled"
    assert steps == seen(make_loader(n_epochs=2)), "a function of the seed"
    assert steps != seen(make_loader(n_epochs=2, seed=1))
    assert seen(make_loader(shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_batch_holds_its_records_tokens() -> None:
    (batch,) = next(make_loader(batch_size=3).steps())
    assert batch.input_ids[:3, :2].tolist() == [[BOS, 100 + i] for i in batch.index]
    assert batch.input_ids[3:, 2].tolist() == [51] * 3, "rejected ones come second"
    assert batch.record == {}


@pytest.mark.parametrize(
    ("n_examples", "sizes"), [(3, [3]), (4, [4]), (13, [4, 4, 2, 3]), (10, [4, 4, 2]), (24, [4, 4, 2, 4, 4, 2, 4])]
)
def test_n_examples_stops_exactly(n_examples: int, sizes: list[int]) -> None:
    loader = make_loader(n_epochs=None, n_examples=n_examples)
    assert [len(step) for step in seen(loader)] == sizes
    assert len(loader) == len(sizes)
    assert [len(step) for step in seen(make_loader(n_examples=n_examples))] == sizes[:3], "one epoch unless told more"


def test_a_data_set_smaller_than_a_batch() -> None:
    steps = seen(make_loader(count=2, n_epochs=None, n_examples=5))
    assert [sorted(step) for step in steps[:2]] == [[0, 1], [0, 1]]
    assert len(steps) == 3
    assert len(steps[2]) == 1


@pytest.mark.parametrize("n_examples", [1, 6, 10, 13])
def test_what_a_run_uses_is_what_its_steps_give(n_examples: int) -> None:
    loader = make_loader(n_epochs=None, n_examples=n_examples)
    assert loader.used() == sorted({i for step in seen(loader) for i in step})


def test_any_rows_can_be_made_a_batch() -> None:
    loader = make_loader()
    batch = loader.batch([7, 2])
    assert batch.index == [7, 2]
    assert loader.shapes([7, 2]) == [(2, [3, 3]), (2, [4, 4])]
    assert batch.input_ids.shape == (4, 6)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 6])
def test_resuming_continues_exactly(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"n_epochs": None, "n_examples": 26, "accumulation": 2}
    whole = seen(make_loader(**options))
    loader = make_loader(**options)
    made: list[Any] = []

    def counted(records: list[dict[str, Any]], *options: Any, **ids: Any) -> Batch:
        made.append(records)
        return collate(records, *options, **ids)

    monkeypatch.setattr(dataloader, "collate", counted)
    assert seen(loader, start) == whole[start:]
    assert len(made) == sum(min(2, len(step)) for step in whole[start:]), "earlier batches are not made"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 8])
def test_ranks_and_micro_batches_partition_each_step(world_size: int, accumulation: int) -> None:
    options: dict[str, Any] = {"count": 17, "batch_size": 7, "accumulation": accumulation, "world_size": world_size}
    ranks = [list(make_loader(rank=rank, **options).steps()) for rank in range(world_size)]
    for step, expected in enumerate(seen(make_loader(count=17, batch_size=7))):
        parts = [[batch.index for batch in ranks[rank][step]] for rank in range(world_size)]
        assert sorted(i for part in parts for batch in part for i in batch) == sorted(expected)
        assert len({len(part) for part in parts}) == 1, "ranks that shard a model must run equally often"
        assert 1 <= len(parts[0]) <= accumulation
        if len(expected) >= world_size:
            assert min(len(batch) for part in parts for batch in part) >= 1


def test_labels_and_scores_reach_the_batch() -> None:
    tokens = made_of(4, completions=1, desirable=[True, False, True, True], score=[0.5, 1, 2, 3])
    loader = UnpairedPreferenceDataLoader(tokens, batch_size=4, pad_id=0, eos_id=EOS)
    (batch,) = next(loader.steps())
    assert batch.record["desirable"].dtype == torch.bool
    assert batch.record["desirable"].tolist() == [index != 1 for index in batch.index]
    assert batch.record["score"].tolist() == [[0.5, 1, 2, 3][index] for index in batch.index]
    partly = made_of(4, completions=1, desirable=[True, False, True, True], score=[0.5, 1, 2, None])
    (batch,) = next(UnpairedPreferenceDataLoader(partly, batch_size=2, pad_id=0, eos_id=EOS).steps())
    assert set(batch.record) == {"desirable", "chosen", "rejected"}, "a score that some rows lack is not used"


def test_numbers_that_make_no_run_are_refused() -> None:
    with pytest.raises(UserError, match="One of n_epochs and n_examples"):
        make_loader(n_epochs=None)
    for name in ("batch_size", "accumulation", "n_epochs", "n_examples"):
        with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
            make_loader(**{name: 0})


def test_records_of_each_shape() -> None:
    data = Dataset("mine")
    data["p"].add_pair("a", "b", source="f:1")
    data["p"].add_pair("a", "c", source="f:2")
    data["q"].add_generation("d", desirable=False, score=0.1, source="f:3")
    shapes = {
        loader: [(r["completions"], r["desirable"], r["source"]) for r in loader.records(data)]
        for loader in (SFTDataLoader, PairedPreferenceDataLoader, UnpairedPreferenceDataLoader)
    }
    assert shapes == {
        SFTDataLoader: [(["a"], None, "f:1")],
        PairedPreferenceDataLoader: [(["a", "b"], None, "f:1"), (["a", "c"], None, "f:1, f:2")],
        UnpairedPreferenceDataLoader: [
            (["a"], True, "f:1"),
            (["b"], False, "f:1"),
            (["a"], True, "f:1"),
            (["c"], False, "f:2"),
            (["d"], False, "f:3"),
        ],
    }
    assert [len(r["completions"]) for r in dataloader.prompt_records(data)] == [1, 0]


def test_one_side_of_unpaired_data_can_be_thinned() -> None:
    data = Dataset("mine")
    for i in range(100):
        data[f"q{i}"].add_pair("a", "b")

    def count(**options: Any) -> Counter[bool]:
        return Counter(r["desirable"] for r in UnpairedPreferenceDataLoader.records(data, **options))

    assert count(frac_unique_desirable=0.25) == {True: 25, False: 100}
    assert count(frac_unique_undesirable=0.5) == {True: 100, False: 50}
    draws = [
        [r["prompt"] for r in UnpairedPreferenceDataLoader.records(data, frac_unique_desirable=0.25, seed=seed)]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("data_dir", "split", "count"),
    [pytest.param(HH_100, "train", 80, id="hh-100"), pytest.param(DATA, "test", 2312 - 9, id="hh", marks=real_data)],
)
def test_real_hh_from_file_to_batches(tmp_path: Path, data_dir: Path, split: str, count: int) -> None:
    config = make_config(tmp_path, datasets=["hh"], data_dir=str(data_dir), train_split=split, eval_split=split)
    tokenizer = make_tokenizer(merges=100)
    tokens = load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader)
    assert len(tokens.rows) + len(load_tokens(config, "test", tokenizer, PairedPreferenceDataLoader).rows) == count
    whole = tokens.rows.with_format("numpy")
    assert all(np.count_nonzero(ids == BOS) == 1 and ids[0] == BOS for ids in whole["prompt_ids"])
    for prompt, completions in zip(tokens.rows["prompt_ids"], tokens.rows["completion_ids"], strict=True):
        for completion in completions:
            assert len(prompt) + len(completion) <= 512
            assert completion.count(EOS) == (1 if completion[-1] == EOS else 0)
            assert completion[-1] == EOS or len(prompt) + len(completion) == 512
    loader = PairedPreferenceDataLoader(tokens, batch_size=32, pad_id=0, eos_id=EOS)
    assert sum(len(batch.index) for step in loader.steps() for batch in step) == len(tokens.rows)
