"""From prompts to the file of samples: every prompt once for each draw, and what was drawn is kept at once.

Samples are appended, as they come, to <file>.partial.jsonl. Its first line says all that they depend on; a killed
command, given again, goes on after the last whole line, and one with other settings is refused.
"""

import fcntl
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import dataloader
from sampling.backends import Backend
from sampling.generate import Decoding, Request, Sample
from sampling.settings import SamplingSettings
from utils import Message, UserError, fingerprint, open_in_place, progress_bar

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
    """What was drawn for a prompt: an answer to it and to each of its later turns."""

    record: dict[str, Any]
    draw: int
    temperature: float
    requests: list[Request] = field(default_factory=list)
    answers: list[Sample] = field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        """Its sample in HALOs' layout, where `policy` answers `messages`; later turns are in `followups`, `turns`."""
        completions, followups = self.record["completions"], self.record["followups"]
        return {
            "prompt": self.requests[0].prompt,
            "messages": self.record["prompt"],
            **({"chosen": completions[0]} if completions else {}),
            "policy": self.answers[0].text,
            "draw": self.draw,
            "temperature": self.temperature,
            "finish_reason": self.answers[-1].finish_reason,
            **({"followups": followups, "turns": [answer.text for answer in self.answers]} if followups else {}),
        }


class SampleLog:
    """The samples so far, on disk."""

    def __init__(self, path: Path, identity: dict[str, Any], writes: bool = True) -> None:
        """`identity` is all that the samples depend on, as JSON. Of the ranks of one model all read the file, and one
        `writes` it. Raises UserError where its identity differs, or where another process writes it."""
        self.path = path
        self.samples: dict[Key, Sample] = {}
        self.sampled_at = datetime.now().astimezone().isoformat(timespec="seconds")
        self.file: TextIO = open_in_place(path if writes else Path(os.devnull))
        try:
            if writes:  # closing the file, or the end of the process, unlocks it
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is writing it; use another exp_name or samples_dir") from error
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith(b"\n")]  # the last one's writer may have been killed
        if len(lines) < 2:
            lines = []  # no sample yet
        for line in lines:
            self._read(json.loads(line), identity)
        if writes:
            self.file.truncate(sum(map(len, lines)))
        if not lines:
            self._write({"sampled_at": self.sampled_at, "identity": identity})

    def _read(self, line: dict[str, Any], identity: dict[str, Any]) -> None:
        if "key" in line:
            self.samples[tuple(line["key"])] = Sample(line["text"], line["ids"], line["finish_reason"])
            return
        self.sampled_at, known = line["sampled_at"], line["identity"]
        if known != identity:
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

    def _write(self, *lines: dict[str, Any]) -> None:
        self.file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.file.flush()


@contextmanager
def sample_log(path: Path, identity: dict[str, Any], writes: bool = True) -> Iterator[SampleLog]:
    """The log beside `path`, which is removed when all went well. Raises UserError where another process writes it."""
    partial = path.with_name(f"{path.name}.partial.jsonl")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        log = SampleLog(partial, identity, writes)
    except OSError as error:
        raise UserError(f"cannot write to {partial.parent} ({error}); samples_dir= names another place") from error
    with log.file:
        yield log
    if writes:
        partial.unlink()


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
                asked = [next_turn(conversations[i, draw]) for i in own]
                temperatures = [conversations[i, draw].temperature for i in own]
                requests += backend.requests(asked, temperatures, draw)
                keys += [(i, draw, turn) for i in own]
            missing = [place for place, key in enumerate(keys) if key not in log.samples]
            for done in backend.complete([requests[place] for place in missing], settings):
                log.add({keys[missing[place]]: sample for place, sample in done.items()})
                advance(len(log.samples), None)
            for key, request in zip(keys, requests, strict=True):
                conversations[key[:2]].requests.append(request)
                conversations[key[:2]].answers.append(log.samples[key])
    return list(conversations.values())


def next_turn(conversation: Conversation) -> dict[str, Any]:
    """The record whose prompt is the conversation so far with the user's next turn."""
    record, answers = conversation.record, conversation.answers
    if not answers:
        return record
    messages: list[Message] = [*record["prompt"]]
    for answer, followup in zip(answers, record["followups"]):
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": followup}]
    return {**record, "prompt": messages, "completions": [], "truncation_mode": "keep_end"}
