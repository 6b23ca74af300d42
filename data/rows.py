"""Rows of data files: found on the hub or on disk, read with their places, checked field by field."""

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
from huggingface_hub import snapshot_download
from pyarrow import parquet

from utils import Message, UserError, console

ROLES = ("system", "user", "assistant")
SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
PLACES_SHOWN = 3  # of the bad rows of one reason; the report on disk has all


class BadRow(UserError):
    """A row that cannot be used. The message is the reason alone, without the place, so that rows can be counted."""


class BadRows:
    """The rows of one data set that cannot be used: how many, why and where."""

    def __init__(self, name: str, total: int = 0) -> None:
        self.name = name
        self.total = total
        self.places: dict[str, list[str]] = {}  # by reason

    def add(self, reason: str, place: str) -> None:
        self.places.setdefault(reason, []).append(place)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Everything done with one row. A BadRow raised inside is noted with its place and goes no further."""
        self.total += 1
        try:
            yield
        except BadRow as error:
            self.add(str(error), place)

    def summary(self) -> str:
        """The number of bad rows, and some places for each reason."""
        lines = [f"{self.name}: {sum(map(len, self.places.values()))} of {self.total} rows cannot be used"]
        for reason, places in self.places.items():
            more = ", ..." if len(places) > PLACES_SHOWN else ""
            lines.append(f"  {len(places)} x {reason}: {', '.join(places[:PLACES_SHOWN])}{more}")
        return "\n".join(lines)

    def check(self, limit: float) -> None:
        """Say what is left out. Raises UserError when that is more than the share `limit` of all rows."""
        count = sum(map(len, self.places.values()))
        if count > limit * self.total:
            allowed = (
                f"max_bad_rows={limit} allows {limit:.2%} of them. Mend the data, or allow more: max_bad_rows=0.05"
            )
            raise UserError(f"{self.summary()}\n{allowed}")
        if count:
            console.print(self.summary(), style="yellow", markup=False)


def rows(files: Iterable[Path], bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row of the files; a row that cannot be parsed goes to `bad`.

    Loaders use each row inside `with data.bad.at(place):`. Raises UserError for a file that cannot be read at all.
    """
    for file in files:
        try:
            for place, row in _parse(file):
                if isinstance(row, dict):
                    yield place, row
                else:
                    with bad.at(place):
                        raise BadRow("the row is malformed")
        except (OSError, EOFError, ValueError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {error}") from error


def _parse(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row; None for a row that cannot be parsed. A `.json` file is a list, or JSON lines."""
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    kind = Path(file.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        with parquet.ParquetFile(file) as table:
            parsed = (row for batch in table.iter_batches() for row in batch.to_pylist())
            yield from ((f"{file} row {n}", row) for n, row in enumerate(parsed, 1))
    elif kind == ".csv":
        csv.field_size_limit(2**31 - 1)
        with opener(file, "rt", encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            line = 2
            for row in reader:
                ragged = None in row or None in row.values()
                yield f"{file}:{line}", None if ragged else row
                line = reader.line_num + 1
    else:
        with opener(file, "rb") as stream:
            is_list = kind == ".json" and stream.read(80).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
            stream.seek(0)
            if is_list:
                yield from ((f"{file} row {n}", row) for n, row in enumerate(json.load(stream), 1))
            else:
                yield from ((f"{file}:{n}", _json(line)) for n, line in enumerate(stream, 1) if line.strip())


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def value_of(row: dict[str, Any], name: str) -> Any:
    """A field that must be there. Raises BadRow."""
    if row.get(name) is None:
        raise BadRow(f"{name!r} is missing")
    return row[name]


def checked_text(value: Any, what: str) -> str:
    """The value, which must be text that can be stored and is more than white space. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{what} is not text")
    if not value.strip():
        raise BadRow(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} is not valid Unicode") from error
    return value


def text_of(row: dict[str, Any], name: str) -> str:
    """A field that must hold text. Raises BadRow."""
    return checked_text(value_of(row, name), repr(name))


def number_of(row: dict[str, Any], name: str) -> float:
    """A field that must hold a finite number. Raises BadRow."""
    try:
        number = float(value_of(row, name))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name!r} is not a number")
    return number


def parse_conversation(value: Any, what: str) -> list[Message]:
    """Messages from a list of them, or from text, which is one turn of the user. Raises BadRow."""
    if isinstance(value, str):
        return [{"role": "user", "content": checked_text(value, what)}]
    if not isinstance(value, list) or not value:
        raise BadRow(f"{what} is neither text nor a list of messages")
    if not all(isinstance(turn, dict) and turn.get("role") in ROLES for turn in value):
        raise BadRow(f"{what} is not a list of messages with a role of {', '.join(ROLES)}")
    return [{"role": turn["role"], "content": checked_text(turn.get("content"), f"a turn of {what}")} for turn in value]


def answer_of(row: dict[str, Any], name: str) -> tuple[list[Message], str]:
    """(what was said before, the answer) from a field that holds the answer alone or a conversation ending in it."""
    value = value_of(row, name)
    if isinstance(value, str):
        return [], checked_text(value, repr(name))
    *before, last = parse_conversation(value, repr(name))
    if last["role"] != "assistant":
        raise BadRow(f"{name!r} does not end with the assistant's turn")
    return before, last["content"]


def pair_of(row: dict[str, Any]) -> tuple[str | list[Message], str, str]:
    """(prompt, chosen, rejected). Where chosen and rejected are whole conversations the prompt is what they share."""
    (before, chosen), (before_rejected, rejected) = answer_of(row, "chosen"), answer_of(row, "rejected")
    if before != before_rejected:
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    return before or value_of(row, "prompt"), chosen, rejected


def collapse(value: Any) -> Any:
    """A row with each run of spaces and tabs in its text made one space, as HALOs does for shp, hh, oasst, ultrabin."""
    if isinstance(value, str):
        return re.sub(r"[ \t]+", " ", value)
    if isinstance(value, list):
        return [collapse(item) for item in value]
    return {key: collapse(item) for key, item in value.items()} if isinstance(value, dict) else value


def hub_files(repo: str, patterns: Sequence[str], split: str, data_dir: str | None, folder: str = "") -> list[Path]:
    """The files of a split of a data set: from the hub, or from `data_dir`, a local copy in the hub's own layout.

    Patterns are relative to the repository, with {split} where its name goes. For `data_dir=D` it tries the folders
    D/<owner>/<repo>, D/<repo>, D/<folder> and D. Nothing of the repository is run: `rows` reads its files as they are.
    (`datasets.load_dataset` would refuse the repositories with a loading script, such as tatsu-lab/alpaca_eval.)
    """
    wanted, any_split = ([pattern.format(split=name) for pattern in patterns] for name in (split, "*"))
    if data_dir is None:
        try:
            root = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=wanted))
        except OSError as error:  # of the network, or of the hub's answer
            raise UserError(
                f"The data set {repo} cannot be fetched from the Hugging Face hub: {str(error).splitlines()[0]}\n"
                "Log in with `hf auth login` if it asks for that, or point data_dir at a folder with a local copy."
            ) from error
    else:
        base = Path(data_dir).expanduser()
        tried = [base / repo, base / repo.split("/")[1], *([base / folder] if folder else []), base]
        fitting = [place for place in tried if any(list(place.glob(pattern)) for pattern in any_split)]
        if not fitting:
            places = "\n".join(f"  {place}" for place in tried)
            raise UserError(f"data_dir={data_dir} holds no copy of {repo} ({', '.join(any_split)}). Tried:\n{places}")
        root = fitting[0]
    found = sorted({path for pattern in wanted for path in root.glob(pattern)})
    if not found:
        there = sorted({str(path.relative_to(root)) for pattern in any_split for path in root.glob(pattern)})
        raise UserError(
            f"{repo} has no {split!r} split in {root}, where there is: {', '.join(there) or 'nothing of it'}.\n"
            "train_split and eval_split say which split is used, for instance train_split=test."
        )
    return found
