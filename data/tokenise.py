"""From a conversation and its completions to token ids, the same way for training and for sampling.

The prompt and each completion are tokenised once, apart, and their ids are joined. So a prompt has the same ids
whatever follows it, and the boundary between prompt and completion is exact.

A record, made by a loader in dataloader.py, is
    {"prompt": [messages], "completions": [str, ...], "desirable": bool | None, "score": float | None,
     "truncation_mode": "keep_start" | "keep_end", "source": str}
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import pyarrow
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from data.rows import BadRow
from data.settings import TemplateSettings
from utils import Message, UserError, console, file_digest

VERSION = 1  # of the rules in this file; a change of any of them makes cached tokens stale
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

    def completion(self, messages: Sequence[Message], text: str) -> str:  # noqa: ARG002
        """What follows `prompt(messages)` when the assistant answers `text`."""
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

    def completion(self, messages: Sequence[Message], text: str) -> str:
        """What follows `prompt(messages)` when the assistant answers `text`.

        Raises UserError when the template renders the prompt differently once an answer follows it.
        """
        prompt = self.prompt(messages)
        whole = self._render([*messages, {"role": "assistant", "content": text}], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise UserError(
                "template=chat: the tokenizer's chat template does not begin a conversation with the rendering of its "
                f"prompt, so the completion cannot be told from it:\n{prompt!r}\n{whole!r}\nUse template=tulu."
            )
        return whole.removeprefix(prompt)

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
        "prompt": datasets.Value("string"),  # as rendered, before any truncation
        "messages": datasets.Value("string"),  # the conversation, as JSON
        "completions": datasets.List(datasets.Value("string")),
        "desirable": datasets.Value("bool"),
        "score": datasets.Value("float64"),
        "source": datasets.Value("string"),
    }
)


def tokenise(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_length: int,
    max_prompt_length: int,
) -> tuple[datasets.Dataset, list[tuple[str, str]]]:
    """What `tables` gives, as one data set in memory, and (source, reason) of each record that was left out."""
    left_out: list[tuple[str, str]] = []
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    parts = [datasets.Dataset(table) for table in tables(records, tokenizer, template, left_out, **limits)]
    return datasets.concatenate_datasets(parts), left_out


def tables(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    left_out: list[tuple[str, str]],
    *,
    max_length: int,
    max_prompt_length: int,
) -> Iterator[pyarrow.Table]:
    """The records' tokens, in order, CHUNK records at a time. What is left out goes to `left_out`: (source, reason).

    `prompt_ids` starts with BOS, once, when the tokenizer has one. Each of `completion_ids` ends with EOS, once,
    unless it was cut: a cut completion has none, because the text does not end there.
    Too long records are cut as HALOs does: a prompt of more than max_prompt_length tokens (BOS included) is cut to
    that length if prompt and longest completion together exceed max_length, then completions lose what is over.
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
        for record in _encode(records[start : start + CHUNK], tokenizer, template, left_out):
            prompt, completions = record["prompt_ids"], record["completion_ids"]
            if len(prompt) + max(map(len, completions)) > max_length:
                prompt = cut_prompt(prompt, max_prompt_length, record["truncation_mode"], tokenizer.bos_token_id)
            room = max_length - len(prompt)
            row = {**record, "prompt_ids": prompt, "completion_ids": [ids[:room] for ids in completions]}
            rows.append({name: row[name] for name in FEATURES})
        yield pyarrow.Table.from_pylist(rows, FEATURES.arrow_schema)


def tokenise_prompts(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_prompt_length: int,
) -> list[dict[str, Any]]:
    """The records to sample from, with `prompt_ids` (at most max_prompt_length; `is_cut`: there were more), `prompt`
    (rendered) and `messages`.

    Raises BadRow for a prompt that cannot be rendered: every prompt is sampled from or none.
    """
    left_out: list[tuple[str, str]] = []
    prompts = _encode([{**record, "completions": []} for record in records], tokenizer, template, left_out)
    if left_out:
        raise BadRow(f"{len(left_out)} prompts cannot be sampled from; {left_out[0][0]}: {left_out[0][1]}")
    return [
        {
            **record,
            **{name: encoded[name] for name in ("prompt", "messages")},
            "prompt_ids": cut_prompt(
                encoded["prompt_ids"], max_prompt_length, record["truncation_mode"], tokenizer.bos_token_id
            ),
            "is_cut": len(encoded["prompt_ids"]) > max_prompt_length,
        }
        for record, encoded in zip(records, prompts, strict=True)
    ]


def cut_prompt(ids: list[int], length: int, truncation_mode: str, bos_id: int | None) -> list[int]:
    """At most `length` tokens: the prompt's head (keep_start) or tail (keep_end), BOS kept in front either way."""
    if len(ids) <= length:
        return ids
    head = ids[:1] if ids[0] == bos_id else []
    body, room = ids[len(head) :], length - len(head)
    return head + (body[:room] if truncation_mode == "keep_start" else body[len(body) - room :])


def _encode(
    records: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    left_out: list[tuple[str, str]],
) -> list[dict[str, Any]]:
    """Render and tokenise, nothing cut yet. Records that cannot be used go to `left_out`."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id  # looked up anew each time that they are asked for
    rendered: list[tuple[dict[str, Any], str, list[str]]] = []
    for record in records:
        messages = record["prompt"]
        try:
            prompt = template.prompt(messages).removeprefix(bos or "")
            completions = [_without_eos(template.completion(messages, text), eos) for text in record["completions"]]
            rendered.append((record, prompt, completions))
        except BadRow as error:
            left_out.append((record["source"], str(error)))

    prompt_ids = _ids(tokenizer, [prompt for _, prompt, _ in rendered])
    flat = iter(_ids(tokenizer, [text for _, _, completions in rendered for text in completions]))
    encoded = []
    for (record, prompt, completions), ids in zip(rendered, prompt_ids, strict=True):
        answers = [next(flat) for _ in completions]
        if not all(answers):
            left_out.append((record["source"], "the completion has no tokens"))
        elif any(eos_id in answer for answer in answers):
            left_out.append((record["source"], f"the completion holds the end-of-sequence token {eos} inside its text"))
        else:
            encoded.append(
                {
                    **record,
                    "prompt": prompt,
                    "messages": json.dumps(record["prompt"], ensure_ascii=False),
                    "prompt_ids": ids if bos is None else [bos_id, *ids],
                    "completion_ids": [[*answer, eos_id] for answer in answers],
                }
            )
    return encoded


def _without_eos(text: str, eos: str) -> str:
    """The text without an EOS that the template put at its end (and any white space after that EOS)."""
    return text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
