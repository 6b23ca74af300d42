"""From the name of a data set, or a file, to the batches of each optimiser step.

    entry of config.datasets --get_<name>() or read_file()--> Dataset of Example
    Dataset --records() of the loader that the loss names--> records (one per demonstration, pair or label)
    records --load_tokens(): tokenise, once, cached on disk--> TokenisedData
    TokenisedData --DataLoader.steps()--> list[Batch] for each optimiser step

To add a data set, write `get_<name>(split)` below; `datasets=[<name>]` finds it.
"""

import hashlib
import inspect
import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import datasets as hf_datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from data import tokenise, toy
from data.batch import Batch, batches_by_length, batches_within, collate, micro_batches
from data.rows import (
    SUFFIXES,
    BadRow,
    BadRows,
    answer_of,
    checked_text,
    collapse,
    hub_files,
    is_samples_file,
    longest_row,
    number_of,
    optional_number_of,
    pair_of,
    parse_conversation,
    prompt_of,
    read_rows,
    text_of,
    value_of,
)
from data.settings import DataSettings, ReadAt
from utils import (
    MOST,
    Message,
    Share,
    UserError,
    as_json,
    console,
    damaged_files,
    digest_of,
    fingerprint,
    remove_litter,
    require_different_files,
    sealed_folder,
    suggest,
)

FILE_COLUMNS = ("prompt", "chosen", "rejected", "completion", "label", "score", "messages", "tools", "weight")
FILE_LAYOUTS = "`prompt, chosen, rejected`; `prompt, completion, label` (and perhaps `score`); `messages`"
LEAST_WEIGHT = 1e-6  # of a row, but for 0; the largest is as far above 1, since sums of single precision hold both
LOOKED_AT = 10_000  # files and folders below one that is named in place of a file: it may be the home directory
hf_datasets.disable_progress_bars()  # for its own writing of files, which takes no time

TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


# ------------------------------------------------------------------------------------------------------------ examples


@dataclass
class Example:
    """A prompt with all that a data set knows about its completions. Lists are indexed by generation."""

    prompt: list[Message]  # ends with the user's turn
    truncation_mode: str = "keep_start"  # or "keep_end": which end of a prompt that is too long survives
    dataset_name: str = ""
    generations: list[str] = field(default_factory=list)
    desirable: list[bool | None] = field(default_factory=list)  # None: not labelled
    scores: list[float | None] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # where each came from, "file:line" or "file row 17"
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (preferred, dispreferred)
    sft_targets: list[int] = field(default_factory=list)  # demonstrations; the preferred ones if none is set
    weights: dict[tuple[int, ...], float] = field(default_factory=dict)  # in the loss, of pairs and completions; else 1
    followups: list[str] = field(default_factory=list)  # the user's later turns, for a benchmark of several turns
    benchmark: dict[str, Any] = field(default_factory=dict)  # what a benchmark knows its question by: its id, category

    def add_generation(
        self, text: str, desirable: bool | None = None, score: float | None = None, source: str = ""
    ) -> int:
        """The index of the completion. One without a label is stored once however often it is added.

        Raises BadRow for a completion that is empty or not text.
        """
        checked_text(text, "the completion")
        for i, known in enumerate(self.generations):
            if known == text and desirable is None and self.desirable[i] is None:
                return i
        self.generations.append(text)
        self.desirable.append(desirable)
        self.scores.append(score)
        self.sources.append(source)
        return len(self.generations) - 1

    def add_pair(self, chosen: str, rejected: str, source: str = "", weight: float | None = None) -> None:
        """Two completions, the first preferred."""
        preferred = self.add_generation(chosen, source=source)
        pair = (preferred, self.add_generation(rejected, source=source))
        self.weigh(weight, pair, *((side,) for side in pair))
        self.pairs.append(pair)

    def weigh(self, weight: float | None, *parts: tuple[int, ...]) -> None:
        """Give pairs and completions a weight in the loss; those that have one keep it."""
        if weight is not None:
            self.weights = {**dict.fromkeys(parts, weight), **self.weights}

    def targets(self) -> list[int]:
        """The generations to imitate: `sft_targets`, else those that a pair prefers, each once, and the desirable
        ones."""
        preferred = list(dict.fromkeys(i for i, _ in self.pairs))
        return self.sft_targets or preferred + [i for i, label in enumerate(self.desirable) if label]

    def record(self, *generations: int, desirable: bool | None = None) -> dict[str, Any]:
        """What tokenise.py reads: the prompt with these completions."""
        return {
            "prompt": self.prompt,
            "completions": [self.generations[i] for i in generations],
            "desirable": desirable,
            "score": self.scores[generations[0]] if len(generations) == 1 else None,
            **({"weight": self.weights[generations]} if generations in self.weights else {}),
            "truncation_mode": self.truncation_mode,
            "source": ", ".join(dict.fromkeys(self.sources[i] for i in generations)) or self.dataset_name,
        }


