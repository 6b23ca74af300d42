"""A few completions before and after training, for the run page: `completions.json` in the run directory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

import models
from distributed import parallel
from launch.schema import Config
from sampling.generate import Decoding, Request, Sample, sample
from training.loop import BasicTrainer
from utils import console, write_json

PROMPTS, TOKENS = 4, 128  # enough to read; on a large model that is split a token takes as long as a forward pass


def write_completions(trainer: BasicTrainer, config: Config, when: Literal["before", "after"]) -> None:
    """Add the policy's likeliest completions of some held-out prompts to the run's file, if it is a language model that
    is trained. For all ranks to call; "before" starts the file anew, where the run has nothing that it goes on from."""
    run, loader = trainer.run, trainer.loaders["eval"]
    if not trainer.trains_policy:
        return
    if when == "before" and (not config.do_first_eval or run.place):
        return
    used = loader.used()
    rows = {row["prompt"]: row for row in (loader.rows[i] for i in used[:: max(1, len(used) // PROMPTS)][:PROMPTS])}
    prompts = prompts_of(trainer, list(rows.values()), trained=when == "after")
    room = models.positions_of(trainer.policy.config) + 1 - max(map(len, prompts))  # the last token is not read
    tokens = int(min(TOKENS, config.max_new_tokens, room))
    requests = [Request(ids, temperature=0) for ids in prompts]
    with torch.compiler.set_stance("force_eager"):  # layers compiled for training are not to meet a cache of keys
        drawn = draw(trainer, trainer.policy, requests, Decoding(tokens, config.seed))
    if parallel.rank() != 0:
        return
    path = run.folder / "completions.json"
    known = known_prompts(path) if when == "after" and path.is_file() else []
    before = {json.dumps(item["messages"]): item for item in known}
    items = [
        before.get(json.dumps(messages := json.loads(row["messages"])), {"messages": messages}) | {when: own.text}
        for row, own in zip(rows.values(), drawn, strict=True)
    ]
    write_json(path, {"max_new_tokens": tokens, "prompts": items})


def known_prompts(path: Path) -> list[dict[str, Any]]:
    """What the file holds of before training; where it is damaged, nothing, and that is said."""
    try:
        found = json.loads(path.read_text())["prompts"]
        return [{"messages": item["messages"], "before": item["before"]} for item in found]
    except (OSError, ValueError, KeyError, TypeError):
        console.print(f"{path} is damaged: made again, without what came before training", style="yellow", markup=False)
        return []


def prompts_of(trainer: BasicTrainer, rows: Sequence[dict[str, Any]], *, trained: bool) -> list[list[int]]:
    """The token ids of rows' prompts, for a `trained` policy with its first control token, if any."""
    return [[*row["prompt_ids"], *control_ids(trainer)[: int(trained)]] for row in rows]


def draw(
    trainer: BasicTrainer, policy: PreTrainedModel, requests: Sequence[Request], decoding: Decoding
) -> list[Sample]:
    """Completions of a policy, the trained one or that it started from. It never writes a control token."""
    size, never = trainer.config.model.eval_batch_size, control_ids(trainer) if policy is trainer.policy else ()
    return sample(policy, trainer.tokenizer, requests, decoding, batch_size=size, never=never)


def control_ids(trainer: BasicTrainer) -> list[int]:
    return [trainer.tokenizer.encode(token, add_special_tokens=False)[0] for token in trainer.control_tokens]
