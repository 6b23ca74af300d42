"""What a loss may ask for, by name, and the check that a loss and its YAML agree.

A loss is a method whose positional parameters name quantities and whose keyword-only parameters are its
hyper-parameters:

    def loss(self, policy_chosen_mean_logps, policy_rejected_mean_logps, *, beta): ...

A quantity is one value for each sequence, [S], or, where it says so, for each completion token, [N], or each of some
features, [K]. In a loss on pairs each of the first two is asked for once for the chosen and once for the rejected
completions, [B] each, or those of their tokens: `policy_logps` as `policy_chosen_logps` and `policy_rejected_logps`,
`feature_drift` as `chosen_feature_drift`, and so on. Short names work too: `chosen_logps` is `policy_chosen_logps`,
`ref_chosen_logps` is `reference_chosen_logps`.

A term that is added to a loss is such a function too. It may also ask for the values of all sequences of pairs.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import BeforeValidator, create_model
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

import sae as saes
from data.batch import Batch, sum_by_sequence
from distributed import parallel
from training.settings import LossSettings, TermSettings
from utils import SIDES, Count, Natural, PathName, Settings, UserError, checked, suggest


def list_or_file(value: Any) -> Any:
    if value is not None and not isinstance(value, str | list):
        raise PydanticCustomError("feature_weights", "has to be null, a list of features, or a file of one")
    return value


FeatureWeights = Annotated[str | list[Any] | None, BeforeValidator(list_or_file)]  # once the SAE is read, a tensor


class MismatchedMeans(NamedTuple):
    """Means over each prompt of an optimiser step with another record's completion, [] each."""

    logps: Tensor  # of the log-probability per token
    logratio: Tensor | None  # of the summed log-ratio, where there is a reference


@dataclass
class LossContext:
    """All that quantities are computed from, for one batch."""

    batch: Batch
    policy: Any  # models.Scores; models.RewardScores of a reward model
    sae: saes.SAE | None = None
    mismatched: MismatchedMeans | None = None
    mean_reward: Tensor | None = None  # of all steps so far
    value_head: nn.Module | None = None

    @functools.cached_property
    def sinks(self) -> list[Tensor]:
        """The attention sinks [M] where each SAE reads."""
        assert self.sae is not None
        return [saes.attention_sinks(x, self.batch.read_lengths) for x in self.sae.vectors(self.policy.residual)]


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


def feature_drift(
    e: LossContext, *, divergence: Literal["kl", "mse"], k: Count, feature_weights: FeatureWeights = None
) -> Tensor:
    """How far the completion's pooled SAE features are from the reference's (`sae.compute_feature_drift`)."""
    assert e.sae is not None and e.policy.residual is not None
    reference = e.batch.reference["features"]
    return saes.compute_feature_drift(
        e.sae,
        e.policy.residual,
        e.batch.read_lengths,
        reference,
        divergence=divergence,
        k=k,
        feature_weights=cast(Any, feature_weights),
        sinks=e.sinks,
    )


def policy_features(e: LossContext, *, latents: list[Natural]) -> Tensor:
    """Pooled activations of the SAE's features `latents` in the completion, [S, K], with gradient."""
    assert e.sae is not None and e.policy.residual is not None
    residual = e.policy.residual
    wanted = torch.tensor(latents, device=residual.device)
    ends = torch.tensor([member.d_sae for member in e.sae.members], device=residual.device).cumsum(0)
    kept = ~torch.stack(e.sinks, 1)[:, torch.bucketize(wanted, ends, right=True)]  # [M, K]
    owner = saes.owners(e.batch.read_lengths).to(residual.device)
    values = e.sae.encode_latents(residual, wanted) * kept
    sums, counts = (
        values.new_zeros(e.batch.num_sequences, len(latents)).index_add(0, owner, x) for x in (values, kept.float())
    )
    return sums / counts.clamp(min=1)