class Dataset:
    """The Examples of one data set. `data[prompt]` is the Example of that prompt, made when first asked for."""

    weight: float = 1  # how often an epoch holds each record, on average

    def __init__(self, name: str, truncation_mode: str = "keep_start") -> None:
        self.name = name
        self.truncation_mode = truncation_mode
        self.examples: dict[str, Example] = {}
        self.bad = BadRows(name)

    def __getitem__(self, prompt: str | list[Message]) -> Example:
        """Raises BadRow for a prompt that is not text or a conversation whose last turn is the user's."""
        messages = parse_conversation(prompt, "the prompt")
        if messages[-1]["role"] != "user":
            raise BadRow("the prompt does not end with the user's turn")
        key = json.dumps(messages)
        if key not in self.examples:
            self.examples[key] = Example(messages, self.truncation_mode, self.name)
        return self.examples[key]

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples.values())

    def part(self, split_name: str, held_out: float) -> "Dataset":
        """Its "test" part, the share `held_out` of the prompts with the smallest hash (rounded up), or the rest."""
        by_hash = sorted(self.examples, key=lambda key: hashlib.sha256(key.encode()).digest())
        test = set(by_hash[: math.ceil(held_out * len(by_hash))])
        part = Dataset(self.name, self.truncation_mode)
        part.examples = {k: example for k, example in self.examples.items() if (k in test) == (split_name == "test")}
        part.bad = self.bad
        return part


# --------------------------------------------------------------------------------------------- data sets with a name


def test_only(name: str, split: str) -> None:
    """Raises UserError for another split than test."""
    if split != "test":
        raise UserError(f"{name} has a test split only, not {split!r}: use it in eval_datasets")


def get_shp(split: str, *, data_dir: str | None = None) -> Dataset:
    """Stanford Human Preferences: comments on Reddit posts, ranked by votes.

    Training uses only pairs whose better comment has at least twice the other's score, and at most 5, drawn at
    random, of each post. To imitate is the comment with the highest score of all that such pairs of the post have.
    """
    data = Dataset("shp")
    pairs: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for place, row in read_rows(hub_files("stanfordnlp/SHP", ["*/{split}.json"], split, data_dir, "shp"), data.bad):
        with data.bad.at(place):
            row = collapse(row)
            for name in ("history", "human_ref_A", "human_ref_B"):
                text_of(row, name)
            row |= {name: number_of(row, name) for name in ("score_A", "score_B", "labels")}
            if row["labels"] not in (0, 1):
                raise BadRow("'labels' is neither 0 nor 1")
            if split != "train" or number_of(row, "score_ratio") >= 2:
                pairs.setdefault(row["history"], []).append((row, place))
    rng = random.Random(0)
    for prompt, comparisons in pairs.items():
        example = data[prompt]
        comments = [
            (row[f"score_{side}"], row[f"human_ref_{side}"], place) for row, place in comparisons for side in "AB"
        ]
        score, best, place = max(comments, key=lambda comment: comment[0])
        example.sft_targets = [example.add_generation(best, score=score, source=place)]
        if split == "train":
            comparisons = rng.sample(comparisons, min(5, len(comparisons)))
        for row, place in comparisons:
            a = example.add_generation(row["human_ref_A"], score=row["score_A"], source=place)
            b = example.add_generation(row["human_ref_B"], score=row["score_B"], source=place)
            example.pairs.append((a, b) if row["labels"] == 1 else (b, a))
    return data


HH_PARTS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")


def get_hh(split: str, *, data_dir: str | None = None) -> Dataset:
    """Anthropic HH: dialogues whose last turn is the one compared."""
    return _hh("hh", HH_PARTS, split, data_dir)


def get_hh_helpful(split: str, *, data_dir: str | None = None) -> Dataset:
    """The part of Anthropic HH that compares helpfulness (helpful-base)."""
    return _hh("hh_helpful", ["helpful-base"], split, data_dir)


def get_hh_harmless(split: str, *, data_dir: str | None = None) -> Dataset:
    """The part of Anthropic HH that compares harmlessness (harmless-base)."""
    return _hh("hh_harmless", ["harmless-base"], split, data_dir)


def _hh(name: str, parts: Sequence[str], split: str, data_dir: str | None) -> Dataset:
    data = Dataset(name, "keep_end")
    files = hub_files("Anthropic/hh-rlhf", [f"{part}/{{split}}.jsonl.gz" for part in parts], split, data_dir, "hh")
    absent = set(parts) - {file.parent.name for file in files}
    if absent:
        console.print(f"{name}: {', '.join(sorted(absent))} not found, the rest is used", style="yellow", markup=False)
    for place, row in read_rows(files, data.bad):
        with data.bad.at(place):
            prompt, chosen, rejected = pair_of({side: _hh_turns(row, side) for side in ("chosen", "rejected")})
            data[prompt].add_pair(chosen, rejected, source=place)
    return data


