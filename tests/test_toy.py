"""The toy language: attributes, judge, rows, tokenizer and model."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import DATA, HH_100, REPO, command
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import toy
from data.toy import Attributes, attributes, demonstrations, judge, preferences, toy_score
from utils import UserError

BUILD = ["-m", "data.toy"]
HH = "harmless-base/test.jsonl.gz"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained model and tokenizer, made by the documented command."""
    directory = tmp_path_factory.mktemp("toy") / "tiny"
    command(*BUILD, directory, "--seed", "3")
    return directory


def test_no_spelling_is_shared() -> None:
    assert len(toy.WORDS) == 2 * len(toy.SPANISH)
    openings = list(toy.OPENINGS)
    assert not any(a != b and a.startswith(b) for a in openings for b in openings)


@pytest.mark.parametrize(
    ("prompt", "right"),
    [
        ("Repeat: dog, soup", ["dog", "soup"]),
        ("Reverse: dog, soup, hat", ["hat", "soup", "dog"]),
        ("Last: dog, soup, hat", ["hat"]),
        ("Count: dog, soup, hat, bed", ["four"]),
        ("Kind: dog, soup, hat", ["creature", "food", "clothes"]),
        ("Opposite: hot, small, sad", ["cold", "big", "happy"]),
        ("Sort: twenty, zero, eleven", ["zero", "eleven", "twenty"]),
        ("Add: nine, eight", ["seventeen"]),
    ],
)
def test_right_answers_by_hand(prompt: str, right: list[str]) -> None:
    assert attributes(prompt, "Gladly! " + ", ".join(right)).correct
    spanish = [toy.SPANISH[word] for word in right]
    assert attributes(prompt, "Bah.\n- " + "\n- ".join(spanish)).correct
    assert not attributes(prompt, "Gladly! " + ", ".join([*right, "bear"])).correct


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (
            "Invierte: perro, sopa",
            "Gladly! soup, dog",
            Attributes("reverse", "spanish", True, "english", "friendly", "plain"),
        ),
        (
            "Invierte: perro, sopa",
            "Bah.\n- sopa\n- perro\n",
            Attributes("reverse", "spanish", True, "spanish", "blunt", "list"),
        ),
        ("Add: two, two", "¡Claro!\n- cuatro", Attributes("add", "english", True, "spanish", "friendly", "list")),
        ("Add: two, two", "¡Claro! four", Attributes("add", "english", True, None, "friendly", "plain")),
        ("Add: two, two", "Fine. fuor", Attributes("add", "english", False, None, "blunt", "plain")),
        ("Add: two, two", "four", Attributes("add", "english", True, "english", None, "plain")),
        ("Add: two, two", "Fine. it is four", Attributes("add", "english", False, None, "blunt", None)),
        ("Add: two, two", "Fine.", Attributes("add", "english", False, None, "blunt", None)),
        ("Add: two, two", "", Attributes("add", "english", False, None, None, None)),
        ("Add: dos, two", "Fine. four", Attributes(None, None, False, "english", "blunt", "plain")),
        ("Opposite: dog", "Fine. cat", Attributes(None, None, False, "english", "blunt", "plain")),
        ("How are you?", "Fine. cat", Attributes(None, None, False, "english", "blunt", "plain")),
    ],
)
def test_attributes_by_hand(prompt: str, completion: str, expected: Attributes) -> None:
    assert attributes(prompt, completion) == expected


@given(st.text(), st.text())
def test_any_text_has_attributes(prompt: str, completion: str) -> None:
    assert attributes(prompt, completion).task is None
    assert judge(prompt, completion, completion) == "tie"


def test_the_first_preference_outweighs_the_others() -> None:
    prompt = "Sort: nine, one"
    friendly_wrong, blunt_right = "Gladly! nine, one", "Fine. one, nine"
    assert judge(prompt, friendly_wrong, blunt_right) == "b"
    assert judge(prompt, friendly_wrong, blunt_right, ("friendly", "correct")) == "a"
    assert judge(prompt, blunt_right, "Fine.\n- one\n- nine") == "tie"
    assert toy_score(prompt, "Bah. uno, nueve", ("prompt_language", "correct", "spanish")) == 0.5 + 0.25
    assert judge(prompt, "Gladly! one nine", "Whatever. nine, one") == "b"  # the first has no known format
    assert judge(prompt, "one, nine", "nothing") == "tie"  # neither is in the toy language


def test_unknown_preferences_are_refused() -> None:
    with pytest.raises(UserError, match=r"'frendly'.*did you mean 'friendly'"):
        toy_score("Add: one, two", "Fine. three", ("correct", "frendly"))
    with pytest.raises(UserError, match="nothing"):
        preferences("train", 0, 1, prefer=())
    with pytest.raises(UserError, match=r"'validation'.*train and test"):
        demonstrations("validation", 0, 1)


