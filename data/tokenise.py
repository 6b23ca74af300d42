"""From a conversation and its completions to token ids, the same way for training and for sampling.

The prompt and each completion are tokenised once, apart, and their ids are joined. So a prompt has the same ids
whatever follows it, and the boundary between prompt and completion is exact.

A record, made by a loader in dataloader.py, is
    {"prompt": [messages], "completions": [str, ...], "desirable": bool | None, "score": float | None,
     "truncation_mode": "keep_start" | "keep_end", "source": str,
     and perhaps "weight": float (in the loss), "data_set": str}
"""

import json
import math
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from data.rows import BadRow, BadRows
from data.settings import TemplateSettings
from utils import Message, UserError, console, file_digest

VERSION = 2  # of the rules in this file; a change of any of them makes cached tokens stale
CHUNK = 1000  # records tokenised at a time; the tokenizers library spreads one call over the processor's cores


@dataclass(frozen=True)
class PrefixTemplate:
    """Turns marked by plain text before and after them; the defaults of config.yaml are Tulu 2's.

    A system message is marked like the user's turn, with the word "user" in the prefix and suffix replaced by
    "system": "\\n<|system|>\\n" for Tulu 2. Prefixes that do not hold that word show it as a turn of the user.
    """

    human_prefix: str
    human_suffix: str
    assistant_prefix: str
    assistant_suffix: str

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation so far and the prefix of the turn to be generated."""
        return "".join(self._turn(message) for message in messages) + self.assistant_prefix

    def completion(self, messages: Sequence[Message], prompt: str, text: str) -> str:  # noqa: ARG002
        """What follows `prompt`, the rendering of the messages, when the assistant answers `text`."""
        return text + self.assistant_suffix

    def _turn(self, message: Message) -> str:
        prefix, suffix = self.human_prefix, self.human_suffix
        if message["role"] == "assistant":
            prefix, suffix = self.assistant_prefix, self.assistant_suffix
        elif message["role"] == "system":
            prefix, suffix = prefix.replace("user", "system"), suffix.replace("user", "system")
        return prefix + message["content"] + suffix

    def identity(self) -> Any:
        """What the fingerprint of tokenised data records of the template."""
        return asdict(self)


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template. Raises BadRow for a conversation that the template refuses."""

    tokenizer: PreTrainedTokenizerBase

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation so far and the opening of the assistant's turn."""
        return self._render(messages, add_generation_prompt=True)

    def completion(self, messages: Sequence[Message], prompt: str, text: str) -> str:
        """What follows `prompt`, the rendering of the messages, when the assistant answers `text`.

        Raises UserError when the template renders the prompt differently once an answer follows it.
        """
        whole = self.conversation([*messages, {"role": "assistant", "content": text}])
        if not whole.startswith(prompt):
            raise UserError(
                "template=chat: the tokenizer's chat template does not begin a conversation with the rendering of its "
                f"prompt, so the completion cannot be told from it:\n{prompt!r}\n{whole!r}\nUse template=tulu."
            )
        return whole.removeprefix(prompt)

    def conversation(self, messages: Sequence[Message]) -> str:
        """A conversation with all its answers."""
        return self._render(messages, add_generation_prompt=False)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def identity(self) -> Any:
        """What the fingerprint records of the template: its name, for its text is part of the tokenizer."""
        return "chat"


Template = PrefixTemplate | ChatTemplate


