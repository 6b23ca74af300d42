"""What a loss may ask for, by name, and the check that a loss and its YAML agree.

A loss is a method whose positional parameters name quantities and whose keyword-only parameters are its
hyper-parameters:

    def loss(self, policy_chosen_mean_logps, policy_rejected_mean_logps, *, beta): ...

A quantity is one value for each sequence, [S], or, where it says so, for each completion token, [N]. In a loss on
pairs each is asked for once for the chosen and once for the rejected completions, [B] each, or those of their tokens:
`policy_logps` as `policy_chosen_logps` and `policy_rejected_logps`, `feature_drift` as `chosen_feature_drift`, and so
on. Short names work too: `chosen_logps` is `policy_chosen_logps`, `ref_chosen_logps` is `reference_chosen_logps`.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import create_model
from torch import Tensor, nn

import sae as saes
from data.batch import Batch, sum_by_sequence
from training.settings import LossSettings
from utils import SIDES, Count, Settings, UserError, checked, suggest


@dataclass
class LossContext:
    """All that quantities are computed from, for one batch."""

    batch: Batch
    policy: Any  # models.Scores; models.RewardScores of a reward model
    sae: saes.SAE | None = None
    kl: Tensor | None = None  # of the whole optimiser step
    mean_reward: Tensor | None = None  # of all steps so far
    value_head: nn.Module | None = None


def policy_logps(e: LossContext) -> Tensor:
    """Summed log-probability of the completion under the policy."""
    return e.policy.logps


def policy_mean_logps(e: LossContext) -> Tensor:
    """The same per token."""
    return e.policy.mean_logps


def reference_logps(e: LossContext) -> Tensor:
    """Summed log-probability of the completion under the reference."""
    return e.batch.reference["logps"]


def reference_mean_logps(e: LossContext) -> Tensor:
    """The same per token."""
    return e.batch.reference["logps"] / e.policy.lengths


def lengths(e: LossContext) -> Tensor:
    """Tokens of the completion, end of sequence included."""
    return e.policy.lengths


def feature_drift(e: LossContext, *, divergence: str, k: Count, feature_weights: Any = None) -> Tensor:
    """How far the completion's pooled SAE features are from the reference's (`sae.compute_feature_drift`)."""
    assert e.sae is not None and e.policy.residual is not None
    reference = e.batch.reference["features"]
    return saes.compute_feature_drift(
        e.sae,
        e.policy.residual,
        e.batch.content_lengths,
        reference,
        divergence=divergence,
        k=k,
        feature_weights=feature_weights,
    )


def position_kl(e: LossContext) -> Tensor:
    """Sum over the completion's tokens of KL(reference || policy) of the next token (TDPO, 2404.11999)."""
    return sum_by_sequence(e.policy.token_kl, e.batch.sequence, e.batch.num_sequences)


def desirable(e: LossContext) -> Tensor:
    """Whether the completion is labelled as desirable (bool); for unpaired data."""
    return e.batch.record["desirable"]


def kl(e: LossContext) -> Tensor:
    """KTO's z, one number for all sequences of an optimiser step (`UnpairedPreferenceTrainer.before_step`)."""
    assert e.kl is not None
    return e.kl.expand(e.batch.num_sequences)


def mean_reward(e: LossContext) -> Tensor:
    """BCO's running mean of the rewards, one number for all sequences (`BCOTrainer`)."""
    assert e.mean_reward is not None
    return e.mean_reward.expand(e.batch.num_sequences)


def on_policy_weight(e: LossContext) -> Tensor:
    """How likely the completion is under the policy, beside what it would sample itself, without gradient:
    exp of the mean over the tokens of log p(token) - log sum_v p(v)^2 (WPO, 2406.11827, Eq. 4)."""
    assert e.policy.token_log_squares is not None
    apart = e.policy.token_logps.detach() - e.policy.token_log_squares
    return (sum_by_sequence(apart, e.batch.sequence, e.batch.num_sequences) / e.policy.lengths).exp()


def rewards(e: LossContext) -> Tensor:
    """What a reward model gives the completion."""
    return e.policy.rewards


def policy_token_logps(e: LossContext) -> Tensor:
    """Log-probability of each completion token under the policy, [N]."""
    return e.policy.token_logps


def reference_token_logps(e: LossContext) -> Tensor:
    """The same under the reference."""
    return e.batch.reference["token_logps"]


def sequence(e: LossContext) -> Tensor:
    """Which record each completion token belongs to, [N]: which single completion, or which pair."""
    return e.batch.sequence % max(1, len(e.batch.index))


def values(e: LossContext) -> Tensor:
    """The value head's forecast before each completion token, [N]."""
    assert e.value_head is not None
    return e.value_head(e.policy.hidden.float()).squeeze(1)


def advantages(e: LossContext) -> Tensor:
    """Generalised advantage of each completion token, [N], whitened over the optimiser step."""
    return e.batch.record["advantages"]


def returns(e: LossContext) -> Tensor:
    """What the value head should have forecast, [N]."""
    return e.batch.record["returns"]


