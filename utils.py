"""Small helpers that two files or more use."""

import contextlib
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
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REPO = Path(__file__).resolve().parent
T = TypeVar("T")
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}
console = Console(highlight=False, soft_wrap=True)


class UserError(Exception):
    """Bad input, configuration or data: one message that names the thing, where it is and what would work.

    The commands print it without a traceback and exit with status 2.
    """


def suggest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'beta'?)"`, or nothing when no known word is close."""
    names = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), names, n=1)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def fingerprint(*parts: Any) -> str:
    """16 hex digits that change when any part does. RunClasses are JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(items: Iterable[Any]) -> str:
    """As `fingerprint` of a list, but longer, and without the text of all its items in memory at once."""
    found = hashlib.sha256()
    for item in items:
        found.update(json.dumps(item, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_path(path: str | Path) -> Path:
    """A path as the user wrote it, or, where nothing is there, the same path inside this repository."""
    path = Path(path).expanduser()
    inside = REPO / path
    return inside if not path.exists() and inside.exists() else path


def named_class(spec: str, module: Any, setting: str) -> Any:
    """The class `Name` of a module of this repo, or `path/to/file.py:Name`."""
    path, _, name = spec.rpartition(":")
    path = str(local_path(path)) if path else ""
    if path:
        loaded = importlib.util.spec_from_file_location(Path(path).stem, path)
        if loaded is None or loaded.loader is None or not Path(path).is_file():
            raise UserError(f"{setting}={spec}: no Python file {path}")
        if own := module_name(Path(path)):
            module = importlib.import_module(own)
        else:
            module = importlib.util.module_from_spec(loaded)
            loaded.loader.exec_module(module)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"{setting}={spec}: no class {name} in {module.__name__}{suggest(name, classes)}")
    return found


def module_name(path: Path) -> str | None:
    """The name under which this repo imports a file of its wings; None for any other file."""
    path = path.resolve()
    if not path.is_relative_to(REPO) or not (path.parent / "__init__.py").is_file():
        return None
    return ".".join(path.relative_to(REPO).with_suffix("").parts)


def flush_to_disk(*paths: Path) -> None:
    """fsync files, or the entries of directories."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a new file or directory so that `path` is there complete or not at all.

    Yields a path beside the target to write to; on success it is flushed and renamed. An existing file is
    replaced; an existing directory must not be there. After an exception the target is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        part = folder / path.name
        yield part
        flush_to_disk(part, *part.rglob("*"))
        part.rename(path)
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with atomic_write(path) as part:
        part.write_text(text)


def html_page(frame: str, places: dict[str, str], data: Any) -> str:
    """A page of this repo: the frame with its {{places}} filled by pieces of HTML. {{style}} is page.css, and {{data}}
    JSON that no text in it can end."""
    places = places | {
        "style": (REPO / "assets/page.css").read_text(),
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], (REPO / frame).read_text())


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step. Raises ValueError for NaN or infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class progress_bar:
    """A live bar on a terminal, and nothing elsewhere: `with progress_bar(...) as advance: advance(done, text)`."""

    def __init__(self, name: str, total: int, done: int) -> None:
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        text = TextColumn("{task.fields[text]}")
        self.progress = Progress(*columns, text, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> Callable[[int, str | None], None]:
        self.progress.start()
        return self.advance

    def advance(self, done: int, text: str | None) -> None:
        self.progress.update(self.task, completed=done, text=text or "")

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is in use."""
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
            for step in problem["loc"]:
                if not isinstance(value, dict):
                    break  # what follows names an alternative of the type
                key, value = f"{key}.{step}".removeprefix("."), value.get(step)
            wanted.setdefault((key, written(value)), []).append(_wanted(kind, key, value, problem))
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
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def known_keys(kind: type[Settings], prefix: str = "") -> list[str]:
    """Every key of the settings, the inner ones with dots."""
    found = []
    for name, field in kind.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found += known_keys(field.annotation, f"{prefix}{name}.")
    return found
