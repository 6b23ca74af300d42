"""How a judge's replies are read: a table of replies by hand, public judgements, and random ones."""

import gzip
import json
import math
import random
import re

import pytest
from conftest import DATA, fuzzed
from hypothesis import given
from hypothesis import strategies as st

from judging.protocols import AlpacaEval, ArenaHard, MTBench, PromptTemplate, Reply

NONE = "malformed"


def read(template, text, **reply):
    """(value, weight) of a reply, or its status where it has no verdict."""
    output = template.read(Reply(text, **reply))
    assert output.text == text and (output.value is None) == (output.status != "judged")
    return output.status if output.value is None else (output.value, output.weight)


# ------------------------------------------------------------------------------------------------- a table by hand

PAIRWISE = [
    # the form that is asked for, bare and dressed
    ("Response 1", 1),
    ("response 2.", 0),
    ("**Response 2**", 0),
    ("“Response 1”", 1),
    ("\n\n  Response 2  \n", 0),
    ("Final answer: Response 1", 1),
    ("**My verdict:** Response 2", 0),
    ("Verdict:\n\n**Response 1**", 1),
    # with words after or before it
    ("Response 2\n\nIt is shorter and avoids the mistake made in Response 1.", 0),
    ("Response 1\n\nResponse 2 leaves out the second step.", 1),
    ("Both are polite. Response 2 is longer than Response 1.\n\nResponse 1", 1),
    ("Response 2\n\nSie ist kürzer und vermeidet den Fehler von Response 1.", 0),
    ("La première est fausse, Response 1 aussi.\n\nResponse 2", 0),
    ("Response 1\n\nResponse 2 se equivoca en la capital.", 1),
    ("Response 2 的首都写错了。\n\nResponse 1", 1),
    # reasoning is not the answer
    ("<think>\nResponse 1 is long.\nResponse 2\nHmm.\n</think>\n\nResponse 1", 1),
    ("Response 2? It is wrong.\nResponse 2\n</think>\nResponse 1", 1),
    ("<thinking>Response 1</thinking>\n\nResponse 2", 0),
    ("[THINK]\nResponse 1\n[/THINK]Response 2", 0),
    ("<think>\nResponse 1\n", NONE),
    ("<think>Response 1</think>", NONE),
    # anything else
    ("Not Response 1.", NONE),
    ("~~Response 1~~", NONE),
    ("Response 1?", NONE),
    ("Anything but\nResponse 1 would be fine.", NONE),
    ("The worse one is:\nResponse 1", NONE),
    ("I prefer Response 2. It does not have the errors of Response 1.", NONE),
    ("Response 1 is worse.", NONE),
    ("Response 1: good.\nResponse 2: bad.", NONE),
    ("**Response 1**\n- long\n\n**Response 2**\n- short", NONE),
    ("Response 1 or Response 2", NONE),
    ("Response 12", NONE),
    ("Response １", NONE),
    ("1", NONE),
    ("Antwort 1", NONE),
    ("Réponse 2", NONE),
    ("Respuesta 2", NONE),
    ("回答1更好。", NONE),
    ("\\boxed{Response 1}", NONE),
    ("", NONE),
    ("I'm sorry, but I cannot choose between them.", "refused"),
    ("<think>Response 1 it is.</think>I cannot help with that.", "refused"),
]


@pytest.mark.parametrize(("text", "value"), PAIRWISE)
def test_a_choice(text, value):
    assert read(PromptTemplate(), text) == (value if isinstance(value, str) else (value, 1))


ARENA = [
    ("My final verdict is: [[A>>B]]", (1, 3)),
    ("So: [[ b > a ]]", (0, 1)),
    ("**[[A=B]]**", (0.5, 1)),
    ("[[`A>B`]]", (1, 1)),
    ("[[**A<<B**]]", (0, 3)),
    ("[A>B]", (1, 1)),
    ("A is right [1], B is not [2]. [[A>B]]", (1, 1)),
    ("[[A>B]], as I said: [[A>B]]", (1, 1)),
    ("<think>[[B>>A]]?</think> [[A>B]]", (1, 1)),
    ("One of [[A>>B]], [[A>B]], [[A=B]], [[B>A]], [[B>>A]]: hard to say.", NONE),
    ("[[A>B]]? No: [[B>A]]", NONE),
    ("[[A>>>B]]", NONE),
    ("[[A>A]]", NONE),
    ("A>B", NONE),
    ("<think>Were A better, I would say [[A>>B]], but", NONE),
]


@pytest.mark.parametrize(("text", "expected"), ARENA)
def test_a_mark_of_arena_hard(text, expected):
    assert read(ArenaHard(), text) == expected


GRADES = [
    ("Rating: [[8]]", 8),
    ("**Rating: [[8.5]]**", 8.5),
    ("Rating: [[**10**]]", 10),
    ("[[ 7/10 ]]", 7),
    ("[[7]]. Once more: [[7.0]]", 7),
    ("The source [1] is right. [[9]]", 9),
    ("<think>[[2]]?</think>[[3]]", 3),
    ("The answer cites [[1]] and [[2]] correctly.\nRating: [[8]]", NONE),
    ("In the form [[5]]. Mine: [[8]]", NONE),
    ("[6]", NONE),
    ("[[0]]", NONE),
    ("[[11]]", NONE),
    ("[[grade]]", NONE),
    ("8/10", NONE),
]


