"""The keys of config/sae/*.yaml: which SAEs are read, and where they read."""

from typing import Literal

from pydantic import Field

from utils import Name, Natural, PathName, Positive, Settings


class SAESettings(Settings):
    """One SAE."""

    name: Name | None = None
    path: PathName | None = None
    format: str = "auto"
    layer: Natural | None = None
    hook: Literal["residual", "mlp"] | None = None
    weight: Positive = 1.0  # of its drift, among several


class SAESection(SAESettings):
    """`sae` of the configuration: one SAE, or `parts`, several by names of the user's."""

    parts: dict[str, SAESettings] = Field(default_factory=dict)
