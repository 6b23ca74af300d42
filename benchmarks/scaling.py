"""What grows with what: time and memory of a step as the data set or the vocabulary grows, and the start of a run.

    python benchmarks/scaling.py data           2,000 and 20,000 pairs, 20 steps of 16 with the built-in model
    python benchmarks/scaling.py vocabulary     32,768 and 262,144 words, the same completion tokens
    python benchmarks/scaling.py startup        experiment=quickstart, from the start of its process to its first step

On one thread of the CPU, but for `startup`, which is the command as it is. Runs of `data` and `startup` each have a
process to themselves.
"""

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from throughput import REPO, SHAPES, Done, Watch, assemble, write_lines

STEPS, BATCH, TURNS = 20, 16, 3


def child(*words: str) -> dict[str, Any]:
    """What this file finds, with those arguments, in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def tell(found: dict[str, Any]) -> None:
    print("\n" + json.dumps(found), flush=True)


# ---------------------------------------------------------------------------------------------------- the data set


def data() -> None:
    print("| pairs | CPU ms a step | ms a pair to load | MB at the first step | MB at the last | most so far |")
    print("|---|---|---|---|---|---|")
    turns: dict[int, list[dict[str, Any]]] = {2_000: [], 20_000: []}
    for _ in range(TURNS):
        for count, found in turns.items():
            found.append(child("train", "--count", str(count)))
    for count, found in turns.items():
        cells = [statistics.median(run[key] for run in found) for key in ("step", "load", "first", "last", "peak")]
        print(f"| {count:,} | {cells[0]:.0f} | {cells[1]:.2f} | {' | '.join(f'{cell:,.0f}' for cell in cells[2:])} |")


def train(count: int) -> None:
    """DPO of the built-in model on the first 320 of so many pairs of random words."""
    import dataloader

    draw = random.Random(0)
    words = [f"{word} " for word in ("table", "salt", "mouse", "tall", "roof", "skirt", "small", "clean")]

    def text(tokens: int) -> str:
        return "".join(draw.choices(words, k=tokens)).strip()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        write_lines(file, [{"prompt": text(30), "chosen": text(20), "rejected": text(20)} for _ in range(count)])
        started = time.process_time()
        loaded: list[float] = []
        load = dataloader.load_tokens

        def timed_load(*positional: Any, **named: Any) -> Any:
            tokens = load(*positional, **named)
            loaded.append(time.process_time() - started)
            return tokens

        dataloader.load_tokens = timed_load
        given = ["loss=dpo", "model=tiny", f"datasets=[{file}]", f"cache_dir={folder}", "do_first_eval=false"]
        given += [
            f"model.batch_size={BATCH}",
            f"n_examples={BATCH * (STEPS + 1)}",
            "held_out=0.01",
            "n_eval_examples=2",
        ]
        trainer = assemble(given)
        watch = Watch(STEPS, "cpu")
        resident: list[float] = []
        trainer.schedule.step = lambda: resident.append(memory("RssAnon"))
        with contextlib.suppress(Done):
            trainer.train()
        found = {"step": 1000 * watch.read()["cpu"] / STEPS, "load": 1000 * loaded[0] / count}
        tell({**found, "first": resident[0], "last": resident[-1], "peak": memory("VmHWM")})


def memory(name: str) -> float:
    """MB of this process: its own now, without what is mapped from files (RssAnon), or all at most so far (VmHWM)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


# ---------------------------------------------------------------------------------------------------- the vocabulary


def vocabulary() -> None:
    """The parts of a step, taking turns, at each size of vocabulary."""
    import torch
    from scoring import median_times, ragged_pairs
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from data import batch as batches
    from modeling.head import token_statistics
    from models import final_hidden_states

    torch.set_num_threads(1)
    torch.manual_seed(0)
    records = ragged_pairs(8, 100, 100)
    batch = batches.collate(records, "shared_prefix", pad_id=0, eos_id=2)
    ways: dict[str, Callable[[], object]] = {}
    for words in (32_768, 262_144):
        config = Gemma2Config(**{**SHAPES["cpu"], "vocab_size": words, "attn_implementation": "segments"})
        model = Gemma2ForCausalLM(config)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def layers(model: Any = model) -> None:
            model.zero_grad(set_to_none=True)
            final_hidden_states(model, batch).sum().backward()

        def head(model: Any = model) -> None:
            model.zero_grad(set_to_none=True)
            hidden = torch.ones(len(batch.target), model.config.hidden_size, requires_grad=True)
            token_statistics(hidden, batch.target, model.lm_head, 30.0)[0].sum().backward()

        ways |= {f"{words:,} layers": layers, f"{words:,} head": head, f"{words:,} optimiser": optimiser.step}
    times = median_times(ways, TURNS)
    print(f"{batch.input_ids.numel():,} positions, {len(batch.target):,} completion tokens; CPU ms\n")
    print("| words | embedding and layers | head | optimiser |\n|---|---|---|---|")
    for label in ("32,768", "262,144"):
        cells = [f"{times[f'{label} {part}']:,.0f}" for part in ("layers", "head", "optimiser")]
        print(f"| {label} | {' | '.join(cells)} |")


# ---------------------------------------------------------------------------------------------------- the start


def startup() -> None:
    print("| | seconds | CPU seconds |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, list[str]] = {
            "nothing cached": [],
            "the caches of an earlier run": [],
            "the same, without the first evaluation": ["do_first_eval=false"],
        }
        for number, (name, options) in enumerate(cases.items()):
            turns = []
            for turn in range(TURNS):
                fresh = Path(folder) / str(turn) if number == 0 else Path(folder) / "0"
                turns.append(first_step(*options, f"cache_dir={fresh}", f"exp_name=start{number}-{turn}"))
            seconds, cpu = map(statistics.median, zip(*turns))
            print(f"| {name} | {seconds:.1f} | {cpu:.1f} |", flush=True)


def first_step(*options: str) -> tuple[float, float]:
    """Seconds, and CPU seconds of all threads, from starting the command to the line that its first step logs."""
    command = [sys.executable, "train.py", "experiment=quickstart", *options]
    folder, name = (word.partition("=")[2] for word in options[-2:])
    lines = Path(folder) / name / "metrics.jsonl"
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    while not (lines.is_file() and "loss/train" in lines.read_text()):
        if process.poll() is not None:
            sys.exit(f"{' '.join(command)} ended before its first step")
        time.sleep(0.01)
    seconds = time.monotonic() - started
    process.kill()
    usage = os.wait4(process.pid, 0)[2]
    return seconds, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "vocabulary", "startup", "train"))
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(arguments.count)
    else:
        {"data": data, "vocabulary": vocabulary, "startup": startup}[arguments.what]()
