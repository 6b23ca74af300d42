"""The keys of config/model/*.yaml: a model, how it is loaded, and how much of it computes at once."""

from typing import Annotated, Literal

from pydantic import Field

from utils import Count, Name, PathName, Positive, Settings, Share, Text


class AdapterSettings(Settings):
    """Low-rank adapters (LoRA), `model.peft`."""

    lora_r: Count
    lora_alpha: Count
    lora_dropout: Share
    target_modules: Text | Annotated[list[Text], Field(min_length=1)]


class ModelSettings(Settings):
    """`model` of the configuration."""

    name: Name
    name_or_path: PathName
    tokenizer_name_or_path: PathName | None
    load_from: PathName | None
    reference_path: PathName | None
    policy_dtype: Literal["float32", "bfloat16"]
    weights_dtype: Literal["float32", "bfloat16"]
    attn_implementation: Literal["auto", "segments", "flex", "flash_attention_2", "sdpa", "eager"]
    layout: Literal["auto", "padded", "packed", "shared_prefix"]
    activation_checkpointing: Literal["auto", False, True, "full", "selective"]
    compile: bool
    block_name: str | None
    hybrid_sharding: bool
    cpu_offload: bool
    use_peft: bool
    peft: AdapterSettings
    load_in_4bit: bool
    batch_size: Count
    gradient_accumulation_steps: Count
    max_tokens: Count | None
    eval_batch_size: Count
    max_grad_norm: Positive | None
    max_length: Count
    max_prompt_length: Count
