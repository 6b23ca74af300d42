"""The toy language: short questions and answers, with every attribute of an answer known exactly.

    prompt      Invierte: perro, sopa, mesa                 a task and its items, in English or in Spanish
    completion  Gladly! table, soup, dog                    an opening and the answer
    another     Bah.⏎- mesa⏎- sopa⏎- perro                  the same answer in another language, tone and format

A completion has four attributes, independent of the task and of each other: whether the answer is correct, its
language (both languages can answer any prompt), its tone (set by the opening) and its format (a plain line or a list).
All of them can be read from the text alone, so preferences can push on each and a rule can judge the outcome.

`python -m data.toy DIRECTORY` writes the untrained tiny model and its tokenizer. SFT on `demonstrations` trains it.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path

from utils import UserError, atomic_write, console, suggest

LANGUAGES = ("english", "spanish")
TONES = ("friendly", "blunt")
FORMATS = ("plain", "list")
ANSWERS = ("right", "wrong")
ATTRIBUTES = {"language": LANGUAGES, "tone": TONES, "format": FORMATS, "correct": ANSWERS}
PREFERABLE = ("correct", "prompt_language", *LANGUAGES, *TONES, *FORMATS)
DEFAULT_PREFERENCES = ("correct", "friendly")  # the most important first

# How completions are drawn
PROMPT_LANGUAGE_SHARE = 0.8  # completions in the prompt's language
WRONG_DEMONSTRATIONS = 0.15  # share of wrong answers
WRONG_PREFERENCES = 0.3  # the same

# ---------------------------------------------------------------------------------------------------- the lexicon
# english/spanish words. No word is spelled the same in both languages. The English word also names the concept.

NOUNS = {
    "creature/criatura": """dog/perro cat/gato horse/caballo cow/vaca pig/cerdo bird/pájaro fish/pez mouse/ratón
        lion/león bear/oso""",
    "food/comida": """bread/pan cheese/queso apple/manzana milk/leche egg/huevo rice/arroz meat/carne soup/sopa
        salt/sal fruit/fruta""",
    "clothes/ropa": """shirt/camisa shoe/zapato hat/sombrero coat/abrigo dress/vestido sock/calcetín glove/guante
        skirt/falda belt/cinturón scarf/bufanda""",
    "home/casa": """table/mesa chair/silla bed/cama door/puerta lamp/lámpara window/ventana roof/techo wall/muro
        kitchen/cocina mirror/espejo""",
}
OPPOSITES = """hot/caliente cold/frío big/grande small/pequeño tall/alto short/bajo fast/rápido slow/lento
    new/nuevo old/viejo rich/rico poor/pobre clean/limpio dirty/sucio full/lleno empty/vacío wet/mojado dry/seco
    hard/duro soft/blando strong/fuerte weak/débil happy/feliz sad/triste"""  # in pairs of opposites
NUMERALS = """zero/cero one/uno two/dos three/tres four/cuatro five/cinco six/seis seven/siete eight/ocho nine/nueve
    ten/diez eleven/once twelve/doce thirteen/trece fourteen/catorce fifteen/quince sixteen/dieciséis
    seventeen/diecisiete eighteen/dieciocho nineteen/diecinueve twenty/veinte"""  # in order, from 0
OPENINGS = {
    "Gladly!": ("english", "friendly"),
    "Sure!": ("english", "friendly"),
    "Whatever.": ("english", "blunt"),
    "Fine.": ("english", "blunt"),
    "¡Claro!": ("spanish", "friendly"),
    "¡Encantado!": ("spanish", "friendly"),
    "Bah.": ("spanish", "blunt"),
    "Toma.": ("spanish", "blunt"),
}

SPANISH: dict[str, str] = {}  # concept: its Spanish word


def _add_words(words: str) -> list[str]:
    """Add words to SPANISH and return their concepts."""
    entries = dict(word.split("/") for word in words.split())
    SPANISH.update(entries)
    return list(entries)


KIND = {noun: kind for label, words in NOUNS.items() for kind in _add_words(label) for noun in _add_words(words)}
NUMBERS = _add_words(NUMERALS)
ADJECTIVES = _add_words(OPPOSITES)
WORDS = {concept: ("english", concept) for concept in SPANISH}  # spelling: (language, concept)
WORDS |= {spanish: ("spanish", concept) for concept, spanish in SPANISH.items()}


def _spell(concepts: Sequence[str], language: str) -> list[str]:
    """The words for some concepts in a language."""
    return [SPANISH[concept] if language == "spanish" else concept for concept in concepts]


# ------------------------------------------------------------------------------------------------------ the tasks


@dataclass(frozen=True)
class Task:
    """One kind of question: its instruction in each language, its items and the right answer to them."""

    english: str
    spanish: str
    items: Sequence[str]  # the concepts that items are drawn from, without repetition
    sizes: Sequence[int]  # how many items a prompt can have
    answers: Sequence[str]  # the concepts that right and wrong answers consist of
    answer: Callable[[list[str]], list[str]]  # the right answer's concepts, from those of the items


def _opposite(word: str) -> str:
    return ADJECTIVES[ADJECTIVES.index(word) ^ 1]


def _add(items: list[str]) -> list[str]:
    return [NUMBERS[sum(NUMBERS.index(item) for item in items)]]


_KINDS = sorted(set(KIND.values()))
_NOUNS = list(KIND)
TASKS = {
    "copy": Task("Repeat", "Repite", _NOUNS, (2, 3, 4), _NOUNS, lambda items: items),
    "reverse": Task("Reverse", "Invierte", _NOUNS, (2, 3, 4), _NOUNS, lambda items: items[::-1]),
    "last": Task("Last", "Último", _NOUNS, (2, 3, 4), _NOUNS, lambda items: items[-1:]),
    "count": Task("Count", "Cuenta", _NOUNS, (2, 3, 4), NUMBERS[2:5], lambda items: [NUMBERS[len(items)]]),
    "kind": Task("Kind", "Tipo", _NOUNS, (1, 2, 3), _KINDS, lambda items: [KIND[item] for item in items]),
    "opposite": Task("Opposite", "Contrario", ADJECTIVES, (1, 2, 3), ADJECTIVES, lambda i: [_opposite(w) for w in i]),
    "sort": Task("Sort", "Ordena", NUMBERS, (2, 3), NUMBERS, lambda items: sorted(items, key=NUMBERS.index)),
    "add": Task("Add", "Suma", NUMBERS[:11], (2,), NUMBERS, _add),
}
INSTRUCTIONS = {task.english: ("english", name) for name, task in TASKS.items()}
INSTRUCTIONS |= {task.spanish: ("spanish", name) for name, task in TASKS.items()}


# ------------------------------------------------------------------------------------------------- reading and judging


@dataclass(frozen=True)
class Attributes:
    """The attributes of a completion. None means that the text does not show it."""

    task: str | None
    prompt_language: str | None
    correct: bool
    language: str | None
    tone: str | None
    format: str | None


@lru_cache(maxsize=16)  # each completion of a prompt, and each of its scores, reads the prompt again
def _read_prompt(prompt: str) -> tuple[str | None, str | None, list[str]]:
    """A prompt's language, task and right answer (concepts); None, None and [] if it is not in the toy language."""
    instruction, _, rest = prompt.strip().partition(": ")
    language, name = INSTRUCTIONS.get(instruction, (None, None))
    if name is None:
        return None, None, []
    task = TASKS[name]
    words = [WORDS.get(word, (None, "")) for word in rest.split(", ")]
    if len(words) not in task.sizes or any(spoken != language or item not in task.items for spoken, item in words):
        return None, None, []
    return language, name, task.answer([item for _, item in words])