def reference_features(e: LossContext, *, latents: list[Natural]) -> Tensor:
    """The same under the reference."""
    return e.batch.reference["features"][:, latents]


def feature_figures(e: LossContext, *, latents: list[Natural], figures: PathName) -> Tensor:  # noqa: ARG001
    """What a table says of the features `latents`, [K]: a column of data_features.parquet (FILE.parquet:COLUMN), which
    `Binding.with_sae` has read."""
    return cast(Any, figures)


def position_kl(e: LossContext) -> Tensor:
    """Sum over the completion's tokens of KL(reference || policy) of the next token (TDPO, 2404.11999)."""
    return sum_by_sequence(e.policy.token_kl, e.batch.sequence, e.batch.num_sequences)


def desirable(e: LossContext) -> Tensor:
    """Whether the completion is one to learn (bool): labelled as desirable, chosen of a pair, or a demonstration."""
    if "desirable" in e.batch.record:
        return e.batch.record["desirable"]
    return torch.arange(e.batch.num_sequences, device=e.batch.target.device) < len(e.batch.index)


def kl(e: LossContext) -> Tensor:
    """KTO's z, one number for all sequences of an optimiser step: the mean log-ratio of each prompt with another
    record's completion, and at least 0."""
    assert e.mismatched is not None and e.mismatched.logratio is not None
    return e.mismatched.logratio.clamp(min=0).expand(e.batch.num_sequences)


def mismatched_logps(e: LossContext) -> Tensor:
    """The mean log-probability per token of these completions, one number for all sequences of an optimiser step."""
    assert e.mismatched is not None
    return e.mismatched.logps.expand(e.batch.num_sequences)


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


