"""The keys of the configuration that say what the data is and how it is rendered."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from utils import Count, PathName, Seed, Settings, Share, possible_path

ReadAt = Literal["text", "predicting"]  # of a completion, by an SAE: see `data.batch.collate`


class TemplateSettings(Settings):
    """How a conversation becomes text."""

    template: Literal["tulu", "chat"] | None
    human_prefix: str
    human_suffix: str
    assistant_prefix: str
    assistant_suffix: str


class MixedSource(Settings):
    """A data set, and how often an epoch of training holds each of its records, on average."""

    name: PathName
    weight: Annotated[float, Field(gt=0, le=1000)]


def mixed_source(value: Any) -> str | MixedSource:
    """An entry of `datasets`. Raises an error of pydantic's where it is none."""
    if isinstance(value, str):
        return possible_path(value)
    try:
        return MixedSource.model_validate(value)
    except ValidationError:
        raise PydanticCustomError(
            "data_set", "has to be a name, a file or {name: hh, weight: 0.3}, the weight above 0 and at most 1000"
        ) from None


TrainingSource = Annotated[str | MixedSource, BeforeValidator(mixed_source)]


class DataSettings(TemplateSettings):
    """Which data is read, and which part of it."""

    datasets: PathName | Annotated[list[TrainingSource], Field(min_length=1)]
    eval_datasets: PathName | Annotated[list[PathName], Field(min_length=1)] | None
    data_dir: PathName | None
    train_split: str
    eval_split: str
    held_out: Annotated[float, Field(gt=0, lt=1)]
    max_bad_rows: Share
    max_row_mb: Count
    train_on: Literal["targets", "turns", "all"]
    cache_dir: PathName
    seed: Seed
