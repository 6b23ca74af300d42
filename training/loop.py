"""The training loop: batches to optimiser steps, metrics, evaluations, checkpoints.

`BasicTrainer` is the one loop of this repo. What a batch's loss is, its subclasses in trainers.py say.
"""

import contextlib
import functools
import inspect
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from data.batch import Batch
from dataloader import DataLoader
from distributed import parallel
from distributed.parallel import Stopped, StopRequest
from distributed.sharding import DTYPES, full_tensor, reshard, sum_over_nodes
from modeling.weights import dtype_of, formats_in, load_weights, open_weights, write_weights
from models import score
from sae import SAE, ResidualTap
from training.checkpoint import Run
from training.metrics import (
    MetricAccumulator,
    MetricsLog,
    StepLines,
    by_data_set,
    evaluation_table,
    of_data_set,
)
from training.quantities import OF_TOKENS, Binding, LossContext, MismatchedMeans, Term
from training.reference import Reference, ReferenceCache
from training.settings import TrainingSettings
from training.throughput import Flops, ThroughputMeter
from utils import UserError, console, fingerprint, prefetch, progress_bar, suggest, written

# The share of lr, by the share of the steps after the warm-up that are done, and the share of all that are left.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda _done, _left: 1.0,
    "cosine": lambda done, _left: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done, _left: 1 - done,
    "trapezoid": lambda _done, left: min(1.0, 5 * left),
}

LEAST_MOVE = 1e-5  # of a weight: less than a thousandth of the usual size of one
LEAST_BF16_MOVE = 2**-14  # of a weight of the usual size in bf16: any smaller one is rounded away

HEADLINE = {  # what the terminal shows of a step, and as what
    "loss/train": "loss",
    "rewards_train/accuracies": "accuracy",
    "rewards_train/margins": "margin",
    "kl/train": "KL",
    "value_loss/train": "value loss",
}


@dataclass(kw_only=True)
class Subject:
    """A model, and all that is needed to read it."""

    policy: PreTrainedModel
    tokenizer: Tokenizer
    loaders: dict[str, DataLoader]  # "train" and "eval"
    load: Callable[..., PreTrainedModel]  # gives another model, split over the ranks as the policy is
    sae: SAE | None = None
    tap: ResidualTap | None = None


@dataclass(kw_only=True)
class Setup(Subject):
    """All that a trainer is given."""

    config: TrainingSettings
    binding: Binding
    run: Run
    references: dict[str, Reference] = field(default_factory=dict)  # of "train", "eval", "train/mismatched", ...
    on_evaluation: Callable[[], None] = lambda: None  # called on rank 0 when the metrics of one are written


