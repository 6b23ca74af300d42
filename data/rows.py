"""Rows of data files: find the files on the Hub or on disk, read rows with their places, check rows field by field."""

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
from pyarrow import parquet

from data.hub import download
from utils import Message, RepeatedKey, UserError, console, in_words, without_repeats

ROLES = ("system", "user", "assistant")
TURNS = (("system", "user"), ("user", "assistant"), ("assistant", "user"))  # who may speak after whom
NOT_RENDERED = ("tool_calls", "function_call", "reasoning", "reasoning_content", "thinking")  # beside what a turn says
SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
longest_row: ContextVar[int] = ContextVar("longest_row", default=16 << 20)  # bytes; settings.max_row_mb
PIECE = 1 << 16  # characters of a file read at once
JSON_SPACE = re.compile(r"[ \t\n\r]*")
PARQUET_ROWS = 16  # of a file in memory at once; each may be nearly as long as one that is too long
MOST_UNPACKED, MOST_PACKED = 1 << 30, 100  # bytes, or times its size: what a packed file may unpack to
UNREADABLE = (ValueError, KeyError, OverflowError, pyarrow.ArrowException)  # what a value of a table may raise
PLACES_SHOWN, PLACES_KEPT = 3, 100  # bad rows of each reason that are printed, and that the report on disk names
REASONS_KEPT = 50  # a reason may hold words of the data; further ones are counted together
NAMES_KEPT = 20


class BadRow(UserError):
    """A row that cannot be used. The message is the reason without the place, so that equal reasons can be counted."""


