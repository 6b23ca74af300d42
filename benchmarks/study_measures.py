"""What benchmarks/study.py measures of a policy. Per-prompt figures are lists in the order of the file's prompts.

Shape letters: S sequences, B prompts of a batch, C completions of each, M text tokens, D width of the residual stream.
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

import dataloader
import models
import trainers  # noqa: F401  (what the jobs need is imported before they are forked)
from autoencoders.training import reconstruct
from data import tokenise
from data.batch import Batch, batches_by_length, sum_by_sequence
from distributed import parallel
from launch import assembly, settings
from launch.schema import Config
from modeling.weights import find_weights
from sae import SAE, attention_sinks, drift_by_feature, pooled_features
from sampling import diversity, samples
from sampling.backends import TransformersBackend
from training.checkpoint import Run
from training.loop import BasicTrainer
from utils import REPO

if TYPE_CHECKING:
    from study import Study

T = TypeVar("T")
DPO_BETA = 0.1  # of the loss by which learning rates are chosen
DRIFT = {"divergence": "kl", "k": 50}  # as config/loss/fpo.yaml has them, for all policies


def on_one_rank(work: Callable[..., T]) -> Callable[..., T]:
    """The function, called as the only rank of a run."""

    @functools.wraps(work)
    def called(*arguments: Any) -> T:
        found: list[T] = []
        try:
            parallel.run(lambda: found.append(work(*arguments)), 1)
        except SystemExit as end:
            if end.code:
                raise
        return found[0]

    return called


def prepared(study: "Study", file: Path, run: Path | None, *options: str) -> tuple[Config, BasicTrainer]:
    """A trainer that does not train: a run's policy (None: the start) on the pairs of a file, with the start as its
    reference."""
    own = [] if run is None else [f"++model.load_from={run}", f"++model.reference_path={study.start}"]
    given = [*study.limits(), *own, f"model={study.start}", "mode=eval", "n_eval_examples=null"]
    given += [f"datasets=[{study.rows('alpaca', 'policy')}]", f"eval_datasets=[{file}]"]
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        raw = compose("config", overrides=settings.translate_arguments([*given, *options]))
    config, classes = settings.check_config(raw, modes=("eval",))
    paths = settings.find_paths(config, classes.binding.needs)
    folder = study.folder if run is None else run
    trainer = assembly.prepare(config, classes, paths, Run(folder), cached=["eval"])
    trainer.module.eval()
    return config, trainer


# ------------------------------------------------------------------------------------------------------------ the pairs


def batches(trainer: BasicTrainer) -> Iterator[tuple[Batch, models.Scores]]:
    """The evaluation data, with what the reference and the policy say of it."""
    for micro_batches in trainer.steps("eval"):
        for batch in micro_batches:
            yield trainer.score(batch, trainer.references.get("eval"))


def pair_figures(batch: Batch, scores: models.Scores) -> dict[str, Tensor]:
    """Figures [B] of the pairs of a batch: whether the policy finds the chosen completion likelier per token; whether
    its log-ratio per token is the larger one, and by how much; and DPO's loss."""

    def margin(values: Tensor) -> Tensor:
        chosen, rejected = values.unflatten(0, (2, -1))
        return chosen - rejected

    ratios = scores.logps - batch.reference["logps"]
    per_token = margin(ratios / scores.lengths)
    return {
        "accuracy": (margin(scores.mean_logps) > 0).float(),
        "reward_accuracy": (per_token > 0).float() + (per_token == 0).float() / 2,
        "margin": per_token,
        "dpo_loss": -F.logsigmoid(DPO_BETA * margin(ratios)),
    }


