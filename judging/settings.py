"""The keys of the configuration that labelling samples reads."""

from typing import Annotated, Literal

from pydantic import Field

from data.settings import DataSettings
from modeling.settings import ModelSettings
from utils import NonNegative, PathName


class LabelSettings(DataSettings):
    """Which samples are scored, and what training data is made of them."""

    files: PathName | Annotated[list[PathName], Field(min_length=1)] | None
    labels: PathName | None
    label_as: Literal["pairs", "binary", "best", "advantages"] = Field(alias="as")
    rejected: Literal["worst", "random"]
    min_margin: NonNegative
    threshold: float | None
    model: ModelSettings