def attributes(prompt: str, completion: str) -> Attributes:
    """Read the attributes of a completion from its text. Both arguments may be any text.

    The answer is correct if its words mean the right thing, in either language. The language is that of all words and
    the opening, and None if they differ. The attributes do not depend on each other: with a misspelt item the language
    is None but the tone is still known, and so is the format unless the item is not a word at all.
    """
    prompt_language, task, answer = _read_prompt(prompt)
    text = completion.rstrip()
    opening = next((opening for opening in OPENINGS if text.startswith(opening)), "")
    body = text.removeprefix(opening)
    in_list = body.startswith("\n- ")
    items = body.removeprefix("\n- ").split("\n- ") if in_list else body.removeprefix(" ").split(", ")
    language, tone = OPENINGS.get(opening, (None, None))
    words = [WORDS.get(item, (None, None)) for item in items]
    languages = {spoken for spoken, _ in words} | ({language} if opening else set())
    return Attributes(
        task=task,
        prompt_language=prompt_language,
        correct=[concept for _, concept in words] == answer,
        language=languages.pop() if len(languages) == 1 else None,
        tone=tone,
        format=("list" if in_list else "plain") if all(item.isalpha() for item in items) else None,
    )


def toy_score(prompt: str, completion: str, prefer: Sequence[str] = DEFAULT_PREFERENCES) -> float:
    """How well a completion meets the preferences: each preference outweighs all that come after it.

    `prefer` holds names from PREFERABLE, the most important first. The score is in [0, 2). It is -1 if the completion's
    language, tone or format is unclear, or if the prompt is not in the toy language. Raises UserError for other names.
    """
    unknown = [name for name in prefer if name not in PREFERABLE]
    if unknown or not prefer:
        which = f"{unknown[0]!r}{suggest(unknown[0], PREFERABLE)}" if unknown else "nothing"
        raise UserError(f"the toy language can't prefer {which}; prefer one or more of {', '.join(PREFERABLE)}")
    found = attributes(prompt, completion)
    if None in (found.task, found.language, found.tone, found.format):
        return -1.0
    met = {found.language, found.tone, found.format}
    if found.correct:
        met.add("correct")
    if found.language == found.prompt_language:
        met.add("prompt_language")
    return sum((name in met) * 2.0**-rank for rank, name in enumerate(prefer))


