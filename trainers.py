"""Scores -> losses: one training loop, the shapes of data, and one small class for each loss.

A loss is a pure function of the quantities its parameters name (`vocabulary.py` lists them); keyword-only parameters
are its hyper-parameters, given by `config/loss/<name>.yaml`. It returns `losses` [B], or `losses, chosen_rewards,
rejected_rewards`. To add one: a class here, a YAML there, a test.

Shape letters: B records (pairs) of a batch, S sequences, N completion tokens.
"""

import functools
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from data.batch import Batch
from dataloader import BAD, GOOD, DataLoader, MismatchedRecords
from distributed import parallel
from distributed.parallel import Stopped, StopRequest
from distributed.sharding import full_tensor, reshard
from modeling import adapters
from modeling.weights import PolicyFile, find_weights, gather_weights, load_weights, write_hub_format
from models import score, score_rewards
from sae import SAE, ResidualTap
from training.checkpoint import MetricsLog, Run
from training.quantities import QUANTITIES, Binding, LossContext
from training.reference import Reference, ReferenceCache
from training.throughput import Flops, ThroughputMeter
from utils import UserError, console, prefetch, progress_bar, suggest

# The share of lr, by the share of the steps after the warm-up that are done, and the share of all that are left.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda _done, _left: 1.0,
    "cosine": lambda done, _left: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done, _left: 1 - done,
    "trapezoid": lambda _done, left: min(1.0, 5 * left),
}


@dataclass
class Setup:
    """All that a trainer is given."""

    config: DictConfig
    binding: Binding
    run: Run
    policy: PreTrainedModel
    tokenizer: Tokenizer
    loaders: dict[str, DataLoader]  # "train" and "eval"
    load: Callable[..., PreTrainedModel]  # gives another model, split over the ranks as the policy is
    sae: SAE | None = None
    tap: ResidualTap | None = None
    references: dict[str, Reference] = field(default_factory=dict)  # of "train", "eval", "train/mismatched", ...


