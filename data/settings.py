"""The keys of the configuration that say what the data is and how it is rendered."""

from typing import Annotated, Literal

from pydantic import Field

from utils import Count, PathName, Seed, Settings, Share


class TemplateSettings(Settings):
    """How a conversation becomes text."""

    template: Literal["tulu", "chat"] | None
    human_prefix: str
    human_suffix: str
    assistant_prefix: str
    assistant_suffix: str


class DataSettings(TemplateSettings):
    """Which data is read, and which part of it."""

    datasets: PathName | Annotated[list[PathName], Field(min_length=1)]
    eval_datasets: PathName | Annotated[list[PathName], Field(min_length=1)] | None
    data_dir: PathName | None
    train_split: str
    eval_split: str
    held_out: Annotated[float, Field(gt=0, lt=1)]
    max_bad_rows: Share
    max_row_mb: Count
    train_on: Literal["targets", "all"]
    cache_dir: PathName
    seed: Seed
