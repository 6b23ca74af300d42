"""Sampling completions from a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from utils import progress_bar


@dataclass(frozen=True)
class Sample:
    """A completion: its text, and its tokens with the end-of-sequence token, where it came to one."""

    text: str
    ids: list[int]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    never: Sequence[int] = (),
) -> list[Sample]:
    """One completion for each prompt (token ids), in the prompts' order, without the tokens in `never`.

    Temperature 0 is greedy.
    Prompts of similar length go together, padded on the left; every batch draws from a seed of its own, so the samples
    depend on the seed and the batch size.
    """
    device = next(model.parameters()).device
    settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    generation = GenerationConfig(
        **(settings if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        suppress_tokens=list(never) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
    )
    model.eval()
    samples: dict[int, Sample] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with progress_bar("sampling", len(prompts), 0) as advance, torch.random.fork_rng():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            input_ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
            mask = torch.zeros_like(input_ids)
            for row, i in enumerate(chosen):
                input_ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            torch.manual_seed(seed + start)
            inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
            output = cast(Any, model).generate(**inputs, generation_config=generation)
            for i, ids in zip(chosen, output[:, width:].tolist()):
                ends = [place for place, token in enumerate(ids) if token in generation.eos_token_id]
                ids = ids[: ends[0] + 1] if ends else ids
                samples[i] = Sample(str(tokenizer.decode(ids, skip_special_tokens=True)).strip(), ids)
            advance(len(samples), None)
    return [samples[i] for i in range(len(prompts))]


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and those that the model's own generation settings name."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    more = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *(token for token in more if token is not None)})