class Reconstruction:
    """How well an SAE gives back the vectors that it is shown."""

    def __init__(self, sae: SAE) -> None:
        self.sae, self.sums = sae, torch.zeros(4, dtype=torch.float64)  # tokens, active latents, errors, squares
        self.total = torch.zeros(sae.d_in, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Vectors [M, D]."""
        rebuilt, active = reconstruct(self.sae, x.float())
        squares = [(x - rebuilt).square().sum(), x.float().square().sum()]
        self.sums += torch.tensor([len(x), float(active), *map(float, squares)], dtype=torch.float64)
        self.total += x.double().sum(0).cpu()

    def read(self) -> dict[str, float]:
        tokens, active, errors, squares = self.sums.tolist()
        return {"fvu": errors / (squares - float(self.total.square().sum()) / tokens), "l0": active / tokens}


def by_prompt(trainer: BasicTrainer, figures: dict[int, dict[str, float]]) -> dict[str, list[float]]:
    """The mean of each figure over the pairs of each prompt, from figures by the pairs' rows."""
    groups: dict[str, list[dict[str, float]]] = {}
    rows = trainer.loaders["eval"].rows
    for index in sorted(figures):
        groups.setdefault(rows[index]["messages"], []).append(figures[index])
    names = next(iter(figures.values()))
    return {name: [fmean(pair[name] for pair in pairs) for pairs in groups.values()] for name in names}


def gathered(batch: Batch, figures: dict[str, Tensor]) -> dict[int, dict[str, float]]:
    """Figures [B] of a batch, by the rows of its pairs."""
    values = {name: own.tolist() for name, own in figures.items()}
    return {index: {name: own[i] for name, own in values.items()} for i, index in enumerate(batch.index)}


@on_one_rank
@torch.no_grad()
def measure_pairs(study: "Study", file: Path, run: Path) -> dict[str, list[float]]:
    """`pair_figures` of a run's policy, per prompt."""
    _, trainer = prepared(study, file, run, "loss=dpo")
    found: dict[int, dict[str, float]] = {}
    for batch, scores in batches(trainer):
        found |= gathered(batch, pair_figures(batch, scores))
    return by_prompt(trainer, found)


@on_one_rank
@torch.no_grad()
def measure(study: "Study", file: Path, run: Path | None, reward_model: Path | None) -> dict[str, Any]:
    """Figures of a run's policy (None: the start): `pairs` and `samples`, per prompt, and `saes`, by layer."""
    scale = study.scale
    saes = [f"++sae.parts.layer_{n}.path={study.folder / 'saes'}" for n in scale.layers]
    saes += [f"++sae.parts.layer_{n}.layer={n}" for n in scale.layers]
    drawn = [f"n_samples={scale.prompts}", f"samples={scale.draws}", f"max_new_tokens={scale.new_tokens}"]
    drawn += ["temperature=1.0", "top_p=1.0", "top_k=0"]  # the policy's own distribution
    config, trainer = prepared(study, file, run, "loss=fpo", *saes, *drawn)
    assert trainer.sae is not None
    members = trainer.sae.members
    widths, latents = [sae.d_in for sae in members], [sae.d_sae for sae in members]
    rebuilt = [Reconstruction(sae) for sae in members]
    found: dict[int, dict[str, float]] = {}
    for batch, scores in batches(trainer):
        figures = pair_figures(batch, scores)
        assert scores.residual is not None
        parts = zip(
            scale.layers, rebuilt, scores.residual.split(widths, 1), batch.reference["features"].split(latents, 1)
        )
        for layer, own, x, before in parts:
            own.add(x[~attention_sinks(x, batch.read_lengths)])
            pooled = pooled_features(own.sae, x, batch.read_lengths)
            drift = drift_by_feature(own.sae, pooled, before, **DRIFT).sum(1).unflatten(0, (2, -1))
            figures |= {f"drift_{layer}_{side}": value for side, value in zip(("chosen", "rejected"), drift)}
        found |= gathered(batch, figures)
    return {
        "pairs": by_prompt(trainer, found),
        "samples": sampled(config, trainer, run or study.start.parent, reward_model),
        "saes": {str(layer): own.read() for layer, own in zip(scale.layers, rebuilt)},
    }


# ---------------------------------------------------------------------------------------------------------- the samples


def sampled(config: Config, trainer: BasicTrainer, run: Path, reward_model: Path | None) -> dict[str, Any]:
    """Figures of the policy's samples. Lists have a value for each prompt, or for each draw of each prompt.

    `kl` is KL(policy || start) summed over the sample's positions, each over the whole vocabulary: the same mean as
    that of log policy - log start (sampling/diversity.py), with less noise.
    """
    backend = TransformersBackend(config, trainer.policy, trainer.tokenizer)
    records = samples.records_to_sample(config)
    identity = {"prompts": len(records), "draws": config.samples}
    start = trainer.load(*models.reference_weights(config.model), frozen=True)
    rewarder = None
    if reward_model is not None:
        rewarder = trainer.load(find_weights(str(reward_model)), reward=True, frozen=True)
    with samples.sample_log(run / "samples", identity) as log:  # what it has is there until all is measured
        talks = samples.converse(config, samples.decoding_of(config), records, backend, log)
        groups = [talks[first : first + config.samples] for first in range(0, len(talks), config.samples)]
        prompts = [list(group[0].requests[0].prompt_ids) for group in groups]
        completions = [[talk.answers[0].ids for talk in group] for group in groups]
        lengths = [len(prompt) + sum(map(len, own)) for prompt, own in zip(prompts, completions)]
        found: dict[int, dict[str, list[float]]] = {}
        for places in batches_by_length(lengths, config.model.eval_batch_size):
            own = [prompts[i] for i in places], [completions[i] for i in places], places
            batch = trainer.loaders["eval"].collate(*own).to(parallel.device())
            found |= read_samples(batch, trainer, start, rewarder)
    figures = {name: [found[i][name] for i in range(len(groups))] for name in found[0]}
    per_draw = {name: [value for draws in figures.pop(name, []) for value in draws] for name in ("rewards", "tokens")}
    texts = [[talk.answers[0].text for talk in group] for group in groups]
    flat = [text for group in texts for text in group]
    return {
        **per_draw,
        **{name: [fmean(draws) for draws in values] for name, values in figures.items()},
        "cut": fmean(talk.answers[0].finish_reason == "length" for talk in talks),
        "distinct_1": diversity.distinct(flat, 1),
        "distinct_2": diversity.distinct(flat, 2),
        "self_bleu": diversity.self_bleu(texts),
    }


def read_samples(batch: Batch, trainer: BasicTrainer, start: Any, rewarder: Any) -> dict[int, dict[str, list[float]]]:
    """By prompt, for each of its samples: -log p, tokens, KL to the start, and the reward."""
    scores = models.score(trainer.policy, batch)
    figures = {"surprisal": -scores.logps, "tokens": scores.lengths.float()}
    batch.reference = {"hidden": scores.hidden, "head": trainer.policy.get_output_embeddings()}
    token_kl = models.score(start, batch).token_kl  # KL(the other || this model), so KL(policy || start)
    assert token_kl is not None
    figures["kl"] = sum_by_sequence(token_kl, batch.sequence, batch.num_sequences)
    if rewarder is not None:
        figures["rewards"] = models.score_rewards(rewarder, batch).rewards
    by_draw = {name: values.unflatten(0, (-1, len(batch.index))).T.tolist() for name, values in figures.items()}
    return {place: {name: own[i] for name, own in by_draw.items()} for i, place in enumerate(batch.index)}


# ----------------------------------------------------------------------------------------------------------------- rest


def read_examples(data: str, folder: Path, model: str, max_prompt: int) -> list[dataloader.Example]:
    """The examples of a data set whose prompts, in the model's chat template, have at most so many tokens."""
    if data == "hh":
        sets = [dataloader.get_hh_harmless("test", data_dir=str(folder))]
    else:
        sets = [dataloader.read_file(folder / f"alpaca_eval/preferences_{part}.jsonl.gz") for part in ("train", "test")]
    tokenizer = models.load_tokenizer(models.fetch(model, models.CONFIG_FILES, "--model"))
    template = tokenise.ChatTemplate(tokenizer)
    found = []
    for example in (example for examples in sets for example in examples):
        ids = tokenizer(template.prompt(example.prompt), add_special_tokens=False)["input_ids"]
        if len(ids) <= max_prompt:
            found.append(example)
    return found


@on_one_rank
@torch.no_grad()
def log_probabilities(study: "Study", file: Path, dtype: str, most: int) -> list[float]:
    """Log-probabilities per token of the start, of at most so many completions."""
    _, trainer = prepared(study, file, None, "loss=sft", f"++model.policy_dtype={dtype}", f"n_eval_examples={most}")
    return [value for _, scores in batches(trainer) for value in scores.mean_logps.tolist()]


def multiplications(rows: int = 1024, width: int = 576, wide: int = 1536) -> dict[str, Any]:
    """GFLOP a second of matrix products in each dtype, and the dtype to compute in: bfloat16 if it is a quarter faster.
    The shapes are those of the model's MLP."""
    device = parallel.device()
    speeds = {}
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(*shape, device=device).to(getattr(torch, name)) for shape in ((rows, width), (width, wide)))
        best = float("inf")
        for _ in range(4):
            began = time.perf_counter()
            float((a @ b)[0, 0])  # waits for a GPU
            best = min(best, time.perf_counter() - began)
        speeds[name] = 2 * rows * width * wide / best / 1e9
    return {
        "kind_of_device": device.type,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        **speeds,
        "dtype": "bfloat16" if speeds["bfloat16"] > 1.25 * speeds["float32"] else "float32",
    }


def processor() -> str:
    """The processor's name, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "a processor")