def make_optimizer(config: DictConfig, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The class of torch.optim that the configuration names. Raises UserError for a name or an option it has not."""
    known = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    if config.optimizer not in known:
        raise UserError(f"optimizer={config.optimizer}: not in torch.optim{suggest(config.optimizer, known)}")
    try:
        return known[config.optimizer](parameters, lr=config.lr, **dict(config.optimizer_options))
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer={config.optimizer}, lr={config.lr}, {config.optimizer_options}: {error}") from error


def make_schedule(config: DictConfig, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A learning rate that rises evenly over `warmup_steps`, then follows `lr_schedule` to the last step."""
    warmup, after = config.warmup_steps, SCHEDULES[config.lr_schedule]

    def share(step: int) -> float:
        if step < warmup:
            return step / warmup
        return after((step - warmup) / max(1, steps - warmup), 1 - step / max(1, steps))

    return LambdaLR(optimizer, share)


class MetricAccumulator:
    """Weighted means of what a batch reports, summed on the device and read once, over all ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, float]] = {}

    def add(self, name: str, values: Tensor, weight: float | None = None) -> None:
        """Add values of any shape; `weight` is what they count for, their number if not given."""
        total, count = self.sums.get(name, (torch.zeros((), device=values.device), 0.0))
        self.sums[name] = (
            total + values.detach().float().sum(),
            count + (values.numel() if weight is None else weight),
        )

    def read(self) -> dict[str, float]:
        """The means. Every rank has to ask, and to have added the same names."""
        if not self.sums:
            return {}
        sums = torch.stack([total for total, _ in self.sums.values()]).double().cpu()
        counts = torch.tensor([count for _, count in self.sums.values()], dtype=torch.float64)
        sums, counts = parallel.sum_over_ranks(torch.stack([sums, counts]))
        values = zip(self.sums, sums.tolist(), counts.tolist())
        return {name: total / count for name, total, count in values if count}


@dataclass
class Update:
    """What is to be known of an update of the weights, on the device."""

    step: int
    records: list[list[Any]]  # of each micro-batch: what they are known by
    wrong: Tensor  # [micro-batches] how many losses were not finite
    norm: Tensor  # of the gradient, before clipping


class BasicTrainer:
    """The loop: batches to steps, metrics, evaluations, checkpoints. Subclasses say what a batch's loss is."""

    sides: ClassVar[tuple[str | None, ...]] = (None,)  # which sides of a record a loss may ask for
    is_reward: ClassVar[bool] = False  # trains a reward model, not a policy
    control_tokens: ClassVar[tuple[str, ...]] = ()  # added to the vocabulary; sampling starts from the first
    passes = 1  # updates from each step of the training data

    def __init__(self, setup: Setup) -> None:
        self.config, self.run, self.tokenizer = setup.config, setup.run, setup.tokenizer
        self.binding = setup.binding
        self.device = parallel.device()
        self.policy, self.sae, self.tap = setup.policy, setup.sae, setup.tap
        self.loaders, self.references, self.load = setup.loaders, setup.references, setup.load
        self.kl: Tensor | None = None  # what some trainers add to the evidence
        self.value_head: nn.Module | None = None
        self.module = self.trained_module()
        reshard(self.module)  # the reference pass has left some of it gathered
        self.last_evaluation: dict[str, float] = {}
        self.unchecked: list[Update] = []
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.config, trained)
        self.schedule = make_schedule(self.config, self.optimizer, len(self.loaders["train"]))

    # ------------------------------------------------------------------------------------------------ the loss

    loss: Callable[..., Any]  # losses [B] from the quantities its parameters name

    def side(self, values: Tensor, side: str | None, batch: Batch) -> Tensor:  # noqa: ARG002
        """The values [S] of all sequences, or those of one side of the records."""
        return values

    def weight(self, batch: Batch) -> int:
        """What a batch counts for in the mean over the optimiser step: its number of records."""
        return len(batch.index)

    def score(self, batch: Batch, reference: Reference | None) -> tuple[Batch, Any]:
        """The batch on the device, with what the reference says of it, and what the policy says."""
        if reference and not batch.reference:
            batch = reference.attach(batch)
        batch = batch.to(self.device)
        return batch, score(self.policy, batch, self.tap)

    def steps(self, split: str, start: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each step of a split, made ready while the step before it is in use."""
        loader = self.loaders[split]
        ready = map(functools.partial(self.make_ready, split), range(start, len(loader)), loader.steps(start))
        return prefetch(ready)

    def make_ready(self, split: str, step: int, micro_batches: list[Batch]) -> list[Batch]:  # noqa: ARG002
        """What of a step's work needs no model: its cached reference looked up, and all in memory that a GPU copies
        from by itself."""
        reference = self.references.get(split)
        if isinstance(reference, ReferenceCache):
            micro_batches = [reference.attach(batch) for batch in micro_batches]
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # for this runs in a thread of its own
                micro_batches = [batch.pinned() for batch in micro_batches]
        return micro_batches

    def before_step(self, split: str, step: int, micro_batches: list[Batch]) -> None:
        """Measure what belongs to a whole optimiser step, or evaluation batch, before its losses are computed."""

    def clip_gradients(self) -> Tensor:
        """Bound the gradient's norm; gives what it was, on the device."""
        return self.clip(self.module, self.config.model.max_grad_norm)

    @staticmethod
    def clip(module: nn.Module, limit: float | None) -> Tensor:
        """Bound the norm of one module's gradient (null: no bound); gives what it was."""
        return full_tensor(nn.utils.clip_grad_norm_(module.parameters(), limit if limit else float("inf")))

    @classmethod
    def check(cls, config: DictConfig, binding: Binding) -> None:
        """Raise UserError for a configuration that this trainer cannot work with."""

    def compute_loss(self, batch: Batch, split: str, means: MetricAccumulator) -> Tensor:
        """Losses of a batch, one for each record; their sum over the step, divided by its weight, is minimised."""
        batch, scores = self.score(batch, self.references.get(split))
        evidence = LossContext(batch, scores, self.sae, self.kl, self.value_head)
        options = self.binding.options
        names = dict.fromkeys(i.quantity for i in self.binding.inputs)
        quantities = {name: QUANTITIES[name](evidence, **options[name]) for name in names}
        inputs = {i.parameter: self.side(quantities[i.quantity], i.side, batch) for i in self.binding.inputs}
        result = self.loss(**inputs, **options["loss"])
        losses, *rewards = result if isinstance(result, tuple) else (result,)
        if losses.ndim == 0:  # a custom loss may give the mean of its batch
            losses = losses.expand(self.weight(batch))
        means.add(f"loss/{split}", losses, self.weight(batch))
        self.report(means, split, batch, scores, rewards)
        if "feature_drift" in quantities:
            for side in filter(None, self.sides):
                means.add(f"feature_drift_{split}/{side}", self.side(quantities["feature_drift"], side, batch))
        return losses

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:
        """Add what this shape of data logs, beside the loss."""

    # ------------------------------------------------------------------------------------------------ the loop

    def trained_module(self) -> nn.Module:
        """What the optimiser trains and a resumed run needs."""
        return self.policy

    def train(self) -> None:
        """Train to the end of the data, from the start or from the newest state of the run."""
        config, loader = self.config, self.loaders["train"]
        step, examples, metrics_size = 0, 0, 0
        if state := self.run.newest_state():
            place = self.run.load_state(state, self.module, self.optimizer)
            step, examples, metrics_size = place["step"], place["examples"], place["metrics_size"]
            self.schedule.load_state_dict(place["schedule"])
            self.last_evaluation = place["evaluation"]
            console.print(f"resuming after {step:,} of {len(loader):,} steps ({examples:,} examples) from {state}")
        self.metrics = MetricsLog(self.run, config, metrics_size)
        if state is None and config.do_first_eval:
            self.log(step, examples, self.evaluate())

        start, evaluated, saved = step, False, False
        flops = Flops.of(self.policy)
        means, pace = MetricAccumulator(), ThroughputMeter(flops)
        with StopRequest() as stop, progress_bar("training", len(loader), step) as advance:
            for micro_batches in self.steps("train", start):
                if number := stop.on_any_rank():
                    self.stop(number, step, examples, saved=saved or step == start)
                self.module.train()
                self.optimise(step, micro_batches, means)
                step, before = step + 1, examples
                examples += loader.records_in(step - 1)
                self.count(pace, step - 1, micro_batches)
                evaluated = is_due(config.eval_every, before, examples)
                saved = is_due(config.save_every, before, examples)
                if step % config.log_every == 0 or step == len(loader) or evaluated or saved:
                    norm = self.check_updates()
                    values = {**means.read(), "grad_norm": norm, "lr": float(self.schedule.get_last_lr()[0])}
                    self.log(step, examples, {**values, **pace.read()})
                    advance(step, self.headline(values))
                    means, pace = MetricAccumulator(), ThroughputMeter(flops)
                if evaluated:
                    self.log(step, examples, self.evaluate())
                if saved:
                    self.save(step, examples)
                    if config.intermediate_checkpoints:
                        self.export(step, examples)
        if step > start and not evaluated:
            self.log(step, examples, self.evaluate())
        if step > start and not saved:
            self.save(step, examples)
        self.run.finish_saving()
        self.export(step, examples)
        self.metrics.close()

    def count(self, pace: ThroughputMeter, step: int, micro_batches: list[Batch]) -> None:  # noqa: ARG002
        """Add what this rank did in a step to how fast the run goes."""
        pace.add(micro_batches, self.passes)

    def headline(self, values: dict[str, float]) -> str:
        """What the progress bar says of the metrics."""
        return f"loss {values['loss/train']:.4f}"

    def stop(self, number: int, step: int, examples: int, *, saved: bool) -> NoReturn:
        """End the run between two steps because of a signal, with its state saved."""
        if self.unchecked:
            self.check_updates()
        if not saved:
            self.save(step, examples)
        self.run.finish_saving()
        self.metrics.close()
        name = signal.Signals(number).name
        console.print(f"stopped by {name} after step {step:,}; the same command goes on from {self.run.states}")
        raise Stopped(128 + number)

    def optimise(self, step: int, micro_batches: list[Batch], means: MetricAccumulator) -> None:
        """One step of the training data, of `passes` updates."""
        self.before_step("train", step, micro_batches)
        for _ in range(self.passes):
            self.update(step, micro_batches, means)
        self.schedule.step()

    def update(self, step: int, micro_batches: list[Batch], means: MetricAccumulator) -> None:
        """One update of the weights. The host does not wait for its outcome, which `check_updates` reads."""
        own = sum(self.weight(batch) for batch in micro_batches)
        total = int(parallel.sum_over_ranks(torch.tensor(own)))
        losses = []
        for batch in micro_batches:
            losses.append(self.compute_loss(batch, "train", means))
            (losses[-1].sum() * parallel.world_size() / total).backward()  # gradients are averaged over the ranks
        self.average_replicated()
        norm = self.clip_gradients()
        wrong = torch.stack([(~part.isfinite()).sum() for part in losses])
        self.unchecked.append(Update(step, [batch.index for batch in micro_batches], wrong, norm.to(wrong.device)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check_updates(self) -> float:
        """The norm of the last gradient, before clipping. Nothing is evaluated or saved that was not checked by this.

        Raises UserError if, in an update since it was last called, a loss or the gradient was not finite.
        """
        updates, self.unchecked = self.unchecked, []
        # The norm is the same on all ranks.
        found = [torch.stack([u.wrong.sum().float(), u.norm.float() / parallel.world_size()]) for u in updates]
        outcomes = parallel.sum_over_ranks(torch.stack(found)).tolist()
        for update, (not_finite, norm) in zip(updates, outcomes):
            if not_finite or not norm < float("inf"):
                self.raise_nonfinite(update)
        return outcomes[-1][1]

    def average_replicated(self) -> None:
        """Average the gradients of parameters that every rank holds whole; FSDP does it for those it splits."""
        if parallel.world_size() > 1:
            for parameter in self.module.parameters():
                if parameter.grad is not None and not isinstance(parameter, DTensor):
                    dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
                    parameter.grad /= parallel.world_size()

    def raise_nonfinite(self, update: Update) -> NoReturn:
        """Raise the UserError for a loss, or a gradient, that is not finite, naming the examples of all ranks."""
        self.run.finish_saving()
        rows = self.loaders["train"].rows
        suspects = [own for own, bad in zip(update.records, update.wrong) if bad] or update.records
        own = (bool(update.wrong.any()), [rows[i]["source"] for records in suspects for i in records])
        found = parallel.gather_objects(own)
        bad_loss = any(bad for bad, _ in found)
        sources = [source for bad, sources in found if bad == bad_loss for source in sources]
        raise UserError(
            f"step {update.step + 1}: the {'loss' if bad_loss else 'gradient'} is not finite; nothing of it was saved. "
            f"Examples: {', '.join(sources) or 'none in particular'}. "
            f"The last checkpoint is good: {self.run.newest_state() or 'none yet'}"
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The means of the metrics over the whole evaluation set."""
        self.module.eval()
        loader, means = self.loaders["eval"], MetricAccumulator()
        with progress_bar("evaluating", len(loader), 0) as advance:
            for step, micro_batches in enumerate(self.steps("eval")):
                self.before_step("eval", step, micro_batches)
                for batch in micro_batches:
                    self.compute_loss(batch, "eval", means)
                advance(step + 1, None)
        return means.read()

    # ------------------------------------------------------------------------------------------------ what is kept

    def log(self, step: int, examples: int, values: dict[str, float]) -> None:
        """To metrics.jsonl and wandb; evaluations to the terminal too."""
        self.metrics.write({"step": step, "examples": examples, **values})
        if "loss/eval" in values:
            self.last_evaluation = values
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            console.print(f"[bold]{examples:,} examples[/bold]  {shown}")

    def save(self, step: int, examples: int) -> None:
        """The state that a resumed run starts from."""
        place = {
            "step": step,
            "examples": examples,
            "metrics_size": self.metrics.size,
            "schedule": self.schedule.state_dict(),
            "evaluation": self.last_evaluation,
        }
        self.run.save_state(self.module, self.optimizer, place, keep=self.config.keep_checkpoints)

    def export(self, step: int, examples: int) -> Path:
        """The trained weights, for others to use. For all ranks to call; rank 0 writes."""

        def write(folder: Path) -> None:
            self.write_export(folder, step)

        return self.run.export(examples, write, keep_others=self.config.intermediate_checkpoints)

    def write_export(self, folder: Path, step: int) -> None:
        """Hub format, and `policy.pt` as HALOs writes it; beside them the adapter alone, if one was trained."""
        state = gather_weights(self.policy)
        if parallel.rank() == 0:
            write_hub_format(self.policy, state, folder)
            self.tokenizer.save_pretrained(folder)
            torch.save({"step_idx": step, "state": state, "metrics": self.last_evaluation}, folder / "policy.pt")
        if self.config.model.use_peft:
            adapters.write_adapter(self.policy, folder / "adapter")

    def read_export(self, folder: Path) -> None:
        """Put the weights that `write_export` wrote in place of those trained, to evaluate them."""
        load_weights(self.policy, PolicyFile(folder / "policy.pt"))


def is_due(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]; never, where `every` is null."""
    return every is not None and now // every > before // every


# ---------------------------------------------------------------------------------------------------- SFT


class SFTTrainer(BasicTrainer):
    """Supervised fine-tuning: the negative log-likelihood of the completion tokens, a mean over the global batch."""

    def loss(self, policy_logps):
        return -policy_logps

    def weight(self, batch: Batch) -> int:
        return sum(batch.lengths)


class CSFTTrainer(SFTTrainer):
    """Conditional SFT (Korbak et al. 2023, 2302.08582): preferred completions are learnt after one control token, the
    others after another, and sampling starts from the first."""

    control_tokens = (GOOD, BAD)


# ---------------------------------------------------------------------------------------------------- paired losses


class PairedPreferenceTrainer(BasicTrainer):
    """Losses on (prompt, chosen, rejected): the first half of the sequences are the chosen ones."""

    sides = ("chosen", "rejected")

    def side(self, values: Tensor, side: str | None, batch: Batch) -> Tensor:
        chosen, rejected = values.unflatten(0, (2, len(batch.index)))  # of a batch of no records too
        return chosen if side == "chosen" else rejected

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:
        for side in ("chosen", "rejected"):
            means.add(f"logps_{split}/{side}", self.side(scores.logps, side, batch))
        means.add(f"logps_{split}/accuracies", self.margin(scores.mean_logps, batch) > 0)
        if rewards:
            report_pair_rewards(means, split, *rewards)

    def margin(self, values: Tensor, batch: Batch) -> Tensor:
        return self.side(values, "chosen", batch) - self.side(values, "rejected", batch)


def report_pair_rewards(means: MetricAccumulator, split: str, chosen: Tensor, rejected: Tensor) -> None:
    """Each chosen completion's reward against that of its own rejected one."""
    means.add(f"rewards_{split}/chosen", chosen)
    means.add(f"rewards_{split}/rejected", rejected)
    means.add(f"rewards_{split}/accuracies", chosen > rejected)
    means.add(f"rewards_{split}/margins", chosen - rejected)


class DPOTrainer(PairedPreferenceTrainer):
    """Direct preference optimisation (Rafailov et al. 2023, 2305.18290, Eq. 7)."""

    def loss(
        self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta
    ):
        chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
        return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


class CDPOTrainer(PairedPreferenceTrainer):
    """Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3).

    A share `label_smoothing` of the preferences is taken to be the wrong way round.
    """

    def loss(self, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, label_smoothing):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        right = -F.logsigmoid(chosen_rewards - rejected_rewards)
        wrong = -F.logsigmoid(rejected_rewards - chosen_rewards)
        return (1 - label_smoothing) * right + label_smoothing * wrong, chosen_rewards, rejected_rewards


class IPOTrainer(PairedPreferenceTrainer):
    """Identity preference optimisation (Azar et al. 2023, 2310.12036, Eq. 17), of log-ratios per token."""

    def loss(self, chosen_mean_logps, rejected_mean_logps, ref_chosen_mean_logps, ref_rejected_mean_logps, *, tau):
        chosen_logratios = chosen_mean_logps - ref_chosen_mean_logps
        rejected_logratios = rejected_mean_logps - ref_rejected_mean_logps
        losses = (chosen_logratios - rejected_logratios - 1 / (2 * tau)).square()
        return losses, tau * chosen_logratios, tau * rejected_logratios


class SLiCTrainer(PairedPreferenceTrainer):
    """Sequence likelihood calibration (Zhao et al. 2023, 2305.10425) with a regulariser on the chosen one."""

    def loss(self, policy_chosen_logps, policy_rejected_logps, *, beta, lambda_coef):
        losses = F.relu(beta - policy_chosen_logps + policy_rejected_logps) - lambda_coef * policy_chosen_logps
        return losses, beta * policy_chosen_logps, beta * policy_rejected_logps


class SimPOTrainer(PairedPreferenceTrainer):
    """Simple preference optimisation (Meng et al. 2024, 2405.14734, Eq. 6); the margin is gamma_beta_ratio * beta."""

    def loss(self, policy_chosen_mean_logps, policy_rejected_mean_logps, *, beta, gamma_beta_ratio):
        chosen_rewards = beta * policy_chosen_mean_logps
        rejected_rewards = beta * policy_rejected_mean_logps
        losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma_beta_ratio * beta)
        return losses, chosen_rewards, rejected_rewards


class ORPOTrainer(PairedPreferenceTrainer):
    """Odds ratio preference optimisation (Hong et al. 2024, 2403.07691, Eq. 6-7)."""

    def loss(self, policy_chosen_mean_logps, policy_rejected_mean_logps, *, lambda_coef):
        log_odds = log_odds_of(policy_chosen_mean_logps) - log_odds_of(policy_rejected_mean_logps)
        losses = -policy_chosen_mean_logps - lambda_coef * F.logsigmoid(log_odds)
        return losses, lambda_coef * policy_chosen_mean_logps, lambda_coef * policy_rejected_mean_logps


def log_odds_of(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, for p up to 1 - 1e-6, beyond which it would run to infinity."""
    logps = logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))


class TDPO1Trainer(PairedPreferenceTrainer):
    """Token-level DPO (Zeng et al. 2024, 2404.11999): DPO less the difference in sequential KL."""

    def loss(
        self,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_position_kl,
        rejected_position_kl,
        *,
        beta,
    ):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        constraint = beta * (rejected_position_kl - chosen_position_kl)
        return -F.logsigmoid(chosen_rewards - rejected_rewards - constraint), chosen_rewards, rejected_rewards


class TDPO2Trainer(PairedPreferenceTrainer):
    """Token-level DPO's second form (2404.11999): the difference in sequential KL weighs alpha, and no gradient
    flows through the chosen side's."""

    def loss(
        self,
        chosen_logps,
        ref_chosen_logps,
        chosen_position_kl,
        rejected_logps,
        ref_rejected_logps,
        rejected_position_kl,
        *,
        beta,
        alpha,
    ):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        constraint = alpha * beta * (rejected_position_kl - chosen_position_kl.detach())
        return -F.logsigmoid(chosen_rewards - rejected_rewards - constraint), chosen_rewards, rejected_rewards


class FPOTrainer(PairedPreferenceTrainer):
    """Feature-level preference optimisation (Yin et al. 2024, 2411.07618 v4, Eq. 8-11).

    A length-normalised DPO whose margin is the reference's own, held back by how much further the rejected
    completion's SAE features have drifted from the reference's than the chosen one's. No gradient flows through the
    chosen side's drift.
    """

    def loss(
        self,
        policy_chosen_mean_logps,
        policy_rejected_mean_logps,
        reference_chosen_mean_logps,
        reference_rejected_mean_logps,
        chosen_feature_drift,
        rejected_feature_drift,
        *,
        beta,
        alpha,
    ):
        chosen_rewards = beta * (policy_chosen_mean_logps - reference_chosen_mean_logps)
        rejected_rewards = beta * (policy_rejected_mean_logps - reference_rejected_mean_logps)
        constraint = alpha * (rejected_feature_drift - chosen_feature_drift.detach())
        return -F.logsigmoid(chosen_rewards - rejected_rewards - constraint), chosen_rewards, rejected_rewards


class BradleyTerryTrainer(PairedPreferenceTrainer):
    """A reward model (Bradley & Terry 1952; Ouyang et al. 2022, 2203.02155, Eq. 1): a scalar head on the last token."""

    is_reward = True

    def loss(self, chosen_rewards, rejected_rewards):
        return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards

    def score(self, batch: Batch, reference: Reference | None) -> tuple[Batch, Any]:  # noqa: ARG002
        batch = batch.to(self.device)
        return batch, score_rewards(self.policy, batch)

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:  # noqa: ARG002
        report_pair_rewards(means, split, *rewards)


# ---------------------------------------------------------------------------------------------------- unpaired losses


class UnpairedPreferenceTrainer(BasicTrainer):
    """Losses on single completions labelled desirable or not. `chosen_...` in a loss's parameters are the values of
    the desirable ones in the batch, `rejected_...` of the others; there may be none of either."""

    sides = (None, "chosen", "rejected")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mismatched_records = {split: MismatchedRecords(loader) for split, loader in self.loaders.items()}
        self.upcoming: dict[tuple[str, int], list[Batch]] = {}  # mismatched records of steps that are ready

    @classmethod
    def check(cls, config: DictConfig, binding: Binding) -> None:
        for key in ("batch_size", "eval_batch_size"):
            if "kl" in binding.needs and config.model[key] == 1:
                raise UserError(f"model.{key}=1: KTO's z needs the completion of another example, so at least 2")

    def side(self, values: Tensor, side: str | None, batch: Batch) -> Tensor:
        return values if side is None else values[batch.record[side]]

    def make_ready(self, split: str, step: int, micro_batches: list[Batch]) -> list[Batch]:
        if "kl" in self.binding.needs:
            self.upcoming[split, step] = self.mismatched(split, step)
        return super().make_ready(split, step, micro_batches)

    def mismatched(self, split: str, step: int) -> list[Batch]:
        """The micro-batches of each prompt of a step with another record's completion."""
        return super().make_ready(f"{split}/mismatched", step, self.mismatched_records[split].batches(step))

    @torch.no_grad()
    def before_step(self, split: str, step: int, micro_batches: list[Batch]) -> None:  # noqa: ARG002
        """KTO's z (2402.01306): the mean log-ratio of each prompt with another record's completion, over
        the optimiser step on all ranks, and then no less than 0."""
        if "kl" not in self.binding.needs:
            return
        total = torch.zeros(2, device=self.device, dtype=torch.float64)
        for batch in self.upcoming.pop((split, step), None) or self.mismatched(split, step):
            batch, scores = self.score(batch, self.references[f"{split}/mismatched"])
            logratios = scores.logps - batch.reference["logps"]
            total += torch.stack([logratios.double().sum(), total.new_full((), len(logratios))])
        logratio, count = parallel.sum_over_ranks(total)
        self.kl = (logratio / count).clamp(min=0).float()

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:
        for side in ("chosen", "rejected"):
            means.add(f"logps_{split}/{side}", self.side(scores.logps, side, batch))
            for values in rewards:
                means.add(f"rewards_{split}/{side}", self.side(values, side, batch))
        if self.kl is not None:
            means.add(f"kl/{split}", self.kl)


class KTOTrainer(UnpairedPreferenceTrainer):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306, Eq. 8)."""

    def loss(self, policy_logps, reference_logps, desirable, kl, *, beta, desirable_weight, undesirable_weight):
        logratios = policy_logps - reference_logps
        values = torch.sigmoid(beta * signed(logratios - kl, desirable))
        return torch.where(desirable, desirable_weight, undesirable_weight) * (1 - values), beta * logratios


class KTOLogSigmoidTrainer(UnpairedPreferenceTrainer):
    """KTO with -log sigmoid(.) in place of 1 - sigmoid(.), as HALOs has it."""

    def loss(self, policy_logps, reference_logps, desirable, kl, *, beta, desirable_weight, undesirable_weight):
        logratios = policy_logps - reference_logps
        losses = -F.logsigmoid(beta * signed(logratios - kl, desirable))
        return torch.where(desirable, desirable_weight, undesirable_weight) * losses, beta * logratios


class KTOZeroTrainer(UnpairedPreferenceTrainer):
    """KTO with 0 as its reference point and no weights, as HALOs has it."""

    def loss(self, policy_logps, reference_logps, desirable, *, beta):
        logratios = policy_logps - reference_logps
        return 1 - torch.sigmoid(beta * signed(logratios, desirable)), beta * logratios


class KTOSurprisalTrainer(UnpairedPreferenceTrainer):
    """KTO without a reference: log-probabilities per token in place of log-ratios, as HALOs has it.

    Its z, a mean of log-probabilities, is never above 0, so it is 0.
    """

    def loss(self, policy_mean_logps, desirable, *, beta, desirable_weight, undesirable_weight):
        values = torch.sigmoid(beta * signed(policy_mean_logps, desirable))
        return torch.where(desirable, desirable_weight, undesirable_weight) * (1 - values), beta * policy_mean_logps


def signed(values: Tensor, desirable: Tensor) -> Tensor:
    """The values [S] where desirable, their negatives elsewhere."""
    return torch.where(desirable, values, -values)


# ---------------------------------------------------------------------------------------------------- offline PPO


class PPOTrainer(UnpairedPreferenceTrainer):
    """Offline, one-step PPO (Schulman et al. 2017, 1707.06347), as HALOs has it: the completions are the data's, the
    old policy is the reference, and a completion is rewarded at its last token.

    `reward` is `label` (1 for a desirable completion, -1 for another), `score` (the data's own field), or a reward
    model that loss=bradley-terry trained. `ppo_epochs` updates are made from each batch.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        reward: str,
        gamma: float,
        lam: float,
        ppo_epochs: int,
        value_head_max_grad_norm: float,
    ) -> None:
        width = setup.policy.config.get_text_config().hidden_size
        value_head = nn.Linear(width, 1).to(parallel.device())  # so small that every rank holds it whole
        nn.init.zeros_(value_head.weight)
        nn.init.zeros_(value_head.bias)
        self.both = nn.ModuleDict({"policy": setup.policy, "value_head": value_head})
        super().__init__(setup)
        self.value_head, self.reward, self.gamma, self.lam = value_head, reward, gamma, lam
        self.passes, self.value_head_max_grad_norm = ppo_epochs, value_head_max_grad_norm
        self.reward_model: PreTrainedModel | None = None
        if reward not in ("label", "score"):
            self.reward_model = setup.load(find_weights(reward), reward=True, frozen=True)

    def trained_module(self) -> nn.Module:
        return self.both

    def loss(
        self, policy_token_logps, reference_token_logps, advantages, returns, values, *, cliprange, critic_coef, KL_coef
    ):
        ratio = torch.exp(policy_token_logps - reference_token_logps)
        clipped = ratio.clamp(cliprange, 1 / cliprange)
        policy_losses = -torch.minimum(advantages * ratio, advantages * clipped)
        critic_losses = 0.5 * (values - returns).square()
        return policy_losses + critic_coef * critic_losses + KL_coef * (reference_token_logps - policy_token_logps)

    def weight(self, batch: Batch) -> int:
        return sum(batch.lengths)

    @torch.no_grad()
    def before_step(self, split: str, step: int, micro_batches: list[Batch]) -> None:  # noqa: ARG002
        """Rewards, returns and advantages of the whole batch; the advantages whitened over it, on all ranks."""
        moments = torch.zeros(3, device=self.device, dtype=torch.float64)
        for batch in micro_batches:
            moved, scores = self.score(batch, None)
            values = QUANTITIES["values"](LossContext(moved, scores, value_head=self.value_head))
            longest = max(batch.lengths, default=0)
            episodes = (values, self.rewards(moved), moved.sequence, longest)
            advantages, returns = generalised_advantages(*episodes, gamma=self.gamma, lam=self.lam)
            batch.record |= {"advantages": advantages, "returns": returns}
            wide = advantages.double()
            moments += torch.stack([wide.sum(), wide.square().sum(), wide.new_full((), len(wide))])
        total, squares, count = parallel.sum_over_ranks(moments)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        for batch in micro_batches:
            batch.record["advantages"] = ((batch.record["advantages"] - mean) / (deviation + 1e-8)).float()

    def rewards(self, batch: Batch) -> Tensor:
        """The reward [S] of each completion."""
        if self.reward_model is not None:
            return score_rewards(self.reward_model, batch).rewards
        if self.reward == "score":
            if "score" not in batch.record:
                raise UserError("loss.reward=score: not every row of the data has a score")
            return batch.record["score"].float()
        return signed(torch.ones_like(batch.record["desirable"], dtype=torch.float32), batch.record["desirable"])

    def clip_gradients(self) -> Tensor:
        assert self.value_head is not None
        self.clip(self.value_head, self.value_head_max_grad_norm)
        return self.clip(self.policy, self.config.model.max_grad_norm)

    def write_export(self, folder: Path, step: int) -> None:
        super().write_export(folder, step)
        assert self.value_head is not None
        if parallel.rank() == 0:
            safetensors.torch.save_model(self.value_head, str(folder / "value_head.safetensors"))

    def read_export(self, folder: Path) -> None:
        super().read_export(folder)
        assert self.value_head is not None
        safetensors.torch.load_model(self.value_head, str(folder / "value_head.safetensors"))


def generalised_advantages(
    values: Tensor, rewards: Tensor, sequence: Tensor, longest: int, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [N] of some completions, `longest` tokens at most, from the values [N] of their tokens,
    the rewards [S] of their last ones, and which completion each token belongs to [N], ascending.

    Schulman et al. 2015, 1506.02438, Eq. 16; the episode ends with the completion, so nothing is forecast beyond it.
    """
    places = torch.arange(len(values), device=values.device)
    left = torch.searchsorted(sequence, sequence, right=True) - 1 - places  # tokens that follow in the completion
    ends = torch.where(left == 0, rewards[sequence], 0)
    advantages = gamma * torch.where(left > 0, values.roll(-1), 0) - values + ends
    reach = 1  # of how many tokens each advantage is the discounted sum so far: that many more are its neighbour's
    while reach < longest:
        further = torch.where(left >= reach, advantages.roll(-reach), 0)
        advantages = advantages + (gamma * lam) ** reach * further
        reach *= 2
    return advantages, advantages + values
