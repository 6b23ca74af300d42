"""Small helpers that at least two modules use."""

import contextlib
import errno
import fcntl
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

REPO = Path(__file__).resolve().parent
T = TypeVar("T")
SIDES = ("chosen", "rejected")  # of a pair
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}
console = Console(highlight=False, soft_wrap=True)


class UserError(Exception):
    """Bad input, configuration or data. The message names the thing, where it is and what would work.

    The commands print it without a traceback and exit with status 2.
    """


def collect_garbage_rarely() -> None:
    """Make Python search for reference cycles less often. Its default, every 700 new objects, takes a fifth of the time
    of the imports and more of the time of tokenising, so call this before the large imports."""
    gc.set_threshold(100_000)


def suggest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'beta'?)"`, or an empty string if no known word is close to `word`."""
    names = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else key).items()}


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change when any part changes. The parts are JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(items: Iterable[Any]) -> str:
    """64 hex digits that change when any item changes. The items are JSON values; only one is in memory at a time."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_path(path: str | Path) -> Path:
    """The path as the user wrote it. If nothing exists there, but it exists inside this repository: that one."""
    path = Path(path).expanduser()
    inside_repo = REPO / path
    return inside_repo if not path.exists() and inside_repo.exists() else path


def is_file_name(text: Any) -> bool:
    """Whether it names something in a directory, and nothing outside it."""
    return isinstance(text, str) and text not in ("", ".", "..") and not set(text) & set("/\\\0")


def load_class(name: str, module: Any, setting: str) -> Any:
    """The class that a setting names: `ClassName`, a class of `module`, or `path/to/file.py:ClassName`.

    Raises UserError, which names the setting, if there is no such file or class.
    """
    file, _, class_name = name.rpartition(":")
    if file:
        path = resolve_path(file)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UserError(f"{setting}={name}: no Python file {path}")
        if imported_as := module_name(path):
            module = importlib.import_module(imported_as)
        else:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"{setting}={name}: no class {class_name} in {module.__name__}{suggest(class_name, classes)}")
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
            self.folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PART, dir=target.parent))
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


def seal(folder: Path) -> None:
    """Write down the digest of every file in a directory, so that `damaged_files` finds what changes later."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / DIGESTS]
    digests = {str(path.relative_to(folder)): file_digest(path) for path in files}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=2, ensure_ascii=False) + "\n")


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


def open_in_place(path: Path) -> TextIO:
    """A file to be added to, made if it is not there. Raises OSError for a link, which may lead anywhere."""
    return open(path, "a", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def write_text(path: Path, text: str) -> None:
    """Write a text file, or replace it, in one step (`atomic_write`)."""
    with atomic_write(path) as part:
        part.write_text(text)


def html_page(frame: str, places: dict[str, str], data: Any) -> str:
    """An HTML page: the file `frame`, with each {{name}} in it replaced by `places[name]`, a piece of HTML.

    {{style}} becomes assets/page.css, {{script}} assets/page.js, and {{data}} JSON. A `</script>` within the data
    cannot end its script.
    """
    places = places | {
        "style": (REPO / "assets/page.css").read_text(),
        "script": (REPO / "assets/page.js").read_text(),
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], (REPO / frame).read_text())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, or replace it, in one step. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class progress_bar:
    """A live bar on a terminal, and nothing elsewhere. `with progress_bar(...) as advance: advance(done, text)`."""

    def __init__(self, name: str, total: int, done: int) -> None:
        times = (kind(table_column=Column(no_wrap=True)) for kind in (TimeElapsedColumn, TimeRemainingColumn))
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), *times, TextColumn("{task.fields[text]}"))
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> Callable[[int, str | None], None]:
        self.progress.start()
        return self.advance

    def advance(self, done: int, text: str | None) -> None:
        self.progress.update(self.task, completed=done, text=text or "")

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

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]  # exp_name=7
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


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
            key, value = where, cast(Any, values)
            item = value  # of a list, if the problem is there
            for step in problem["loc"]:  # some steps name an alternative of a type
                if isinstance(value, dict):
                    key, value = f"{key}.{step}".removeprefix("."), value.get(step)
                    item = value
                elif isinstance(item, list) and isinstance(step, int):
                    item = item[step]
            wanted.setdefault((key, written(value)), []).append(_wanted(kind, key, item, problem))
        lines = []
        for (key, value), all_wanted in wanted.items():
            said = " or ".join(dict.fromkeys(all_wanted)).replace(" or has to be", " or")
            lines.append(f"{key} {said}" if said.startswith("is ") else f"{key}={value}: {said}")
        raise UserError("\n".join(lines)) from None


WANTED = {  # by pydantic's kinds of errors
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
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
    """A value as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def known_keys(kind: type[Settings], prefix: str = "") -> list[str]:
    """Every key of the settings, the inner ones with dots."""
    found = []
    for name, field in kind.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found += known_keys(field.annotation, f"{prefix}{name}.")
    return found