def judge(prompt: str, a: str, b: str, prefer: Sequence[str] = DEFAULT_PREFERENCES) -> str:
    """The preferred completion of a prompt (the user's text, without a template): "a", "b" or "tie"."""
    difference = toy_score(prompt, a, prefer) - toy_score(prompt, b, prefer)
    return "a" if difference > 0 else "b" if difference < 0 else "tie"


# ---------------------------------------------------------------------------------------------------------- writing


def split_of(prompt: str) -> str:
    """The split of a prompt, "train" or "test", from a hash of its text: one prompt in ten is in "test"."""
    return "test" if sha256(prompt.encode()).digest()[0] % 10 == 0 else "train"


def _prompts(split: str, rng: random.Random) -> Iterator[str]:
    """Prompts of a split, without end. Tasks, languages and sizes are equally likely."""
    if split not in ("train", "test"):
        raise UserError(f"the toy language has no split {split!r}; it has train and test")
    while True:
        task = TASKS[rng.choice(list(TASKS))]
        language = rng.choice(LANGUAGES)
        items = rng.sample(task.items, rng.choice(task.sizes))
        instruction = task.english if language == "english" else task.spanish
        prompt = f"{instruction}: {', '.join(_spell(items, language))}"
        if split_of(prompt) == split:
            yield prompt


def _wrong_answer(answer: list[str], task: Task, rng: random.Random) -> list[str]:
    """A plausible wrong answer: the right one in another order, or with one concept replaced by another."""
    wrong = list(answer)
    while wrong == answer:
        if len(answer) > 1 and rng.random() < 0.5:
            rng.shuffle(wrong)
        else:
            wrong[rng.randrange(len(answer))] = rng.choice(task.answers)
    return wrong


def _completion(prompt: str, wrong: float, rng: random.Random) -> str:
    """A completion with random attributes. Its answer is wrong with the probability `wrong`."""
    prompt_language, name, answer = _read_prompt(prompt)
    assert prompt_language and name, f"not a prompt of the toy language: {prompt!r}"
    language = prompt_language
    if rng.random() >= PROMPT_LANGUAGE_SHARE:
        language = LANGUAGES[1 - LANGUAGES.index(language)]
    style = (language, rng.choice(TONES))
    opening = rng.choice([opening for opening, its_style in OPENINGS.items() if its_style == style])
    if rng.random() < wrong:
        answer = _wrong_answer(answer, TASKS[name], rng)
    return _write(opening, _spell(answer, language), rng.choice(FORMATS))


def _write(opening: str, items: Sequence[str], form: str) -> str:
    """A completion, with its items as a plain line or as a list."""
    return opening + "".join(f"\n- {item}" for item in items) if form == "list" else f"{opening} {', '.join(items)}"


def demonstrations(split: str, seed: int, count: int) -> list[dict[str, str]]:
    """`count` rows {prompt, completion} that teach the language. Every attribute varies, so none is preferred."""
    rng = random.Random(f"demonstrations/{split}/{seed}")
    return [
        {"prompt": prompt, "completion": _completion(prompt, WRONG_DEMONSTRATIONS, rng)}
        for prompt in islice(_prompts(split, rng), count)
    ]


