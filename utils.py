"""Small helpers that at least two modules use."""

import contextlib
import ctypes
import errno
import fcntl
import gc
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import IO, Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column

REPO = Path(__file__).resolve().parent
T = TypeVar("T")
SIDES = ("chosen", "rejected")  # of a pair
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}
SECONDS_BETWEEN_LINES = 30.0  # of progress, in a batch job's log


class Screen(Console):
    """A terminal, or the file in its place, that shows every text as it is.

    Brackets are no markup. Control characters, which a terminal would obey, are left out, and characters that its
    encoding lacks are escaped. When nobody reads any longer (`| head`), the command goes on without a word.
    """

    CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As Console's: all that is printed comes through here, rich's own control sequences too."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=self.harmless(segment.text))

    def harmless(self, text: str) -> str:
        return self.CONTROL.sub("", text).encode(self.encoding, "backslashreplace").decode(self.encoding)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


console, error_console = Screen(), Screen(stderr=True)


class UserError(Exception):
    """Bad input, configuration or data. The message names the thing, where it is and what would work.

    The commands print it without a traceback and exit with status 2.
    """


def collect_garbage_rarely() -> None:
    """Make Python search for reference cycles less often. Its default, every 700 new objects, takes a fifth of the time
    of the imports and more of the time of tokenising, so call this before the large imports."""
    gc.set_threshold(100_000)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when the one that started it ends, however that ends. Only Linux does
    that."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def suggest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'beta'?)"`, or an empty string if no known word is close to `word`."""
    names = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), names, n=1, cutoff=0.7)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else key).items()}


def in_words(error: BaseException) -> str:
    """What went wrong, in a line: of an error of the file system only that, for messages that name the path."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change when any part changes. The parts are JSON values."""
    return hashlib.sha256(_canonical(parts)).hexdigest()[:16]


def digest_of(items: Iterable[Any]) -> str:
    """64 hex digits that change when any item changes. The items are JSON values; only one is in memory at a time."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(_canonical(item) + b"\n")
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    """The same bytes for equal JSON values, also for text that is not valid Unicode."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_path(text: str) -> Path:
    """A path of a command line; ~ is the home directory, also where no shell replaced it (`--flag=~/file`)."""
    return Path(text).expanduser()


def resolve_path(path: str | Path) -> Path:
    """The path as the user wrote it. If nothing exists there, but it exists inside this repository: that one."""
    path = Path(path).expanduser()
    inside_repo = REPO / path
    return inside_repo if not path.exists() and inside_repo.exists() else path


def is_file_name(text: Any) -> bool:
    """Whether it names something in a directory, and nothing outside it."""
    return isinstance(text, str) and text not in ("", ".", "..") and not set(text) & set("/\\\0")


def require_different_files(files: Iterable[Path], where: str) -> None:
    """Raises UserError where two paths lead to one file."""
    seen: dict[Any, Path] = {}
    for file in files:
        known = seen.setdefault(tuple(file.stat())[1:3] if file.exists() else file.absolute(), file)
        if known is not file:
            raise UserError(f"{where} names one file twice: {known}, {file}")


def code_file(name: str) -> Path | None:
    """The user's file that `path/to/file.py:Name` names; None for code of this repository."""
    file, _, _ = name.rpartition(":")
    path = resolve_path(file)
    return path if file and module_name(path) is None else None


def load_class(name: str, module: Any, setting: str) -> Any:
    """The class that a setting names: `ClassName`, a class of `module`, or `path/to/file.py:ClassName`.

    Raises UserError, which names the setting, if there is no such file or class.
    """
    return load_named(name, module, setting, "class", inspect.isclass)


def load_function(name: str, module: Any, setting: str) -> Any:
    """The function that a setting names, as `load_class`."""
    return load_named(name, module, setting, "function", inspect.isfunction)


def load_named(name: str, module: Any, setting: str, kind: str, is_kind: Callable[[Any], bool]) -> Any:
    """What a setting names of a module: `Name`, or `path/to/file.py:Name`."""
    file, _, own_name = name.rpartition(":")
    if file:
        path = resolve_path(file)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UserError(f"{setting}={name}: no Python file {path}")
        if imported_as := module_name(path):
            module = importlib.import_module(imported_as)
        else:
            module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except (Exception, SystemExit) as error:
                raise UserError(f"{setting}={name}: {path} cannot be run ({type(error).__name__}: {error})") from error
    found = getattr(module, own_name, None)
    if not is_kind(found):
        there = [key for key, value in vars(module).items() if is_kind(value)]
        raise UserError(f"{setting}={name}: no {kind} {own_name} in {module.__name__}{suggest(own_name, there)}")
    return found


def module_name(path: Path) -> str | None:
    """The name under which this repository imports a file of its packages; None for any other file."""
    path = path.resolve()
    if not path.is_relative_to(REPO) or not (path.parent / "__init__.py").is_file():
        return None
    return ".".join(path.relative_to(REPO).with_suffix("").parts)


def flush_to_disk(*paths: Path) -> None:
    """Write files, or the entries of directories, to the disk itself (fsync)."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


PART = ".fpo.part"  # ends the name of a directory that is still being written


class Part:
    """A place to write a file or directory at, beside its `target`: it appears there whole, by `finish`, or never.

    It is in a directory that this process keeps locked, which tells it from what a killed process has left.
    """

    def __init__(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_litter(target.parent)
        self.target, self.lock = target, -1
        while self.lock < 0:  # until it is locked, another process may take it for litter
            self.folder = part_beside(target, target.parent)
            self.lock = locked(self.folder, wait=True)
        self.path = self.folder / target.name

    def finish(self) -> None:
        """Flush to disk and rename. An existing file is replaced; an existing directory that is not empty is an
        error."""
        flush_to_disk(self.path, *self.path.rglob("*"))
        self.path.rename(self.target)
        flush_to_disk(self.target.parent)

    def close(self) -> None:
        """Remove what is left beside the target."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)


def part_beside(target: Path, folder: Path) -> Path:
    """A new directory to write a file in, before it is moved to its `target`."""
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PART, dir=folder))


def locked(folder: Path, *, wait: bool) -> int:
    """A descriptor of a directory, which locks it until it is closed; -1 if there is no such directory, or if another
    process locks it and this one does not `wait`."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # locked, or a file system without locks
        if wait:
            return descriptor
    else:
        if folder.exists():
            return descriptor
    os.close(descriptor)
    return -1


def remove_litter(folder: Path) -> None:
    """Remove from a directory what killed processes were writing there."""
    for left in folder.glob(f".*{PART}"):
        if (lock := locked(left, wait=False)) >= 0:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def missing_folders(folder: Path) -> list[Path]:
    """The directories that would be made for this one, the inner first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the directories that hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):  # something is in it, or it was not made
            folder.rmdir()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file or directory so that `path` is either complete or does not exist (`Part`).

    Yields a temporary path to write to. An exception leaves `path` as it was.
    """
    part = Part(path)
    try:
        yield part.path
        part.finish()
    finally:
        part.close()


DIGESTS = "digests.json"  # of a sealed directory: the digest of each of its files


@contextlib.contextmanager
def sealed_folder(path: Path) -> Iterator[Path]:
    """Fill a directory that appears whole and sealed, or not at all. One of the same name that another process has
    finished meanwhile stays."""
    part = Part(path)
    try:
        part.path.mkdir()
        yield part.path
        seal(part.path)
        try:
            part.finish()
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        part.close()


def seal(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write down the digest of every file in a directory, so that `damaged_files` finds what changes later. Some may be
    `known`, by the file's name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / DIGESTS]
    names = {str(path.relative_to(folder)): path for path in files}
    digests = {name: known.get(name) or file_digest(path) for name, path in names.items()}
    (folder / DIGESTS).write_text(as_json(digests, indent=2) + "\n")


def seal_of(folder: Path) -> dict[str, str]:
    """The digests that `seal` wrote, by file; empty where there is none that can be read."""
    try:
        files = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError):
        return {}
    return files if isinstance(files, dict) else {}


def damaged_files(folder: Path, share: slice = slice(None)) -> list[str]:
    """The files of a sealed directory that are not as they were written, among a share of them; the seal itself,
    where it cannot be read."""
    files = list(seal_of(folder).items())
    if not files:
        return [DIGESTS]
    return [
        name for name, digest in files[share] if not (folder / name).is_file() or file_digest(folder / name) != digest
    ]


def sound_digest(path: Path) -> str:
    """`file_digest`. Raises UserError where the file lies in a sealed directory and is not what was written there."""
    digest = file_digest(path)
    for folder in path.absolute().parents:
        if (folder / DIGESTS).is_file():
            known = seal_of(folder)
            if not known or known.get(str(path.absolute().relative_to(folder)), digest) != digest:
                raise damaged(folder, [path.name if known else DIGESTS])
            break
    return digest


def damaged(folder: Path, files: Iterable[str]) -> UserError:
    """The error for a sealed directory of which some files have changed."""
    return UserError(
        f"{folder}: damaged ({', '.join(files)}): not what was written there. Make it again; or, if the change is "
        f"yours, remove {DIGESTS} there"
    )


def open_in_place(path: Path) -> IO[bytes]:
    """A file to be read and added to, made if it is not there. Raises OSError for a link, which may lead anywhere."""
    return open(path, "ab+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def lock(file: IO[bytes], path: Path, *, wait: bool) -> None:
    """Lock an open file until it is closed. On a file system without locks this says so, and goes on.

    Raises BlockingIOError where another process locks it, unless it is to `wait` for that.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        told = (
            f"{path}: no locks on this file system ({error.strerror}), so do not start a second process that writes it"
        )
        console.print(told, style="yellow")


def require_writable(*paths: Path) -> None:
    """Raises UserError for a path that no file can be written to. Nothing is made; what killed processes were writing
    beside it goes."""
    for path in paths:
        try:
            folder = next(place for place in path.absolute().parents if os.path.lexists(place))
            remove_litter(folder)
            shutil.rmtree(part_beside(path, folder), ignore_errors=True)
            if path.exists():
                path.open("ab").close()
        except OSError as error:
            raise UserError(f"cannot write {path}: {in_words(error)}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, or replace it, in one step (`atomic_write`)."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def html_page(frame: str, places: dict[str, str], data: Any) -> str:
    """An HTML page: the file `frame`, with each {{name}} in it replaced by `places[name]`, a piece of HTML.

    {{data}} becomes JSON, within which a `</script>` cannot end its script. Another name with a dot is that of a file,
    which is filled in the same way and put there.
    """
    places = places | {"data": as_json(data).replace("<", "\\u003c")}

    def filled(file: str) -> str:
        def content(place: re.Match[str]) -> str:
            return filled(place[1]).rstrip("\n") if "." in place[1] else places[place[1]]

        return re.sub(r"\{\{([\w./]+)\}\}", content, (REPO / file).read_text())

    return filled(frame)


# ---------------------------------------------------------------------------------------------------- JSON

# Not every reader takes these as they are: some end a line at them, some obey them, and UTF-8 has no half of a pair.
ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def as_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON that any program can read. NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RepeatedKey(ValueError):
    """A JSON object has a key twice."""


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of json, which would take the last of two equal keys. Raises RepeatedKey."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(f"the key {next(key for key in found if keys.count(key) > 1)!r} twice")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, or replace it, in one step, by the rules of `as_json`."""
    write_text(path, as_json(value, indent=2) + "\n")


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """What is to be written as JSON, with its digest."""
    return {**content, "digest": fingerprint(json.loads(as_json(content)))}


def without_seal(content: dict[str, Any]) -> dict[str, Any] | None:
    """What a sealed JSON file holds; None where it is not what was written. Older files have no seal."""
    content = dict(content)
    digest = content.pop("digest", None)
    return content if digest in (None, fingerprint(content)) else None


def json_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a JSON Lines file that is not blank.

    Give it the file, opened to read bytes: its lines end at a line feed and nowhere else. The value is None for a line
    that is not JSON, such as half a line of a killed writer, or that has a key twice.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line, object_pairs_hook=without_repeats)
            except (ValueError, RecursionError):
                value = None
            yield number, value


def write_json_lines(file: IO[bytes], *values: Any) -> None:
    """Add values to a JSON Lines file, a line each."""
    file.write("".join(f"{as_json(value)}\n" for value in values).encode())
    file.flush()


def log_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """What `write_log_lines` wrote, a line each; None for one that is damaged, or half a line. (Lines of an earlier
    version have no digest.)"""
    for _, value in json_lines(lines):
        is_sound = isinstance(value, dict) and value.pop("digest", None) in (None, _line_digest(value))
        yield value if is_sound else None


def write_log_lines(file: IO[bytes], *values: dict[str, Any]) -> None:
    """As `write_json_lines`, each line with a digest of the rest of it."""
    as_read = [json.loads(as_json(value)) for value in values]
    write_json_lines(file, *({**value, "digest": _line_digest(value)} for value in as_read))


def _line_digest(value: dict[str, Any]) -> str:
    try:
        return fingerprint(value)
    except RecursionError:
        return ""


def open_json_lines(path: Path, *, wait: bool = False) -> IO[bytes]:
    """Open a JSON Lines file to read it and add lines, for this process alone until it is closed.

    If a killed process left half a line, a new one is begun. Where another process has it open, this waits for its end,
    or raises UserError. Raises OSError for a link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open_in_place(path)
        try:
            lock(file, path, wait=wait)
        except BlockingIOError as error:
            file.close()
            raise UserError(f"{path}: another process is writing it") from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()  # the other process removed it when it closed it
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.seek(0)
    return file


@contextlib.contextmanager
def json_lines_file(path: Path, *, wait: bool = False) -> Iterator[IO[bytes]]:
    """A file that `open_json_lines` opens, closed in the end. If there is nothing in it then, it goes, with the
    directories that were made for it."""
    made = missing_folders(path.parent)
    with open_json_lines(path, wait=wait) as file:
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)
                remove_empty(made)


def append_json_line(path: Path, value: dict[str, Any], but_for: Iterable[str] = ()) -> bool:
    """Append one line to a JSON Lines file, on the disk itself when this returns; unless a line says the same, but for
    some keys. Whether it was appended."""

    def essence(line: Any) -> Any:
        return {key: own for key, own in line.items() if key not in but_for} if isinstance(line, dict) else None

    with json_lines_file(path.resolve(), wait=True) as file:
        wanted = essence(json.loads(as_json(value)))
        if any(essence(line) == wanted for _, line in json_lines(file)):
            return False
        write_json_lines(file, value)
        os.fsync(file.fileno())
        return True


def valid_unicode(value: Any) -> Any:
    """A JSON value with U+FFFD for each half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, dict):
        return {valid_unicode(key): valid_unicode(item) for key, item in value.items()}
    return [valid_unicode(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------- progress


class progress_bar:
    """A live bar on a terminal; in a log a line now and then. `with progress_bar(...) as advance: advance(done, text)`.

    `in_log=False`: no such lines, since the caller prints some itself.
    """

    def __init__(self, name: str, total: int, done: int, *, in_log: bool = True) -> None:
        times = (kind(table_column=Column(no_wrap=True)) for kind in (TimeElapsedColumn, TimeRemainingColumn))
        title, text = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[text]"))
        columns = (title, BarColumn(), MofNCompleteColumn(), *times, text)
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task(name, total=total, completed=done, text="")
        self.name, self.total, self.in_log = name, total, in_log and not console.is_terminal
        self.began = self.said = time.monotonic()  # said: when the last line was printed

    def __enter__(self) -> Callable[[int, str | None], None]:
        self.progress.start()
        return self.advance

    def advance(self, done: int, text: str | None) -> None:
        self.progress.update(self.task, completed=done, text=text or "")
        now = time.monotonic()
        if self.in_log and now - self.said >= SECONDS_BETWEEN_LINES:
            self.said = now
            words = f"{self.name}: {done:,} of {self.total:,} after {now - self.began:,.0f} s  {text or ''}"
            console.print(words.rstrip())

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The same items. A thread makes the next item while the caller uses the current one."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, source, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, source, end)
            yield cast(T, item)


# ---------------------------------------------------------------------------------------------------- settings

# Of anything that is counted, and the largest weight: what is computed from two such numbers fits into 64 bits.
MOST = 10**9


def as_name(value: Any) -> Any:
    """A number as text, such as `exp_name=7`."""
    return str(value) if type(value) in (int, float) else value


def possible_path(text: str) -> str:
    """The path with ~ replaced by the home directory. Raises an error of pydantic's if no file can be called so."""
    longest = max(len(part.encode(errors="replace")) for part in text.split("/"))
    if "\0" in text or longest > 255 or len(text) > 4000:
        raise PydanticCustomError("path", "has to be a path that a file can have: names of at most 255 bytes, no NUL")
    return os.path.expanduser(text)  # noqa: PTH111 (a Path would change the rest, which may be a name on the Hub)


def name_below(text: str) -> str:
    """The path, if it leads further down. Raises an error of pydantic's otherwise."""
    if set(text.split("/")) & {"", ".", ".."}:
        raise PydanticCustomError("name_below", "has to be the name of a directory, which may be below others: a/b")
    return text


Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
PathName = Annotated[str, AfterValidator(possible_path)]
Name = Annotated[Text, BeforeValidator(as_name)]
RunName = Annotated[Name, AfterValidator(possible_path), AfterValidator(name_below)]
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class Settings(BaseModel):
    """A part of the configuration: each key with its type and range. Nothing is converted: `no` is not false."""

    model_config = STRICT


S = TypeVar("S", bound=Settings)


def checked(kind: type[S], values: dict[str, Any], where: str = "") -> S:
    """The settings with these values. `where` is put before the keys in messages.

    Raises UserError with a line for each key that is wrong, missing or unknown.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        wanted: dict[tuple[str, str], list[str]] = {}
        for problem in error.errors():
            key, place, value = where, "", cast(Any, values)
            item = value  # of a list at that place, if the problem is there
            missing = len(problem["loc"]) - 1 if problem["type"] == "missing" else None
            for number, step in enumerate(problem["loc"]):  # some steps name an alternative of a type
                if isinstance(item, dict) and (step in item or number == missing):
                    key, place, value = f"{key}{place}.{step}".removeprefix("."), "", item.get(step)
                    item = value
                elif isinstance(item, list) and isinstance(step, int):
                    item, place = item[step], f"{place}[{step}]"
            text = written(value) if len(written(value)) <= SHOWN else f"{written(value)[:SHOWN]}..."
            wanted.setdefault((key, text), []).append(_wanted(kind, key, item, problem))
        lines = []
        for (key, value), all_wanted in wanted.items():
            said = " or ".join(dict.fromkeys(all_wanted)).replace(" or has to be", " or")
            lines.append(f"{key} {said}" if said.startswith("is ") else f"{key}={value}: {said}")
        raise UserError("\n".join(lines)) from None


SHOWN = 100  # characters of a wrong value
WANTED = {  # by pydantic's kinds of errors
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    "too_short": "a list that is not empty",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def _wanted(kind: type[Settings], key: str, value: Any, problem: Any) -> str:
    """What a key would have to be, in words."""
    what, details = problem["type"], problem.get("ctx", {})
    if what == "missing":
        return "is missing"
    if what == "extra_forbidden":
        known = known_keys(kind)
        alike = [other for other in known if other.count(".") == key.count(".")]
        if not alike:  # below a key of the user's
            key, alike = key.rpartition(".")[2], [other.rpartition(".")[2] for other in known]
        return f"is read by nothing{suggest(key, alike)}"
    if what == "literal_error":
        known = [word.strip("'").lower() for word in re.split(", | or ", details["expected"])]
        return f"not one of {', '.join(known)}{suggest(written(value), known)}"
    return f"has to be {WANTED[what].format(**details)}" if what in WANTED else problem["msg"]


def written(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    if isinstance(value, str) and (value.isprintable() or not value):
        return value
    return json.dumps(value, ensure_ascii=isinstance(value, str), default=str)


def known_keys(kind: type[Settings], prefix: str = "") -> list[str]:
    """Every key of the settings, the inner ones with dots."""
    found = []
    for name, field in kind.model_fields.items():
        found.append(prefix + (field.alias or name))
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found += known_keys(field.annotation, f"{prefix}{name}.")
    return found
