"""The jobs of benchmarks/gpu.py. Each runs in a process of its own and tells what it finds, a row at a time."""

import copy
import functools
import gc
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import throughput
import torch
import torch.distributed as dist
import transformers
from gpu import Row, last_lines
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config

import models
from data import toy
from data.batch import BATCH_LAYOUTS, Batch, collate
from distributed import parallel
from modeling.attention import possible_combinations
from training.throughput import peak_flops
from utils import REPO, end_with_parent, write_json, write_text

Tell = Callable[[Row], None]  # adds a row to the job's table


@dataclass(frozen=True)
class Place:
    """Where a job runs, and what it finds there."""

    device: torch.device
    folder: Path  # for models, data and runs, of all jobs
    out: Path  # of the report
    model: Path  # of the study, and
    data: Path  # its data, where they are

    @property
    def is_dry(self) -> bool:
        return self.device.type == "cpu"


def do(name: str, file: str, device: str, **paths: str) -> None:
    """Do a job in this process; its rows go to a file, a line of JSON each."""
    place = Place(torch.device(device), **{key: Path(value) for key, value in paths.items()})
    with Path(file).open("a") as lines:

        def tell(row: Row) -> None:
            print(json.dumps(row), file=lines, flush=True)

        machine = {"device": "CPU" if place.is_dry else torch.cuda.get_device_name(), "torch": torch.__version__}
        machine |= {"transformers": transformers.__version__}
        peak = peak_flops()
        tell({"machine": machine | ({"TFLOP/s by its data sheet": f"{peak / 1e12:g}"} if peak else {})})
        WORK[name](place, tell)


def attempt(row: Row, work: Callable[[], Row]) -> Row:
    """The row with what `work` finds, or with why it failed."""
    try:
        return row | work()
    except (Exception, SystemExit) as error:  # commands raise SystemExit
        traceback.print_exc()
        return row | {"failed": last_lines(f"{type(error).__name__}: {error}", 4)}
    finally:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def seconds_of(place: Place, work: Callable[[], object]) -> float:
    """Seconds of one call, on a GPU until all is done."""
    wait: Callable[[], None] = (lambda: None) if place.is_dry else torch.cuda.synchronize
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def relative(found: Tensor, exact: Tensor) -> float:
    """How far a tensor is from the exact one, as a share of the exact one's norm."""
    return float((found.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-30))


# -------------------------------------------------------------------------------------------------- the built-in model


def arguments_of(place: Place, name: str, *own: str) -> list[str]:
    """The arguments of train.py for two steps of the built-in model, in bf16."""
    files = {split: place.folder / f"{split}.jsonl" for split in ("train", "test")}
    for split, file in files.items():
        write_text(file, "".join(json.dumps(row) + "\n" for row in toy.preferences(split, seed=0, count=16)))
    return [
        *("model=tiny", "model.policy_dtype=bfloat16", "model.batch_size=8", "model.eval_batch_size=8", "nproc=1"),
        *(f"datasets=[{files['train']}]", f"eval_datasets=[{files['test']}]", f"cache_dir={place.folder}/runs"),
        *(f"exp_name={name}", "n_eval_examples=8", "do_first_eval=false", "show_tokens=0", "max_new_tokens=4"),
        *("optimizer=AdamW", "lr=1e-3", "warmup_steps=0", *own),
    ]


def composed(arguments: Sequence[str]) -> Any:
    """The configuration of a command line."""
    from hydra import compose, initialize_config_dir

    from launch import settings

    with initialize_config_dir(str(REPO / "config"), version_base=None):
        return compose("config", overrides=settings.translate_arguments(arguments))


def trained(place: Place, arguments: Sequence[str]) -> list[float]:
    """Train, as train.py does; gives the loss of each step."""
    import train

    one_rank()
    config = composed(arguments)
    train.train(config)
    lines = (place.folder / "runs" / config.exp_name / "metrics.jsonl").read_text().splitlines()
    return [line["loss/train"] for line in map(json.loads, lines) if "loss/train" in line]


def one_rank() -> None:
    if not dist.is_initialized():
        parallel.init_process_group(0, 1, dist.HashStore())


# -------------------------------------------------------------------------------------------------- attention