def _hh_turns(row: dict[str, Any], side: str) -> list[Message]:
    """The turns of a dialogue written as "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    before, *pieces = re.split(r"\n\n(Human|Assistant):", collapse(text_of(row, side)))
    if before or not pieces:
        raise BadRow(f"{side!r} does not start with a turn of Human or Assistant")
    if not pieces[-1].strip():
        raise BadRow(f"{side!r} is empty")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]


def get_oasst(split: str, *, data_dir: str | None = None) -> Dataset:
    """Open Assistant: trees of messages, where volunteers ranked the answers to one turn (rank 0 is the best).

    English only. Each answer is paired with the one ranked just above it; the prompt is all that was said from the
    root down. The test split is the hub's validation split.
    """
    data = Dataset("oasst", "keep_end")
    pattern = ["data/{split}-*.parquet"]
    hub_split = "validation" if split == "test" else split
    roles = {"prompter": "user", "assistant": "assistant"}
    messages: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[dict[str, Any]]] = {}  # the ranked ones, by the message that they answer
    for place, row in read_rows(hub_files("OpenAssistant/oasst1", pattern, hub_split, data_dir, "oasst"), data.bad):
        with data.bad.at(place):
            if value_of(row, "lang") != "en":
                continue
            if text_of(row, "role") not in roles:
                raise BadRow("'role' is neither prompter nor assistant")
            row = {
                **row,
                "text": collapse(text_of(row, "text")),
                "rank": optional_number_of(row, "rank"),
                "place": place,
            }
            row["parent_id"] = None if row.get("parent_id") is None else text_of(row, "parent_id")
            messages[text_of(row, "message_id")] = row
            if row["rank"] is not None and row["role"] == "assistant":
                answers.setdefault(text_of(row, "parent_id"), []).append(row)

    parent: str | None
    for parent, ranked in answers.items():
        path: list[Message] = []
        passed = set()
        while parent in messages and parent not in passed:
            passed.add(parent)
            path.insert(0, {"role": roles[messages[parent]["role"]], "content": messages[parent]["text"]})
            parent = messages[parent]["parent_id"]
        if parent is not None and parent not in passed:
            continue  # a message on the way is not in English
        for better, worse in pairwise(sorted(ranked, key=lambda row: row["rank"])):
            with data.bad.caught(worse["place"]):
                if parent in passed:
                    raise BadRow("the message answers itself")
                if worse["rank"] == better["rank"] + 1:
                    example = data[path]
                    example.add_pair(better["text"], worse["text"], source=worse["place"])
                    example.sft_targets = [example.pairs[0][0]]  # the best one
    return data


def get_ultrabin(split: str, *, data_dir: str | None = None) -> Dataset:
    """UltraFeedback, binarised by the Zephyr team: the best-scored of four models' answers against another."""
    data = Dataset("ultrabin")
    files = hub_files(
        "HuggingFaceH4/ultrafeedback_binarized", ["data/{split}_prefs-*.parquet"], split, data_dir, "ultrabin"
    )
    for place, row in read_rows(files, data.bad):
        with data.bad.at(place):
            prompt, chosen, rejected = pair_of(collapse(row))
            data[prompt].add_pair(chosen, rejected, source=place)
    return data


def get_ultrachat(split: str, *, data_dir: str | None = None) -> Dataset:
    """UltraChat, as filtered by the Zephyr team: conversations whose last answer is a demonstration."""
    data = Dataset("ultrachat", "keep_end")
    files = hub_files("HuggingFaceH4/ultrachat_200k", ["data/{split}_sft-*.parquet"], split, data_dir, "ultrachat")
    for place, row in read_rows(files, data.bad):
        with data.bad.at(place):
            _add_row(data, {"messages": value_of(row, "messages")}, place)
    return data


def get_alpacaeval(split: str, *, data_dir: str | None = None) -> Dataset:
    """AlpacaEval's 805 instructions, each with the reference model's output."""
    test_only("alpacaeval", split)
    data = Dataset("alpacaeval")
    for place, row in read_rows(hub_files("tatsu-lab/alpaca_eval", ["alpaca_eval.json"], split, data_dir), data.bad):
        with data.bad.at(place):
            prompt, output = text_of(row, "instruction"), text_of(row, "output")
            data[prompt].sft_targets = [data[prompt].add_generation(output, source=place)]
    return data


def get_arenahard(split: str, *, data_dir: str | None = None) -> Dataset:
    """Arena-Hard v0.1's 500 prompts."""
    test_only("arenahard", split)
    data = Dataset("arenahard")
    patterns = ["data/arena-hard-v0.1/question.jsonl", "question.jsonl"]  # on the hub; in the authors' repository
    files = hub_files("lmarena-ai/arena-hard-auto", patterns, split, data_dir, "arena_hard")
    for place, row in read_rows(files, data.bad):
        with data.bad.at(place):
            data[text_of(row, "prompt")].benchmark = {"uid": text_of(row, "uid")}
    return data


def get_mtbench(split: str, *, data_dir: str | None = None) -> Dataset:
    """MT-Bench's 80 questions of two turns: the first is the prompt, the second is in `followups`."""
    test_only("mtbench", split)
    data = Dataset("mtbench")
    patterns = ["raw/question.jsonl", "question.jsonl"]  # on the hub; in the authors' repository
    files = hub_files("HuggingFaceH4/mt_bench_prompts", patterns, split, data_dir, "mt_bench")
    for place, row in read_rows(files, data.bad):
        with data.bad.at(place):
            turns = row.get("turns") or value_of(row, "prompt")  # the authors' name for it, and the hub's
            if not isinstance(turns, list) or not turns:
                raise BadRow("its turns are not a list of texts")
            first, *later = [checked_text(turn, "a turn") for turn in turns]
            number = value_of(row, "question_id" if "question_id" in row else "prompt_id")
            if not isinstance(number, int):
                raise BadRow("its number is not a whole number")
            benchmark = {"question_id": number, "category": text_of(row, "category")}
            data[first].followups, data[first].benchmark = later, benchmark
    return data


TOY_ROWS = {"toy": {"train": 10_000, "test": 2_000}, "toy_sft": {"train": 60_000, "test": 2_000}}


def get_toy(split: str) -> Dataset:
    """Preferences in the toy language (data/toy.py), which needs no download; the chosen one is the SFT target."""
    data = Dataset("toy")
    for n, row in enumerate(toy.preferences(split, seed=0, count=_toy_rows("toy", split)), 1):
        data[row["prompt"]].add_pair(row["chosen"], row["rejected"], source=f"toy[{split}] row {n}")
    return data


def get_toy_sft(split: str) -> Dataset:
    """Demonstrations in the toy language."""
    data = Dataset("toy_sft")
    for n, row in enumerate(toy.demonstrations(split, seed=0, count=_toy_rows("toy_sft", split)), 1):
        example = data[row["prompt"]]
        example.sft_targets.append(example.add_generation(row["completion"], source=f"toy_sft[{split}] row {n}"))
    return data