def make_optimizer(config: TrainingSettings, parameters: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    """The class of torch.optim that the configuration names. Raises UserError for a name or an option it has not."""
    known = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    if config.optimizer not in known:
        raise UserError(f"optimizer={config.optimizer}: not in torch.optim{suggest(config.optimizer, known)}")
    kind, options = known[config.optimizer], config.optimizer_options
    for name, parameter in inspect.signature(kind).parameters.items():
        is_flag = "bool" in str(parameter.annotation)
        if name in options and isinstance(options[name], bool) != is_flag and options[name] is not None:
            wanted = "true or false" if is_flag else "a number"
            raise UserError(f"optimizer_options.{name}={written(options[name])}: has to be {wanted}")
    # One operation on many tensors at once (`foreach`, the default on a GPU) takes split ones or whole ones.
    kinds = [[p for p in parameters if isinstance(p, DTensor) is split] for split in (True, False)]
    with refused_options(config):
        return kind([{"params": own} for own in kinds if own], lr=lr, **options)


@contextlib.contextmanager
def refused_options(config: TrainingSettings) -> Iterator[None]:
    """What an optimiser raises of its options becomes a UserError."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer={config.optimizer}, {written(config.optimizer_options)}: {error}") from error


def check_optimizer(config: TrainingSettings) -> None:
    """Take a step with the optimiser. Raises UserError for one that cannot, with these options."""
    weight = torch.ones(1, requires_grad=True)
    weight.grad = torch.ones(1)
    optimizer = make_optimizer(config, [weight], 1.0 if config.lr is None else config.lr)
    with refused_options(config):
        optimizer.step()


def warmup_of(config: TrainingSettings, steps: int) -> int:
    """The steps of the warm-up: `warmup_steps`, or the share `warmup_ratio` of all."""
    return round(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps


def make_schedule(config: TrainingSettings, optimizer: torch.optim.Optimizer, steps: int, done: int = 0) -> LambdaLR:
    """A learning rate that rises evenly over the warm-up, then follows `lr_schedule` to the last of `steps`. So many
    are `done`."""
    warmup, after = warmup_of(config, steps), SCHEDULES[config.lr_schedule]

    def share(step: int) -> float:
        if step < warmup:
            return step / warmup
        return after((step - warmup) / max(1, steps - warmup), 1 - step / max(1, steps))

    return LambdaLR(optimizer, share, last_epoch=done - 1)


@dataclass
class Update:
    """The outcome of an update of the weights. It stays on the device until `check_updates` reads it."""

    step: int
    records: list[list[Any]]  # of each micro-batch: what they are known by
    wrong: Tensor  # [micro-batches] how many losses were not finite
    norm: Tensor  # of the gradient, before clipping


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the ranks, all of one dtype at once: many small ones would take longer."""
    for dtype in {tensor.dtype for tensor in tensors}:
        own = [tensor for tensor in tensors if tensor.dtype == dtype]
        together = torch.cat([tensor.flatten() for tensor in own])
        dist.all_reduce(together)
        together /= parallel.world_size()
        for tensor, mean in zip(own, together.split([tensor.numel() for tensor in own])):
            tensor.copy_(mean.view_as(tensor))


def weighed(values: Tensor, batch: Batch, weight: float) -> Tensor:
    """A batch's values, each by its record's weight; where a custom function gives their mean, their sum."""
    return batch.weighted(values) if values.ndim else values.expand(1) * weight


class BasicTrainer:
    """The loop: batches to steps, metrics, evaluations, checkpoints. Subclasses say what a batch's loss is."""

    sides: ClassVar[tuple[str | None, ...]] = (None,)  # which sides of a record a loss may ask for,
    token_sides: ClassVar[tuple[str | None, ...]] = (None,)  # and of which it may have one value for each token
    is_reward: ClassVar[bool] = False  # trains a reward model, not a policy,
    has_sae_head: ClassVar[bool] = False  # whose reward is linear in an SAE's features
    needs: ClassVar[frozenset[str]] = frozenset()  # what it has to be given beside what its loss asks for (`NEEDS`)
    control_tokens: ClassVar[tuple[str, ...]] = ()  # added to the vocabulary; sampling starts from the first
    trains_policy: ClassVar[bool] = True  # a language model, which terms can be added for and samples drawn from
    can_plan: ClassVar[bool] = True  # mode=plan can count what it takes
    can_grow: ClassVar[bool] = True  # more data only adds steps at the end
    gives: ClassVar[frozenset[str]] = frozenset()  # quantities that a loss may ask for, of those that only some have
    passes = 1  # updates from each step of the training data

    def __init__(self, setup: Setup) -> None:
        self.config, self.run, self.tokenizer = setup.config, setup.run, setup.tokenizer
        self.binding, self.on_evaluation = setup.binding, setup.on_evaluation
        self.device = parallel.device()
        self.policy, self.sae, self.tap = setup.policy, setup.sae, setup.tap
        self.loaders, self.references, self.load = setup.loaders, setup.references, setup.load
        self.mismatched_means: MismatchedMeans | None = None  # what some trainers add to the context of a loss
        self.mean_reward: Tensor | None = None
        self.value_head: nn.Module | None = None
        self.module = self.trained_module()
        reshard(self.module)  # the reference pass has left some of it gathered
        self.stopping = StopRequest()
        self.step, self.examples = 0, 0  # that are done
        self.saved_step = 0  # when the state was saved
        self.earlier_end: int | None = None  # the last step, before the run was made longer
        self.last_evaluation: dict[str, float] = {}
        self.evaluated_step: int | None = None  # when that was
        self.best: dict[str, Any] | None = None  # the evaluation that is exported as BEST
        self.moved = False  # whether an update has changed the weights
        self.began, self.seconds_before = time.monotonic(), 0.0  # of this process, and of those before it
        self.unchecked: list[Update] = []
        self.starts_from_reference = self.config.model.reference_path is None and bool(
            self.binding.needs & {"reference", "live_reference"}
        )

    def start_optimizer(self) -> None:
        """Make the optimiser and its schedule. A trainer that only evaluates has none."""
        reshard(self.module)  # a pass without a step has left some of it gathered, and the optimiser needs the slices
        trained = [p for p in self.module.parameters() if p.requires_grad]
        assert self.config.lr is not None  # filled in before (settings.with_defaults)
        coarse = any(parameter.dtype == torch.bfloat16 for parameter in trained) and self.config.optimizer != "SGD"
        if coarse and self.config.lr < LEAST_BF16_MOVE:
            raise UserError(
                f"model.weights_dtype=bfloat16, lr={self.config.lr:g}: a step would change next to no weight, since "
                f"one of 0.02, a usual size, is {2 * LEAST_BF16_MOVE:.1g} from the next; give weights_dtype=float32"
            )
        self.optimizer = make_optimizer(self.config, trained, self.config.lr)
        steps = len(self.loaders["train"])
        if (warmup := warmup_of(self.config, steps)) >= steps:
            told = f"The warm-up of {warmup:,} steps is as long as the run, which has {steps:,}: lr is never reached"
            console.print(f"{told}; give fewer warmup_steps, or a warmup_ratio", style="yellow", markup=False)
        farthest = self.config.lr * steps * self.passes
        if farthest < LEAST_MOVE and self.config.optimizer != "SGD":  # which goes by the size of the gradient
            console.print(
                f"lr={self.config.lr:g} in {steps:,} steps moves no weight by more than about {farthest:.1g}, which "
                "changes next to nothing; give a larger lr, or more to train on (lr=null: the default for this model)",
                style="yellow",
            )
        self.schedule = make_schedule(self.config, self.optimizer, steps)

    # ------------------------------------------------------------------------------------------------ the loss

    loss: Callable[..., Any]  # losses [B] from the quantities its parameters name

    def side(self, values: Tensor, side: str | None, batch: Batch) -> Tensor:  # noqa: ARG002
        """The values [S] of all sequences, or those of one side of the records."""
        return values

    def side_of_tokens(self, values: Tensor, side: str | None, batch: Batch) -> Tensor:  # noqa: ARG002
        """The values [N] of all completion tokens, or those of the tokens of one side (`token_sides`)."""
        return values

    def weight(self, batch: Batch) -> float:
        """What a batch counts for in the mean of the loss over the optimiser step: its records."""
        return self.records(batch)

    def records(self, batch: Batch) -> float:
        """The records of a batch, each by its weight."""
        return len(batch.index) if batch.weights is None else sum(batch.weights)

    def score(self, batch: Batch, reference: Reference | None) -> tuple[Batch, Any]:
        """The batch on the device, with what the reference says of it, and what the policy says."""
        if reference and not batch.reference:
            batch = reference.attach(batch)
        batch = batch.to(self.device)
        return batch, score(self.policy, batch, self.tap, log_squares="log_squares" in self.binding.needs)

    def steps(self, split: str, start: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each step of a split. Each step is prepared while the one before it is in use."""
        loader = self.loaders[split]
        prepared = map(functools.partial(self.prepare_step, split), range(start, len(loader)), loader.steps(start))
        return prefetch(prepared)

    def prepare_step(self, split: str, step: int, micro_batches: list[Batch]) -> list[Batch]:  # noqa: ARG002
        """Do the part of a step's work that needs no model."""
        return self.prepare_batches(split, micro_batches)

    def prepare_batches(self, split: str, micro_batches: list[Batch]) -> list[Batch]:
        """Look up the cached reference, and put all into memory from which a GPU copies by itself."""
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
    def check(cls, config: TrainingSettings, binding: Binding) -> None:
        """Raise UserError for a configuration that this trainer cannot work with."""

    @classmethod
    def check_data(cls, binding: Binding, loader: DataLoader) -> None:
        """Raise UserError for data, to train on or to evaluate on, that this trainer cannot work with."""

    @classmethod
    def other_weights(cls, binding: Binding) -> dict[str, str]:  # noqa: ARG003
        """What else it is trained from: by the key that names them, weights as `model.load_from` names them."""
        return {}

    @classmethod
    def check_weights(cls, binding: Binding) -> None:
        """Raise UserError, without reading a weight, for `other_weights` that this trainer cannot work with."""

    @classmethod
    def evaluated(cls, binding: Binding) -> list[str]:
        """The names of the metrics that an evaluation has."""
        drift = [*(f"feature_drift_eval/{side}" for side in cls.sides if side), "sae_eval/left_out"]
        terms = [f"term_eval/{term.name}" for term in binding.terms]
        return ["loss/eval", *(drift if "feature_drift" in binding.options else ()), *terms]

    def compute_loss(self, batch: Batch, split: str, means: MetricAccumulator, per_record: float = 1.0) -> Tensor:
        """The losses of a batch and its terms; their sum over the step, divided by the step's weight, is minimised.

        `per_record` is what a record counts for in the step's weight on average: the mean of a loss may be one over
        tokens, that of a term is one over records.
        """
        batch, scores = self.score(batch, self.references.get(split))
        context = LossContext(batch, scores, self.sae, self.mismatched_means, self.mean_reward, self.value_head)
        quantities = self.binding.compute(context)
        result = self.loss(**self.inputs(self.binding, quantities, batch), **self.binding.options["loss"])
        losses, *rewards = result if isinstance(result, tuple) else (result,)
        losses = weighed(losses, batch, self.weight(batch))
        means.add(f"loss/{split}", losses, self.weight(batch))
        added = []
        for term in self.binding.terms:
            values = weighed(self.term_values(term, context), batch, self.records(batch))
            means.add(f"term_{split}/{term.name}", values, self.records(batch))
            added.append(term.weight * per_record * values)
        self.report(means, split, batch, scores, rewards)
        if "feature_drift" in quantities:
            means.add(f"sae_{split}/left_out", torch.cat(context.sinks))
            for side in filter(None, self.sides):
                means.add(f"feature_drift_{split}/{side}", self.side(quantities["feature_drift"], side, batch))
        return torch.cat([losses, *added])

    def term_values(self, term: Term, context: LossContext) -> Tensor:
        """What a term gives for a batch. Raises UserError for a shape that says nothing of records."""
        batch = context.batch
        inputs = self.inputs(term.binding, term.binding.compute(context), batch)
        values = term.function(**inputs, **term.binding.options["loss"])
        if not isinstance(values, Tensor) or values.shape not in ((), (len(batch.index),), (batch.num_sequences,)):
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UserError(
                f"term.{term.name} gave {shape} for {len(batch.index)} records of {batch.num_sequences} sequences; "
                "it has to give a value for each record, for each sequence, or one number"
            )
        return values

    def inputs(self, binding: Binding, quantities: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The positional arguments of a loss or a term, by name."""
        found = {}
        for i in binding.inputs:
            part = self.side_of_tokens if i.quantity in OF_TOKENS else self.side
            found[i.parameter] = part(quantities[i.quantity], i.side, batch)
        return found

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:
        """Add what this shape of data logs, beside the loss."""

    # ------------------------------------------------------------------------------------------------ the loop

    def trained_module(self) -> nn.Module:
        """What the optimiser trains and a resumed run needs."""
        return self.policy

    def train(self) -> None:
        """Train to the end of the data, from the start or from the newest state of the run."""
        self.start_optimizer()
        self.start_or_resume()
        self.finish_step()  # the last one before, which a killed run may not have finished
        self.take_steps()
        self.run.finish_saving()
        self.metrics.close()

    def start_or_resume(self) -> None:
        """Load the state that the run goes on from, if there is one, and open the log."""
        place, total = self.run.place, len(self.loaders["train"])
        if place:
            self.run.load_state(self.module, self.optimizer)
            self.step, self.examples, end = place["step"], place["examples"], place["end"]
            self.saved_step, self.seconds_before = self.step, place["seconds"]
            self.earlier_end = end if end == self.step else None
            self.last_evaluation, self.evaluated_step = place["evaluation"], place["evaluated_step"]
            self.best, self.moved = self.best_of(place), place.get("moved", True)
            self.schedule = make_schedule(self.config, self.optimizer, total, done=self.step)
            console.print(
                f"resuming after {self.step:,} of {total:,} steps ({self.examples:,} examples) from {self.run.state}"
            )
            if total != end and self.config.lr_schedule != "constant":
                console.print(
                    f"lr_schedule={self.config.lr_schedule} ended with step {end:,} and ends with step {total:,} now: "
                    "the steps before had the learning rates of the other end",
                    style="yellow",
                )
        self.metrics = MetricsLog(self.run, self.config, self.step)

    def take_steps(self) -> None:
        """Take all steps that are left."""
        loader, flops = self.loaders["train"], Flops.of(self.policy)
        means, pace = MetricAccumulator(), ThroughputMeter(flops)
        lines = StepLines(len(loader), self.step, self.headline)
        with progress_bar("training", len(loader), self.step, in_log=False) as advance:
            for micro_batches in self.steps("train", self.step):
                self.stop_if_asked()
                self.module.train()
                self.seed_step(self.step)
                self.optimise(self.step, micro_batches, means)
                self.step, self.examples = self.step + 1, self.examples + loader.records_in(self.step)
                self.count(pace, self.step - 1, micro_batches)
                if self.step % self.config.log_every == 0 or self.save_is_due() or self.evaluation_is_due():
                    norm = self.check_updates()
                    values = {**means.read(), "grad_norm": norm, "lr": float(self.schedule.get_last_lr()[0])}
                    values |= pace.read()
                    self.log(self.step, self.examples, values)
                    lines.add(self.step, values)
                    advance(self.step, self.headline(values))
                    means, pace = MetricAccumulator(), ThroughputMeter(flops)
                if self.save_is_due():
                    self.save(self.step, self.examples)
                self.finish_step()

    def seed_step(self, step: int) -> None:
        """Make what a step draws, for dropout, a function of the step and the rank: a resumed run draws the same."""
        torch.manual_seed(int(fingerprint(self.config.seed, step, parallel.rank()), 16))

    def finish_step(self) -> None:
        """Evaluate and export, where that is due after the last step. Its state is saved first, so that a failure here
        loses nothing."""
        if self.evaluation_is_due() and self.evaluated_step != self.step:
            self.log(self.step, self.examples, self.evaluate())
            self.keep_best()
        if self.export_is_due():
            self.run.finish_saving()
            self.stop_if_asked()
            self.export(self.step, self.examples)

    def keep_best(self) -> None:
        """Export the weights as BEST where the last evaluation is the best one since the weights first changed."""
        wanted, found = self.config.eval_best, self.last_evaluation
        if wanted is None or not self.moved:
            return
        name = wanted.removeprefix("-")
        if name not in found:
            raise UserError(f"eval_best={wanted}: the evaluation has no such metric; it has {', '.join(found)}")
        sign = -1 if wanted.startswith("-") else 1
        if math.isfinite(found[name]) and (self.best is None or sign * found[name] > sign * self.best["value"]):
            self.run.finish_saving()
            self.best = {"metric": wanted, "value": found[name], "step": self.step, "examples": self.examples}
            self.export(self.step, self.examples, "BEST")

    def best_of(self, place: dict[str, Any]) -> dict[str, Any] | None:
        """The best evaluation before a state, where later ones compare with it and BEST still is its export. A run that
        was killed later may have led BEST on; this one will, too."""
        best, before = place.get("best"), place["config"]
        same = all(before.get(key) == getattr(self.config, key) for key in ("eval_best", "n_eval_examples"))
        return best if best and same and self.run.linked("BEST") == f"step-{best['examples']}" else None

    def save_is_due(self) -> bool:
        return self.is_due(self.config.save_every)

    def evaluation_is_due(self) -> bool:
        if self.step == 0:
            return self.config.do_first_eval
        return self.is_due(self.config.eval_every) or self.step == self.earlier_end

    def export_is_due(self) -> bool:
        return self.is_due(self.config.save_every if self.config.intermediate_checkpoints else None)

    def is_due(self, every: int | None) -> bool:
        """Whether the last step reached a multiple of so many examples (null: of none), or the end."""
        loader = self.loaders["train"]
        if self.step in (0, len(loader)):
            return self.step > 0
        before = self.examples - loader.records_in(self.step - 1)
        return every is not None and self.examples // every > before // every

    def count(self, pace: ThroughputMeter, step: int, micro_batches: list[Batch]) -> None:  # noqa: ARG002
        """Add what this rank did in a step to how fast the run goes."""
        pace.add(micro_batches, self.passes)

    def headline(self, values: dict[str, float]) -> str:
        """What the terminal shows of the metrics of some steps."""
        return "  ".join(f"{word} {values[name]:.4g}" for name, word in HEADLINE.items() if name in values)

    def stop_if_asked(self) -> None:
        """End the run because of a signal, with its state saved, if any rank has got one. For all ranks to call."""
        number = self.stopping.on_any_rank()
        if not number:
            return
        if self.unchecked:
            self.check_updates()
        if self.saved_step != self.step:
            self.save(self.step, self.examples)
        self.run.finish_saving()
        self.metrics.close()
        name = signal.Signals(number).name
        where = f"after step {self.step:,}; the same command goes on from there"
        console.print(f"stopped by {name} {where if self.step else 'before the first step'}")
        raise Stopped(128 + number)

    def optimise(self, step: int, micro_batches: list[Batch], means: MetricAccumulator) -> None:
        """One step of the training data, of `passes` updates."""
        self.before_step("train", step, micro_batches)
        for _ in range(self.passes):
            self.update(step, micro_batches, means)
        self.schedule.step()

    def update(self, step: int, micro_batches: list[Batch], means: MetricAccumulator) -> None:
        """One update of the weights. The host does not wait for its outcome, which `check_updates` reads."""
        own = [[self.weight(batch), self.records(batch)] for batch in micro_batches]
        total, records = map(float, parallel.sum_over_ranks(torch.tensor(own, dtype=torch.float64).sum(0)))
        wrong = []
        for batch in micro_batches:
            sum_over_nodes(self.module, batch is micro_batches[-1])
            wrong.append(self.add_gradient(batch, means, total, records))
        self.average_replicated()
        norm = self.clip_gradients()
        found = torch.stack(wrong)
        self.unchecked.append(Update(step, [batch.index for batch in micro_batches], found, norm.to(found.device)))
        self.run.wait_until_read()
        self.moved |= any(group["lr"] for group in self.optimizer.param_groups)  # a warm-up begins with 0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def add_gradient(self, batch: Batch, means: MetricAccumulator, total: float, records: float) -> Tensor:
        """Add what a micro-batch gives to the gradient of a step of this `total` weight and so many records. Gives how
        many of its losses are not finite. Nothing of its graph outlives this."""
        losses = self.compute_loss(batch, "train", means, total / records)
        (losses.sum() * parallel.world_size() / total).backward()  # gradients are averaged over the ranks
        return (~losses.detach().isfinite()).sum()

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
            whole = (p.grad for p in self.module.parameters() if not isinstance(p, DTensor) and p.grad is not None)
            average_over_ranks(list(whole))

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
            f"The last checkpoint is good: {next(iter(self.run.saved()), 'none yet')}"
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The means of the metrics over all evaluation data, and of several data sets those of each."""
        self.module.eval()
        loader, means = self.loaders["eval"], defaultdict[str | None, MetricAccumulator](MetricAccumulator)
        with progress_bar("evaluating", len(loader), 0) as advance:
            for step, micro_batches in enumerate(self.steps("eval")):
                self.stop_if_asked()
                self.before_step("eval", step, micro_batches)
                for batch in micro_batches:
                    self.compute_loss(batch, "eval", means[batch.data_set])
                advance(step + 1, None)
        together = MetricAccumulator.together(means.values())
        apart = {name: own for name, own in means.items() if name is not None}
        each = {of_data_set(key, name): value for name, own in apart.items() for key, value in own.read().items()}
        return {**together.read(), **each}

    # ------------------------------------------------------------------------------------------------ what is kept

    def log(self, step: int, examples: int, values: dict[str, float]) -> None:
        """To metrics.jsonl and the trackers; evaluations to the terminal and the run page too."""
        self.metrics.write({"step": step, "examples": examples, **values})
        if "loss/eval" in values:
            self.last_evaluation, self.evaluated_step = values, step
            for data_set, own in by_data_set(values, self.loaders["eval"].names.values()).items():
                console.print(evaluation_table(step, examples, own, data_set))
            if parallel.rank() == 0:
                self.on_evaluation()

    def save(self, step: int, examples: int) -> None:
        """The state that a resumed run starts from."""
        place = {
            "step": step,
            "examples": examples,
            "end": len(self.loaders["train"]),
            "seconds": self.seconds(),
            "evaluation": self.last_evaluation,
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "moved": self.moved,
            # A run that is made longer keeps its warm-up.
            "config": {**self.config.model_dump(), "warmup_steps": warmup_of(self.config, len(self.loaders["train"]))},
            "inputs": self.run.inputs,
        }
        keep, log = self.config.keep_checkpoints, self.metrics.content()
        self.run.save_state(self.module, self.optimizer, place, keep=keep, log=log)
        self.saved_step = step

    def seconds(self) -> float:
        """How long the run has taken, with what a killed process before it had saved."""
        return self.seconds_before + time.monotonic() - self.began

    def export(self, step: int, examples: int, link: str = "LATEST") -> Path:
        """The trained weights, for others to use. For all ranks to call; rank 0 writes."""

        def write(folder: Path) -> None:
            self.write_export(folder, step)

        keep_others = self.config.intermediate_checkpoints
        return self.run.export(examples, write, self.is_export_as_wanted, link=link, keep_others=keep_others)

    def is_export_as_wanted(self, folder: Path) -> bool:
        """Whether an export has the files that `write_export` would write, in that dtype."""
        if self.config.export_dtype and dtype_of(folder) != self.config.export_dtype:
            return False
        return formats_in(folder) == set(self.config.export)

    def write_export(self, folder: Path, step: int) -> None:
        """The weights in the formats that `export` names, and the tokenizer."""
        dtype = DTYPES[self.config.export_dtype] if self.config.export_dtype else None
        write_weights(self.policy, folder, self.config.export, dtype, step_idx=step, metrics=self.last_evaluation)
        if parallel.rank() == 0:
            self.tokenizer.save_pretrained(folder)

    def read_export(self, folder: Path) -> None:
        """Load the weights that `write_export` wrote, to evaluate them."""
        load_weights(self.policy, open_weights(folder))
        self.moved = True
