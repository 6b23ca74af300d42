"""Training speed and memory beside TRL's trainers: the same tokens, weights, optimiser and precision.

    python benchmarks/throughput.py                          every contender, at the lengths of real data
    python benchmarks/throughput.py --lengths 300:100        prompts of 150 to 450 tokens, completions of 50 to 150
    python benchmarks/throughput.py --only 'dpo *' 'trl dpo *' --steps 4 --rounds 3
    python benchmarks/throughput.py --model models/smollm2   a real model on its text, by its chat template
    python benchmarks/throughput.py --device cuda            Gemma-2-2B's shape in bfloat16 (not run so far: no GPU)

Each run is a process of its own, and the contenders take turns, round by round. The model has random weights: on the
CPU Gemma 2's shape with 12.3 M parameters and 32,768 words, in fp32 on one thread. A step ends with the optimiser's;
the first does not count. What is printed of each contender is the median over the rounds.

TRL runs without what slows it down (gradient checkpointing, which is on there by default; logging of each step), and
with what makes it fast: the fused optimiser, and, where the line says so, the reference computed in advance and, on the
CPU, its completion-only head, which TRL keeps for GPUs ("head forced"). What it does not have, it does not run:
`padding_free` of DPO is off since a refactor, KTO has none, and SFT's needs flash attention.

Lengths come from data (`alpaca`, `hh`: words and punctuation marks of $FPO_DATA) or are drawn evenly from half to
one and a half times the ones given (`PROMPT:COMPLETION`). `log-normal` is drawn with alpaca's means and spreads,
`ultrafeedback` with means of 180, 300 and 300 tokens, for where those are absent. The text is random words of the
built-in tokenizer, each one token. `--model` names a directory in the Hub's format instead, which reads the text of
that data itself.
"""

import argparse
import fnmatch
import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

# This process imports no torch: a child would start with its memory as its own peak (Linux's ru_maxrss).
DATA = Path(os.environ.get("FPO_DATA", "."))  # whole files of real data: CONTRIBUTING.md
PAIRED, UNPAIRED = ("dpo", "simpo", "fpo", "tdpo2"), ("kto", "sft")
LAYOUTS, SIDES = ("shared_prefix", "packed", "padded"), ("chosen", "rejected")
BASE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
OPTIMISER = {"lr": 1e-4, "max_grad_norm": 1.0}


@dataclass(frozen=True)
class Size:
    """Of the model: keys of Gemma2Config. Of the SAE: its latents, and the layer that it reads."""

    shape: dict[str, Any]
    latents: int
    layer: int


