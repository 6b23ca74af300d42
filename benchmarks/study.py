"""FPO beside its peers on a real model. The figures are in benchmarks/study/*.jsonl, the page is docs/results.md.

    python benchmarks/study.py --model path/to/smollm2-135m-instruct     about six hours on two cores
    python benchmarks/study.py --full                    the whole grid on whole files, for a GPU
    python benchmarks/study.py --quick                   every step once, on four pairs: the figures mean nothing
    python benchmarks/study.py --plan                    what would be done, and what it takes
    python benchmarks/study.py --report                  the page alone, from the figures that are there

The jobs: a start (the model fine-tuned on chosen completions), SAEs that read it, a reward model from it; for DPO and
FPO a learning rate, and for FPO a beta, each the best of three on validation pairs; then every loss at its seeds, and
its measures on test pairs and on samples for their prompts. Prompts belong to one split, by their hash. Each job runs
in a process of its own and adds a line to the file of figures. A job whose line is there is not done again, and a
training run that was killed goes on from its last state, so the same command goes on where it stopped. Runs are in
outputs/study/ until no job needs them.

What the default costs. SmolLM2-135M has 106 M parameters in its layers and 28 M in its head: 0.212 GFLOP for a token
forward, 0.057 for one projected onto the vocabulary, and three times both in training. A pair has a prompt of 47
tokens and two completions of about 64 (answers are read to 112 tokens, as four fifths of these go on beyond that),
175 tokens in the layout that shares the prompt: 140 GFLOP. A run of 240 pairs is 33 TFLOP. Measuring one is 14: 140
pairs forward, then two samples of 64 tokens for each of 64 prompts, read by policy, start and reward model. With 32
policies in all, an SAE run of 0.8 million tokens, the start and the reward model that is 1,750 TFLOP, and at 90 GFLOP
a second (fp32, two cores with AVX2) five and a half hours. `--plan` counts again. The first job measures what the
machine multiplies faster, float32 or bfloat16, and the whole study computes in that.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from utils import end_with_parent, fingerprint  # noqa: E402

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKEN, HEAD, WIDTH = 0.212e-3, 0.057e-3, 576  # TFLOP for a token forward and for one projected; the residual stream
SPEED = 0.09  # TFLOP a second, before there is a job to go by
SAE_LR = 2e-4  # at 16,384 latents (config/loss/sae.yaml)
TUNED = ("dpo", "fpo")  # losses of which a learning rate is chosen where not every loss has its own
SPLITS = {"test": 0.25, "validation": 0.35, "reward": 0.6, "policy": 1.0}  # up to which share of the hashes


@dataclass(frozen=True)
class Variant:
    """A loss, and for FPO the weight of its constraint and the layer that its SAE reads (None: as `Scale` has it)."""

    loss: str
    alpha: float | None = None
    layer: int | None = None

    @property
    def name(self) -> str:
        alpha = "" if self.alpha is None else f"-alpha{self.alpha:g}"
        return self.loss + alpha + ("" if self.layer is None else f"-layer{self.layer}")

    @property
    def is_fpo(self) -> bool:
        return self.loss.startswith("fpo")


@dataclass(frozen=True)
class Setting:
    """A run of a preference loss. `beta` is None for a loss whose YAML's own is used."""

    data: str
    variant: Variant
    lr: float
    beta: float | None
    seed: int

    @property
    def name(self) -> str:
        beta = "" if self.beta is None else f"-beta{self.beta:g}"
        return f"{self.data}-{self.variant.name}{beta}-lr{self.lr:g}-seed{self.seed}"

    def fields(self) -> dict[str, Any]:
        """What a line of figures says of it."""
        rest = {"data": self.data, "lr": self.lr, "beta": self.beta, "seed": self.seed}
        return {**rest, "variant": self.variant.name, **asdict(self.variant)}