@pytest.mark.parametrize(("text", "expected"), GRADES)
def test_a_grade(text, expected):
    assert read(MTBench(), text) == (expected if isinstance(expected, str) else (expected, 1))


@pytest.mark.parametrize(
    ("template", "table"), [(PromptTemplate(), PAIRWISE), (ArenaHard(), ARENA), (MTBench(), GRADES)]
)
def test_a_reply_that_was_cut_has_no_verdict(template, table):
    assert {read(template, text, cut=True) for text, _ in table} == {NONE}


def test_the_first_token_may_be_all_that_is_asked_for():
    assert read(AlpacaEval(), "m", alternatives={"m": -0.1, "M": -2.5}, cut=True)[0] > 0.9


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
@pytest.mark.parametrize("model", ["vicuna-13b", "gemma-7b-it"])
def test_published_judgements_of_alpaca_eval(model):
    """Each reply gives the preference that the board counts; which output was `m` is drawn, and not in the file."""
    rows = json.loads(gzip.decompress((DATA / f"alpaca_eval/annotations/{model}.json.gz").read_bytes()))
    replies = [row for row in rows if row["raw_completion"]]
    assert len(replies) > 800
    for row in replies:
        (first, *_) = row["raw_completion"]["logprobs"]["content"]
        alternatives = {one["token"]: one["logprob"] for one in first["top_logprobs"]}
        value, _ = read(AlpacaEval(), row["raw_completion"]["text"], alternatives=alternatives, cut=True)
        assert min(abs(row["preference"] - 1 - p) for p in (value, 1 - value)) < 1e-6


# ------------------------------------------------------------------------------------------------- random replies

PIECES = [
    *"12 \n.:*_?!\"", "Response", "response", "Response 1", "Response 2", "\nResponse 1\n", "\nResponse 2\n", "not",
    "Verdict:", "the final answer is", "is", "better", "[[", "]]", "[", "A", "B", ">", ">>", "=", "[[A>B]]", "[[B>>A]]",
    "[[7]]", "[[3/10]]", "<think>", "</think>", "[/THINK]", "I'm sorry", "Antwort", "回答", "\u2028", "\ud83d", "１",
]  # fmt: skip


def reply(seed):
    """A random reply: hypothesis draws only its seed, which is twenty times as fast as drawing its pieces."""
    draw = random.Random(seed)
    return "".join(draw.choice(PIECES) if draw.random() < 0.9 else chr(draw.randrange(0x500)) for _ in range(seed % 16))


REPLIES = st.integers(0, 2**40).map(reply)
OTHER = {PromptTemplate: str.maketrans("12", "21"), ArenaHard: str.maketrans("ABab", "BAba")}


@fuzzed
@given(REPLIES, st.sampled_from([PromptTemplate(), ArenaHard(), MTBench()]))
def test_any_reply_is_read(text, template):
    """A verdict is in its range, and stands in the reply once its reasoning is gone; a cut reply has none."""
    found = read(template, text)
    if not isinstance(found, str):
        value, weight = found
        assert (1 <= value <= 10 and weight == 1) if template.responses == 1 else (value in (0, 0.5, 1))
        assert read(template, f"{text}</think>") == NONE
    assert read(template, text, cut=True) == NONE


@fuzzed
@given(REPLIES, st.sampled_from([PromptTemplate(), ArenaHard()]))
def test_the_other_name_is_the_other_verdict(text, template):
    """What is said of one response, said of the other one, is the opposite: no place or name is preferred."""
    one, two = (read(template, said) for said in (text, text.translate(OTHER[type(template)])))
    assert one == two if isinstance(one, str) else two == (1 - one[0], one[1])


@fuzzed
@given(st.integers(0, 2**40))
def test_lines_that_are_names_decide(seed):
    """Whatever else is said: here in lines that name both, so that none of them is a verdict."""
    draw = random.Random(seed)
    names = ["Response 1", "Response 2", "**Response 1**"]
    parts = [(draw.choice(names), reply(draw.randrange(2**40))) for _ in range(seed % 4)]
    lines = [line for verdict, text in parts for line in (verdict, f"Response 1, Response 2: {without_marks(text)}")]
    expected = {verdict.strip("*")[-1] for verdict, _ in parts}
    found = read(PromptTemplate(), "\n".join(lines))
    assert found == ((float(expected == {"1"}), 1) if len(expected) == 1 else NONE)


def without_marks(text):
    return re.sub(r"[\s\x1c-\x1e\x85<>\[\]:]", " ", text) + "."


@fuzzed
@given(st.integers(0, 2**40))
def test_a_preference_needs_its_tokens_to_be_likely(seed):
    draw = random.Random(seed)
    tokens = draw.sample(["m", "M", " m", "M ", "<think>", "x", ""], seed % 6)
    alternatives = {token: -draw.expovariate(draw.choice([0.1, 1.0, 10.0])) for token in tokens}
    mass = sum(math.exp(value) for token, value in alternatives.items() if token.strip() in ("m", "M"))
    found = read(AlpacaEval(), "m", alternatives=alternatives)
    assert (found == NONE) == (mass < 0.5)
    if found != NONE:
        other = read(AlpacaEval(), "m", alternatives={token.swapcase(): value for token, value in alternatives.items()})
        assert 0 <= found[0] <= 1 and other[0] == pytest.approx(1 - found[0])
