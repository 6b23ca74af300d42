"""Sampling completions from a model.

Each completion draws from random numbers of its own, a function of the seed, its prompt and its number among the
prompt's draws: it does not depend on what else is in the batch. So neither the batch size, nor a stop in between, nor
more prompts change it, as far as the model's own numbers are the same in another batch (in float32 they are, up to
rounding; in bfloat16 near ties may fall the other way).
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from distributed import parallel
from distributed.parallel import gather_objects
from distributed.sharding import gathered
from utils import Message, UserError, fingerprint, progress_bar


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn. Each request has its own temperature."""

    max_new_tokens: int
    seed: int
    top_p: float = 1.0  # only the likeliest tokens, of this much probability together
    top_k: int = 0  # only so many of the likeliest tokens; 0: all
    stop: tuple[str, ...] = ()  # a completion ends before the first of these


@dataclass(frozen=True)
class Request:
    """One completion to be drawn."""

    prompt_ids: Sequence[int]
    temperature: float  # 0: the likeliest token each time
    draw: int = 0  # its number among the completions of this prompt
    prompt: str = ""  # the same as text, not cut, and
    messages: Sequence[Message] = ()  # as a conversation: for servers

    def seed(self, seed: int) -> int:
        """64 bits that no other draw, prompt or seed of the run has."""
        return int(fingerprint(seed, self.draw, list(self.prompt_ids), self.prompt), 16)


@dataclass(frozen=True)
class Sample:
    """A completion."""

    text: str
    ids: list[int]  # with the token that ended it, where it came to one; empty from a server
    finish_reason: Literal["stop", "length"]  # length: cut at max_new_tokens


class DrawTokens(LogitsProcessor):
    """Leaves one token possible in each row: drawn with the row's own uniform number of this step, or the likeliest."""

    def __init__(self, requests: Sequence[Request], settings: Decoding, width: int, device: torch.device) -> None:
        self.width = width
        self.temperature = torch.tensor([[request.temperature] for request in requests], device=device)  # [R, 1]
        numbers = [np.random.default_rng(r.seed(settings.seed)).random(settings.max_new_tokens) for r in requests]
        self.uniform = torch.tensor(np.stack(numbers), device=device)  # [R, max_new_tokens]
        self.warpers: list[LogitsProcessor] = [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        self.warpers += [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [R, V], all but the drawn token's -inf. Raises UserError where they are not numbers."""
        step = input_ids.shape[1] - self.width
        greedy = self.temperature == 0
        warped = scores.float() / self.temperature.masked_fill(greedy, 1)
        for warper in self.warpers:
            warped = warper(input_ids, warped)
        below = warped.softmax(1, dtype=torch.float64).cumsum(1)  # the distribution function over the vocabulary
        if below[:, -1].isnan().any():
            raise UserError(
                "the model's scores are not numbers (NaN): its weights, or model.policy_dtype, are at fault"
            )
        drawn = torch.searchsorted(below, self.uniform[:, step : step + 1] * below[:, -1:], right=True)
        token = torch.where(greedy, scores.argmax(1, keepdim=True), drawn)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def sample(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    settings: Decoding,
    *,
    batch_size: int,
    never: Sequence[int] = (),
) -> list[Sample]:
    """A completion for each request, in order, without the tokens in `never`."""
    samples: dict[int, Sample] = {}
    with progress_bar("sampling", len(requests), 0) as advance:
        for batch in sample_batches(model, tokenizer, requests, settings, batch_size=batch_size, never=never):
            samples |= batch
            advance(len(samples), None)
    return [samples[i] for i in range(len(requests))]


@torch.no_grad()
def sample_batches(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    settings: Decoding,
    *,
    batch_size: int,
    never: Sequence[int] = (),
) -> Iterator[dict[int, Sample]]:
    """The completions by the place of their request, a batch at a time.

    Prompts of similar length go together, padded on the left. The ranks of a split model each draw some of the batches,
    and give each other the completions: on their own where each can hold all of the model, else step by step together.
    Nothing but the settings decides: what the model's own
    generation_config.json says of temperatures, penalties and the like is not used, only its end tokens.
    """
    ends = end_tokens(model, tokenizer)
    generation = GenerationConfig(
        do_sample=False,  # DrawTokens draws
        max_new_tokens=settings.max_new_tokens,
        suppress_tokens=list(never) or None,
        stop_strings=list(settings.stop) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
    )
    model.eval()
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        is_split = isinstance(model, FSDPModule)
        rank, ranks = (parallel.rank(), parallel.world_size()) if is_split else (0, 1)
        with gathered(model) if is_split else nullcontext(True) as on_its_own:
            for first in range(0, len(batches), ranks):
                at_once = batches[first : first + ranks]
                own = at_once[rank] if rank < len(at_once) else []
                found: dict[int, Sample] = {}
                if own or not on_its_own:  # a rank without a batch goes along with the others
                    inputs = [requests[i] for i in own or at_once[0]]
                    drawn = draw_batch(model, tokenizer, inputs, settings, generation, synced_gpus=not on_its_own)
                    found = dict(zip(own, drawn))
                yield {i: one for part in (gather_objects(found) if is_split else [found]) for i, one in part.items()}
    finally:
        model.generation_config = kept


def draw_batch(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    settings: Decoding,
    generation: GenerationConfig,
    *,
    synced_gpus: bool,
) -> list[Sample]:
    """The completions of one batch. `synced_gpus`: go on until those of all ranks are complete."""
    input_ids, mask = left_padded([r.prompt_ids for r in requests], tokenizer.pad_token_id, model.device)
    width = input_ids.shape[1]
    draw = DrawTokens(requests, settings, width, model.device)
    output = cast(Any, model).generate(
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=generation,
        logits_processor=LogitsProcessorList([draw]),
        synced_gpus=synced_gpus,
        **({"tokenizer": tokenizer} if settings.stop else {}),
    )
    ends: Any = generation.eos_token_id
    return [finished(ids, tokenizer, ends, settings) for ids in output[:, width:].tolist()]


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [R, T] and their mask [R, T]."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return input_ids.to(device), mask.to(device)


def finished(ids: list[int], tokenizer: Tokenizer, ends: Sequence[int], settings: Decoding) -> Sample:
    """A row of generated tokens, cut at its end token or stop string."""
    stops = [place for place, token in enumerate(ids) if token in ends]
    ids = ids[: stops[0] + 1] if stops else ids
    stopped = holds_stop(tokenizer, ids, settings.stop)
    if stopped:  # what follows it is padding
        ids = next(ids[:n] for n in range(1, len(ids) + 1) if holds_stop(tokenizer, ids[:n], settings.stop))
    text, is_plain = before_stop(str(tokenizer.decode(ids, skip_special_tokens=True)), settings.stop)
    if stopped and not is_plain:  # the stop string has special tokens in it
        before, _ = before_stop(str(tokenizer.decode(ids, skip_special_tokens=False)), settings.stop)
        text = re.sub("|".join(map(re.escape, tokenizer.all_special_tokens)), "", before)
    return Sample(text.strip(), ids, "stop" if stops or stopped else "length")


def holds_stop(tokenizer: Tokenizer, ids: list[int], stop: Sequence[str]) -> bool:
    """Whether the text of these tokens, with or without special ones, has a stop string in it."""
    return any(before_stop(str(tokenizer.decode(ids, skip_special_tokens=skip)), stop)[1] for skip in (True, False))


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there was one."""
    places = [text.find(word) for word in stop if word in text]
    return (text[: min(places)], True) if places else (text, False)


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and those that the model's own generation settings name."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    more = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *(token for token in more if token is not None)})