@dataclass(frozen=True)
class Scale:
    """How much is done. Counts of pairs are for each split, and None is all."""

    name: str
    max_prompt: int  # tokens; longer prompts are left out
    max_length: int  # tokens of a prompt with a completion, which is cut there
    lengths: dict[str, tuple[int, int]]  # for the estimate: tokens of a prompt and of a completion, by data set
    pairs: dict[str, dict[str, int | None]]  # by data set and split; reward 0: no reward model, so no win rate
    batch_size: int
    sae_texts: int | None  # that the SAEs are trained on, and
    sae_length: int  # tokens of each, at most
    sae_epochs: int
    sae_batch: int  # tokens a step
    sae_width: int  # latents for each number of the residual stream
    layers: tuple[int, ...]  # that have an SAE; FPO reads the last one's
    lrs: tuple[float, ...]
    betas: tuple[float, ...]
    own_lr: bool  # whether each loss has a learning rate of its own, or dpo's or fpo's
    grid: tuple[tuple[str, Variant, int], ...]  # data set, variant, seeds
    prompts: int  # that samples are drawn for, and
    draws: int  # how many for each, of
    new_tokens: int  # tokens at most
    save_every: int = 80  # records


BASE = (*map(Variant, ("dpo", "fpo", "simpo", "tdpo2", "fpo-mse")), Variant("fpo", 0))
LAYERS = (14, 22, 29)
DEFAULT = Scale(
    name="default",
    max_prompt=64,
    max_length=112,
    lengths={"alpaca": (47, 63), "hh": (44, 30)},
    pairs={
        "alpaca": {"policy": 240, "reward": 400, "validation": 56, "test": 140},
        "hh": {"policy": 240, "reward": 0, "validation": 0, "test": 140},
    },
    batch_size=8,
    sae_texts=3600,
    sae_length=256,
    sae_epochs=1,
    sae_batch=1024,
    sae_width=8,
    layers=LAYERS,
    lrs=(5e-6, 1.5e-5, 5e-5),
    betas=(0.1, 1, 5),
    own_lr=False,
    grid=(
        *(("alpaca", variant, 3) for variant in BASE),
        *(("alpaca", Variant("fpo", alpha), 1) for alpha in (2, 20)),
        *(("alpaca", Variant("fpo", None, layer), 1) for layer in (22, 14)),
        ("alpaca", Variant("kto"), 1),
        *(("hh", variant, 1) for variant in map(Variant, ("dpo", "fpo", "simpo"))),
    ),
    prompts=64,
    draws=2,
    new_tokens=64,
)
QUICK = replace(
    DEFAULT,
    name="quick",
    max_prompt=40,
    max_length=56,
    pairs={"alpaca": {"policy": 4, "reward": 4, "validation": 4, "test": 4}},
    batch_size=2,
    sae_texts=12,
    sae_length=64,
    sae_batch=64,
    sae_width=1,
    lrs=(5e-5,),
    betas=(1,),
    grid=tuple(("alpaca", variant, 1) for variant in map(Variant, ("dpo", "fpo", "simpo"))),
    prompts=2,
    new_tokens=8,
)
FULL = replace(
    DEFAULT,
    name="full",
    max_prompt=512,
    max_length=1024,
    lengths={"alpaca": (75, 400), "hh": (140, 60)},
    pairs={data: dict.fromkeys(SPLITS) for data in ("alpaca", "hh")},
    batch_size=32,
    sae_texts=None,
    sae_length=1024,
    sae_epochs=4,
    sae_batch=4096,
    sae_width=16,
    own_lr=True,
    grid=tuple(
        (data, variant, 3)
        for data in ("alpaca", "hh")
        for variant in (
            *BASE,
            Variant("kto"),
            *(Variant(loss, alpha) for loss in ("fpo", "fpo-mse") for alpha in (0.1, 2, 20)),
            *(Variant(loss, None, layer) for loss in ("fpo", "fpo-mse") for layer in (22, 14)),
        )
    ),
    prompts=160,
    draws=4,
    new_tokens=256,
    save_every=2000,
)
SCALES = {scale.name: scale for scale in (DEFAULT, QUICK, FULL)}


