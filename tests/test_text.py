"""Text that meets a terminal or a file: it is shown and written as it is, whatever it holds."""

import contextlib
import io
import json
import math
import os
import random
import re
import signal
import time

import pytest
from conftest import fuzzed
from forks import Fork
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

import utils
from utils import (
    Screen,
    Settings,
    UserError,
    append_json_line,
    as_json,
    atomic_write,
    fingerprint,
    json_lines,
    json_lines_file,
    log_lines,
    open_json_lines,
    progress_bar,
    require_writable,
    valid_unicode,
    write_json,
    write_json_lines,
    write_log_lines,
)

PIECES = [
    *"a1 \t\n\r\x00\x07\x08\x0b\x0c\x1b\x1c\x1e\x7f\x85\x9b\x9d\u2028\u2029\ufeff\ud83d\ude00é中😀[]/:<&\"'\\",
    "[bold]", "[/bold]", "[/]", "[red on blue]", "[link=x]", ":smile:", "\x1b[31m", "\x1b]0;title\x07", "\x9b2J",
    "\x1b]8;;http://x\x1b\\", "</script>", "\ud83d\ude00", "NaN", "\udce9",
]  # fmt: skip
STYLES = re.compile(r"\x1b\[[\d;]*m")  # rich's own colours


def text_of(seed):
    draw = random.Random(seed)
    return "".join(
        draw.choice(PIECES) if draw.random() < 0.8 else chr(draw.randrange(0x3000)) for _ in range(seed % 12)
    )


class Terminal(io.TextIOWrapper):
    """Bytes are kept; an encoding's lack is an error, as on a terminal."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="")

    def isatty(self):
        return True

    def shown(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


def everywhere(text, screen):
    """Print it as all that the commands print: a line, a styled one, a table's title, heads and cells, a bar."""
    screen.print(text)
    screen.print(f"name {text}: 1", style="red")
    table = Table(text, text, title=text)
    table.add_row(text, "x", style="bold")
    screen.print(table)


# ------------------------------------------------------------------------------------------------- the terminal


@fuzzed
@given(st.integers(0, 2**40))
def test_any_text_is_printed_and_none_is_obeyed(seed):
    terminal = Terminal(("utf-8", "ascii", "latin-1")[seed % 3])
    screen = Screen(file=terminal, force_terminal=True, width=60)
    if seed % 8:  # a table takes ten times as long as a line
        screen.print(text_of(seed), style="red")
    else:
        everywhere(text_of(seed), screen)
    shown = STYLES.sub("", terminal.shown())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", shown)


@pytest.mark.parametrize("name", ["dpo[beta=0.1]", "dpo[/b]", "[bold]x[/bold]", "[/]", "a :smile: b", "[red]"])
def test_brackets_are_no_markup(name):
    terminal = Terminal()
    everywhere(name, Screen(file=terminal, width=200))
    assert STYLES.sub("", terminal.shown()).count(name) == 6


