"""Rows of data files: find the files on the Hub or on disk, read rows with their places, check rows field by field."""

import csv
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from data.hub import download
from utils import Message, UserError, console, json_lines

ROLES = ("system", "user", "assistant")
SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
PLACES_SHOWN, PLACES_KEPT = 3, 100  # bad rows of each reason that are printed, and that the report on disk names
REASONS_KEPT = 50  # a reason may hold words of the data; further ones are counted together


class BadRow(UserError):
    """A row that cannot be used. The message is the reason without the place, so that equal reasons can be counted."""


class BadRows:
    """The rows of one data set that cannot be used: how many, why, and where they are."""

    def __init__(self, name: str, total: int = 0) -> None:
        self.name = name
        self.total = total
        self.counts: Counter[str] = Counter()  # by reason
        self.places: dict[str, list[str]] = {}  # by reason, the first PLACES_KEPT

    def add(self, reason: str, place: str) -> None:
        if reason not in self.counts and len(self.counts) >= REASONS_KEPT:
            reason = "other reasons"
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES_KEPT:
            places.append(place)

    @contextmanager
    def caught(self, place: str) -> Iterator[None]:
        """A BadRow raised inside the `with` block is recorded and not raised again."""
        try:
            yield
        except BadRow as error:
            self.add(str(error), place)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Count one row, and use it inside the `with` block, where a BadRow is `caught`."""
        self.total += 1
        with self.caught(place):
            yield

    @classmethod
    def from_report(cls, name: str, total: int, report: dict[str, Any]) -> "BadRows":
        """Those that `report` described."""
        bad = cls(name, total)
        bad.counts = Counter({reason: found["rows"] for reason, found in report.items()})
        bad.places = {reason: found["first"] for reason, found in report.items()}
        return bad

    def report(self) -> dict[str, Any]:
        """By reason, how many rows are bad and the first of their places, as JSON."""
        return {reason: {"rows": count, "first": self.places[reason]} for reason, count in self.counts.items()}

    def summary(self) -> str:
        """How many rows are bad and, for each reason, how many and some of their places."""
        lines = [f"{self.name}: {self.counts.total()} of {self.total} rows cannot be used"]
        for reason, count in self.counts.items():
            more = ", ..." if count > PLACES_SHOWN else ""
            lines.append(f"  {count} x {reason}: {', '.join(self.places[reason][:PLACES_SHOWN])}{more}")
        return "\n".join(lines)

    def check(self, limit: float) -> None:
        """Print what is left out. Raises UserError if the bad rows are more than the share `limit` of all rows."""
        count = self.counts.total()
        if count > limit * self.total:
            allowed = f"max_bad_rows={limit} allows {limit:.2%} of them. Fix the data, or allow more: max_bad_rows=0.05"
            raise UserError(f"{self.summary()}\n{allowed}")
        if count:
            console.print(self.summary(), style="yellow", markup=False)


def read_rows(files: Iterable[Path], bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for every row of the files. Rows that cannot be parsed are added to `bad` and skipped.

    A place is "file:line" or "file row n". Loaders use each row inside `with data.bad.at(place):`.
    Raises UserError for a file that cannot be read at all.
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
    """Yield (place, row) for every row; the row is None if it cannot be parsed.

    A `.json` file holds one list, or JSON lines. Lists in `.json` files are read whole, other formats row by row.
    """
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
                yield from ((f"{file}:{n}", row) for n, row in json_lines(stream))


def value_of(row: dict[str, Any], name: str) -> Any:
    """The value of a required field. Raises BadRow if it is missing or null."""
    if row.get(name) is None:
        raise BadRow(f"{name!r} is missing")
    return row[name]


def checked_text(value: Any, what: str) -> str:
    """Return `value`. Raises BadRow unless it is valid Unicode text that is more than white space.

    `what` names the value in the error.
    """
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
    """The text of a required field. Raises BadRow."""
    return checked_text(value_of(row, name), repr(name))


def number_of(row: dict[str, Any], name: str) -> float:
    """The finite number in a required field. Raises BadRow."""
    try:
        number = float(value_of(row, name))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name!r} is not a number")
    return number


def parse_conversation(value: Any, what: str) -> list[Message]:
    """Messages from a list of messages, or from a text, which becomes one user turn. Raises BadRow."""
    if isinstance(value, str):
        return [{"role": "user", "content": checked_text(value, what)}]
    if not isinstance(value, list) or not value:
        raise BadRow(f"{what} is neither text nor a list of messages")
    if not all(isinstance(turn, dict) and turn.get("role") in ROLES for turn in value):
        raise BadRow(f"{what} is not a list of messages with a role of {', '.join(ROLES)}")
    return [{"role": turn["role"], "content": checked_text(turn.get("content"), f"a turn of {what}")} for turn in value]


def answer_of(row: dict[str, Any], name: str) -> tuple[list[Message], str]:
    """(earlier messages, answer) from a field that holds the answer alone, or a conversation that ends with it.

    Raises BadRow.
    """
    value = value_of(row, name)
    if isinstance(value, str):
        return [], checked_text(value, repr(name))
    *before, last = parse_conversation(value, repr(name))
    if last["role"] != "assistant":
        raise BadRow(f"{name!r} does not end with the assistant's turn")
    return before, last["content"]


def pair_of(row: dict[str, Any]) -> tuple[str | list[Message], str, str]:
    """(prompt, chosen, rejected). If chosen and rejected are whole conversations, the prompt is the part they share.

    Raises BadRow if they do not share it.
    """
    (before, chosen), (before_rejected, rejected) = answer_of(row, "chosen"), answer_of(row, "rejected")
    if before != before_rejected:
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    return before or value_of(row, "prompt"), chosen, rejected


def collapse(value: Any) -> Any:
    """Replace each run of spaces and tabs in a row's text by one space, as HALOs does for shp, hh, oasst, ultrabin."""
    if isinstance(value, str):
        return re.sub(r"[ \t]+", " ", value)
    if isinstance(value, list):
        return [collapse(item) for item in value]
    return {key: collapse(item) for key, item in value.items()} if isinstance(value, dict) else value