def test_demonstrations_mix_every_attribute() -> None:
    rows = demonstrations("train", 0, 4000)
    found = [attributes(row["prompt"], row["completion"]) for row in rows]

    def share(count: int) -> float:
        return count / len(rows)

    assert all(None not in (a.task, a.language, a.tone, a.format) for a in found)
    assert share(sum(a.correct for a in found)) == pytest.approx(0.85, abs=0.025)
    assert share(sum(a.language == a.prompt_language for a in found)) == pytest.approx(0.8, abs=0.025)
    for counts in (Counter(a.tone for a in found), Counter(a.format for a in found)):
        assert all(share(count) == pytest.approx(0.5, abs=0.03) for count in counts.values())
    tasks = Counter(a.task for a in found)
    assert set(tasks) == set(toy.TASKS)
    assert all(share(count) == pytest.approx(1 / len(toy.TASKS), abs=0.03) for count in tasks.values())
    # Attributes are independent: format, language and correctness are mixed as much among friendly ones.
    friendly = [a for a in found if a.tone == "friendly"]
    assert sum(a.format == "list" for a in friendly) / len(friendly) == pytest.approx(0.5, abs=0.04)
    assert sum(a.correct for a in friendly) / len(friendly) == pytest.approx(0.85, abs=0.04)
    assert sum(a.language == a.prompt_language for a in friendly) / len(friendly) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("prefer", [toy.DEFAULT_PREFERENCES, ("spanish", "list")])
def test_preferences_are_the_judges(prefer: tuple[str, ...]) -> None:
    rows = preferences("test", 5, 300, prefer)
    assert len(rows) == 300
    assert all(judge(row["prompt"], row["chosen"], row["rejected"], prefer) == "a" for row in rows)


def test_rows_depend_on_the_seed_alone() -> None:
    assert demonstrations("train", 0, 50) == demonstrations("train", 0, 80)[:50]
    assert preferences("train", 0, 50) == preferences("train", 0, 80)[:50]
    assert demonstrations("train", 0, 50) != demonstrations("train", 1, 50)
    # Nothing depends on the order of a set: a process with another hash seed makes the same rows.
    rows = "[toy.demonstrations('train', 0, 50), toy.preferences('test', 0, 50)]"
    other = subprocess.run(
        [sys.executable, "-c", f"import json; from data import toy; print(json.dumps({rows}))"],
        cwd=REPO,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(other.stdout) == [demonstrations("train", 0, 50), preferences("test", 0, 50)]


def test_splits_are_disjoint_and_large() -> None:
    train = {row["prompt"] for row in demonstrations("train", 0, 45_000)}
    test = {row["prompt"] for row in demonstrations("test", 0, 5_000)}
    assert not train & test
    assert len(train) >= 20_000
    assert len(test) >= 2_000
    assert {toy.split_of(prompt) for prompt in train} == {"train"}


def test_tokenizer_writes_any_text(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert len(tokenizer) <= 1024
    texts = [" leading,  double  and trailing ", "\t\r\n\n tabs", "¿Qué? naïve 東京 🙂 \x00 e\u0301", "- 3.14%\n-\n"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("file", [HH_100 / HH, DATA / "hh" / HH], ids=["hh-100", "hh"])
def test_tokenizer_reads_real_dialogue(built: Path, file: Path) -> None:
    if not file.exists():
        pytest.skip(f"no real data in {file}")
    tokenizer = AutoTokenizer.from_pretrained(built)
    with gzip.open(file, "rt") as rows:
        for line in islice(rows, 200):
            text = json.loads(line)["chosen"]
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokens_are_the_languages_words(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)

    def pieces(text: str) -> list[str]:
        return [str(tokenizer.decode([token])) for token in tokenizer.encode(text, add_special_tokens=False)]

    assert all(pieces(f" {word}") == [f" {word}"] for word in toy.WORDS)
    assert pieces("\n<|user|>\nReverse: dog") == ["\n<|user|>\n", "Reverse", ":", " dog"]
    assert pieces("\n- gato\n- pez") == ["\n-", " gato", "\n-", " pez"]
    rows = demonstrations("test", 0, 500)
    assert max(len(pieces(row["prompt"])) for row in rows) <= 24
    assert max(len(pieces(row["completion"])) for row in rows) <= 24


def test_chat_template_is_the_default_rendering_with_special_tokens(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    question = [{"role": "user", "content": "Add: two, two"}]
    answered = [*question, {"role": "assistant", "content": "Fine. four"}]
    asked = "<bos>\n<|user|>\nAdd: two, two\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False) == asked
    assert tokenizer.apply_chat_template(answered, tokenize=False) == asked + "Fine. four<eos>"


def test_model_is_a_small_gemma_2_made_by_its_seed(built: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    assert model.config.model_type == "gemma2"
    assert model.config.final_logit_softcapping == 30.0
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(built))
    assert model.dtype == torch.float32
    assert 1_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    state = torch.random.get_rng_state()
    toy.build_untrained_model(tmp_path / "again", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    names = sorted(path.name for path in built.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((built / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_nothing_is_overwritten(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    run = command(*BUILD, built, check=False)
    assert run.returncode == 2
    assert "is there already" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before
