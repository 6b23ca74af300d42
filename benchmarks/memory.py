"""Peak memory of a training run by loss, at a large vocabulary.

    python benchmarks/memory.py          a minute or two on 2 cores; writes docs/memory.md
    python benchmarks/memory.py tensors  the bytes of the tensors alone, in steps of throughput.py, at the lengths of hh

The model is random, of Gemma 2's architecture, with 65,536 words and width 256, so that logits are what memory could go
to: those of one batch, whole, would take the size that the last column says, for TDPO twice (policy and reference).
With `tensors` it is that of throughput.py, and no library or allocator adds to what is counted.
"""

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from throughput import Done, assemble, child, overrides
from torch.profiler import ProfilerActivity, profile

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

VOCABULARY, WIDTH, LATENTS = 65_536, 256, 4_096
LOSSES = ("sft", "simpo", "dpo", "fpo", "tdpo1", "tdpo2")
PAGE = REPO / "docs" / "memory.md"
HEAD = f"""# Peak memory by loss

Made by `python benchmarks/memory.py`: two optimiser steps of 16 pairs of about 100 + 200 + 200 tokens on a random model
of Gemma 2's architecture with {VOCABULARY:,} words, in fp32 on the CPU. *Peak* is the largest resident set of the whole
process, libraries included; *over `simpo`* is what the loss takes beyond that paired loss without a reference. `tdpo1`
and `tdpo2` hold a second model of {{model}} MB, and no loss holds the logits of a whole batch ({{logits}} MB; a TDPO
that did would hold two).
"""


def build(folder: Path) -> int:
    """Write the model, its tokenizer, an SAE and the data; gives the completion tokens of a batch."""
    import shutil

    from transformers import Gemma2Config, Gemma2ForCausalLM

    from autoencoders.formats import save_sae
    from sae import SAE

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPO / "assets/tiny" / name, folder / "model")
    wide = torch.randn(WIDTH, LATENTS)
    zeros = torch.zeros(LATENTS)
    save_sae(SAE(wide, zeros, wide.T.contiguous(), torch.zeros(WIDTH), zeros + 16), folder / "params.npz")
    words = {side: " ".join(["table"] * count) for side, count in (("prompt", 100), ("chosen", 199), ("rejected", 199))}
    rows = [{**words, "prompt": f"{number} {words['prompt']}"} for number in range(32)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 16 * 2 * 200


def peak(folder: Path, loss: str) -> float:
    """Peak resident memory of one run, in MB."""
    command = [sys.executable, "train.py", f"loss={loss}", "model=tiny", f"model.name_or_path={folder}/model"]
    command += [f"datasets=[{folder}/pairs.jsonl]", f"eval_datasets=[{folder}/pairs.jsonl]", f"cache_dir={folder}/out"]
    command += ["model.batch_size=16", "model.eval_batch_size=4", "n_eval_examples=4", f"exp_name={loss}"]
    command += ["sae=tiny", f"sae.path={folder}/params.npz"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads((folder / "out" / loss / "summary.json").read_text())["peak_rss_mb"]


# ---------------------------------------------------------------------------------------------------- tensors alone

STEPS = 4  # measured; the one before makes the optimiser's tensors


def tensors() -> None:
    given: dict[str, Any] = {"device": "cpu", "batch": 8, "steps": STEPS, "threads": 1, "lengths": "hh", "model": None}
    given |= {"size": "cpu", "accumulation": 1, "compile": False}
    print("| `loss=` | peak of the tensors, MB | over `simpo` |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        child(Path(name), given)
        first = 0.0  # simpo's
        for loss in ("simpo", "dpo", "fpo", "tdpo2"):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                most = process.submit(peak_of_tensors, Path(name), given, loss).result() / 2**20
            first = first or most
            print(f"| `{loss}` | {most:,.1f} | {most / first - 1:+.1%} |", flush=True)


def peak_of_tensors(folder: Path, given: dict[str, Any], loss: str) -> float:
    """Bytes: what is alive before a step, and what the profiler sees come and go in it."""
    trainer = assemble(overrides(folder, {**given, "out": f"{folder}/{loss}"}, loss, "shared_prefix"))
    update, peaks = trainer.update, []

    def measured(step: int, *others: Any) -> None:
        gc.collect()
        alive = {id(t.untyped_storage()): t.untyped_storage() for t in gc.get_objects() if isinstance(t, torch.Tensor)}
        before = sum({storage.data_ptr(): storage.nbytes() for storage in alive.values()}.values())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            update(step, *others)
        events = profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        now = most = 0
        for _, change in changes:
            now += change
            most = max(most, now)
        peaks.append(before + most)
        if len(peaks) > STEPS:
            raise Done

    trainer.update = measured
    with contextlib.suppress(Done):
        trainer.train()
    return max(peaks[1:])


def main() -> None:
    if sys.argv[1:] == ["tensors"]:
        tensors()
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = build(folder)
        model = (folder / "model" / "model.safetensors").stat().st_size / 2**20
        peaks = {loss: peak(folder, loss) for loss in LOSSES}
    head = HEAD.format(model=f"{model:,.0f}", logits=f"{tokens * VOCABULARY * 4 / 2**20:,.0f}")
    rows = [f"| `{loss}` | {mb:,.0f} | {mb - peaks['simpo']:+,.0f} |" for loss, mb in peaks.items()]
    table = ["| `loss=` | peak, MB | over `simpo`, MB |", "|---|---|---|", *rows]
    print("\n".join(table))
    PAGE.write_text(head + "\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