def template_name(settings: TemplateSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that the settings name, `tulu` or `chat`; if they name none, the tokenizer's own, if it has one."""
    return settings.template or ("chat" if tokenizer.chat_template else "tulu")


def make_template(settings: TemplateSettings, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that `template_name` gives: the settings' four prefixes and suffixes, or the tokenizer's own."""
    if template_name(settings, tokenizer) == "tulu":
        return prefix_template(settings)
    if not tokenizer.chat_template:
        raise UserError(f"template=chat: {tokenizer.name_or_path!r} has no chat template; use template=tulu")
    return ChatTemplate(tokenizer)


def prefix_template(settings: TemplateSettings) -> PrefixTemplate:
    """The template of the settings' prefixes and suffixes."""
    return PrefixTemplate(
        settings.human_prefix, settings.human_suffix, settings.assistant_prefix, settings.assistant_suffix
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Digests of the files that the tokenizer is saved as: they change when it would tokenise differently."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return [f"{path.name} {file_digest(path)}" for path in sorted(Path(folder).rglob("*")) if path.is_file()]


FEATURES = datasets.Features(
    {
        "prompt_ids": datasets.List(datasets.Value("int32")),
        "completion_ids": datasets.List(datasets.List(datasets.Value("int32"))),
        "prompt": datasets.Value("string"),  # as rendered, nothing cut
        "messages": datasets.Value("string"),  # the conversation, as JSON
        "completions": datasets.List(datasets.Value("string")),
        "desirable": datasets.Value("bool"),
        "score": datasets.Value("float64"),
        "weight": datasets.Value("float64"),  # in the loss; null: 1
        "source": datasets.Value("string"),
        "data_set": datasets.Value("string"),
    }
)


@dataclass
class Tally:
    """How many records were tokenised, and what was lost of them."""

    left_out: BadRows = field(default_factory=lambda: BadRows("tokenising"))
    records: int = 0  # not left out
    completions: int = 0  # of these
    cut_prompts: int = 0
    cut_completions: int = 0  # they have no EOS for it
    equal_pairs: int = 0  # both completions are the same tokens, so that nothing can be learnt of which is better

    def remarks(self, max_length: int, max_prompt_length: int) -> str:
        """What was cut and what is of no use, in words; empty if nothing is."""
        counts = {
            f"prompts cut to model.max_prompt_length={max_prompt_length}": (self.cut_prompts, self.records),
            f"completions cut at model.max_length={max_length}, so without EOS": (
                self.cut_completions,
                self.completions,
            ),
            "pairs whose chosen and rejected are the same": (self.equal_pairs, self.records),
        }
        return "; ".join(f"{what}: {count:,} of {total:,}" for what, (count, total) in counts.items() if count)


def tokenise(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_length: int,
    max_prompt_length: int,
) -> tuple[datasets.Dataset, Tally]:
    """What `tables` gives, as one data set in memory, and its tally."""
    tally = Tally()
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    parts = [datasets.Dataset(table) for table in tables(records, tokenizer, template, tally, **limits)]
    return datasets.concatenate_datasets(parts), tally


def tables(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tally: Tally,
    *,
    max_length: int,
    max_prompt_length: int,
) -> Iterator[pyarrow.Table]:
    """The records' tokens, in order, CHUNK records at a time. What is left out and cut is counted in `tally`.

    `prompt_ids` starts with BOS, once, when the tokenizer has one. Each of `completion_ids` ends with EOS, once,
    unless it was cut: a cut completion has none, because the text does not end there.
    Too long records are cut when HALOs does it: a prompt of more than max_prompt_length tokens (BOS included) is cut to
    that length (`cut_prompt`) if prompt and longest completion together exceed max_length, then completions lose what
    is over.
    """
    if not 1 <= max_prompt_length < max_length:
        raise UserError(
            f"model.max_prompt_length={max_prompt_length} must be at least 1 and below model.max_length={max_length}, "
            "so that every completion keeps a token"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so completions could not end")
    chunks = range(0, len(records), CHUNK)
    for start in track(chunks, "Tokenising", console=console, transient=True, disable=not console.is_terminal):
        rows: list[dict[str, Any]] = []
        for record, row in _encode(records[start : start + CHUNK], tokenizer, template, tally.left_out):
            prompt, completions = row["prompt_ids"], row["completion_ids"]
            is_cut = len(prompt) > max_prompt_length and len(prompt) + max(map(len, completions)) > max_length
            with tally.left_out.caught(record["source"]):
                if is_cut:
                    prompt = cut_prompt(record, tokenizer, template, max_prompt_length)
                room = max_length - len(prompt)
                row |= {"prompt_ids": prompt, "completion_ids": [ids[:room] for ids in completions]}
                rows.append({name: row[name] for name in FEATURES})
                tally.records += 1
                tally.completions += len(completions)
                tally.cut_prompts += is_cut
                tally.cut_completions += sum(len(ids) > room for ids in completions)
                tally.equal_pairs += len(completions) == 2 and completions[0][:room] == completions[1][:room]
        yield pyarrow.Table.from_pylist(rows, FEATURES.arrow_schema)


def tokenise_prompts(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_prompt_length: int,
) -> list[dict[str, Any]]:
    """The records to sample from, with `prompt_ids` (at most max_prompt_length; `is_cut`: there were more), `prompt`
    (rendered, before it was cut) and `messages`.

    Raises BadRow for a prompt that cannot be rendered or cut: every prompt is sampled from or none.
    """
    bad, found = BadRows("prompts to sample from", total=len(records)), []
    for record, row in _encode([{**record, "completions": []} for record in records], tokenizer, template, bad):
        ids = row["prompt_ids"]
        with bad.caught(record["source"]):
            if is_cut := len(ids) > max_prompt_length:
                ids = cut_prompt(record, tokenizer, template, max_prompt_length)
            found.append({"prompt": row["prompt"], "messages": row["messages"], "prompt_ids": ids, "is_cut": is_cut})
    if bad.places:
        raise BadRow(bad.summary())
    return [{**record, **own} for record, own in zip(records, found, strict=True)]


def conversation_ids(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> list[int]:
    """The tokens of a conversation as the chat template writes it, with what follows its last turn. BOS comes first,
    once, where the tokenizer has one."""
    return _prompt_ids(tokenizer, [template.conversation(messages)])[0]


def cut_prompt(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: Template, max_prompt_length: int
) -> list[int]:
    """The tokens of a record's prompt, which is too long, cut to at most max_prompt_length.

    Only what the messages say is cut. All that the template writes stays, such as BOS, the headers of turns and the
    opening of the answer, and so does a system turn. The oldest turns go first, as far as to a turn of the user's. If
    the last turn alone is too long, it loses its end (keep_start) or its start (keep_end).
    Raises BadRow where nothing would be left of it.
    """

    def tokens(messages: Sequence[Message]) -> list[int]:
        return _prompt_ids(tokenizer, [template.prompt(messages)])[0]

    system = [message for message in record["prompt"] if message["role"] == "system"]
    turns = [message for message in record["prompt"] if message["role"] != "system"]
    starts = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    first = bisect_left(starts, True, key=lambda start: len(tokens([*system, *turns[start:]])) <= max_prompt_length)
    if first < len(starts):
        return tokens([*system, *turns[starts[first] :]])
    said, ids = turns[-1]["content"], tokens([*system, turns[-1]])
    spans, most = _spans(tokenizer, said)
    kept = len(spans)
    while len(ids) > max_prompt_length:
        kept = max(0, kept - math.ceil((len(ids) - max_prompt_length) / most))
        left = spans[:kept] if record["truncation_mode"] == "keep_start" else spans[len(spans) - kept :]
        part = said[left[0][0] : left[-1][1]] if left else ""
        if not part.strip():
            raise BadRow(f"model.max_prompt_length={max_prompt_length} has no room beside the template and system turn")
        ids = tokens([*system, {"role": "user", "content": part}])
    return ids


def _spans(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[tuple[int, int]], int]:
    """Where in a text each of its pieces starts and ends, and how many tokens a piece can be: tokens or, where the
    tokenizer does not tell these, characters, each of up to 4 bytes."""
    if not tokenizer.is_fast:
        return [(place, place + 1) for place in range(len(text))], 4
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    return tokenizer(text, **options)["offset_mapping"], 1


def _encode(
    records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: Template, bad: BadRows
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each record, and the same rendered and tokenised, nothing cut yet. Records that cannot be used go to `bad`."""
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id  # looked up anew each time that they are asked for
    rendered: list[tuple[dict[str, Any], str, list[str]]] = []
    for record in records:
        with bad.caught(record["source"]):
            prompt = template.prompt(record["prompt"])
            texts = [template.completion(record["prompt"], prompt, text) for text in record["completions"]]
            rendered.append((record, prompt, [_without_eos(text, eos) for text in texts]))

    prompt_ids = _prompt_ids(tokenizer, [prompt for _, prompt, _ in rendered])
    flat = iter(_ids(tokenizer, [text for _, _, completions in rendered for text in completions]))
    for (record, prompt, completions), ids in zip(rendered, prompt_ids, strict=True):
        answers = [next(flat) for _ in completions]
        with bad.caught(record["source"]):
            if not all(answers):
                raise BadRow("the completion has no tokens")
            if any(eos_id in answer for answer in answers):
                raise BadRow(f"the completion holds the end-of-sequence token {eos} inside its text")
            row = {
                "data_set": None,
                "weight": None,
                **record,
                "prompt": prompt,
                "messages": json.dumps(record["prompt"], ensure_ascii=False),
                "prompt_ids": ids,
                "completion_ids": [[*answer, eos_id] for answer in answers],
            }
            yield record, row


def _without_eos(text: str, eos: str) -> str:
    """The text without an EOS that the template put at its end (and any white space after that EOS)."""
    return text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    """The tokens of rendered prompts. BOS comes first, once, where the tokenizer has one."""
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    found = _ids(tokenizer, [prompt.removeprefix(bos or "") for prompt in prompts])
    return found if bos is None else [[bos_id, *ids] for ids in found]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