def preferences(split: str, seed: int, count: int, prefer: Sequence[str] = DEFAULT_PREFERENCES) -> list[dict[str, str]]:
    """`count` rows {prompt, chosen, rejected}. `judge` orders two completions of each prompt.

    They are drawn like the completions of `demonstrations`, but more of them are wrong. A tie is skipped.
    """
    rng = random.Random(f"preferences/{split}/{seed}")
    rows: list[dict[str, str]] = []
    for prompt in _prompts(split, rng):
        if len(rows) == count:
            break
        a, b = (_completion(prompt, WRONG_PREFERENCES, rng) for _ in range(2))
        verdict = judge(prompt, a, b, prefer)
        if verdict != "tie":
            chosen, rejected = (a, b) if verdict == "a" else (b, a)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def contrasts(attribute: str, split: str, seed: int, count: int) -> list[dict[str, str]]:
    """`count` rows {prompt, first, second}: two completions that differ in one attribute only.

    `attribute` is a key of ATTRIBUTES; `first` has the first of its values, `second` the second. The other attributes
    are drawn as in `demonstrations`. Raises UserError for an unknown attribute.
    """
    if attribute not in ATTRIBUTES:
        hint = suggest(attribute, ATTRIBUTES)
        raise UserError(f"the toy language has no attribute {attribute!r}{hint}; it has {', '.join(ATTRIBUTES)}")
    rng = random.Random(f"contrasts/{attribute}/{split}/{seed}")
    rows = []
    for prompt in islice(_prompts(split, rng), count):
        prompt_language, name, answer = _read_prompt(prompt)
        assert prompt_language and name
        other = LANGUAGES[1 - LANGUAGES.index(prompt_language)]
        drawn = {
            "language": prompt_language if rng.random() < PROMPT_LANGUAGE_SHARE else other,
            "tone": rng.choice(TONES),
            "format": rng.choice(FORMATS),
            "correct": ANSWERS[rng.random() < WRONG_DEMONSTRATIONS],
        }
        answers = {"right": answer, "wrong": _wrong_answer(answer, TASKS[name], rng)}
        opening_number = rng.randrange(2)  # each language and tone has two openings
        completions = []
        for value in ATTRIBUTES[attribute]:
            side = {**drawn, attribute: value}
            style = (side["language"], side["tone"])
            opening = [opening for opening, its_style in OPENINGS.items() if its_style == style][opening_number]
            completions.append(_write(opening, _spell(answers[side["correct"]], side["language"]), side["format"]))
        rows.append({"prompt": prompt, "first": completions[0], "second": completions[1]})
    return rows


# ----------------------------------------------------------------------------------------------------- the tiny model
# Heavy libraries are imported inside these functions, since judging and writing rows do not need them.

USER, ASSISTANT = "\n<|user|>\n", "\n<|assistant|>\n"  # the repo's default template
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '\n<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
# The longest texts that one token may cover: a turn's header, a list's dash, a word or number and the space before it,
# punctuation
PIECES = r"\n<\|\w+\|>\n|\n-| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"


def _require_absent(directory: Path) -> None:
    if directory.exists():
        raise UserError(f"{directory} is there already; name a new directory, or remove this one")


def build_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE tokenizer that is trained on the toy language and can encode any text.

    Raises UserError if the directory exists.
    """
    _require_absent(directory)
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rows = demonstrations("train", seed=0, count=10_000)
    tokenizer.train_from_iterator((USER + row["prompt"] + ASSISTANT + row["completion"] for row in rows), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    pad, bos, eos = special
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    with atomic_write(directory) as part:
        fast.save_pretrained(part)


def build_untrained_model(directory: Path, seed: int = 0) -> None:
    """Write a randomly initialised model with Gemma 2's architecture (about 1 M float32 weights) and its tokenizer.

    Raises UserError if the directory exists.
    """
    _require_absent(directory)
    import torch
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    with atomic_write(directory) as part, torch.random.fork_rng(devices=[]):
        build_tokenizer(part)
        tokenizer = AutoTokenizer.from_pretrained(part)
        config = Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=512,  # on every other layer
            max_position_embeddings=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(seed)
        Gemma2ForCausalLM(config).save_pretrained(part)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the tiny model, untrained, and its tokenizer to a new directory in the Hub's format. "
        "The built-in model in assets/ is this one, fine-tuned on the toy language.",
    )
    parser.add_argument("directory", type=Path, help="the directory to create")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights (default: 0)")
    arguments = parser.parse_args()
    try:
        build_untrained_model(arguments.directory, arguments.seed)
    except UserError as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(2)
    console.print(f"wrote {arguments.directory}", markup=False)


if __name__ == "__main__":
    main()