# ------------------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Job:
    """Something that gives one line of figures. `kind` names what does it, a key of WORK."""

    kind: str
    name: str
    tflop: float  # about
    uses: tuple[str, ...] = ()  # runs that it reads
    settings: tuple[Setting, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


Results = dict[str, dict[str, Any]]  # lines by the name of their job


def family(scale: Scale, variant: Variant) -> str:
    """The loss whose learning rate a variant takes."""
    if scale.own_lr:
        return variant.loss
    return "fpo" if variant.is_fpo or variant.loss == "simpo" else "dpo"  # SimPO counts per token, as FPO does


def chosen(results: Results, what: str, loss: str, candidates: Sequence[float]) -> float:
    """The best learning rate or beta of a loss; until it is known, the middle one of those tried."""
    line = results.get(f"choose {what} of {loss}")
    return middle(candidates) if line is None else line["best"]


def middle(candidates: Sequence[float]) -> float:
    return sorted(candidates)[len(candidates) // 2]


def plan(scale: Scale, results: Results) -> list[Job]:
    """All jobs in their order. Names of runs are final once what they depend on is in the results."""
    jobs = [Job("machine", "machine", 0.1), Job("data", "data", 0.1)]
    start, saes = ("start",), ("start", "saes")
    sft = sum(cost_of_sft(scale, data) for data in scale.pairs)
    jobs += [Job("train", "start", sft), Job("train", "saes", cost_of_saes(scale), start)]
    if results.get("machine", {}).get("dtype") == "bfloat16":
        jobs.append(Job("precision", "precision", 32 * pair(scale, "alpaca"), start))
    for data in scale.pairs:
        rewards = reward_model(scale, data)
        jobs += [Job("train", name, cost_of_reward(scale, data), start, options={"data": data}) for name in rewards]
        options = {"data": data}
        jobs.append(
            Job("measure", f"measure start on {data}", cost_of_measure(scale, data), (*saes, *rewards), (), options)
        )

    def setting(data: str, variant: Variant, seed: int) -> Setting:
        beta = chosen(results, "beta", "fpo", scale.betas) if variant.is_fpo else None
        return Setting(data, variant, chosen(results, "lr", family(scale, variant), scale.lrs), beta, seed)

    def search(what: str, variant: Variant, candidates: Sequence[float], **fixed: float) -> Iterator[Job]:
        tried = tuple(replace(setting("alpaca", variant, 1), **fixed, **{what: value}) for value in candidates)
        yield from (train(scale, own) for own in tried)
        cost = len(tried) * count(scale, "alpaca", "validation") * pair(scale, "alpaca")
        used = ("start", *(own.name for own in tried))
        yield Job("choose", f"choose {what} of {variant.loss}", cost, used, tried, {"what": what})

    jobs += search("beta", Variant("fpo"), scale.betas, lr=middle(scale.lrs))
    for loss in dict.fromkeys([*TUNED, *(family(scale, variant) for _, variant, _ in scale.grid)]):
        jobs += search("lr", Variant(loss), scale.lrs)
    most = max(seeds for _, _, seeds in scale.grid)
    for seed in range(1, most + 1):
        for data, variant, seeds in scale.grid:
            if seed <= seeds:
                own = setting(data, variant, seed)
                used = (*saes, *reward_model(scale, data), own.name)
                cost = cost_of_measure(scale, data)
                jobs += [train(scale, own), Job("measure", f"measure {own.name}", cost, used, (own,), {"data": data})]
    unique: dict[str, Job] = {}
    for job in jobs:
        unique.setdefault(job.name, job)  # a run that several need: where it is first
    return list(unique.values())


def train(scale: Scale, setting: Setting) -> Job:
    cost = count(scale, setting.data, "policy") * 3.1 * pair(scale, setting.data)
    cost *= {"tdpo2": 1.4, "kto": 1.6}.get(setting.variant.loss, 1.0)  # a live reference; KTO's mismatched pairs
    uses = ("start", "saes") if setting.variant.is_fpo else ("start",)
    return Job("train", setting.name, cost, uses, (setting,))


def reward_model(scale: Scale, data: str) -> tuple[str, ...]:
    """The name of a data set's reward model, if it has one."""
    return () if scale.pairs[data]["reward"] == 0 else (f"reward-{data}",)


ALL = {"alpaca": 4000, "hh": 2300}  # pairs, about, of which a split has its share


def count(scale: Scale, data: str, split: str) -> float:
    """Pairs of a split, about."""
    shares = [0.0, *SPLITS.values()]
    share = SPLITS[split] - shares[list(SPLITS).index(split)]
    wanted = scale.pairs[data][split]
    return ALL[data] * share if wanted is None else wanted


def pair(scale: Scale, data: str) -> float:
    """TFLOP of a pair forward."""
    prompt, completion = scale.lengths[data]
    return (prompt + 2 * completion) * TOKEN + 2 * completion * HEAD


def cost_of_sft(scale: Scale, data: str) -> float:
    prompt, completion = scale.lengths[data]
    return min(224, count(scale, data, "policy")) * 3 * ((prompt + completion) * TOKEN + completion * HEAD)


def cost_of_reward(scale: Scale, data: str) -> float:
    prompt, completion = scale.lengths[data]
    return count(scale, data, "reward") * 3 * (prompt + 2 * completion) * TOKEN


def cost_of_saes(scale: Scale) -> float:
    tokens = (scale.sae_texts or 5600) * scale.sae_epochs * min(scale.sae_length, 400) * 0.9
    latents = scale.sae_width * WIDTH
    return tokens * (TOKEN + len(scale.layers) * 10 * WIDTH * latents / 1e12)


def cost_of_measure(scale: Scale, data: str) -> float:
    prompt, _ = scale.lengths[data]
    new = scale.draws * scale.new_tokens
    sampled = scale.prompts * ((prompt + new) * 4 * TOKEN + 3 * new * HEAD)  # drawn, then read three times
    return count(scale, data, "test") * pair(scale, data) + sampled


def unneeded(jobs: Sequence[Job], results: Results) -> list[str]:
    """Finished runs that no job reads any more."""
    left = {name for job in jobs if job.name not in results for name in job.uses}
    return [name for name, line in results.items() if line["kind"] == "train" and name not in left]


# ------------------------------------------------------------------------------------------------------- doing the jobs


@dataclass(frozen=True)
class Study:
    """A study of some scale on this machine."""

    scale: Scale
    model: str
    data: Path
    folder: Path  # of its runs
    lines: Path  # of its figures

    def results(self) -> Results:
        """The figures so far. A line that was not written to its end does not count."""
        if not self.lines.is_file():
            return {}
        whole = [line for line in self.lines.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return {line["job"]: line for line in map(json.loads, whole)}

    def check(self) -> None:
        """Ends the process where the figures so far are those of other numbers than the scale's."""
        line = self.results().get("machine", {"numbers": self.numbers})
        if line["numbers"] != self.numbers:
            sys.exit(f"{self.lines} is of a study with other numbers; move it and {self.folder} away")

    @property
    def numbers(self) -> str:
        """What changes with any number that a figure depends on; more seeds or variants change none."""
        return fingerprint({**asdict(self.scale), "grid": None, "save_every": None})

    def add(self, line: dict[str, Any]) -> None:
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        text = self.lines.read_text() if self.lines.is_file() else ""
        kept = text[: text.rfind("\n") + 1]  # a last line whose writer was killed goes
        part = self.lines.with_suffix(".part")
        part.write_text(kept + json.dumps(line) + "\n")
        part.replace(self.lines)

    def rows(self, data: str, split: str) -> Path:
        return self.folder / "data" / f"{data}-{split}.jsonl"

    @property
    def start(self) -> Path:
        return self.folder / "start" / "LATEST"

    @property
    def dtype(self) -> str:
        return str(self.results()["machine"]["dtype"])

    def limits(self) -> list[str]:
        """What all runs on pairs have in common."""
        scale = self.scale
        return f"""++model.policy_dtype={self.dtype} ++model.max_length={scale.max_length}
            ++model.max_prompt_length={scale.max_prompt} ++model.batch_size={scale.batch_size}
            ++model.eval_batch_size={2 * scale.batch_size} show_tokens=0 nproc=1 cache_dir={self.folder}""".split()

    def arguments(self, job: Job) -> list[str]:
        """The arguments of train.py for a run."""
        scale = self.scale
        found = [*self.limits(), f"exp_name={job.name}", "do_first_eval=false", "eval_every=null", "max_new_tokens=8"]
        found += [f"save_every={scale.save_every * (10 if job.name == 'saes' else 1)}", "keep_checkpoints=1"]

        def data(split: str, *sets: str) -> str:
            return "[" + ",".join(str(self.rows(name, split)) for name in sets) + "]"

        if job.name == "start":
            own = [f"datasets={data('policy', *scale.pairs)}", f"eval_datasets={data('test', *scale.pairs)}"]
            own.append("n_eval_examples=64")
            return [*found, *own, "loss=sft", f"model={self.model}"]
        found.append(f"model={self.start}")
        if job.name == "saes":
            latents = scale.sae_width * WIDTH
            return [
                *found,
                *f"""loss=sae datasets={data("texts", "sae")} eval_datasets={data("texts", "held-out")}
                n_epochs={scale.sae_epochs} n_eval_examples={2 * scale.batch_size} loss.layer={list(scale.layers)}
                loss.d_sae={latents} loss.k={min(32, latents // 4)} loss.batch_tokens={scale.sae_batch}
                loss.buffer_tokens={64 * scale.sae_batch} loss.dead_after={100 * scale.sae_batch}
                lr={SAE_LR * math.sqrt(16384 / latents):.2g} warmup_steps=null ++model.max_length={scale.sae_length}
                ++model.max_prompt_length={scale.sae_length // 2}""".replace(", ", ",").split(),
            ]
        if job.name.startswith("reward-"):
            name = job.options["data"]
            own = [f"datasets={data('reward', name)}", f"eval_datasets={data('test', name)}", "n_eval_examples=null"]
            return [*found, *own, "loss=bradley-terry"]
        (setting,) = job.settings
        variant, own = setting.variant, [f"loss={setting.variant.loss}", f"lr={setting.lr:g}", f"seed={setting.seed}"]
        own += [f"datasets={data('policy', setting.data)}", f"eval_datasets={data('test', setting.data)}"]
        own += [f"n_eval_examples={scale.batch_size}"]  # what is reported is measured by a job of its own
        if variant.is_fpo:
            layer = scale.layers[-1] if variant.layer is None else variant.layer
            own += [f"++sae.path={self.folder / 'saes'}", f"++sae.layer={layer}", f"loss.beta={setting.beta:g}"]
            own += [] if variant.alpha is None else [f"loss.alpha={variant.alpha:g}"]
        return [*found, *own]


def split_of(prompt: Any) -> str:
    """The split that a prompt belongs to, by its hash. `prompt` is JSON."""
    share = int(hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:12], 16) / 16**12
    return next(split for split, end in SPLITS.items() if share < end)


def spread(groups: Sequence[Sequence[Any]], most: int | None) -> list[Any]:
    """At most so many items: the first of each group, then the second of each that has one, and so on."""
    longest = max(map(len, groups), default=0)
    return [group[place] for place in range(longest) for group in groups if place < len(group)][:most]


def do_machine(study: Study, job: Job) -> dict[str, Any]:  # noqa: ARG001
    """What the processor or GPU multiplies a second in each dtype, at the shapes of the model."""
    from study_measures import multiplications

    return {**multiplications(), "numbers": study.numbers}


def do_data(study: Study, job: Job) -> dict[str, Any]:  # noqa: ARG001
    """Write the pairs of each split, and the texts that SAEs read."""
    from study_measures import read_examples

    found: dict[str, Any] = {}
    texts: dict[str, list[list[dict[str, Any]]]] = {"sae": [], "held-out": []}
    for data, wanted in study.scale.pairs.items():
        by_split: dict[str, list[list[dict[str, Any]]]] = {split: [] for split in SPLITS}
        for example in read_examples(data, study.data, study.model, study.scale.max_prompt):
            split = split_of(example.prompt)
            rows = [
                {"prompt": example.prompt, "chosen": example.generations[c], "rejected": example.generations[r]}
                for c, r in example.pairs
            ]
            by_split[split].append(rows)
            answers = [{"role": "assistant", "content": text} for text in example.generations]
            kind = {"policy": "sae", "reward": "sae", "test": "held-out"}.get(split)
            if kind:
                texts[kind].append([{"messages": [*example.prompt, answer]} for answer in answers])
        for split, prompts in by_split.items():
            order = sorted(prompts, key=lambda rows: hashlib.sha256(json.dumps(rows).encode()).digest())
            rows = spread(order, wanted[split])
            write_rows(study.rows(data, split), rows)
            found[f"{data}/{split}"] = {"pairs": len(rows), "prompts": len({json.dumps(r["prompt"]) for r in rows})}
    for kind, prompts in texts.items():
        rows = spread(prompts, study.scale.sae_texts)
        write_rows(study.rows(kind, "texts"), rows)
        found[f"{kind}/texts"] = {"texts": len(rows)}
    return {"rows": found}


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def do_train(study: Study, job: Job) -> dict[str, Any]:
    """A run, by the command that a user would type; its figures."""
    sys.argv = ["train.py", *study.arguments(job)]
    print("python", *sys.argv, flush=True)
    was_there = (study.folder / job.name / "state").exists()
    try:
        runpy.run_path(str(REPO / "train.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    lines = [json.loads(line) for line in (study.folder / job.name / "metrics.jsonl").read_text().splitlines()]
    steps, last = [line for line in lines if "tokens_per_second" in line], lines[-1]
    paced = steps[1:] or steps  # the first step warms up
    figures = {
        "steps": len(steps),
        "seconds_per_step": statistics.median(line["seconds"] for line in paced),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in paced),
        "training_memory_gb": steps[-1]["peak_memory_gb"],
        "resumed": was_there,
        "evaluated": {name: value for name, value in last.items() if "_eval/" in name or name == "loss/eval"},
    }
    return figures | (job.settings[0].fields() if job.settings else {})


def do_choose(study: Study, job: Job) -> dict[str, Any]:
    """Which of some runs is best on the validation pairs: by the loss that DPO at beta 0.1 would have there. It is a
    proper score, and has one scale for all of them, whatever they minimise."""
    from study_measures import measure_pairs

    file, tried = study.rows("alpaca", "validation"), []
    for setting in job.settings:
        found = measure_pairs(study, file, study.folder / setting.name)
        means = {name: statistics.fmean(found[name]) for name in ("dpo_loss", "accuracy", "reward_accuracy", "margin")}
        tried.append({"value": getattr(setting, job.options["what"]), **setting.fields(), **means})
    best = min(tried, key=lambda one: one["dpo_loss"] if math.isfinite(one["dpo_loss"]) else math.inf)
    return {"best": best["value"], "tried": tried}


def do_measure(study: Study, job: Job) -> dict[str, Any]:
    """All that the page says of a policy, or of the start."""
    from study_measures import measure

    data = job.options["data"]
    rewards = [study.folder / name for name in reward_model(study.scale, data)]
    run = study.folder / job.settings[0].name if job.settings else None
    found = measure(study, study.rows(data, "test"), run, rewards[0] if rewards else None)
    return found | (job.settings[0].fields() if job.settings else {"data": data})


def do_precision(study: Study, job: Job) -> dict[str, Any]:  # noqa: ARG001
    """How far the start's log-probabilities in bfloat16 are from those in float32."""
    from study_measures import log_probabilities

    file = study.rows("alpaca", "validation")
    low, high = (log_probabilities(study, file, dtype, 32) for dtype in ("bfloat16", "float32"))
    apart = [abs(a - b) for a, b in zip(low, high, strict=True)]
    return {"mean": statistics.fmean(apart), "largest": max(apart), "completions": len(apart)}


WORK: dict[str, Callable[[Study, Job], dict[str, Any]]] = {
    "machine": do_machine,
    "data": do_data,
    "train": do_train,
    "choose": do_choose,
    "measure": do_measure,
    "precision": do_precision,
}


def in_child(study: Study, job: Job, log: Path, result: Path) -> None:
    """Do a job in this process, which is a fork: it has the libraries loaded, and its memory is its own."""
    end_with_parent(signal.SIGTERM)  # with its state saved
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.chdir(REPO)
    figures = WORK[job.kind](study, job)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures |= {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_memory_gb": usage.ru_maxrss / 2**20}
    result.write_text(json.dumps(rounded(figures)))


def rounded(value: Any) -> Any:
    """Floats with four digits, in lists and dictionaries too. NaN becomes None."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def in_a_process(study: Study, job: Job) -> dict[str, Any]:
    """Do a job in a process of its own. Ends this one, with the end of the log, where it fails."""
    log, result = study.folder / "logs" / f"{job.name}.log", study.folder / "result.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(study, job, log, result))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:  # the terminal sends it to the job as well
        process.join()
        sys.exit(130)
    if process.exitcode or not result.is_file():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        sys.exit(f"{tail}\n{job.name} failed with status {process.exitcode}; all of its output is in {log}")
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def clean(study: Study, jobs: Sequence[Job], results: Results) -> None:
    """Remove what no later job reads: states and copies of finished runs, and runs that have been measured."""
    old = unneeded(jobs, results)
    for name, line in results.items():
        if line["kind"] == "train":
            run = study.folder / name
            copies = [] if name == "saes" else run.glob("step-*/policy.pt")  # the Hub's format beside it has the same
            found = [run / "state", *copies, *(run.glob("step-*") if name in old else [])]
            for path in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            if name in old:
                (run / "LATEST").unlink(missing_ok=True)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def speed_of(jobs: Sequence[Job], results: Results) -> float:
    """TFLOP a second of the jobs done so far."""
    done = [(job.tflop, results[job.name]["seconds"]) for job in jobs if job.name in results]
    tflop, seconds = map(sum, zip(*done)) if done else (0, 0)
    return tflop / seconds if tflop > 20 and seconds else SPEED


def run(study: Study, do: Callable[[Study, Job], dict[str, Any]] = in_a_process) -> None:
    """Do what is left, a job at a time. What is to be done is planned again after each, from what is known then."""
    study.check()
    while True:
        results = study.results()
        jobs = plan(study.scale, results)
        clean(study, jobs, results)
        left = [job for job in jobs if job.name not in results]
        if not left:
            return
        began = time.monotonic()
        figures = do(study, left[0])
        seconds = time.monotonic() - began
        study.add({"job": left[0].name, "kind": left[0].kind, **figures, "seconds": round(seconds, 1)})
        rest = sum(job.tflop for job in left[1:]) / speed_of(jobs, study.results())
        print(
            f"[{len(jobs) - len(left) + 1}/{len(jobs)}] {left[0].name}: {clock(seconds)}; "
            f"{len(left) - 1} jobs left, about {clock(rest)}",
            flush=True,
        )


def show_plan(study: Study) -> None:
    results = study.results()
    jobs = plan(study.scale, results)
    left = [job for job in jobs if job.name not in results]
    for job in jobs:
        print(f"{'done' if job.name in results else '':5}{job.kind:10}{job.tflop:9.1f} TFLOP  {job.name}")
    total, rest = sum(job.tflop for job in jobs), sum(job.tflop for job in left)
    speed = speed_of(jobs, results)
    print(
        f"{len(jobs)} jobs, {total:,.0f} TFLOP; left {len(left)} of {rest:,.0f} TFLOP, "
        f"{rest / speed / 3600:.1f} hours at {1000 * speed:.0f} GFLOP a second"
    )


def preload() -> None:
    """Import what the jobs need, so that each fork has it."""
    import study_measures  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_const", dest="scale", const="quick", default="default")
    how.add_argument("--full", action="store_const", dest="scale", const="full")
    parser.add_argument("--model", default=MODEL, help="a Hub id, or a directory in the Hub's format (%(default)s)")
    parser.add_argument("--data", type=Path, default=os.environ.get("FPO_DATA"), help="directory of CONTRIBUTING.md")
    parser.add_argument("--plan", action="store_true", help="print the jobs and what they take")
    parser.add_argument("--report", action="store_true", help="write the page, and do no job")
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    folder, lines = REPO / "outputs" / "study" / scale.name, REPO / "benchmarks" / "study" / f"{scale.name}.jsonl"
    if scale is QUICK:  # figures that mean nothing are not to be committed
        lines = folder / "quick.jsonl"
    model = str(Path(arguments.model).resolve()) if Path(arguments.model).is_dir() else arguments.model
    study = Study(scale, model, Path(arguments.data or ".").resolve(), folder, lines)
    if arguments.plan:
        show_plan(study)
        return
    if not arguments.report:
        if arguments.data is None:
            parser.error("--data has to name the directory of real data (or FPO_DATA)")
        folder.mkdir(parents=True, exist_ok=True)
        preload()
        run(study)
    import study_report

    pages = folder if scale is QUICK else REPO / "docs"
    print(study_report.write_page(scale, study.results(), pages))


if __name__ == "__main__":
    main()