def compare_attention(place: Place, tell: Tell) -> None:
    """One layer of the model has a sliding window, the other none."""
    width = 32 if place.is_dry else 512
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16 if place.is_dry else 256,
        sliding_window=32 if place.is_dry else 512,
    )

    def model_of(attention: str, dtype: torch.dtype) -> Any:
        own = copy.deepcopy(config)  # a model writes its attention into it
        return AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation=attention).to(place.device)

    torch.manual_seed(0)
    exact = model_of("segments", torch.float32)
    for parameter in exact.parameters():  # large enough for what a token sees to show
        nn.init.normal_(parameter, std=width**-0.5)

    def values(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities, and the gradient of a sum of them with weights."""
        model.zero_grad()
        logps = models.score(model, batch).token_logps
        (logps * torch.linspace(0.5, 1.5, len(logps), device=place.device)).sum().backward()
        return logps.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    @functools.cache
    def in_bf16(attention: str) -> Any:
        model = model_of(attention, torch.bfloat16)
        model.load_state_dict(exact.state_dict())
        return model

    def compare(attention: str, batch: Batch, expected: tuple[Tensor, Tensor]) -> Row:
        model = in_bf16(attention)
        logps, gradient = values(model, batch)
        row: Row = {"log-probabilities off": float((logps - expected[0]).abs().max()) if len(logps) else 0.0}
        row["gradient off"] = relative(gradient, expected[1])
        return row | {"ms": 1000 * seconds_of(place, lambda: values(model, batch))}

    ways = possible_combinations(config, place.device, "bfloat16", pairs=True)
    ways.sort(key=lambda way: way[0] != "segments")  # first what the others are to be as good as
    for tokens in (1, 50, 129) if place.is_dry else (1, 50, 129, 700, 3000):
        lengths = [tokens // 3, tokens // 3, tokens - 2 * (tokens // 3)]
        prompt, *completions = (torch.randint(3, 512, (length,)).tolist() for length in lengths)
        pair = {"prompt_ids": prompt, "completion_ids": completions, "index": 0}
        records = [pair] if tokens > 1 else []  # a rank without records reads one token
        batches = {layout: collate(records, layout, pad_id=0, eos_id=2).to(place.device) for layout in BATCH_LAYOUTS}
        expected = values(exact, batches["shared_prefix"])
        for attention, layout in ways:
            row: Row = {"tokens": tokens, "attention": attention, "layout": layout}
            tell(attempt(row, partial(compare, attention, batches[layout], expected)))


# -------------------------------------------------------------------------------------------------- losses


MAIN = ["fpo", "dpo", "simpo", "tdpo2", "kto", "sft", "ppo"]
OTHERS = sorted({file.stem for file in (REPO / "config/loss").glob("*.yaml")} - {"paired", "unpaired", *MAIN})
SMALL_SAE = ["loss.d_sae=64", "loss.k=4", "loss.batch_tokens=106"]  # of the built-in model's width
OWN = {
    "sae": SMALL_SAE,
    "sae-finetune": ["loss.batch_tokens=106"],
    "sae-difference": [*SMALL_SAE, "model.reference_path=assets/tiny"],
}


def take_steps(place: Place, tell: Tell) -> None:
    """Training, an evaluation, the export and the run page; a plan and the features; the same compiled. Then the other
    losses."""
    import eval as evaluation
    from launch import plan, settings
    from launch.policies import read_config

    first: dict[str, float] = {}

    def steps(loss: str, compiled: bool) -> Row:
        arguments = arguments_of(place, f"{loss}-{compiled}", f"loss={loss}", f"model.compile={compiled}".lower())
        started = time.perf_counter()
        found = trained(place, [*arguments, *OWN.get(loss, ())])
        row: Row = {"first loss": found[0], "last loss": found[-1], "seconds": time.perf_counter() - started}
        return row | ({"off": abs(found[0] - first[loss])} if loss in first else {})

    def planned() -> Row:
        config, classes = settings.check_config(
            composed(arguments_of(place, "plan", "loss=fpo", "mode=plan")), ["plan"]
        )
        return {"planned GB": plan.make(config, classes, 1).peak / 1e9}

    def features() -> Row:
        run = place.folder / "runs" / "fpo-False"
        given = ["++mode=features", "++n_samples=4", "++n_eval_examples=8", "++max_new_tokens=4"]
        evaluation.write_features(read_config(run, given), run, given)
        return {}

    for losses in (MAIN, OTHERS):
        for compiled in (False, True):
            for loss in losses[:1] if compiled and place.is_dry else losses:  # a CPU compiles one for half a minute
                row = attempt({"what": loss, "compiled": compiled}, partial(steps, loss, compiled))
                first |= {loss: row["first loss"]} if "first loss" in row else {}
                tell(row)
            if losses is MAIN and not compiled:
                tell(attempt({"what": "mode=plan"}, planned))
                tell(attempt({"what": "mode=features"}, features))


# -------------------------------------------------------------------------------------------------- speed, beside TRL


def training(place: Place, accumulation: int, compiled: bool = False) -> Row:
    """What throughput.py is given. A step has as many micro-batches as `accumulation` says."""
    given: Row = {"device": "cuda", "size": "cuda", "batch": 32, "steps": 4, "lengths": "ultrafeedback"}
    if place.is_dry:
        given = {"device": "cpu", "size": "smallest", "batch": 4, "steps": 4, "lengths": "20:10"}
    own = {"accumulation": accumulation, "compile": compiled, "out": f"{place.folder}/throughput/runs"}
    return {**given, **own, "threads": torch.get_num_threads(), "model": None, "profile": False}


def built(place: Place) -> tuple[Path, Row]:
    """The folder with throughput.py's model and data, and what it says of them. It is made once."""
    folder = place.folder / "throughput"
    file = folder / "built.json"
    if not file.is_file():
        folder.mkdir(exist_ok=True)
        write_json(file, throughput.build(folder, training(place, 1)))
    return folder, json.loads(file.read_text())


def figures(given: Row, known: Row, found: Row) -> Row:
    """Of the measured step whose rate is the middle one, the better of two: others may have compiled for new lengths.
    MFU: 6 operations for each parameter and token that is no padding, beside the device's peak. It counts each prompt
    once, as it is computed here; peers compute it for each completion, and count it twice."""
    work, steps = throughput.Work.of(known["shape"]), []
    for number, seconds in enumerate(found["each"], 1):  # step 0 warms up
        pairs = known["pairs"][number * given["batch"] : (number + 1) * given["batch"]]
        once = sum(prompt + sum(completions) for prompt, completions in pairs)
        twice = once + sum(prompt for prompt, _ in pairs)
        steps.append((once / seconds, twice / seconds, 1000 * seconds / len(pairs)))
    once, twice, milliseconds = sorted(steps)[len(steps) // 2]
    mfu = 6 * (work.layers + work.head) / known["rate"]
    row = {"ms a pair": milliseconds, "tokens/s": twice, "MFU": mfu * once, "MFU, prompts twice": mfu * twice}
    row["peak GB"] = found["peak"] * 2**20 / 1e9
    return row | {"reference, ms a pair": 1000 * found["reference"] / len(known["pairs"])}


def time_losses(place: Place, tell: Tell) -> None:
    folder, known = built(place)
    accumulation = 1
    if not place.is_dry:  # 42 GB for weights, gradients and optimiser; 43 for the activations of 16 pairs
        accumulation = 2 if torch.cuda.get_device_properties(0).total_memory > 100e9 else 8

    def run(loss: str, compiled: bool) -> Row:
        given = training(place, accumulation, compiled)
        return figures(given, known, throughput.run_ours(folder, given, throughput.Contender(loss, "shared_prefix")))

    for compiled in (False, True):
        rows = {}
        for loss in ("simpo", "fpo", "dpo", "tdpo2"):
            rows[loss] = attempt({"loss": loss, "compiled": compiled}, partial(run, loss, compiled))
            tell(rows[loss])
        if "failed" not in rows["simpo"] | rows["fpo"]:
            time = rows["simpo"]["tokens/s"] / rows["fpo"]["tokens/s"]
            peak = rows["fpo"]["peak GB"] / rows["simpo"]["peak GB"]
            row: Row = {"loss": "fpo / simpo", "compiled": compiled}
            tell(row | {"time; wanted: 1.03": time, "memory; wanted: 1.01": peak})


def time_trl(place: Place, tell: Tell) -> None:
    """The same with half as many pairs at once follows where memory ran out."""
    folder, known = built(place)
    ours = max((row["tokens/s"] for row in found_before(place, "speed") if row["loss"] == "dpo"), default=None)

    def run(contender: throughput.Contender, accumulation: int) -> Row:
        given = training(place, accumulation)
        row = figures(given, known, throughput.run_trl(folder, given, contender))
        return row | ({"times our time; wanted: 1.5": ours / row["tokens/s"]} if ours else {})

    contenders = [own for own in throughput.contenders(place.device.type) if own.loss == "dpo" and not own.forced]
    for contender in reversed([own for own in contenders if own.reference == "precomputed"]):  # the fastest comes last
        for accumulation in (1, 2) if place.is_dry else (8, 16):
            row: Row = {"what": contender.name, "pairs at once": training(place, 1)["batch"] // accumulation}
            row = attempt(row, partial(run, contender, accumulation))
            tell(row)
            if "OutOfMemoryError" not in row.get("failed", ""):
                break


def found_before(place: Place, job: str) -> list[Row]:
    """The rows of a job before this one, but for those of what failed."""
    file = place.out / "gpu.json"
    jobs = json.loads(file.read_text())["jobs"] if file.is_file() else {}
    return [row for row in jobs.get(job, {"rows": []})["rows"] if "failed" not in row]


# -------------------------------------------------------------------------------------------------- the head


def compare_heads(place: Place, tell: Tell) -> None:
    """Words are so many that the logits of all tokens take 16.8 GB. The first of `rows` is what a run would take."""
    from scoring import Way, projections

    tokens, words, width, rows = (64, 512, 32, (32, 16)) if place.is_dry else (16_384, 256_000, 2304, (1024, 256, 4096))
    dtype = torch.float32 if place.is_dry else torch.bfloat16

    def values(way: Way, weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        """Log-probabilities, and the gradients of a sum of them with weights."""
        logps = way()
        return [logps.detach(), *torch.autograd.grad((logps.float() * weights).sum(), inputs)]

    def measure(way: Way, weights: Tensor, inputs: list[Tensor], exact: list[Tensor]) -> Row:
        found = values(way, weights, inputs)  # compiles
        row: Row = {"log-probabilities off": float((found[0] - exact[0]).abs().max())}
        row |= {f"gradient of {name} off": relative(found[n], exact[n]) for n, name in ((1, "hidden"), (2, "weights"))}
        del found
        before = memory(place)
        if not place.is_dry:
            torch.cuda.reset_peak_memory_stats()
        row = {"ms": 1000 * min(seconds_of(place, lambda: values(way, weights, inputs)) for _ in range(3)), **row}
        return row if place.is_dry else {"more GB": torch.cuda.max_memory_allocated() / 1e9 - before, **row}

    for softcap in (30.0, None):
        torch.manual_seed(0)
        with place.device:
            hidden, head = torch.randn(tokens, width, dtype=dtype), nn.Linear(width, words, bias=False, dtype=dtype)
            target, weights = torch.randint(words, (tokens,)), torch.rand(tokens) + 0.5
            wide, wide_head = hidden.float().requires_grad_(), nn.Linear(width, words, bias=False)
        nn.init.normal_(head.weight, std=3 * width**-0.5)
        wide_head.load_state_dict(head.state_dict())
        hidden.requires_grad_()
        plain = projections(wide, wide_head, target, softcap, rows)[f"autograd, checkpointed, {rows[0]} at a time"]
        assert plain
        exact = values(plain, weights, [wide, wide_head.weight])
        del wide, wide_head, plain
        for name, found in projections(hidden, head, target, softcap, rows).items():
            row: Row = {"soft-cap": softcap, "way": name}
            work = partial(measure, found, weights, [hidden, head.weight], exact) if found else None
            tell(attempt(row, work) if work else row | {"failed": "absent"})


def memory(place: Place) -> float:
    """GB of a GPU's tensors."""
    return 0.0 if place.is_dry else torch.cuda.memory_allocated() / 1e9


# -------------------------------------------------------------------------------------------------- within a step


def look_for_waits(place: Place, tell: Tell) -> None:
    from training.metrics import MetricAccumulator

    def steps(loss: str) -> Row:
        own = [f"loss={loss}", "model.batch_size=4", "model.gradient_accumulation_steps=2"]
        trainer = throughput.assemble(arguments_of(place, f"waits-{loss}", *own))
        trainer.module.train()
        every = list(trainer.steps("train"))
        try:
            for step, micro_batches in enumerate(every):
                if step == 2 and not place.is_dry:  # the optimiser's tensors are there
                    torch.cuda.set_sync_debug_mode("error")
                trainer.optimise(step, micro_batches, MetricAccumulator())
        finally:
            if not place.is_dry:
                torch.cuda.set_sync_debug_mode("default")
        return {"steps watched": len(every) - 2}

    for loss in MAIN:
        tell(attempt({"loss": loss}, partial(steps, loss)))


def count_kept(place: Place, tell: Tell) -> None:
    """On six layers of Gemma-2-2B and 9,000 positions. What is counted are the tensors that autograd says it keeps."""
    from launch import assembly, plan, settings

    one_rank()
    shape = throughput.SIZES["smallest" if place.is_dry else "cuda"].shape
    own = {"vocab_size": 1024, "num_hidden_layers": 2 if place.is_dry else 6}
    config = Gemma2Config(**throughput.BASE, **(shape | own))
    folder, length = place.folder / "layers", 20 if place.is_dry else 1000
    with place.device:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    pair = {"prompt_ids": [5] * length, "completion_ids": [[6] * length, [7] * length]}

    def measure(compiled: bool, which: str) -> Row:
        keys = [f"name_or_path={folder}", f"compile={compiled}".lower(), f"activation_checkpointing={which}"]
        raw = composed(arguments_of(place, "kept", "loss=sft", *(f"model.{key}" for key in keys)))
        chosen = settings.check_config(raw)[0].model
        attention, layout = models.choose_attention(chosen, config, pairs=True)
        model = assembly.build_model(chosen, attention, 0, folder)
        batch = collate([pair | {"index": n} for n in range(3)], layout, pad_id=0, eos_id=2).to(place.device)
        row: Row = {}
        if which != "selective":  # which keeps what autograd does not know of
            row["counted GB"] = plan.kept_for_backward(model, batch) / 1e9

        def step() -> None:
            before = memory(place)
            hidden = models.final_hidden_states(model, batch)
            row["kept GB"] = memory(place) - before
            hidden.float().square().mean().backward()
            model.zero_grad()

        step()  # compiles
        seconds = seconds_of(place, step)
        return row | {"ms": 1000 * seconds}

    for compiled, which in ((False, "false"), (False, "selective"), (False, "full"), (True, "false"), (True, "full")):
        tell(attempt({"compiled": compiled, "checkpointing": which}, partial(measure, compiled, which)))


# -------------------------------------------------------------------------------------------------- whole runs


def kill_and_resume(place: Place, tell: Tell) -> None:
    """The first line says how far two undisturbed runs are apart."""

    def arguments(name: str, *own: str) -> list[str]:
        return arguments_of(place, name, "loss=fpo", "model.batch_size=2", "n_epochs=2", "save_every=8", *own)

    def weights(name: str) -> Tensor:
        tensors = load_file(place.folder / "runs" / name / "LATEST" / "model.safetensors")
        return torch.cat([tensors[key].float().flatten() for key in sorted(tensors)])

    def compared(name: str, *own: str) -> Row:
        losses = trained(place, arguments(name, *own))
        off = max(abs(a - b) for a, b in zip(losses, undisturbed, strict=True))
        return {"steps": len(losses), "losses off": off, "weights off": relative(weights(name), weights("undisturbed"))}

    def killed() -> Row:
        states = place.folder / "runs" / "killed" / "state"
        command = [sys.executable, "train.py", *arguments("killed")]
        process = subprocess.Popen(command, cwd=REPO, preexec_fn=end_with_parent)
        while process.poll() is None and not list(states.glob("step-*")):
            time.sleep(0.02)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"it ended with status {process.returncode} before it could be killed")
        step = max(int(state.name.removeprefix("step-")) for state in states.glob("step-*"))
        return {"went on after step": step, **compared("killed")}

    undisturbed = trained(place, arguments("undisturbed"))
    tell(attempt({"what": "undisturbed"}, partial(compared, "again")))
    tell(attempt({"what": "killed"}, killed))
    tell(attempt({"what": "model.cpu_offload=true"}, partial(compared, "offloaded", "model.cpu_offload=true")))


def run_study(place: Place, tell: Tell) -> None:
    import study

    if missing := [str(path) for path in (place.model, place.data / "alpaca_eval") if not path.is_dir()]:
        tell({"job": "all", "failed": f"absent: {', '.join(missing)}"})
        return

    def do(own: study.Study, job: study.Job) -> Row:
        started = time.perf_counter()
        found = study.in_a_process(own, job)
        tell({"job": job.name, "seconds": time.perf_counter() - started})
        return found

    folder, scale = place.folder / "study", study.QUICK if place.is_dry else study.DEFAULT
    folder.mkdir()
    study.preload()
    study.run(study.Study(scale, str(place.model), place.data, folder, place.out / "study.jsonl"), do)


WORK: dict[str, Callable[[Place, Tell], None]] = {
    "attention": compare_attention,
    "losses": take_steps,
    "speed": time_losses,
    "trl": time_trl,
    "head": compare_heads,
    "waits": look_for_waits,
    "checkpointing": count_kept,
    "resuming": kill_and_resume,
    "study": run_study,
}