class BadRows:
    """The rows of one data set that cannot be used: how many, why, and where they are."""

    def __init__(self, name: str, total: int = 0) -> None:
        self.name = name
        self.total = total
        self.counts: Counter[str] = Counter()  # by reason
        self.places: dict[str, list[str]] = {}  # by reason, the first PLACES_KEPT
        self.unused: dict[str, None] = {}  # the names of values of which nothing is read, at most NAMES_KEPT

    def add(self, reason: str, place: str) -> None:
        if reason not in self.counts and len(self.counts) >= REASONS_KEPT:
            reason = "other reasons"
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES_KEPT:
            places.append(place)

    def leave(self, names: Iterable[str]) -> None:
        """Note the names of values that are not used."""
        self.unused.update(dict.fromkeys(islice(names, NAMES_KEPT - len(self.unused))))

    @contextmanager
    def caught(self, place: str) -> Iterator[None]:
        """What is wrong with a row inside the `with` block is recorded: a BadRow is not raised again."""
        try:
            yield
        except BadRow as error:
            self.add(str(error), place)
        except RecursionError:
            self.add("the row is nested too deeply", place)

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
            enough = min(1, (1000 * count // self.total + 1) / 1000)  # a little more than there are, against rounding
            allowed = f"max_bad_rows={limit} allows {limit:.2%} of them. Fix the data, or allow more: "
            allowed += f"max_bad_rows={enough:g}"
            raise UserError(f"{self.summary()}\n{allowed}")
        if count:
            console.print(self.summary(), style="yellow", markup=False)


def read_rows(
    files: Iterable[Path], bad: BadRows, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for every row of the files. Rows that cannot be parsed are added to `bad` and skipped.

    With `columns`, a row has only those; the names of others, and of what a message holds beside its role and content,
    go to `bad.unused`. A place is "file:line" or "file row n". Loaders use each row inside `with data.bad.at(place):`.
    Raises UserError for a file that cannot be read at all.
    """
    for file in files:
        try:
            for place, row in _parse(file, bad, columns):
                if not isinstance(row, dict):
                    with bad.at(place):
                        raise row if isinstance(row, BadRow) else BadRow("the row is malformed")
                elif columns is None:
                    yield place, row
                else:
                    bad.leave(name for name in _unused(row, columns) if name not in bad.unused)
                    yield place, {name: row[name] for name in columns if name in row}
        except RecursionError as error:
            raise UserError(f"{file} cannot be read: it is nested too deeply") from error
        except (OSError, EOFError, ValueError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {in_words(error)}") from error


def _unused(row: dict[str, Any], columns: Sequence[str]) -> Iterator[str]:
    """The names of a row's values that are neither of the columns nor a message's role and content."""
    for name, value in row.items():
        if name not in columns:
            yield name
        elif isinstance(value, list):
            keys = (key for turn in value if isinstance(turn, dict) and "role" in turn for key in turn if turn[key])
            yield from (f"{name}.{key}" for key in keys if key not in ("role", "content", *NOT_RENDERED))


def _parse(file: Path, bad: BadRows, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for every row; in place of one that cannot be read, a BadRow that says why.

    Of a Parquet file only the columns are read. A `.json` file holds one list, or JSON lines.
    """
    kind = Path(file.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"several columns are called {Counter(names).most_common(1)[0][0]!r}")
            used = [name for name in names if columns is None or name in columns]
            bad.leave(name for name in names if name not in used)
            read = chain.from_iterable(map(_table_rows, _bounded(file, table.iter_batches(PARQUET_ROWS, columns=used))))
            yield from ((f"{file} row {n}", row) for n, row in enumerate(read, 1))
        return
    with _Unpacked(file) if file.suffix == ".gz" else file.open("rb") as opened:
        stream = cast(BinaryIO, opened)
        is_list = kind == ".json" and stream.read(80).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        stream.seek(0)
        if kind == ".csv":
            yield from ((f"{file}:{n}", row) for n, row in _csv_rows(stream))
        elif is_list:
            yield from ((f"{file} row {n}", item) for n, item in enumerate(_ListReader(stream).items(), 1))
        else:
            yield from ((f"{file}:{n}", _json(line)) for n, line in enumerate(_lines(stream), 1) if line.strip())


def require_data(file: Path, unpacked: int) -> None:
    """Raises ValueError for a packed file that has unpacked to far more than texts do, and would fill the memory."""
    if unpacked > max(MOST_UNPACKED, MOST_PACKED * file.stat().st_size):
        raise ValueError(f"it unpacks to more than {MOST_PACKED} times its size, and over {MOST_UNPACKED >> 20:,} MiB")


def _bounded(file: Path, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """The parts of a table, which has to be data (`require_data`)."""
    unpacked = 0
    for batch in batches:
        unpacked += batch.nbytes
        require_data(file, unpacked)
        yield batch


class _Unpacked(gzip.GzipFile):
    """The content of a .gz file, which has to be data (`require_data`)."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.path = file

    def read(self, size: int | None = -1) -> bytes:
        return self._data(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        return self._data(super().read1(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._data(super().readline(size))

    def _data(self, content: bytes) -> bytes:
        require_data(self.path, self.tell())
        return content


def is_samples_file(file: Path) -> bool:
    """Whether a file begins as those of eval.py do."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        return bool(re.match(rb'\s*\{\s*"sampled_at":', stream.read(80)))


def _too_long() -> str:
    return f"the row is longer than max_row_mb={longest_row.get() >> 20}"


def _table_rows(batch: pyarrow.RecordBatch) -> Iterator[Any]:
    """The rows of a part of a table."""
    longest = longest_row.get()
    try:
        rows = batch.to_pylist() if batch.nbytes <= longest else None
    except UNREADABLE:
        rows = None
    if rows is not None:
        yield from rows
        return
    for row in (batch.slice(place, 1) for place in range(batch.num_rows)):  # each by itself, since one may be bad
        try:
            yield row.to_pylist()[0] if row.nbytes <= longest else BadRow(_too_long())
        except UNREADABLE:
            yield BadRow("the row holds a value that cannot be read")


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, which end with \\n alone. Of one that is too long only a beginning, which is too long."""
    longest = longest_row.get()
    while line := stream.readline(longest + 1):
        yield line
        while len(line) > longest and not line.endswith(b"\n"):
            line = stream.readline(longest + 1)


def _json(line: bytes) -> Any:
    """The value on one line; a BadRow where it has none."""
    if len(line) > longest_row.get():
        return BadRow(_too_long())
    try:
        return json.loads(line, object_pairs_hook=without_repeats)
    except RecursionError:
        return BadRow("the row is nested too deeply")
    except RepeatedKey as error:
        return BadRow(f"the row has {error}")
    except ValueError:
        return BadRow("the row is malformed")


class _ListReader:
    """Reads a JSON list. In memory are one item and the piece of the file that follows it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        self.decoder = json.JSONDecoder(object_pairs_hook=without_repeats)
        self.held, self.at = "", 0  # what is read, and where in it the rest begins

    def items(self) -> Iterator[Any]:
        """Raises ValueError where the file is not a list, or an item is too long."""
        self.mark()  # the opening bracket
        if self.mark() != "]":
            self.at -= 1
            yield self.item()
            while (mark := self.mark()) == ",":
                yield self.item()
            if mark != "]":
                raise ValueError(f"after an item of the list comes {mark!r}" if mark else "it ends within its list")
        if mark := self.mark():
            raise ValueError(f"after its list comes {mark!r}")

    def mark(self) -> str:
        """The next character that is not white space, after which the rest begins; empty at the end of the file."""
        self.skip_space()
        while self.at == len(self.held):
            self.held, self.at = self.text.read(PIECE), 0
            if not self.held:
                return ""
            self.skip_space()
        self.at += 1
        return self.held[self.at - 1]

    def item(self) -> Any:
        """The next item, after which the rest begins."""
        longest = longest_row.get()
        while True:
            self.skip_space()
            try:
                value, end = self.decoder.raw_decode(self.held, self.at)
            except RepeatedKey as error:
                raise ValueError(f"an item of the list has {error}") from None
            except ValueError as error:
                piece = self.text.read(max(PIECE, len(self.held)))
                if not piece or len(self.held) - self.at > longest:
                    reason = f"an item of the list is not JSON, or longer than max_row_mb={longest >> 20}"
                    raise ValueError(f"{reason}: {self.held[self.at : self.at + 40]!r}") from error
                self.held, self.at = self.held[self.at :] + piece, 0
            else:
                self.at = end
                return value

    def skip_space(self) -> None:
        space = JSON_SPACE.match(self.held, self.at)
        assert space
        self.at = space.end()


def _csv_rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The rows of a CSV file, each with the line that it begins in. Raises csv.Error where one is too long, for a
    missing quote can be the reason, and for a name that two columns have."""
    text, longest, length = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), longest_row.get(), 0

    def lines() -> Iterator[str]:
        nonlocal length
        while line := text.readline(longest + 1):
            length += len(line)
            if length > longest:
                raise csv.Error(f"line {start}: {_too_long()}")
            yield line

    csv.field_size_limit(2**31 - 1)
    start = 1
    reader = csv.DictReader(lines(), strict=True)
    names = Counter(reader.fieldnames or [])
    if names and names.most_common(1)[0][1] > 1:
        raise csv.Error(f"several columns are called {names.most_common(1)[0][0]!r}")
    start, length = 2, 0
    for row in reader:
        is_ragged = None in row or None in row.values()
        yield start, BadRow("the row is malformed") if is_ragged else row
        start, length = reader.line_num + 1, 0


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
    value = value_of(row, name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name!r} is not a number")
    return number


def optional_number_of(row: dict[str, Any], name: str) -> float | None:
    """The number in a column; None where there is none."""
    return None if row.get(name) in (None, "") else number_of(row, name)


def parse_conversation(value: Any, what: str) -> list[Message]:
    """Messages from a list of messages, or from a text, which becomes one user turn. Raises BadRow."""
    if isinstance(value, str):
        return [{"role": "user", "content": checked_text(value, what)}]
    if not isinstance(value, list) or not value:
        raise BadRow(f"{what} is neither text nor a list of messages")
    if not all(isinstance(turn, dict) and turn.get("role") in ROLES for turn in value):
        raise BadRow(f"{what} is not a list of messages with a role of {', '.join(ROLES)}")
    for name in NOT_RENDERED:
        if any(turn.get(name) for turn in value):
            raise BadRow(f"a turn of {what} has {name!r}, which would not be rendered")
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


def pair_of(row: dict[str, Any]) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected). If chosen and rejected are whole conversations, the prompt is the part they share,
    with what a `prompt` has beside that (`prompt_of`).

    Raises BadRow if they do not share it.
    """
    (before, chosen), (before_rejected, rejected) = answer_of(row, "chosen"), answer_of(row, "rejected")
    if before != before_rejected:
        raise BadRow("the prompts of 'chosen' and 'rejected' differ")
    return prompt_of(row, before), chosen, rejected


def prompt_of(row: dict[str, Any], before: list[Message]) -> list[Message]:
    """The prompt of a row whose answer ends a conversation, after the messages `before`, perhaps none.

    A `prompt` beside them may be a part of them, or have them as a part, or be what they go on from. Raises BadRow if
    it is neither.
    """
    if before and not row.get("prompt"):
        return before
    given = parse_conversation(value_of(row, "prompt"), "the prompt")
    if is_part(before, given):
        return given
    if is_part(given, before):
        return before
    if (given[-1]["role"], before[0]["role"]) in TURNS:
        return given + before
    raise BadRow("the prompt and the conversation that the answer ends are different ones")


def is_part(part: list[Message], whole: list[Message]) -> bool:
    """Whether the messages follow each other somewhere in the others, but for white space around what they say."""
    a, b = ([(message["role"], message["content"].strip()) for message in messages] for messages in (part, whole))
    return any(b[start : start + len(a)] == a for start in range(len(b) - len(a) + 1))


def collapse(value: Any) -> Any:
    """Replace each run of two and more spaces and tabs in a row's text by one space, as HALOs does for shp, hh, oasst
    and ultrabin."""
    if isinstance(value, str):
        return re.sub(r"[ \t]{2,}", " ", value)
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
