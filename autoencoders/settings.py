"""The keys of config/sae/*.yaml: which SAEs are read, and where they read."""

from typing import Annotated, Literal

from pydantic import Field

from data.settings import ReadAt
from utils import MOST, Name, Natural, PathName, Positive, Settings


class SAESettings(Settings):
    """One SAE."""

    name: Name | None = None
    path: PathName | None = None
    format: str = "auto"
    layer: Natural | None = None
    hook: Literal["residual", "mlp"] | None = None
    weight: Positive = 1.0  # of its drift, among several


class Steering(Settings):
    """How much of a feature is added."""

    index: Natural
    weight: Annotated[float, Field(ge=-MOST, le=MOST)]


class SAESection(SAESettings):
    """`sae` of the configuration: one SAE, or `parts`, several by names of the user's; and what is done to features."""

    parts: dict[str, SAESettings] = Field(default_factory=dict)
    at: ReadAt = "text"
    ablate: list[Natural] | PathName | None = None
    ablate_to: Literal["zero", "mean"] = "zero"
    steer: list[Steering] | None = None