def reconstruction_error(e: LossContext) -> Tensor:
    """How much the SAE of a reward model's head misses of the vector that it reads, as a share of its square."""
    return e.policy.reconstruction_error


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
        policy_features,
        reference_features,
        feature_figures,
        position_kl,
        desirable,
        kl,
        mismatched_logps,
        mean_reward,
        on_policy_weight,
        rewards,
        reconstruction_error,
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
OF_SOME = {  # `gives` says whose
    "kl",
    "mismatched_logps",
    "mean_reward",
    "rewards",
    "reconstruction_error",
    "values",
    "advantages",
    "returns",
}
OF_FEATURES = {"feature_figures"}  # those that are [K], of no sequence
NEEDS = {  # what has to be there before the first step, for those that take more than the policy's own scores
    "reference_logps": {"reference"},
    "reference_mean_logps": {"reference"},
    "feature_drift": {"reference", "sae"},
    "policy_features": {"sae"},
    "reference_features": {"reference", "sae"},
    "feature_figures": {"sae"},
    "position_kl": {"live_reference"},
    "kl": {"reference", "mismatched"},
    "mismatched_logps": {"mismatched"},
    "on_policy_weight": {"log_squares"},
    "reconstruction_error": {"sae"},
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
    """A loss, or a term, matched with its configuration."""

    where: str  # the section of the configuration
    inputs: tuple[Input, ...]
    options: dict[str, dict[str, Any]]  # hyper-parameters of `__init__`, `loss`, the loader and each quantity
    needs: frozenset[str]  # of "reference", "live_reference", "sae", "mismatched", "log_squares"
    settings: type[Settings]  # that check the hyper-parameters
    terms: tuple["Term", ...] = ()  # that are added to the loss

    def quantities(self) -> set[str]:
        """What the loss and its terms ask for."""
        return {i.quantity for part in self.parts() for i in part.inputs}

    def parts(self) -> list["Binding"]:
        """The loss's own binding, and those of its terms."""
        return [self, *(term.binding for term in self.terms)]

    def with_sae(self, sae: saes.SAE) -> "Binding":
        """The same binding, with what is said of an SAE's features checked, and feature weights read into tensors.
        Raises UserError for what does not fit the SAE."""
        options = dict(self.options)
        if "feature_drift" in options:
            drift = saes.drift_options(sae, self.where, **options["feature_drift"])
            if drift["feature_weights"] is not None:
                drift["feature_weights"] = drift["feature_weights"].to(parallel.device())
            options["feature_drift"] = drift
        for quantity in ("policy_features", "reference_features", "feature_figures"):
            if quantity in options:
                saes.require_features(options[quantity]["latents"], sae.d_sae, f"{self.where}.latents")
        if "feature_figures" in options:
            own = options["feature_figures"]
            figures = saes.read_feature_figures(own["figures"], sae, f"{self.where}.figures")
            options["feature_figures"] = own | {"figures": figures[own["latents"]].to(parallel.device())}
        terms = tuple(replace(term, binding=term.binding.with_sae(sae)) for term in self.terms)
        return replace(self, options=options, terms=terms)

    def compute(self, context: LossContext) -> dict[str, Tensor]:
        """The quantities that the parameters name, each once."""
        wanted = dict.fromkeys(i.quantity for i in self.inputs)
        return {name: QUANTITIES[name](context, **self.options[name]) for name in wanted}


@dataclass(frozen=True)
class Term:
    """A function that is added to a loss: it gives a value for each record, or each sequence, or their mean."""

    name: str
    function: Callable[..., Tensor]
    weight: float
    binding: Binding


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
    """The hyper-parameters of a function: its keyword-only parameters. Raises UserError for annotations that name
    nothing."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except Exception as error:  # an annotation is any expression
        raise UserError(f"{name_of(function)}: an annotation has no value ({told(error)})") from error
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def told(error: Exception) -> str:
    """An error's kind and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def sides_of(trainer: Any, quantity: str) -> tuple[str | None, ...]:
    """Of which sides the losses of a trainer may ask for a quantity: of none, where it does not have that."""
    if quantity not in trainer.gives and (trainer.is_reward or quantity in OF_SOME):
        return ()
    if quantity in OF_FEATURES:
        return (None,)
    return trainer.token_sides if quantity in OF_TOKENS else trainer.sides


def sides_in_term(trainer: Any, quantity: str) -> tuple[str | None, ...]:
    """The same of terms, which may ask for the values of all sequences of pairs too."""
    sides = sides_of(trainer, quantity)
    return tuple(dict.fromkeys([None, *sides])) if sides else ()


SidesOf = Callable[[Any, str], tuple[str | None, ...]]


def known_parameters(trainer: Any, sides: SidesOf = sides_of) -> list[str]:
    """Every full name that a loss may ask for."""
    names = []
    for side in dict.fromkeys(side for quantity in QUANTITIES for side in sides(trainer, quantity)):
        for quantity in QUANTITIES:
            if side not in sides(trainer, quantity):
                continue
            owner, _, rest = quantity.partition("_")
            owned = owner in ("policy", "reference")
            names.append("_".join(filter(None, (owner, side, rest) if owned else (side, quantity))))
    return names


def bind(trainer: Any, loader: Callable[..., Any], settings: LossSettings) -> Binding:
    """Match a trainer's signature with the keys of `config.loss`.

    Raises UserError naming everything that does not fit: a parameter that is no quantity; a hyper-parameter that has
    no value, or one that its annotation does not allow; a key that nothing reads.
    """
    parameters = list(inspect.signature(trainer.loss).parameters.values())[1:]
    readers = {"init": trainer.__init__, "loss": trainer.loss, "loader": loader}
    return match(trainer, f"{trainer.__name__}.loss", parameters, readers, settings.hyperparameters, "loss", sides_of)


def bind_term(trainer: Any, name: str, function: Callable[..., Tensor], settings: TermSettings) -> Term:
    """The same for a term, beside the losses of a trainer. Raises UserError, also where it trains no language model."""
    where = f"term.{name}"
    if not trainer.trains_policy:
        raise UserError(f"{where}: {trainer.__name__} trains no language model, which is what a term is added to")
    parameters, readers = list(inspect.signature(function).parameters.values()), {"loss": function}
    if taken := {"weight", "function"} & keyword_only(function).keys():
        raise UserError(
            f"{where}.{min(taken)} is a key of every term, so {function.__name__} cannot have it for itself"
        )
    asking = f"{function.__name__} of {where}"
    binding = match(trainer, asking, parameters, readers, settings.hyperparameters, where, sides_in_term)
    return Term(name, function, settings.weight, binding)


def match(
    trainer: Any,
    asking: str,
    parameters: Sequence[inspect.Parameter],
    readers: dict[str, Callable[..., Any]],
    values: dict[str, Any],
    where: str,
    sides: SidesOf,
) -> Binding:
    """Match positional parameters with quantities, and the keyword-only ones of all readers with `values`."""
    problems, inputs = [], []
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            problems.append(f"{asking} has the parameter {parameter}, which names no quantity")
            continue
        found = parse_parameter(parameter.name)
        if found is None or found.side not in sides(trainer, found.quantity):
            known = known_parameters(trainer, sides)
            lacks = found is not None and not sides(trainer, found.quantity)
            hint = f", which {trainer.__name__} does not have" if lacks else suggest(parameter.name, known)
            problems.append(f"{asking} asks for {parameter.name!r}{hint}; it can have {', '.join(known)}")
        else:
            inputs.append(found)

    quantities = dict.fromkeys(i.quantity for i in inputs)
    readers |= {quantity: QUANTITIES[quantity] for quantity in quantities}
    wanted = {reader: keyword_only(function) for reader, function in readers.items()}
    owner, settings = asking.removesuffix(".loss"), Settings
    try:
        settings = hyperparameters(owner, tuple(readers.values()))
        checked(settings, values, where)
    except UserError as error:
        takes = ", ".join(sorted({key for parameters in wanted.values() for key in parameters})) or "none"
        unread = "is read by nothing" in str(error)
        problems.append(f"{error}\nhyper-parameters of {owner}: {takes}" if unread else str(error))
    except Exception as error:  # a bound that does not go with its type, a check of the user's that fails
        problems.append(f"{asking}: an annotation of its hyper-parameters cannot check {where}.* ({told(error)})")
    if problems:
        raise UserError("\n".join(problems))
    return Binding(
        where=where,
        inputs=tuple(inputs),
        options={reader: {k: values[k] for k in parameters if k in values} for reader, parameters in wanted.items()},
        needs=frozenset(trainer.needs).union(*(NEEDS.get(quantity, set()) for quantity in quantities)),
        settings=settings,
    )


@functools.cache
def hyperparameters(name: str, readers: tuple[Callable[..., Any], ...]) -> type[Settings]:
    """The hyper-parameters as settings: the annotation of each keyword-only parameter is its type. Raises UserError for
    one that is none, or a name that settings cannot have."""
    found: type[Settings] = Settings
    for reader in readers:
        for key, parameter in keyword_only(reader).items():
            empty = inspect.Parameter.empty
            annotation: Any = Any if parameter.annotation is empty else parameter.annotation
            field: Any = (annotation, ... if parameter.default is empty else parameter.default)
            try:
                found = create_model(name, __base__=found, **{key: field})
                found.model_rebuild()  # names within a type that are written as text
                if key not in found.model_fields:
                    raise NameError("a name that begins with _ is private")
            except Exception as error:  # pydantic has many kinds
                raise UserError(
                    f"{name_of(reader)}: its hyper-parameter {key!r} cannot be checked ({told(error)}); annotate it "
                    "with a plain type, such as float, or as in trainers.py"
                ) from error
    return found


def hyperparameters_of_term(function: Callable[..., Tensor]) -> type[Settings]:
    """The hyper-parameters of a term and of the quantities that it asks for, for whatever loss."""
    inputs = [parse_parameter(name) for name in inspect.signature(function).parameters]
    return hyperparameters(function.__name__, (function, *(QUANTITIES[i.quantity] for i in inputs if i)))
