"""The keys of the configuration that sampling reads."""

from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from data.settings import DataSettings
from modeling.settings import ModelSettings
from utils import Count, Name, Natural, PathName, RunName, Settings, Share, Text


class DecodingSettings(Settings):
    """How completions are drawn."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Natural
    max_new_tokens: Count
    stop: Text | list[Text]


class SamplingSettings(DataSettings, DecodingSettings):
    """What is sampled, from which prompts, by whom, into which file."""

    mode: str
    exp_name: RunName
    n_samples: Count
    samples: Count
    samples_dir: PathName
    backend: Literal["transformers", "vllm", "openai"]
    base_url: str | None
    served_model: Name | None
    max_failed: Share
    tensor_parallel: bool
    model: ModelSettings

    def may_fail(self, prompts: int) -> int:
        """How many samples of so many prompts a server may leave without an answer."""
        return ceil(self.max_failed * prompts * self.samples)