def _toy_rows(name: str, split: str) -> int:
    if split not in TOY_ROWS[name]:
        raise UserError(f"The toy language has the splits {' and '.join(TOY_ROWS[name])}, not {split!r}")
    return TOY_ROWS[name][split]


# ---------------------------------------------------------------------------------------------------------- local files


def read_file(file: Path) -> Dataset:
    """A data set from a file in one of FILE_LAYOUTS. Columns beyond them are in `bad.unused`.

    Raises UserError when no row at all can be used.
    """
    data = Dataset(str(file), "keep_end")
    columns: dict[str, None] = {}
    for place, row in read_rows([file], data.bad, FILE_COLUMNS):
        columns.update(dict.fromkeys(row))
        with data.bad.at(place):
            _add_row(data, row, place)
    if not data.examples:
        if is_samples_file(file):
            raise UserError(
                f"{file} holds samples that eval.py wrote: answers, without a label that says which are good. "
                f"`python compare.py -f {file}` judges them, `eval.py ++mode=label` scores them, and both write rows "
                f"to train on (docs/online.md), which have one of the layouts {FILE_LAYOUTS}"
            )
        found = ", ".join([*columns, *data.bad.unused]) or "none"
        raise UserError(f"{data.bad.summary()}\nColumns found: {found}. Known layouts: {FILE_LAYOUTS}.")
    return data


def _add_row(data: Dataset, row: dict[str, Any], place: str) -> None:
    """Add a row of any of FILE_LAYOUTS. Raises BadRow, with `data` as it was."""
    if (tools := row.get("tools")) and tools not in ("[]", "null"):
        raise BadRow("'tools' would not be rendered")
    weight = optional_number_of(row, "weight")
    if weight and not LEAST_WEIGHT <= weight <= 1 / LEAST_WEIGHT:
        raise BadRow(f"'weight' is neither 0 nor from {LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}")
    if "chosen" in row or "rejected" in row:
        prompt, chosen, rejected = pair_of(row)
        data[prompt].add_pair(chosen, rejected, place, weight)
    elif "completion" in row:
        before, completion = answer_of(row, "completion")
        label = TRUTH.get(str(value_of(row, "label")).lower())
        if label is None:
            raise BadRow("'label' is neither true nor false (1 nor 0)")
        score = optional_number_of(row, "score")
        if score is not None and abs(score) > MOST:
            raise BadRow(f"'score' is beyond {MOST:g}")
        example = data[prompt_of(row, before)]
        example.weigh(weight, (example.add_generation(completion, label, score, place),))
    elif "messages" in row:
        before, completion = answer_of(row, "messages")
        example = data[prompt_of(row, before)]
        example.sft_targets.append(example.add_generation(completion, source=place))
        example.weigh(weight, (example.sft_targets[-1],))
    else:
        raise BadRow("the row has no known layout")


# ------------------------------------------------------------------------------------ from the configuration to tokens


def named_loaders() -> dict[str, Callable[..., Dataset]]:
    """The `get_<name>` functions of this file, by name."""
    return {name.removeprefix("get_"): f for name, f in globals().items() if name.startswith("get_")}


@dataclass(frozen=True)
class DataSource:
    """What `entry`, a name or a file, contributes to the training or the test rows."""

    entry: str
    split: str = ""  # which of its splits; a file has none
    part: str = ""  # "train" or "test": only that part of it, see Dataset.part
    weight: float = field(default=1, compare=False)  # in training

    @property
    def is_file(self) -> bool:
        return "/" in self.entry or self.entry.endswith(SUFFIXES)

    def check(self) -> None:
        """Raises UserError when there is no such data set, or no such file."""
        names = sorted(named_loaders())
        known = f"Known are {', '.join(names)}, and the paths of files ({', '.join(SUFFIXES)})"
        if not self.is_file:
            if self.entry not in names:
                raise UserError(f"There is no data set {self.entry!r}{suggest(self.entry, names)}. {known}")
            return
        path = Path(self.entry)
        if path.is_dir():
            files = sorted(str(file) for file in islice(path.rglob("*"), LOOKED_AT) if file.name.endswith(SUFFIXES))
            there = f"name files in it, such as {', '.join(files[:3])}" if files else f"no data file is in it. {known}"
            raise UserError(f"The data set {self.entry} is a folder: {there}")
        if not path.is_file():
            missing = f"The data set {self.entry} is no file here (looked for from {Path.cwd()})"
            if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.entry) and not self.entry.endswith(SUFFIXES):
                missing += (
                    ". On the Hub only some data sets are known, by names without a slash. Of another, name the files "
                    f"that `hf download {self.entry} --repo-type dataset --local-dir FOLDER` fetches. {known}"
                )
            raise UserError(missing)
        if not self.entry.endswith(SUFFIXES):
            raise UserError(f"The data file {self.entry} is of no known kind; known are {', '.join(SUFFIXES)}")

    def load(self, settings: DataSettings) -> Dataset:
        """The examples. A `get_<name>` function is given the configuration keys that its parameters name."""
        self.check()
        before = longest_row.set(settings.max_row_mb << 20)
        try:
            if self.is_file:
                data = read_file(Path(self.entry))
            else:
                loader = named_loaders()[self.entry]
                data = loader(self.split, **_named_by(loader, dict(settings)))
        finally:
            longest_row.reset(before)
        if not self.part:
            return data
        part = data.part(self.part, settings.held_out)
        if data.examples and not part.examples:
            what = "one prompt is" if len(data) == 1 else f"{len(data)} prompts are all"
            raise UserError(
                f"{self.entry}: its {what} held out for evaluation (held_out={settings.held_out}, rounded up), so that "
                "there is none to train on; give eval_datasets=[...], or more prompts"
            )
        return part