QUANTITIES: dict[str, Callable[..., Tensor]] = {
    quantity.__name__: quantity
    for quantity in (
        policy_logps,
        policy_mean_logps,
        reference_logps,
        reference_mean_logps,
        lengths,
        feature_drift,
        position_kl,
        desirable,
        kl,
        mean_reward,
        on_policy_weight,
        rewards,
        policy_token_logps,
        reference_token_logps,
        sequence,
        values,
        advantages,
        returns,
    )
}
OF_TOKENS = {  # those that are [N]
    "policy_token_logps",
    "reference_token_logps",
    "sequence",
    "values",
    "advantages",
    "returns",
}
NEEDS = {  # what has to be there before the first step, for those that take more than the policy's own scores
    "reference_logps": {"reference"},
    "reference_mean_logps": {"reference"},
    "feature_drift": {"reference", "sae"},
    "position_kl": {"live_reference"},
    "kl": {"reference", "kl"},
    "on_policy_weight": {"log_squares"},
    "reference_token_logps": {"reference"},
}


@dataclass(frozen=True)
class Input:
    """A positional parameter of a loss: it names a quantity, for all sequences or for one side."""

    parameter: str
    quantity: str
    side: str | None


@dataclass(frozen=True)
class Binding:
    """A loss matched with its configuration."""

    inputs: tuple[Input, ...]
    options: dict[str, dict[str, Any]]  # hyper-parameters of `__init__`, `loss`, the loader and each quantity
    needs: frozenset[str]  # of "reference", "live_reference", "sae", "kl", "log_squares"

    def with_options(self, reader: str, options: dict[str, Any]) -> "Binding":
        """The same binding, with other options for one of their readers."""
        return replace(self, options={**self.options, reader: options})


def parse_parameter(parameter: str) -> Input | None:
    """The quantity and side that a parameter of a loss names, or None."""
    words = ["reference" if word == "ref" else word for word in parameter.split("_")]
    side = next((side for side in SIDES if side in words), None)
    name = "_".join(word for word in words if word != side)
    for quantity in (name, f"policy_{name}"):
        if quantity in QUANTITIES:
            return Input(parameter, quantity, side)
    return None


def keyword_only(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The hyper-parameters of a function: its keyword-only parameters."""
    parameters = inspect.signature(function, eval_str=True).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def may_have(trainer: Any, quantity: str, side: str | None) -> bool:
    """Whether the losses of a trainer may ask for a quantity of that side."""
    return side in (trainer.token_sides if quantity in OF_TOKENS else trainer.sides)


def known_parameters(trainer: Any) -> list[str]:
    """Every full name that a loss may ask for."""
    names = []
    for side in trainer.sides:
        for quantity in QUANTITIES:
            if not may_have(trainer, quantity, side):
                continue
            owner, _, rest = quantity.partition("_")
            owned = owner in ("policy", "reference")
            names.append("_".join(filter(None, (owner, side, rest) if owned else (side, quantity))))
    return names


def bind(trainer: type, loader: Callable[..., Any], settings: LossSettings) -> Binding:
    """Match a trainer's signature with the keys of `config.loss`.

    Raises UserError naming everything that does not fit: a parameter that is no quantity; a hyper-parameter that has
    no value, or one that its annotation does not allow; a key that nothing reads.
    """
    name, problems, inputs = trainer.__name__, [], []
    loss = inspect.signature(trainer.loss)  # type: ignore[attr-defined]
    for parameter in list(loss.parameters.values())[1:]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            continue
        found = parse_parameter(parameter.name)
        if found is None or not may_have(trainer, found.quantity, found.side):
            known = known_parameters(trainer)
            hint = suggest(parameter.name, known)
            problems.append(f"{name}.loss asks for {parameter.name!r}{hint}; it can have {', '.join(known)}")
        else:
            inputs.append(found)

    quantities = dict.fromkeys(i.quantity for i in inputs)
    readers = {"init": trainer.__init__, "loss": trainer.loss, "loader": loader}  # type: ignore[attr-defined, misc]
    readers |= {quantity: QUANTITIES[quantity] for quantity in quantities}
    wanted = {reader: keyword_only(function) for reader, function in readers.items()}
    values = settings.hyperparameters
    try:
        checked(hyperparameters(name, tuple(readers.values())), values, "loss")
    except UserError as error:
        takes = ", ".join(sorted({key for parameters in wanted.values() for key in parameters})) or "none"
        unread = "is read by nothing" in str(error)
        problems.append(f"{error}\nhyper-parameters of {name}: {takes}" if unread else str(error))
    if problems:
        raise UserError("\n".join(problems))
    return Binding(
        inputs=tuple(inputs),
        options={reader: {k: values[k] for k in parameters if k in values} for reader, parameters in wanted.items()},
        needs=frozenset().union(*(NEEDS.get(quantity, set()) for quantity in quantities)),
    )


@functools.cache
def hyperparameters(name: str, readers: tuple[Callable[..., Any], ...]) -> type[Settings]:
    """The hyper-parameters as settings: the annotation of each keyword-only parameter is its type."""
    fields: dict[str, Any] = {}
    for reader in readers:
        for key, parameter in keyword_only(reader).items():
            empty = inspect.Parameter.empty
            annotation = Any if parameter.annotation is empty else parameter.annotation
            fields[key] = (annotation, ... if parameter.default is empty else parameter.default)
    return create_model(name, __base__=Settings, **fields)