# Encoding a completion token takes 2 * width * latents operations: of what the model takes for it, forward and
# backward, 0.4 to 0.6 % on both devices. Gemma Scope has 16,384 latents for Gemma-2-2B.
SIZES = {
    "cpu": Size(
        {
            "vocab_size": 32_768,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
        },
        latents=1024,
        layer=2,
    ),
    "cuda": Size(  # what transformers' defaults have of Gemma-2-2B is not here
        {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "vocab_size": 256_000},
        latents=16_384,
        layer=12,
    ),
    "smallest": Size(  # of which a figure means nothing
        {
            "vocab_size": 1024,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        latents=64,
        layer=1,
    ),
}


@dataclass(frozen=True)
class Contender:
    """What is run: `loss` by this repo in a layout, or by TRL with a reference, and its head forced or as shipped."""

    loss: str
    layout: str | None = None  # None: TRL's
    reference: str | None = None  # "live" or "precomputed"
    forced: bool = False
    attention: str | None = None  # TRL's, where there is a choice

    @property
    def name(self) -> str:
        if self.layout:
            return f"{self.loss} {self.layout}"
        words = (self.reference, self.attention, "head forced" if self.forced else None)
        return f"trl {self.loss} " + (", ".join(filter(None, words)) or "as shipped")


def contenders(device: str) -> list[Contender]:
    found = [Contender(loss, layout) for loss in PAIRED for layout in LAYOUTS]
    found += [Contender(loss, layout) for loss in UNPAIRED for layout in LAYOUTS[1:]]  # no prompt is shared
    heads = (False, True) if device == "cpu" else (False,)
    attentions: tuple[str | None, ...] = (None,) if device == "cpu" else ("eager", "flex_attention")
    if device == "cuda" and importlib.util.find_spec("flash_attn"):
        attentions += ("flash_attention_2",)
    for loss in ("dpo", "kto", "sft"):
        for reference in (None,) if loss == "sft" else ("live", "precomputed"):
            found += [Contender(loss, None, reference, forced, own) for forced in heads for own in attentions]
    return found


# ---------------------------------------------------------------------------------------------------- lengths


Pair = tuple[list[dict[str, str]], str, str]  # the turns of the prompt, chosen and rejected completion

# The mean and the spread of the logarithm, of a prompt and both completions. UltraFeedback's have means of about 180,
# 300 and 300 tokens.
SPREADS = {
    "log-normal": ((3.2, 0.8), (5.9, 0.8), (5.4, 1.0)),
    "ultrafeedback": ((4.69, 1.0), (5.46, 0.7), (5.46, 0.7)),
}
LONGEST = 1024  # tokens that are drawn for a prompt or a completion


def lengths(kind: str, count: int) -> list[tuple[int, int, int]]:
    """Tokens of the prompts, chosen and rejected completions of some pairs."""
    draw = random.Random(0)
    if ":" in kind:
        prompt, completion = map(int, kind.split(":"))

        def ragged(mean: int) -> int:
            return draw.randint(mean // 2, mean * 3 // 2)

        return [(ragged(prompt), ragged(completion), ragged(completion)) for _ in range(count)]
    if kind in SPREADS:
        drawn = ([round(draw.lognormvariate(*own)) for own in SPREADS[kind]] for _ in range(count))
        return [tuple(min(max(1, tokens), LONGEST) for tokens in own) for own in drawn]  # type: ignore[misc]
    header = 2 if kind == "hh" else 0  # HH writes "Human:" or "Assistant:" before a turn
    return [
        (
            sum(header + tokens_in(turn["content"]) for turn in prompt),
            header + tokens_in(chosen),
            header + tokens_in(rejected),
        )
        for prompt, chosen, rejected in real_pairs(kind, count)
    ]


def real_pairs(kind: str, count: int) -> list[Pair]:
    """Some pairs of a file of real data."""
    files = {"alpaca": DATA / "alpaca_eval/preferences_train.jsonl.gz", "hh": DATA / "hh/harmless-base/test.jsonl.gz"}
    if kind not in files or not files[kind].is_file():
        sys.exit(f"--lengths {kind}: no real data" if kind not in files else f"there is no {files[kind]}")
    with gzip.open(files[kind], "rt") as file:
        rows = [json.loads(line) for line in file]
    return [texts(row) for row in random.Random(0).sample(rows, count)]


def texts(row: dict[str, str]) -> Pair:
    """HH has the whole dialogue on both sides."""
    if "prompt" in row:
        return [{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"]
    roles = {"Human": "user", "Assistant": "assistant"}
    chosen, rejected = (re.split(r"\n\n(Human|Assistant):", row[side])[1:] for side in SIDES)
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(chosen[:-2:2], chosen[1:-2:2])]
    return turns, chosen[-1].strip(), rejected[-1].strip()


def tokens_in(text: str) -> int:
    return max(1, len(re.findall(r"\w+|[^\w\s]", text)))


# ---------------------------------------------------------------------------------------------------- one run


def build(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Write the model, its tokenizer, an SAE and the data."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

    from autoencoders.formats import save_sae
    from modeling.head import chunk_rows
    from sae import SAE
    from training import throughput

    torch.manual_seed(0)
    size = SIZES[arguments["size"]]
    device, kind, count = arguments["device"], arguments["lengths"], arguments["batch"] * (arguments["steps"] + 1)
    if arguments["model"]:
        (folder / "model").symlink_to(Path(arguments["model"]).resolve(strict=True))
        pairs = real_pairs(kind, count)
    else:
        with torch.device(device):  # a GPU draws the weights in no time
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            model = AutoModelForCausalLM.from_config(Gemma2Config(**BASE, **size.shape), dtype=dtype)
        model.save_pretrained(folder / "model")
        del model
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(REPO / "assets/tiny" / name, folder / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        words = [word[1:] for word in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{3,}", word)]
        draw, pairs = random.Random(1), []
        for own in lengths(kind, count):
            prompt, chosen, rejected = (" ".join(draw.choices(words, k=tokens)) for tokens in own)
            pairs.append(([{"role": "user", "content": prompt}], chosen, rejected))
    shape = json.loads((folder / "model/config.json").read_text())
    wide = torch.randn(shape["hidden_size"], size.latents).div_(shape["hidden_size"] ** 0.5)
    zeros = torch.zeros(size.latents)
    # of the tapped stream, whose numbers here are of the order of 1: a few in a hundred latents are active
    save_sae(SAE(wide, zeros, wide.T.contiguous(), torch.zeros(len(wide)), zeros + 2), folder / "params.npz")

    sides = [(turns, text, side) for turns, *both in pairs for side, text in zip(SIDES, both)]
    whole = [[*turns, {"role": "assistant", "content": text}] for turns, text, _ in sides]
    labelled = [{"prompt": turns, "completion": text, "label": side == "chosen"} for turns, text, side in sides]
    rows = [dict(zip(SIDES, both)) for both in zip(whole[::2], whole[1::2])]
    for name, records in (("dpo", rows), ("kto", labelled), ("sft", [{"messages": turns} for turns in whole])):
        write_lines(folder / f"{name}.jsonl", records)
    for loss in ("dpo", "kto", "sft"):
        write_lines(folder / f"trl_{loss}.jsonl", trl_rows(folder, arguments, loss))
    rate = throughput.peak_flops() or multiplications(device)
    rows = chunk_rows(shape["vocab_size"], torch.device(device))
    return {"rate": rate, "pairs": shapes_of(folder, arguments), "shape": shape, "chunk_rows": rows}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def tokenised(folder: Path, arguments: dict[str, Any], loss: str) -> Any:
    """The rows that our loader makes of a loss's data, in the order of the file."""
    import models
    from launch import assembly

    config, classes = checked(overrides(folder, arguments, loss, "padded"))
    return assembly.tokenise_split(config, classes, models.load_tokenizer(folder / "model"), "train").rows


def trl_rows(folder: Path, arguments: dict[str, Any], loss: str) -> list[dict[str, Any]]:
    """The same text in TRL's columns, batch by batch."""
    sides = SIDES if loss == "dpo" else ("completion",)
    rows = []
    for row in tokenised(folder, arguments, loss):
        label = {"label": row["desirable"]} if loss == "kto" else {}
        rows.append({"prompt": row["prompt"], **dict(zip(sides, row["completions"], strict=True)), **label})
    if loss != "kto":
        return rows
    # its KL takes the completion of the record before, ours of the one after: the same of a batch turned round
    size = 2 * arguments["batch"]
    return [row for start in range(0, len(rows), size) for row in rows[start : start + size][::-1]]


def shapes_of(folder: Path, arguments: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """Tokens of the prompt and of both completions, of each pair."""
    rows = tokenised(folder, arguments, "dpo")
    return [(len(row["prompt_ids"]), [len(ids) for ids in row["completion_ids"]]) for row in rows]


def multiplications(device: str) -> float:
    """Floating-point operations a second that a large matrix product reaches here."""
    import torch

    size, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.randn(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        started = time.perf_counter()
        (a @ a).sum().item()
        return time.perf_counter() - started

    return 2 * size**3 / min(seconds() for _ in range(6))


class Done(Exception):
    """The last step has been measured."""


class Watch:
    """Notes time and memory at the end of each optimiser step of whatever trains within it, and ends that after the
    last one."""

    def __init__(self, steps: int, device: str, *, profiled: bool = False) -> None:
        from torch.profiler import profile

        self.stamps: list[tuple[float, float]] = []
        self.steps, self.device = steps, device
        self.profiler = profile() if profiled else None

    def __enter__(self) -> "Watch":
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.hook = register_optimizer_step_post_hook(lambda *_: self.stamp())
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, kind: Any, *_: object) -> bool:
        self.hook.remove()
        return kind is Done

    def stamp(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.stamps.append((time.perf_counter(), time.process_time()))
        if self.profiler and len(self.stamps) == 1:
            self.profiler.start()
        if len(self.stamps) > self.steps:
            if self.profiler:
                self.profiler.stop()
            raise Done

    def read(self) -> dict[str, Any]:
        """Seconds of the measured steps, by the clock and of CPU, and of each by the clock; and the peak in MB: of a
        GPU's tensors while it watched, of the process since that began."""
        (wall, cpu), (wall_end, cpu_end) = self.stamps[0], self.stamps[-1]
        each = [end - start for (start, _), (end, _) in pairwise(self.stamps)]
        found = {"seconds": wall_end - wall, "cpu": cpu_end - cpu, "each": each, "peak": self.peak()}
        if self.profiler:
            spent = {event.key: event.self_cpu_time_total for event in self.profiler.key_averages()}
            found["shares"] = {name: time / sum(spent.values()) for name, time in spent.items()}
        return found

    def peak(self) -> float:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def overrides(folder: Path, arguments: dict[str, Any], loss: str, layout: str) -> list[str]:
    """The configuration of a run of ours, as the command line would give it."""
    data = folder / f"{loss if loss in UNPAIRED else 'dpo'}.jsonl"
    batch = arguments["batch"] * (2 if loss in UNPAIRED else 1)
    given = [f"loss={loss}", "model=tiny", f"model.name_or_path={folder}/model", f"datasets=[{data}]"]
    given += [f"eval_datasets=[{data}]", f"cache_dir={arguments['out']}", f"exp_name={loss}", "do_first_eval=false"]
    given += [f"model.batch_size={batch}", f"model.eval_batch_size={batch}", f"model.layout={layout}"]
    given += [f"model.gradient_accumulation_steps={arguments['accumulation']}", f"model.compile={arguments['compile']}"]
    given += ["model.max_length=8192", "model.max_prompt_length=4096", "n_eval_examples=2", "resume=never"]
    given += [f"lr={OPTIMISER['lr']}", f"model.max_grad_norm={OPTIMISER['max_grad_norm']}", "warmup_steps=0"]
    given += ["optimizer=AdamW", "++optimizer_options.weight_decay=0", "++optimizer_options.fused=true"]
    given += [f"model.policy_dtype={'float32' if arguments['device'] == 'cpu' else 'bfloat16'}"]
    if loss == "fpo":
        given += [
            f"sae.path={folder}/params.npz",
            f"sae.layer={SIZES[arguments['size']].layer}",
            "sae.format=gemma_scope",
        ]
    return given


def checked(given: list[str]) -> Any:
    """The configuration, and the classes that it names."""
    from hydra import compose, initialize_config_dir

    from launch import settings

    with initialize_config_dir(str(REPO / "config"), version_base=None):
        return settings.check_config(compose("config", overrides=given))


def assemble(given: list[str]) -> Any:
    """Our trainer, as train.py builds it."""
    import torch.distributed as dist

    from distributed import parallel
    from launch import assembly, settings
    from training.checkpoint import Run

    if not dist.is_initialized():
        parallel.init_process_group(0, 1, dist.HashStore())
    config, classes = checked(given)
    run = Run(Path(config.cache_dir) / config.exp_name)
    run.start(config)
    paths = settings.find_paths(config, classes.binding.needs)
    trainer = assembly.prepare(config, classes, paths, run, cached=("train",))
    trainer.start_optimizer()
    return trainer


def run_ours(folder: Path, arguments: dict[str, Any], contender: Contender) -> dict[str, Any]:
    import numpy as np

    import dataloader
    from launch import assembly

    reference = timed(assembly, "load_or_build", arguments["device"])
    # the order of the file, as TRL's
    dataloader.DataLoader._order = lambda loader, _epoch: np.arange(len(loader.rows))  # type: ignore[method-assign, assignment]
    trainer = assemble(overrides(folder, arguments, contender.loss, contender.layout or ""))
    losses: list[float] = []
    trainer.log = lambda _step, _examples, values: losses.append(values["loss/train"])
    with Watch(arguments["steps"], arguments["device"], profiled=arguments["profile"]) as watch:
        trainer.train()
    return {**watch.read(), "losses": losses, "reference": sum(reference)}


def timed(owner: Any, name: str, device: str) -> list[float]:
    """Wraps a function so that its seconds, of CPU where it runs there, are in the list that this gives."""
    function, found = getattr(owner, name), []
    clock = time.process_time if device == "cpu" else time.perf_counter

    def wrapped(*positional: Any, **named: Any) -> Any:
        started = clock()
        try:
            return function(*positional, **named)
        finally:
            found.append(clock() - started)

    setattr(owner, name, wrapped)
    return found


def run_trl(folder: Path, arguments: dict[str, Any], contender: Contender) -> dict[str, Any]:
    import torch
    import trl
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if contender.forced:
        trl.trainer.utils._use_triton = lambda device: True  # noqa: ARG005
    on_cpu, kind = arguments["device"] == "cpu", contender.loss.upper()

    capped = "attn_logit_softcapping" in json.loads((folder / "model/config.json").read_text())  # sdpa cannot do that

    def load() -> Any:
        how = {"dtype": torch.float32, "attn_implementation": contender.attention or ("eager" if capped else "sdpa")}
        return AutoModelForCausalLM.from_pretrained(folder / "model", **how)

    rows = [json.loads(line) for line in (folder / f"trl_{contender.loss}.jsonl").read_text().splitlines()]
    batch = arguments["batch"] * (1 if kind == "DPO" else 2)
    options: dict[str, Any] = {} if kind == "SFT" else {"beta": 0.1}
    referred: dict[str, Any] = {}
    if contender.reference == "precomputed":
        options |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": batch}
    if contender.reference == "live":
        referred["ref_model"] = load()
    if contender.attention == "flash_attention_2" and kind == "SFT":
        options["padding_free"] = True
    trainer_class = getattr(trl, f"{kind}Trainer")
    reference = timed(trainer_class, "_precompute_ref_logps", arguments["device"]) if kind != "SFT" else []
    trainer = trainer_class(
        model=load(),
        args=getattr(trl, f"{kind}Config")(
            output_dir=arguments["out"],
            per_device_train_batch_size=batch // arguments["accumulation"],
            gradient_accumulation_steps=arguments["accumulation"],
            train_sampling_strategy="sequential",
            use_cpu=on_cpu,
            bf16=not on_cpu,
            gradient_checkpointing=False,
            learning_rate=OPTIMISER["lr"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=OPTIMISER["max_grad_norm"],
            max_length=8192,
            num_train_epochs=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            dataloader_num_workers=0,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        **referred,
    )
    with Watch(arguments["steps"], arguments["device"]) as watch:
        trainer.train()
    seen = [line for line in trainer.state.log_history if "loss" in line]
    return {**watch.read(), "losses": [line["loss"] for line in seen], "reference": sum(reference)}


# ---------------------------------------------------------------------------------------------------- what can be


@dataclass(frozen=True)
class Work:
    """What the model takes: parameters of the layers, words and width; the sum of the layers' widths of attention."""

    layers: float
    words: int
    width: int
    attention: float

    @classmethod
    def of(cls, shape: dict[str, Any]) -> "Work":
        width, depth, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
        size = shape.get("head_dim") or width // heads
        queries, keys = heads * size, shape["num_key_value_heads"] * size
        layer = width * (2 * queries + 2 * keys + 3 * shape["intermediate_size"])
        return cls(depth * layer, shape["vocab_size"], width, depth * queries)

    @property
    def head(self) -> int:
        return self.words * self.width

    def operations(self, forwards: float, positions: int, projections: int, pairs: float) -> float:
        """Of so many forward passes; a backward pass is two."""
        own = 2 * self.layers * positions + 2 * self.head * projections + 4 * self.attention * pairs
        return forwards * own


def least(work: Work, contender: Contender, step: list[tuple[int, list[int]]]) -> float:
    """Operations of a step that are needed, by whichever way: each prompt once where there are pairs, completions
    alone projected, what is seen alone attended to, nothing twice. TDPO's reference is a forward pass more, KTO's
    mismatched pairs too."""
    shapes = step if contender.loss not in UNPAIRED else [(p, [c]) for p, completions in step for c in completions]
    positions = sum(prompt + sum(own) for prompt, own in shapes)
    projections = sum(sum(own) for _, own in shapes)
    pairs = sum(prompt**2 / 2 + sum(c * prompt + c * c / 2 for c in own) for prompt, own in shapes)
    return work.operations(3 + (contender.loss in ("tdpo2", "kto")), positions, projections, pairs)


def counted(
    work: Work, contender: Contender, step: list[tuple[int, list[int]]], built: dict[str, Any], size: Size, device: str
) -> float:
    """Operations of a step as the contender does them: padding, attention to what is then masked, prompts twice,
    projections that no loss reads or that are made again."""
    sequences = [(prompt, own) for prompt, completions in step for own in completions]
    whole = [prompt + own for prompt, own in sequences]
    projections = sum(own for _, own in sequences)
    if contender.layout == "shared_prefix":
        positions = sum(prompt + sum(own) for prompt, own in step)
        pairs = sum(prompt**2 + sum(c * (prompt + c) for c in own) for prompt, own in step)
    elif contender.layout == "packed":
        positions, pairs = sum(whole), sum(n * n for n in whole)
    else:
        positions, pairs = len(whole) * max(whole), len(whole) * max(whole) ** 2
    if contender.layout is None and device == "cpu" and not contender.forced:
        projections = positions - len(whole)
    forwards = 3
    forwards += contender.loss == "kto"  # the policy's KL
    forwards += contender.loss == "tdpo2"
    if contender.reference == "live":
        forwards += 2 if contender.loss == "kto" else 1
    again = projections  # whose logits are computed in the backward pass too
    if contender.layout:
        chunk = built["chunk_rows"]  # the last one is still there
        again = (projections - 1) // chunk * chunk * (2 if contender.loss == "tdpo2" else 1)
    sae = 2 * work.width * size.latents * projections if contender.loss == "fpo" else 0
    return work.operations(forwards, positions, projections, pairs) + 2 * work.head * again + sae


# ---------------------------------------------------------------------------------------------------- all runs


def child(folder: Path, arguments: dict[str, Any], contender: Contender | None = None) -> dict[str, Any]:
    """What one process finds, with caches of its own; it prints a line of JSON last."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        own = {"folder": str(folder), "out": out, "contender": asdict(contender) if contender else None, **arguments}
        threads = {"OMP_NUM_THREADS": str(arguments["threads"]), "HF_DATASETS_CACHE": out}
        done = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(own)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **threads},
            check=False,
        )
    if done.returncode:
        sys.exit(f"{contender.name if contender else 'build'}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work_of_child(given: dict[str, Any]) -> None:
    folder, contender = Path(given["folder"]), given["contender"]
    if contender is None:
        found = build(folder, given)
    else:
        run = run_ours if contender["layout"] else run_trl
        found = run(folder, given, Contender(**contender))
    print("\n" + json.dumps(found))


def measure(arguments: argparse.Namespace, chosen: list[Contender], kind: str) -> None:
    """All rounds at one kind of lengths, and their table."""
    names = ("device", "batch", "steps", "threads", "model", "compile", "profile")
    given = {name: getattr(arguments, name) for name in names}
    given |= {"lengths": kind, "size": arguments.device, "accumulation": 1}
    with tempfile.TemporaryDirectory() as name:
        built = child(Path(name), given)
        runs: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in chosen}
        for number in range(arguments.rounds):
            for contender in chosen:
                print(f"round {number + 1}: {contender.name}", file=sys.stderr, flush=True)
                runs[contender].append(child(Path(name), given, contender))
    report(arguments, kind, built, runs)


HEAD = """
| | s a step | CPU s | tokens/s | reference, s | peak, MB | time | operations | peak | of the rate |
|---|---|---|---|---|---|---|---|---|---|"""


def report(
    arguments: argparse.Namespace, kind: str, built: dict[str, Any], runs: dict[Contender, list[dict[str, Any]]]
) -> None:
    """A table. Time, operations and peak are also beside those of the first of the same loss; the last column is how
    near a run comes to doing what is needed at the rate of a matrix product; on a known GPU, its data sheet's (MFU)."""
    device, batch, steps = arguments.device, arguments.batch, arguments.steps
    work, clock = Work.of(built["shape"]), "cpu" if device == "cpu" else "seconds"
    pairs = [(prompt, completions) for prompt, completions in built["pairs"]]
    parts = [pairs[start : start + batch] for start in range(batch, len(pairs), batch)]  # the first step warms up
    tokens = sum(prompt + own for prompt, completions in pairs[batch:] for own in completions)
    means = [statistics.mean(prompt for prompt, _ in pairs)]
    means += [statistics.mean(completions[side] for _, completions in pairs) for side in (0, 1)]
    print(
        f"\n{kind}, {device}, {arguments.threads} thread(s): {steps} steps of {batch} pairs (kto and sft: of both "
        f"sides of each), prompts of {means[0]:.0f} tokens, chosen of {means[1]:.0f}, rejected of {means[2]:.0f}; "
        f"medians of {arguments.rounds}; matrix products run at {built['rate'] / 1e9:,.0f} GFLOP/s\n{HEAD}"
    )
    wrong = []
    for contender, own in runs.items():
        first = next(other for other in runs if other.loss == contender.loss)

        def median(key: str, of: Contender = contender) -> float:
            return statistics.median(run[key] for run in runs[of])

        operations, of_first = (
            sum(counted(work, c, part, built, SIZES[device], device) for part in parts) for c in (contender, first)
        )
        needed = sum(least(work, contender, part) for part in parts) / built["rate"]
        cells = [
            f"{median('seconds') / steps:.2f}",
            f"{median('cpu') / steps:.2f}",
            f"{tokens / median('seconds'):,.0f}",
            f"{median('reference') / (steps + 1):.2f}",
            f"{median('peak'):,.0f}",
            f"{median(clock) / median(clock, first):.2f}",
            f"{operations / of_first:.2f}",
            f"{median('peak') / median('peak', first):.2f}",
            f"{needed / median(clock):.0%}",
        ]
        print(f"| {contender.name} | {' | '.join(cells)} |")
        apart = max(abs(a - b) / abs(b) for a, b in zip(own[0]["losses"], runs[first][0]["losses"], strict=True))
        if apart > (1e-3 if device == "cpu" else 2e-2):
            wrong.append(
                f"{contender.name}: losses {own[0]['losses']}, those of {first.name} {runs[first][0]['losses']}"
            )
    for contender, own in runs.items():
        if "shares" in own[0]:
            most = sorted(own[0]["shares"].items(), key=lambda item: -item[1])[:20]
            print(f"\n{contender.name}: {', '.join(f'{name} {share:.1%}' for name, share in most)}")
    if wrong:
        sys.exit("not the same training:\n" + "\n".join(wrong))
    print("\nThose of one loss have the same training losses in every step.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", metavar="DIRECTORY", help="a real model, on its own text; with --lengths alpaca or hh"
    )
    parser.add_argument("--lengths", nargs="+", default=["alpaca"], metavar="KIND")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of contenders' names")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--steps", type=int, default=3, help="measured in each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="this repo's models (model.compile)")
    parser.add_argument("--profile", action="store_true", help="what share of a step's CPU time each operation takes")
    parser.add_argument("--list", action="store_true", help="print the contenders' names")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work_of_child(json.loads(arguments.child))
        return
    named = contenders(arguments.device)
    chosen = [c for c in named if any(fnmatch.fnmatch(c.name, pattern) for pattern in arguments.only)]
    if arguments.list or not chosen:
        print("\n".join(contender.name for contender in named))
        return
    for kind in arguments.lengths:
        measure(arguments, chosen, kind)


if __name__ == "__main__":
    main()