def _named_by(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that the function's parameters, after its first, ask for by name."""
    _, *others = inspect.signature(function).parameters
    return {name: values[name] for name in others if name in values}


def sources(settings: DataSettings, split_name: str) -> list[DataSource]:
    """Where the "train" or the "test" rows come from. Raises UserError for what is named twice.

    Without eval_datasets the test rows come from `datasets` too: from their split eval_split, or, of a file and where
    eval_split is train_split, from the share held_out of the prompts, which training then leaves out.
    """
    entries = settings.eval_datasets if split_name == "test" and settings.eval_datasets else settings.datasets
    split = settings.train_split if split_name == "train" else settings.eval_split
    found = []
    for named in [entries] if isinstance(entries, str) else entries:
        entry, weight = (named, 1.0) if isinstance(named, str) else (named.name, named.weight)
        whole = DataSource(entry, split)
        shared = not settings.eval_datasets and (whole.is_file or settings.train_split == settings.eval_split)
        found.append(DataSource(entry, "" if whole.is_file else split, split_name if shared else "", weight))
    key = "eval_datasets" if entries is settings.eval_datasets else "datasets"
    ((entry, times),) = Counter(source.entry for source in found).most_common(1) or [("", 0)]
    if times > 1:
        instead = f"; {{name: {entry}, weight: 2}} gives its rows twice as often" if key == "datasets" else ""
        raise UserError(f"{key} names {entry} twice{instead}")
    require_different_files([Path(source.entry) for source in found if source.is_file], key)
    return found


def check_datasets(settings: DataSettings) -> None:
    """Raises UserError for a data set that does not exist, before any is loaded; warns when tests see training rows."""
    train, test = sources(settings, "train"), sources(settings, "test")
    if not train:
        raise UserError(f"datasets is empty; known are {', '.join(sorted(named_loaders()))}, and the paths of files")
    for source in [*train, *test]:
        source.check()
    for source in test:
        if source in train:
            message = f"{source.entry} is trained on and tested on: figures are not held out"
            console.print(message, style="yellow", markup=False)
        elif source.part and not source.is_file:
            message = f"{source.entry}: tests use {settings.held_out:.1%} of the prompts of its {source.split} split"
            console.print(f"{message}, training the others", markup=False)


def load_datasets(settings: DataSettings, split_name: str) -> list[Dataset]:
    """The data sets of a split, in the order of the configuration. Raises UserError when too many rows are bad."""
    loaded = []
    for source in sources(settings, split_name):
        data = source.load(settings)
        data.bad.check(settings.max_bad_rows)
        if source.is_file and data.bad.unused and source.part != "test":  # of one file for both it is said once
            console.print(f"{source.entry}: not used are {', '.join(data.bad.unused)}", markup=False)
        data.weight = source.weight
        loaded.append(data)
    return loaded


def prompt_records(data: Dataset) -> list[dict[str, Any]]:
    """A record for each prompt, to sample from: completions hold the one to compare with, if any."""
    return [
        {**example.record(*example.targets()[:1]), "followups": example.followups, "benchmark": example.benchmark}
        for example in data
    ]


@dataclass
class TokenisedData:
    """Tokenised records: `rows` has the columns of tokenise.FEATURES."""

    rows: hf_datasets.Dataset
    fingerprint: str  # changes with anything that the tokens depend on
    path: Path  # where they are cached; report.json there lists the rows left out
    weights: dict[str, float] = field(default_factory=dict)  # by data set, where an epoch is mixed: see `Mixture`

    @classmethod
    def cached(cls, fingerprint: str, path: Path, weights: dict[str, float]) -> "TokenisedData":
        """Those that `load_tokens` has written."""
        return cls(hf_datasets.Dataset.from_file(str(path / "tokens.arrow")), fingerprint, path, weights)


def load_tokens(
    settings: DataSettings,
    split_name: str,
    tokenizer: PreTrainedTokenizerBase,
    loader_class: type["DataLoader"],
    *,
    max_length: int,
    max_prompt_length: int,
    options: dict[str, Any] | None = None,
) -> TokenisedData:
    """The tokenised rows of a split ("train" or "test") for a loader; `options` go to its `records`.

    They are kept in <cache_dir>/.cache/tokens and found there by the next run.
    """
    records: list[dict[str, Any]] = []
    bad: dict[str, Any] = {}  # by data set
    weights: dict[str, float] = {}
    named = {"seed": settings.seed, "train_on": settings.train_on}
    arguments = {**_named_by(loader_class.records, named), **(options or {})}
    for data in load_datasets(settings, split_name):
        found = loader_class.records(data, **arguments)
        if not found:
            raise UserError(
                f"{data.name} ({split_name}) has {len(data)} prompts but no {loader_class.needs}, "
                f"which {loader_class.__name__} works on"
            )
        counted = [record for record in found if record.get("weight") != 0]
        if not counted:
            raise UserError(f"{data.name} ({split_name}): every row has weight 0, so there is nothing to read")
        if len(counted) < len(found):
            none = len(found) - len(counted)
            console.print(f"{data.name} ({split_name}): {none:,} of {len(found):,} have weight 0", markup=False)
        records += [{**record, "data_set": data.name} for record in counted]
        bad[data.name] = data.bad.report()
        weights[data.name] = data.weight

    template = tokenise.make_template(settings, tokenizer)
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    digest = tokenise.tokenizer_digest(tokenizer)
    name = fingerprint(tokenise.VERSION, digest_of(records), bad, digest, template.identity(), limits)
    path = Path(settings.cache_dir) / ".cache" / "tokens" / name
    if path.exists() and (bad_files := damaged_files(path)):
        console.print(f"{path} is damaged ({', '.join(bad_files)}) and made again", style="yellow", markup=False)
        shutil.rmtree(path)
    remove_litter(path.parent)
    if path.exists():
        console.print(f"Tokens ({split_name}): found in {path}", markup=False)
    else:
        _write_tokens(path, records, tokenizer, template, bad, limits)
    report = json.loads((path / "report.json").read_text())
    left_out = BadRows.from_report(f"tokenising ({split_name})", len(records), report["left_out"]["tokenising"])
    left_out.check(settings.max_bad_rows)
    mixed = split_name == "train" and set(weights.values()) != {1}
    tokenised = TokenisedData.cached(name, path, weights if mixed else {})
    if not len(tokenised.rows):
        raise UserError(left_out.summary())
    if report["remarks"]:
        console.print(f"Tokens ({split_name}): {report['remarks']}", style="yellow", markup=False)
    if mixed:
        parts, names = Mixture(tokenised, settings.seed).parts, short_names([*weights])
        held = [f"{count:,} of {names[own]}'s {len(rows):,} records" for own, (rows, count) in parts.items()]
        console.print(f"An epoch holds {', '.join(held)}", markup=False)
    return tokenised


def _write_tokens(
    path: Path,
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: tokenise.Template,
    bad: dict[str, Any],
    limits: dict[str, int],
) -> None:
    """The tokens, a table at a time, and beside them a report: the bad rows by data set and reason, and the tally's
    remarks."""
    tally = tokenise.Tally()
    with sealed_folder(path) as part:
        with hf_datasets.arrow_writer.ArrowWriter(
            path=str(part / "tokens.arrow"), features=tokenise.FEATURES
        ) as writer:
            for table in tokenise.tables(records, tokenizer, template, tally, **limits):
                writer.write_table(table)
            writer.finalize()
        report = {"left_out": {**bad, "tokenising": tally.left_out.report()}, "remarks": tally.remarks(**limits)}
        (part / "report.json").write_text(as_json(report, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------- from tokens to batches


def short_names(names: Sequence[str]) -> dict[str, str]:
    """A name for metrics for each data set: its own, of a file its stem, or its whole path where stems are equal."""
    stems = {name: Path(name).name.partition(".")[0] for name in names}
    taken = Counter(stems.values())
    return {name: stem if taken[stem] == 1 else name.strip("/").replace("/", ".") for name, stem in stems.items()}


class Mixture:
    """Which rows an epoch holds, where data sets have weights: of n records with the weight w round(w n), at least one.
    All are seen before one is seen again, in this epoch or a later one."""

    def __init__(self, tokens: TokenisedData, seed: int) -> None:
        self.seed = seed
        self.parts: dict[str, tuple[np.ndarray, int]] = {}  # each data set's rows, and how many of them an epoch holds
        for name, weight in tokens.weights.items():
            own = np.asarray(pc.equal(tokens.rows.data.column("data_set"), name)).nonzero()[0]
            if len(own):
                self.parts[name] = own, max(1, round(weight * len(own)))
        self.total = sum(count for _, count in self.parts.values())
        self.epochs_for_all = max(math.ceil(len(own) / count) for own, count in self.parts.values())

    def rows(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, data set by data set."""
        return np.concatenate([self._drawn(epoch, n, *part) for n, part in enumerate(self.parts.values())])

    def _drawn(self, epoch: int, number: int, own: np.ndarray, count: int) -> np.ndarray:
        """Those of one data set: a part of its rows in random order, then in another, and so on."""
        first, start = divmod(epoch * count, len(own))
        passes = range(first, first + math.ceil((start + count) / len(own)))
        orders = [np.random.default_rng([self.seed, number, turn]).permutation(own) for turn in passes]
        return np.concatenate(orders)[start : start + count]


class DataLoader:
    """Batches of tokenised records, in an order that is a function of the seed and the epoch alone.

    An optimiser step holds `batch_size` records over all ranks and micro-batches; the last step of an epoch, and of
    the run, may hold fewer. It is split into `accumulation` micro-batches on each rank, or as many more as keep them
    within `max_tokens` positions. `n_examples` ends the run after that many records, `n_epochs` after so many passes.
    """

    needs: ClassVar[str]  # what a data set must have

    def __init__(
        self,
        tokens: TokenisedData,
        *,
        batch_size: int,
        pad_id: int,
        eos_id: int,
        layout: str = "padded",
        read_at: ReadAt = "text",
        accumulation: int = 1,
        max_tokens: int | None = None,
        n_epochs: int | None = 1,
        n_examples: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        apart: bool = False,
    ) -> None:
        """`apart`: a batch holds records of one data set only. Raises UserError for numbers that make no run."""
        if n_epochs is None and n_examples is None:
            raise UserError("One of n_epochs and n_examples must say when the run ends")
        counts = {
            "batch_size": batch_size,
            "accumulation": accumulation,
            "max_tokens": max_tokens,
            "n_epochs": n_epochs,
            "n_examples": n_examples,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self.rows = tokens.rows
        self.mixture = Mixture(tokens, seed) if tokens.weights else None
        self.per_epoch = self.mixture.total if self.mixture else len(self.rows)  # records
        self.batch_size = batch_size
        self.pad_id, self.eos_id = pad_id, eos_id
        self.layout, self.read_at = layout, read_at
        self.accumulation, self.max_tokens = accumulation, max_tokens
        self.seed = seed
        self.shuffle = shuffle
        self.rank, self.world_size = rank, world_size
        whole = math.inf if n_epochs is None else n_epochs * self.per_epoch
        self.total = int(min(whole, math.inf if n_examples is None else n_examples))  # records of the run
        self.steps_per_epoch = math.ceil(self.per_epoch / batch_size)
        there = self.rows.column_names  # tokens that an earlier version cached lack the weights
        columns = [name for name in ("desirable", "score") if self.rows.data.column(name).null_count == 0]
        if "weight" in there and self.rows.data.column("weight").null_count < len(self.rows):
            columns.append("weight")
        self.values = self.rows.select_columns(["prompt_ids", "completion_ids", *columns])
        self.names = short_names(self.rows.data.column("data_set").unique().to_pylist() if apart else [])

    @staticmethod
    def records(data: Dataset) -> list[dict[str, Any]]:
        """The records of a data set, see tokenise.py."""
        raise NotImplementedError

    def __len__(self) -> int:
        """The number of optimiser steps."""
        epochs, rest = divmod(self.total, self.per_epoch)
        return epochs * self.steps_per_epoch + math.ceil(rest / self.batch_size)

    def records_in(self, step: int) -> int:
        """The records of one optimiser step, over all ranks."""
        return len(self.indices(step))

    def examples_before(self, step: int) -> int:
        """The records of all steps before one."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return min(epochs * self.per_epoch + rest * self.batch_size, self.total)

    def indices(self, step: int) -> list[int]:
        """The rows of one optimiser step, over all ranks."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.batch_size
        end = min(start + self.batch_size, self.total - epoch * self.per_epoch)
        return self._order(epoch)[start:end].tolist()

    def steps(self, start: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimiser step, from step `start` on. All ranks get the same number of
        them, some of no records (see `batch.micro_batches`)."""
        for step in range(start, len(self)):
            groups = self.by_data_set(self.indices(step))
            yield [batch for name, indices in groups.items() for batch in self.micro_batches(indices, name)]

    def by_data_set(self, indices: list[int]) -> dict[str | None, list[int]]:
        """Some rows by the name of their data set, where data sets are apart; else all of them by None."""
        if len(self.names) < 2:
            return {None: indices}
        found: dict[str | None, list[int]] = {name: [] for name in self.names.values()}
        for index, name in zip(indices, self.rows.with_format("arrow")[indices]["data_set"].to_pylist()):
            found[self.names[name]].append(index)
        return {name: own for name, own in found.items() if own}

    def micro_batches(self, indices: list[int], data_set: str | None) -> list[Batch]:
        """This rank's micro-batches of some rows."""
        batches = [self.batch([indices[i] for i in own]) for own in self.shares(self.shapes(indices))]
        return [replace(batch, data_set=data_set) for batch in batches]

    def shares(self, shapes: list[tuple[int, list[int]]]) -> list[list[int]]:
        """Which records of an optimiser step, given their shapes, each of this rank's micro-batches holds."""
        return micro_batches(
            shapes, self.layout, ranks=self.world_size, least=self.accumulation, max_tokens=self.max_tokens
        )[self.rank]

    def shapes(self, indices: list[int]) -> list[tuple[int, list[int]]]:
        """For each row, the number of tokens of its prompt and of each completion."""
        table = self.rows.with_format("arrow")[indices]  # the lengths alone: no list of tokens is made
        prompts = pc.list_value_length(table["prompt_ids"]).to_pylist()
        completions = iter(pc.list_value_length(pc.list_flatten(table["completion_ids"])).to_pylist())
        counts = pc.list_value_length(table["completion_ids"]).to_pylist()
        return [(prompt, list(islice(completions, count))) for prompt, count in zip(prompts, counts)]

    def parts(self, shapes: list[tuple[int, list[int]]], at_once: int) -> list[list[int]]:
        """Which of some records, given their shapes, go through the model together where no step says so: as many as
        `max_tokens` allows, or else `at_once`."""
        if self.max_tokens is not None:
            return batches_within(shapes, self.layout, self.max_tokens)
        return batches_by_length([prompt + max(completions) for prompt, completions in shapes], at_once)

    def used(self) -> list[int]:
        """The rows that the run will see, in order."""
        if self.total >= self.per_epoch * (self.mixture.epochs_for_all if self.mixture else 1):
            return list(range(len(self.rows)))
        starts = range(0, self.total, self.per_epoch)
        return sorted({i for e, start in enumerate(starts) for i in self._order(e)[: self.total - start].tolist()})

    def batch(self, indices: list[int]) -> Batch:
        """The batch of some rows."""
        columns = self.values[indices]
        batch = self.collate(columns["prompt_ids"], columns["completion_ids"], indices)
        kinds = {"desirable": torch.bool, "score": torch.float32}
        if "weight" in columns:
            batch.weights = [1.0 if weight is None else weight for weight in columns["weight"]]
        batch.record = {name: torch.tensor(columns[name], dtype=kinds[name]) for name in kinds if name in columns}
        if (desirable := batch.record.get("desirable")) is not None:  # here, where no device is waited for
            batch.record |= {"chosen": desirable.nonzero().flatten(), "rejected": (~desirable).nonzero().flatten()}
        return batch

    def collate(self, prompts: list[list[int]], completions: list[list[list[int]]], index: Sequence[Any]) -> Batch:
        """One batch of tokenised prompts with their completions."""
        records = [
            {"prompt_ids": prompt, "completion_ids": own, "index": key}
            for prompt, own, key in zip(prompts, completions, index, strict=True)
        ]
        return collate(records, self.layout, pad_id=self.pad_id, eos_id=self.eos_id, read_at=self.read_at)

    @lru_cache(maxsize=1)  # noqa: B019 (one loader lives as long as its run)
    def _order(self, epoch: int) -> np.ndarray:
        rows = self.mixture.rows(epoch) if self.mixture else np.arange(len(self.rows))
        return np.random.default_rng([self.seed, epoch]).permutation(rows) if self.shuffle else rows


class MismatchedRecords:
    """For KTO's z: each prompt of an optimiser step with the completion of the step's next record.

    A record is a pair (row of the prompt, row of the completion). A step of one record takes the completion of the
    one that comes before it in the epoch.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def pairs(self, step: int) -> list[tuple[int, int]]:
        """The records of one optimiser step, over all ranks. Raises UserError if the data holds only one record."""
        rows = self.loader.indices(step)
        if len(rows) == 1 and step == 0:
            raise UserError("KTO's z needs the completion of another example: the data has to hold at least 2")
        others = rows[1:] + rows[:1] if len(rows) > 1 else self.loader.indices(step - 1)[-1:]
        return list(zip(rows, others))

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimiser step."""
        pairs = self.pairs(step)
        return [self.batch([pairs[i] for i in own]) for own in self.loader.shares(self.shapes(pairs))]

    def parts(self, shapes: list[tuple[int, list[int]]], at_once: int) -> list[list[int]]:
        """As of the loader."""
        return self.loader.parts(shapes, at_once)

    def used(self) -> list[tuple[int, int]]:
        """The records that the run will see, in order."""
        return sorted({pair for step in range(len(self.loader)) for pair in self.pairs(step)})

    def shapes(self, pairs: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
        """For each record, the number of tokens of its prompt and of its completion."""
        prompts, completions = (self.loader.shapes(list(rows)) for rows in zip(*pairs))
        return [(prompt, lengths) for (prompt, _), (_, lengths) in zip(prompts, completions)]

    def batch(self, pairs: list[tuple[int, int]]) -> Batch:
        """The batch of some records."""
        prompts = self.loader.values[[prompt for prompt, _ in pairs]]["prompt_ids"]
        completions = self.loader.values[[completion for _, completion in pairs]]["completion_ids"]
        return self.loader.collate(prompts, completions, pairs)


def earlier_turns(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record for each turn of the assistant's that answers the user's in the records' prompts; each of them once."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        talk = record["prompt"]
        for place in range(1, len(talk)):
            if (talk[place - 1]["role"], talk[place]["role"]) == ("user", "assistant"):
                own = {**record, "prompt": talk[:place], "completions": [talk[place]["content"]], "score": None}
                found.setdefault(json.dumps(talk[: place + 1]), own)
    return list(found.values())


class SFTDataLoader(DataLoader):
    """One completion a record: the demonstration, or each that there is."""

    needs = "demonstrations"

    @staticmethod
    def records(data: Dataset, train_on: str = "targets") -> list[dict[str, Any]]:
        """A record for each target of each prompt; with train_on="turns" also for each earlier turn of the assistant's,
        once; with "all" for each completion."""
        if train_on == "all":
            return [example.record(i) for example in data for i in range(len(example.generations))]
        found = [example.record(target) for example in data for target in example.targets()]
        return [*earlier_turns(found), *found] if train_on == "turns" else found


class PairedPreferenceDataLoader(DataLoader):
    """Two completions a record, the first preferred."""

    needs = "pairs"

    @staticmethod
    def records(data: Dataset) -> list[dict[str, Any]]:
        """A record for each pair."""
        return [example.record(*pair) for example in data for pair in example.pairs]


class UnpairedPreferenceDataLoader(DataLoader):
    """One completion a record, labelled desirable or not: `Batch.record["desirable"]` [S]."""

    needs = "labels or pairs"

    @staticmethod
    def records(
        data: Dataset, *, frac_unique_desirable: Share = 1.0, frac_unique_undesirable: Share = 1.0, seed: int = 0
    ) -> list[dict[str, Any]]:
        """A record for each label and for both sides of each pair.

        Of the desirable and of the undesirable ones only the fractions given are kept, drawn with the seed.
        """
        found: list[dict[str, Any]] = []
        for example in data:
            labelled = [(i, label) for i, label in enumerate(example.desirable) if label is not None]
            sides = [side for better, worse in example.pairs for side in ((better, True), (worse, False))]
            found += [example.record(i, desirable=label) for i, label in labelled + sides]
        kept: set[int] = set()
        for label, fraction in ((True, frac_unique_desirable), (False, frac_unique_undesirable)):
            own = [i for i, record in enumerate(found) if record["desirable"] == label]
            kept.update(random.Random(seed).sample(own, round(fraction * len(own))))
        return [record for i, record in enumerate(found) if i in kept]


GOOD, BAD = "<|good|>", "<|bad|>"  # the control tokens of conditional SFT


class ConditionalSFTDataLoader(UnpairedPreferenceDataLoader):
    """The unpaired records, each completion after the control token for its label."""

    @staticmethod
    def records(data: Dataset, **options: Any) -> list[dict[str, Any]]:
        """As of UnpairedPreferenceDataLoader. The tokenizer has to know both control tokens."""
        found = UnpairedPreferenceDataLoader.records(data, **options)
        return [
            {**record, "completions": [(GOOD if record["desirable"] else BAD) + text for text in record["completions"]]}
            for record in found
        ]