def hub_files(repo: str, patterns: Sequence[str], split: str, data_dir: str | None, folder: str = "") -> list[Path]:
    """The files of one split of a data set, from the Hub or from `data_dir`, a local copy in the Hub's layout.

    `patterns` are relative to the repository; {split} in them stands for the split's name. With `data_dir=D`, it tries
    the folders D/<owner>/<repo>, D/<repo>, D/<folder> and D. No code of the repository runs: `rows` reads the files as
    they are. (`datasets.load_dataset` refuses repositories that have a loading script, such as tatsu-lab/alpaca_eval.)
    Raises UserError if the data set or the split cannot be found.
    """
    wanted, any_split = ([pattern.format(split=name) for pattern in patterns] for name in (split, "*"))
    if data_dir is None:
        try:
            root = download(repo, wanted, data_set=True)
        except UserError as error:
            raise UserError(f"{error}\ndata_dir= names a folder with a local copy.") from error
    else:
        base = Path(data_dir)
        tried = [base / repo, base / repo.split("/")[1], *([base / folder] if folder else []), base]
        copies = [folder for folder in tried if any(list(folder.glob(pattern)) for pattern in any_split)]
        if not copies:
            folders = "\n".join(f"  {folder}" for folder in tried)
            raise UserError(f"data_dir={data_dir} holds no copy of {repo} ({', '.join(any_split)}). Tried:\n{folders}")
        root = copies[0]
    found = sorted({path for pattern in wanted for path in root.glob(pattern)})
    if not found:
        present = sorted({str(path.relative_to(root)) for pattern in any_split for path in root.glob(pattern)})
        raise UserError(
            f"{repo} has no {split!r} split in {root}. That folder has: {', '.join(present) or 'none of its files'}.\n"
            "Choose another split with train_split or eval_split, for example train_split=test."
        )
    return found