def test_what_an_encoding_lacks_is_escaped():
    terminal = Terminal("ascii")
    Screen(file=terminal).print("größer 😀 \ud83d")
    assert terminal.shown() == "gr\\xf6\\xdfer \\U0001f600 \\ud83d\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_no_markup_either(monkeypatch, is_terminal):
    monkeypatch.setattr(utils, "SECONDS_BETWEEN_LINES", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(utils, "console", Screen(file=terminal, force_terminal=is_terminal, width=200))
    with progress_bar("[/x]", 3, 0) as advance:
        advance(1, "\x1b]0;t\x07 loss [0.1]")
    shown = terminal.shown()
    assert "[/x]" in shown and "]0;t loss [0.1]" in shown
    assert is_terminal or shown == "[/x]: 1 of 3 after 0 s  ]0;t loss [0.1]\n"


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress_bar("judging", 300, 0) as advance, progress_bar("training", 300, 0, in_log=False) as other:
        for done in range(300):
            now[0] += 1
            advance(done, None)
            other(done, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "judging: 29 of 300 after 30 s" and len(lines) == 10


def test_nobody_reads_any_longer():
    """`command | head`: the command goes on, and its files are written."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:  # noqa: PTH123
        screen = Screen(file=pipe)
        for _ in range(3):
            everywhere("text", screen)
        assert screen.quiet


# ------------------------------------------------------------------------------------------------- JSON


def value_of(seed):
    """A random JSON value, and some that JSON lacks."""
    draw = random.Random(seed)
    numbers = [draw.random(), math.nan, math.inf, -math.inf, 2**70, True, None]
    kinds = [
        lambda: text_of(draw.randrange(2**40)),
        lambda: draw.choice(numbers),
        lambda: [value_of(draw.randrange(2**40)) for _ in range(draw.randrange(3))],
        lambda: {text_of(draw.randrange(2**40)): value_of(draw.randrange(2**40)) for _ in range(draw.randrange(3))},
    ]
    return draw.choice(kinds)()


VALUES = st.integers(0, 2**40).map(value_of)


def without_nan(value):
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def halves_joined(value):
    """Two halves of a pair, one after the other, are read as the character that they make."""
    return json.loads(json.dumps(value))


@fuzzed
@given(VALUES)
def test_any_value_is_written_and_read_again(value):
    text = as_json(value)
    expected = halves_joined(without_nan(value))
    assert strict(text.encode()) == expected  # UTF-8, and standard
    assert len(text.splitlines()) == 1  # for readers that end lines where Python does
    assert strict(as_json(value, indent=2)) == expected
    json.dumps(valid_unicode(value), ensure_ascii=False).encode()
    assert len(fingerprint(value)) == 16
    stream = io.BytesIO()
    write_json_lines(stream, [value, 1], [value, 2])
    assert [found for _, found in json_lines(io.BytesIO(stream.getvalue()))] == [[expected, 1], [expected, 2]]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r"])
def test_lines_end_at_a_line_feed_and_nowhere_else(character):
    """As other programs write them: not escaped, where JSON allows that."""
    text = f"one{character}two"
    raw = json.dumps(text) if ord(character) < 0x20 else f'"{text}"'
    lines = f"{raw}\n\n{raw}".encode()
    assert list(json_lines(io.BytesIO(lines))) == [(1, text), (3, text)]


def test_a_line_that_is_no_json_is_none():
    lines = [b'{"a": 1}\n', b'{"a": \n', b"[" * 100_000 + b"\n", b"\xff\n", b"9" * 5000 + b"\n", b'"b"']
    assert list(json_lines(lines)) == [(1, {"a": 1}), (2, None), (3, None), (4, None), (5, None), (6, "b")]


def test_lines_are_appended_after_half_a_line(tmp_path):
    path = tmp_path / "below" / "lines.jsonl"
    append_json_line(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": 2, "b')
    append_json_line(path, {"a": 3})
    append_json_line(path, {"a": 4})
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2, "b\n{"a": 3}\n{"a": 4}\n'


def test_one_process_writes_a_file_of_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    with open_json_lines(path):
        with pytest.raises(UserError, match=r"lines.jsonl: another process is writing it"):
            open_json_lines(path)
        path.unlink()
        with open_json_lines(path) as new:  # what was removed is nobody's
            write_json_lines(new, 1)
    assert path.read_bytes() == b"1\n"


# ------------------------------------------------------------------------------------------------- files


HANGS = "import sys, time, pathlib, utils\nwith utils.atomic_write(pathlib.Path(sys.argv[1])) as part:\n"
HANGS += "    part.write_text('half')\n    time.sleep(60)"


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_stays(tmp_path):
    """By the next writer in that directory, whatever it writes."""
    killed, living = (Fork("-c", HANGS, tmp_path / name) for name in ("killed", "living"))
    while len(list(tmp_path.glob(".*.part/*"))) < 2:
        time.sleep(0.02)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.join()
    (tmp_path / ".mine.part").mkdir()
    write_json(tmp_path / "other.json", {})
    try:
        left = sorted(path.name.split(".")[1] for path in tmp_path.glob(".*.part"))
        assert left == ["living", "mine"] and (tmp_path / "other.json").is_file()
    finally:
        os.kill(living.process.pid, signal.SIGKILL)
        living.process.join()
    with atomic_write(tmp_path / "folder") as part:
        part.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.part", "folder", "other.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    left = tmp_path / "new" / ".file.x.fpo.part"  # by a killed process
    left.mkdir(parents=True)
    require_writable(tmp_path / "new" / "file", tmp_path / "a" / "b" / "file")
    assert not left.exists()
    assert not list((tmp_path / "new").iterdir()) and not (tmp_path / "a").exists()
    (tmp_path / "nowhere").symlink_to("gone")
    long = "a" * 240  # what is written beside it has a longer name
    for path, reason in [
        ("file/below", "Not a directory|File exists"),
        ("folder", "Is a directory"),
        ("nowhere/below", "No such file"),
        (long, "File name too long"),
    ]:
        with pytest.raises(UserError, match=f"cannot write {tmp_path / path}: ({reason})"):
            require_writable(tmp_path / path)


def test_a_damaged_line_of_a_log_is_none():
    """Whichever of its bytes is another one, and whatever that makes of it."""
    value = {"key": [3, 0, 0], "text": "half \ud83d, \u2028", "x": 0.1, "deep": {"b": None, "a": [True, 10**30]}}
    write_log_lines(file := io.BytesIO(), value)
    line = file.getvalue()
    assert list(log_lines([line, b'{"a": 1}\n', b'{"a": 1, "digest": "x"}', b"[]"])) == [value, {"a": 1}, None, None]
    for place in range(len(line)):
        for change in (1, 2, 32, 128):
            (found,) = log_lines([line[:place] + bytes([line[place] ^ change]) + line[place + 1 :]])
            assert found is None or value.items() <= found.items()  # the word "digest" itself
    deep = b'{"a": ' + b"[" * 900 + b"]" * 900 + b', "digest": "x"}'
    assert list(log_lines([deep])) == [None]


@pytest.mark.parametrize("lines", [[], [{"a": 1}]])
def test_a_file_of_no_lines_leaves_nothing(tmp_path, lines):
    with contextlib.suppress(UserError), json_lines_file(tmp_path / "a" / "b" / "log.jsonl") as file:
        write_json_lines(file, *lines)
        raise UserError("refused later")
    left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))]
    assert left == (["a", "a/b", "a/b/log.jsonl"] if lines else [])


def test_the_home_directory(monkeypatch):
    class Places(Settings):
        one: utils.PathName
        several: utils.PathName | list[utils.PathName] | None

    monkeypatch.setenv("HOME", "/home/me")
    places = utils.checked(Places, {"one": "~/runs", "several": ["~", "a~b"]})
    assert (places.one, places.several) == ("/home/me/runs", ["/home/me", "a~b"])
    assert utils.checked(Places, {"one": "", "several": None}).several is None
    with pytest.raises(UserError, match="one=7: has to be text"):
        utils.checked(Places, {"one": 7, "several": "~"})
