"""The keys of the configuration that sampling reads."""

from typing import Annotated, Literal

from pydantic import Field

from data.settings import DataSettings
from modeling.settings import ModelSettings
from utils import Count, Name, Natural, Settings


class DecodingSettings(Settings):
    """How completions are drawn."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Natural
    max_new_tokens: Count
    stop: str | list[Annotated[str, Field(min_length=1)]]


class SamplingSettings(DataSettings, DecodingSettings):
    """What is sampled, from which prompts, by whom, into which file."""

    mode: str
    exp_name: Name
    n_samples: Count
    samples: Count
    samples_dir: str
    backend: Literal["transformers", "vllm", "openai"]
    base_url: str | None
    served_model: Name | None
    tensor_parallel: bool
    model: ModelSettings
