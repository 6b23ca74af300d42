"""From prompts to the file of samples: every prompt once for each draw, and what was drawn is kept at once.

Samples are appended, as they come, to <file>.partial.jsonl. Its first line says all that they depend on; a killed
command, given again, goes on with what is there, and one with other settings is refused.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import dataloader
from sampling.backends import Backend
from sampling.generate import Decoding, Request, Sample
from sampling.openai_server import NoAnswer
from sampling.settings import SamplingSettings
from utils import (
    Message,
    UserError,
    as_json,
    console,
    file_digest,
    fingerprint,
    in_words,
    log_lines,
    missing_folders,
    open_json_lines,
    progress_bar,
    remove_empty,
    without_seal,
    write_log_lines,
    write_text,
)

Key = tuple[int, int, int]  # prompt, draw, turn

MT_BENCH_TEMPERATURES = {  # FastChat's, by category; 0.7 for any other, such as writing and roleplay
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


def decoding_of(config: SamplingSettings) -> Decoding:
    """How completions are drawn. Raises UserError where nothing says at which temperature."""
    if config.temperature is None and config.mode != "mtbench":
        raise UserError("temperature=null: only mode=mtbench has temperatures of its own; set a number of at least 0")
    stop = (config.stop,) if isinstance(config.stop, str) else tuple(config.stop)
    return Decoding(config.max_new_tokens, config.seed, config.top_p, config.top_k, stop)


def records_to_sample(config: SamplingSettings, *, every: bool = False) -> list[dict[str, Any]]:
    """The prompts of the test rows: `n_samples` of them, drawn at random but the same in every run, or all.

    Raises UserError where there is none.
    """
    records = [r for data in dataloader.load_datasets(config, "test") for r in dataloader.prompt_records(data)]
    if not records:
        raise UserError("the test rows hold no prompt to sample from; look at datasets, eval_datasets and eval_split")
    if every:
        return records
    chosen = random.Random(0).sample(range(len(records)), min(config.n_samples, len(records)))
    return [records[i] for i in sorted(chosen)]


def temperature_of(record: dict[str, Any], config: SamplingSettings) -> float:
    """The configuration's temperature, or where it is null the one of the question's category in MT-Bench."""
    if config.temperature is None:
        return MT_BENCH_TEMPERATURES.get(record["benchmark"]["category"], 0.7)
    return float(config.temperature)


@dataclass
class Conversation:
    """What was drawn for a prompt: an answer to it and to each of its later turns, up to one that `failed`: why a
    server did not give it."""

    record: dict[str, Any]
    draw: int
    temperature: float
    requests: list[Request] = field(default_factory=list)
    answers: list[Sample] = field(default_factory=list)
    failed: str | None = None

    def entry(self) -> dict[str, Any]:
        """Its sample in HALOs' layout, where `policy` answers `messages`; later turns are in `followups`, `turns`.

        An answer that a server did not give is null.
        """
        completions, followups = self.record["completions"], self.record["followups"]
        texts = [answer.text for answer in self.answers] + [None] * (1 + len(followups) - len(self.answers))
        return {
            "prompt": self.requests[0].prompt,
            "messages": self.record["prompt"],
            **({"chosen": completions[0]} if completions else {}),
            "policy": texts[0],
            "draw": self.draw,
            "temperature": self.temperature,
            "finish_reason": self.answers[-1].finish_reason if self.failed is None else "failed",
            **({"followups": followups, "turns": texts} if followups else {}),
            **({} if self.failed is None else {"failed": self.failed}),
        }


def require_own_file(target: Path, identity: dict[str, Any], source: str) -> None:
    """Raises UserError where the target holds samples from another `source`, a run, a model or a server: models in two
    directories may have one name."""
    try:
        content = json.loads(target.read_text(encoding="utf-8"))
        other, drawn = Path(content["sampled_from"]), content["sampling"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if drawn != identity and other.resolve() != Path(source).resolve():
        raise UserError(
            f"{target} holds samples from {other}, not from {source}; ++exp_name=NAME names a file for these"
        )


class SampleLog:
    """The samples so far, on disk, and the file `target` that all of them are published in."""

    def __init__(self, target: Path, identity: dict[str, Any], writes: bool = True) -> None:
        """`identity` is all that the samples depend on, as JSON. Of the ranks of one model all read the log, and one
        `writes` it. Raises UserError where its identity differs, or where another process writes it.

        `finished`: the target has all these samples. If a server left out some, the target has the others.
        """
        self.target, self.path, self.writes = target, target.with_name(f"{target.name}.partial.jsonl"), writes
        self.samples: dict[Key, Sample] = {}
        self.sampled_at = datetime.now().astimezone().isoformat(timespec="seconds")
        self.finished = False
        readable = self.path if self.path.exists() else Path(os.devnull)
        self.file = open_json_lines(self.path) if writes else readable.open("rb")
        try:
            self._open(identity)
        except BaseException:
            self.file.close()  # and unlock it
            raise

    def _open(self, identity: dict[str, Any]) -> None:
        found = list(log_lines(self.file))
        lines = [line for line in found if line is not None]
        if len(lines) < len(found):
            told = f"{self.path}: {len(found) - len(lines)} damaged or incomplete line(s), drawn again"
            console.print(told, style="yellow")
        is_known = any("identity" in line for line in lines)  # else nothing says what the samples depend on
        self.is_empty = not (is_known and any("key" in line for line in lines)) or self._is_published(lines[-1])
        self.samples = self._read_target(identity)
        if self.finished:
            return
        if self.is_empty:
            if self.writes:
                self.file.truncate(0)
            self._write({"sampled_at": self.sampled_at, "identity": identity})
        else:
            for line in lines:
                self._read(line, identity)

    def _is_published(self, last: dict[str, Any]) -> bool:
        """Whether the target appeared, and only this log was not removed any more."""
        return "published" in last and self.target.is_file() and file_digest(self.target) == last["published"]

    def _read_target(self, identity: dict[str, Any]) -> dict[Key, Sample]:
        """The samples in the target, if they were drawn in just this way."""
        try:
            content = json.loads(self.target.read_text(encoding="utf-8"))
            if content["sampling"] != identity:
                return {}
            if without_seal(content) is None:
                raise UserError(
                    f"{self.target} is not what eval.py wrote: it was changed or is damaged. Move it away to draw its "
                    "samples again, or name another file with ++exp_name=NAME"
                )
            self.finished = not any("failed" in entry for entry in content["samples"])
            self.sampled_at = content["sampled_at"]
            return samples_in(content["samples"], identity["samples"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}

    def _read(self, line: dict[str, Any], identity: dict[str, Any]) -> None:
        match line:
            case {"key": [int(), int(), int()] as key, "text": str(), "ids": list(), "finish_reason": str()}:
                self.samples[tuple(key)] = Sample(line["text"], line["ids"], line["finish_reason"])
            case {"identity": dict(), "sampled_at": str()}:
                self.sampled_at = line["sampled_at"]
        known = line.get("identity", identity)
        if isinstance(known, dict) and known != identity:
            differing = [k for k in {**known, **identity} if known.get(k) != identity.get(k)]
            lines = "\n".join(f"  {k}: {known.get(k)!r} there, {identity.get(k)!r} now" for k in differing)
            raise UserError(
                f"{self.path} holds unfinished samples of another setting:\n{lines}\n"
                "Finish them as they were begun, or delete that file, or use another exp_name or samples_dir."
            )

    def add(self, samples: dict[Key, Sample]) -> None:
        """Keep samples, on disk first."""
        self._write(*({"key": key, **asdict(sample)} for key, sample in samples.items()))
        self.samples |= samples
        self.is_empty &= not samples

    def _write(self, *lines: dict[str, Any]) -> None:
        if self.writes:
            write_log_lines(self.file, *lines)

    def publish(self, content: Any) -> None:
        """Write the target, a JSON file, and remove the log."""
        if not self.writes:
            return
        text = as_json(content, indent=2) + "\n"
        self._write({"published": hashlib.sha256(text.encode()).hexdigest()})
        write_text(self.target, text)
        self.path.unlink()


def samples_in(entries: list[dict[str, Any]], draws: int) -> dict[Key, Sample]:
    """The samples in a file of them, in its order: `draws` of one prompt together."""
    found: dict[Key, Sample] = {}
    for place, entry in enumerate(entries):
        for turn, text in enumerate(entry.get("turns", [entry["policy"]])):
            if text is not None:
                reason: Any = entry["finish_reason"] if "failed" not in entry else "stop"
                found[(*divmod(place, draws), turn)] = Sample(text, [], reason)
    return found


@contextmanager
def sample_log(path: Path, identity: dict[str, Any], writes: bool = True) -> Iterator[SampleLog]:
    """The log of samples that are to be published in `path`. It is removed when all went well, or nothing was drawn.

    Raises UserError where another process writes it.
    """
    try:
        made = missing_folders(path.parent)
        log = SampleLog(path, identity, writes)
    except OSError as error:
        where = "samples_dir= names another place"
        raise UserError(f"cannot write to {path.parent} ({in_words(error)}); {where}") from error
    with log.file:
        all_went_well = False
        try:
            yield log
            all_went_well = not log.finished  # else it may hold what another command began
        finally:
            if writes and (all_went_well or log.is_empty):
                log.path.unlink(missing_ok=True)
                remove_empty(made)


def identity_of(
    config: SamplingSettings, settings: Decoding, records: Sequence[dict[str, Any]], policy: str, template: str
) -> dict[str, Any]:
    """All that samples depend on, but the batch size; `policy` says which weights, or whose server, and `template`
    which template: "chat" or "tulu"."""
    prompts = [[record["prompt"], record["followups"], record["truncation_mode"]] for record in records]
    prefixes = [config.human_prefix, config.human_suffix, config.assistant_prefix, config.assistant_suffix]
    return {
        "backend": config.backend,
        "policy": policy,
        "prompts": fingerprint(prompts),
        "samples": config.samples,
        "temperature": config.temperature,
        **json.loads(json.dumps(asdict(settings))),
        "template": template if template == "chat" else fingerprint(prefixes),
        "max_prompt_length": config.model.max_prompt_length,
        "policy_dtype": config.model.policy_dtype,
    }


def converse(
    config: SamplingSettings, settings: Decoding, records: Sequence[dict[str, Any]], backend: Backend, log: SampleLog
) -> list[Conversation]:
    """`config.samples` conversations from each record, those of one record together; what the log has is not drawn
    again. A later turn is asked after the answers to all the earlier ones, and if it is too long its end is kept."""
    conversations = {
        (i, draw): Conversation(record, draw, temperature_of(record, config))
        for i, record in enumerate(records)
        for draw in range(config.samples)
    }
    turns = 1 + max(len(record["followups"]) for record in records)
    total = config.samples * sum(1 + len(record["followups"]) for record in records)
    with progress_bar("sampling", total, len(log.samples)) as advance:
        for turn in range(turns):
            keys: list[Key] = []
            requests = []
            for draw in range(config.samples):
                own = [i for i, record in enumerate(records) if turn <= len(record["followups"])]
                own = [i for i in own if conversations[i, draw].failed is None]
                asked = [next_turn(conversations[i, draw]) for i in own]
                temperatures = [conversations[i, draw].temperature for i in own]
                requests += backend.requests(asked, temperatures, draw)
                keys += [(i, draw, turn) for i in own]
            missing = [place for place, key in enumerate(keys) if key not in log.samples]
            for done in backend.complete([requests[place] for place in missing], settings):
                log.add({keys[missing[place]]: one for place, one in done.items() if isinstance(one, Sample)})
                for place, one in done.items():
                    if isinstance(one, NoAnswer):
                        conversations[keys[missing[place]][:2]].failed = str(one)
                advance(len(log.samples), None)
            for key, request in zip(keys, requests, strict=True):
                conversations[key[:2]].requests.append(request)
                if key in log.samples:
                    conversations[key[:2]].answers.append(log.samples[key])
            require_enough(config, list(conversations.values()))
    return list(conversations.values())


def require_enough(config: SamplingSettings, conversations: Sequence[Conversation]) -> None:
    """Raises UserError where a server failed to answer more of the conversations than `max_failed` allows."""
    failed = [talk.failed for talk in conversations if talk.failed is not None]
    prompts = len(conversations) // config.samples
    if len(failed) > config.may_fail(prompts) or len(failed) == len(conversations):
        raise UserError(
            f"{len(failed)} of {len(conversations)} samples got no answer from {config.base_url}, the last: "
            f"{failed[-1]}\nThe others are kept, and a rerun asks only for what is missing; "
            f"max_failed={config.max_failed:g} allows {config.may_fail(prompts)} to be left out."
        )


def next_turn(conversation: Conversation) -> dict[str, Any]:
    """The record whose prompt is the conversation so far with the user's next turn."""
    record, answers = conversation.record, conversation.answers
    if not answers:
        return record
    messages: list[Message] = [*record["prompt"]]
    for answer, followup in zip(answers, record["followups"]):
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": followup}]
    return {**record, "prompt": messages, "completions": [], "truncation_mode": "keep_end"}
