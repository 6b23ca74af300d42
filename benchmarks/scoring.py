"""What scoring a batch and its backward pass cost: the layouts, and the vocabulary projection against other ways.

    python benchmarks/scoring.py layouts        python benchmarks/scoring.py projection

On random weights of Gemma 2's shape (12.3 M parameters, 32,768 words), in fp32 on one core. CPU seconds of the process,
medians of runs that take turns, since other work on the machine then meets all alike.
"""

import argparse
import importlib
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from data.batch import BATCH_LAYOUTS, Batch, collate
from distributed import parallel
from modeling import head
from models import score

WORDS, WIDTH = 32_768, 256
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


def median_times(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU milliseconds of each way, taking turns, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if turn:
                times[name].append(time.process_time() - started)
    return {name: 1000 * statistics.median(own) for name, own in times.items()}


def ragged_pairs(count: int, prompt: int, completion: int) -> list[dict]:
    """Pairs whose lengths are drawn evenly from half to one and a half times the ones given."""
    draw = random.Random(0)

    def tokens(mean: int) -> list[int]:
        return [draw.randrange(3, WORDS) for _ in range(draw.randint(mean // 2, mean * 3 // 2))]

    sides = [(tokens(prompt), tokens(completion), tokens(completion)) for _ in range(count)]
    return [{"prompt_ids": p, "completion_ids": [a, b], "index": i} for i, (p, a, b) in enumerate(sides)]


def seen_pairs(batch: Batch) -> int:
    """Query-key pairs that attention computes a layer: whole rows where padded, whole segments otherwise."""
    if batch.segments is None:
        return batch.input_ids.shape[0] * batch.input_ids.shape[1] ** 2
    lengths = [length for length, _ in batch.segments]
    return sum(n * (n + (lengths[prompt] if prompt is not None else 0)) for n, prompt in batch.segments)


def layouts() -> None:
    """Score and backward pass of 8 pairs, by layout, at several lengths of prompt and completion."""
    torch.manual_seed(0)
    gemma = {name: Gemma2ForCausalLM(Gemma2Config(**SHAPE, attn_implementation=name)) for name in ("eager", "segments")}
    llama = {name: LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=name)) for name in ("sdpa", "segments")}
    for prompt, completion in ((100, 100), (300, 100), (100, 300)):
        records = ragged_pairs(8, prompt, completion)
        compare_layouts("Gemma 2", gemma["eager"], gemma["segments"], records)
        compare_layouts("Llama", llama["sdpa"], llama["segments"], records)


def compare_layouts(name: str, padded: PreTrainedModel, packed: PreTrainedModel, records: list[dict]) -> None:
    batches = {layout: collate(records, layout, pad_id=0, eos_id=2) for layout in BATCH_LAYOUTS}

    def step(layout: str) -> None:
        model = padded if layout == "padded" else packed
        model.zero_grad()
        score(model, batches[layout]).logps.sum().backward()

    times = median_times({layout: partial(step, layout) for layout in BATCH_LAYOUTS}, 3)
    prompts, tokens = (sum(len(record["prompt_ids"]) for record in records), len(batches["padded"].target))
    print(f"{name}, {len(records)} pairs, {prompts:,} tokens of prompts and {tokens:,} of completions")
    for layout in BATCH_LAYOUTS:
        cells = batches[layout].input_ids.numel(), seen_pairs(batches[layout]), times[layout]
        print("  {:14} {:7,} positions {:11,} query-key pairs {:8,.0f} ms".format(layout, *cells), flush=True)


Way = Callable[[], Tensor]  # log-probabilities [N] of some tokens


def projections(
    hidden: Tensor, own_head: nn.Linear, target: Tensor, softcap: float | None, rows: Sequence[int]
) -> dict[str, Way | None]:
    """The ways to log p(target) [N] from final hidden states [N, D], by name; None for one that is not here. `rows` are
    the numbers of tokens at a time that are tried."""

    def plain(x: Tensor, y: Tensor) -> Tensor:
        logits = own_head(x).float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits.gather(1, y.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)

    def checkpointed(count: int) -> Tensor:
        parts = zip(hidden.split(count), target.split(count))
        return torch.cat([checkpoint(plain, x, y, use_reentrant=False) for x, y in parts])

    def ours(count: int, passes: head.Passes = head.EAGER) -> Tensor:
        head.use_passes(own_head, passes)
        with mock.patch.object(head, "chunk_rows", lambda *_: count):
            return head.token_statistics(hidden, target, own_head, softcap)[0]

    ways: dict[str, Way | None] = {"autograd, whole": partial(plain, hidden, target)}
    ways |= {f"autograd, checkpointed, {count} at a time": partial(checkpointed, count) for count in rows}
    ways |= {f"head.py, {count} at a time": partial(ours, count) for count in rows}
    ways |= {f"head.py, compiled, {n} at a time": lambda n=n: ours(n, head.compiled_passes()) for n in rows[:2]}
    return ways | of_libraries(hidden, own_head.weight, target, softcap)


def of_libraries(hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> dict[str, Way | None]:
    """Those of torch, which knows no soft-capping, of Apple and of Liger."""
    options: dict[str, Any] = {"reduction": "none"}

    def of(function: Callable[..., Tensor] | None, *inputs: Tensor, **own: Any) -> Way | None:
        return None if function is None else lambda: -function(*inputs, **options, **own)

    found: dict[str, Way | None] = {}
    if softcap is None:
        torchs = getattr(F, "linear_cross_entropy", None)  # new in torch 2.13
        chunked = torchs and getattr(nn, "LinearCrossEntropyOptions")()  # noqa: B009  (mypy reads any torch)
        found["F.linear_cross_entropy"] = of(torchs, hidden, weight, target)
        found["F.linear_cross_entropy, chunked"] = of(torchs, hidden, weight, target, options=chunked)
    apples = imported("cut_cross_entropy", "linear_cross_entropy")
    for name, least in (("cut-cross-entropy", "high"), ("cut-cross-entropy, no gradient left out", None)):
        found[name] = of(apples, hidden, weight, target, softcap=softcap, filter_eps=least)
    ligers = imported("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    loss = ligers and ligers(softcap=softcap, accum_dtype=torch.float32, **options)
    found["Liger"] = loss and (lambda: -loss(weight, hidden, target))
    return found


def imported(module: str, name: str) -> Any:
    """A thing of a library; None where the library is not installed."""
    return getattr(importlib.import_module(module), name) if importlib.util.find_spec(module.split(".")[0]) else None


def projection() -> None:
    """Log-probabilities of 512 tokens and their gradients, by the ways there are."""
    for softcap in (30.0, None):
        compare_projections(softcap)


def compare_projections(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(512, WIDTH, requires_grad=True)
    own_head = nn.Linear(WIDTH, WORDS, bias=False)
    target, weights = torch.randint(WORDS, (512,)), torch.randn(512)

    def backward(way: Way) -> None:
        hidden.grad = own_head.weight.grad = None
        (way() * weights).sum().backward()

    found = projections(hidden, own_head, target, softcap, (512, 128, 32))
    ways = {name: partial(backward, way) for name, way in found.items() if way}
    print(f"512 tokens, {WORDS:,} words, width {WIDTH}, soft-capping {softcap}")
    for name, milliseconds in median_times(ways, 3).items():
        print(f"  {name:44} {milliseconds:8,.0f} ms", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layouts", "projection"))
    torch.set_num_threads(1)
    parallel.keep_freed_memory()  # as a run does
    {"layouts": layouts, "projection": projection}[parser.parse_args().what]()
