"""The whole configuration as one schema: each key with its type and range. The checks and `--help` are made from it."""

from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from autoencoders.settings import SAESection
from data.settings import DataSettings
from judging.settings import LabelSettings
from sampling.settings import SamplingSettings
from training.settings import TrainingSettings
from utils import MOST, Count, Natural, NonNegative, PathName, Settings, UserError


class OnlineSettings(Settings):
    """Rounds of sampling, labelling and training (launch/online.py)."""

    rounds: Count
    prompts: Count
    samples: Count
    reward: list[str]


class Config(TrainingSettings, SamplingSettings, LabelSettings):
    """The whole configuration. config/config.yaml has the defaults, with a line on each key."""

    mode: Literal[
        "train",
        "plan",
        "online",
        "sample",
        "eval",
        "features",
        "label",
        "rewards",
        "alpacaeval",
        "arenahard",
        "mtbench",
    ]
    nproc: Count | None
    online: OnlineSettings
    sae: SAESection
    compare_to: PathName | None
    data: Annotated[list[PathName], Field(min_length=1)] | None
    score_by: Annotated[list[Natural], Field(min_length=1)] | None
    probe: PathName | list[PathName] | None
    probe_texts: Count
    probe_features: Count
    probe_min_auc: Annotated[float, Field(ge=0.5, le=1)]
    probe_weight: NonNegative
    probe_others: NonNegative


EVERYWHERE = {"mode", "exp_name", "model", "loss", "term", "sae", *DataSettings.model_fields}
TRAINING, SAMPLING, LABELS = (
    {field.alias or name for name, field in section.model_fields.items()} - EVERYWHERE
    for section in (TrainingSettings, SamplingSettings, LabelSettings)
)
FEATURES = {"compare_to", "data", "score_by", "probe"} | {key for key in Config.model_fields if "probe_" in key}
# What a mode reads beside EVERYWHERE. Those that train, or check a run as it was trained, check its other keys too.
CHECKED = {"log_to", "wandb", "optimizer", "optimizer_options", "eval_best", "toy_comparison", "show_tokens"}
BENCHMARK = SAMPLING - {"n_samples"}  # which is sampled whole
READ: dict[str, set[str]] = {
    "train": TRAINING | {"nproc", "max_new_tokens"},
    "plan": TRAINING | {"nproc", "max_new_tokens"},
    "online": TRAINING | {"nproc", "max_new_tokens", "n_samples", "online", "backend"},
    "sample": SAMPLING,
    "alpacaeval": BENCHMARK,
    "arenahard": BENCHMARK,
    "mtbench": BENCHMARK,
    "eval": CHECKED | SAMPLING | {"nproc", "n_eval_examples"},
    "features": CHECKED | SAMPLING | FEATURES | {"nproc", "n_eval_examples", "n_examples"},
    "label": LABELS | {"nproc"},
    "rewards": {"nproc", "files", "samples_dir", "n_eval_examples"},
}


def require_read(keys: Iterable[str], mode: str) -> None:
    """Raises UserError with a line for each key, of those that were given, that does nothing in the mode."""
    lines = []
    for key in dict.fromkeys(key.partition(".")[0] for key in keys):
        where = [other for other, read in READ.items() if key in read]
        if where and mode not in where:
            lines.append(f"{key} does nothing with mode={mode}; it is for {', '.join(where)}")
    if lines:
        raise UserError("\n".join(lines))


@cache  # the help asks for each of its sections
def kinds(settings: type[Settings] = Config) -> dict[str, str]:
    """What each key may be, in a few words: by its full name."""
    schema = settings.model_json_schema()
    found: dict[str, str] = {}

    def add(section: dict[str, Any], prefix: str) -> None:
        for name, own in section.get("properties", {}).items():
            found[prefix + name] = kind_of(own)
            if "$ref" in own:
                add(schema["$defs"][own["$ref"].rpartition("/")[2]], f"{prefix}{name}.")

    add(schema, "")
    return found


def kind_of(own: dict[str, Any]) -> str:
    """A part of a JSON schema in a few words."""
    if "anyOf" in own:
        return " or ".join(dict.fromkeys(map(kind_of, own["anyOf"])))
    if "enum" in own or "const" in own:
        return "|".join(str(value).lower() for value in own.get("enum") or [own["const"]])
    if own.get("type") in ("integer", "number"):
        return f"{'whole ' * (own['type'] == 'integer')}number {' and '.join(range_of(own))}".rstrip()
    if own.get("type") == "array":
        return f"[{kind_of(own.get('items', {}))}, ...]"
    return {"string": "text", "boolean": "true|false", "null": "null"}.get(own.get("type", ""), "keys with values")


def range_of(own: dict[str, Any]) -> list[str]:
    """The bounds of a number."""
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    return [f"{sign} {own[bound]:g}" for bound, sign in signs.items() if bound in own and abs(own[bound]) < MOST]
