"""The keys of config/model/*.yaml: a model, how it is loaded, and how much of it computes at once."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from utils import Count, Name, PathName, Positive, Settings, Share, Text


def fast_dtype(name: str) -> str:
    """What `auto` stands for here: bfloat16 on a GPU and on a processor that multiplies it, else float32. A processor
    without such instructions takes fifty times as long for a matrix product in bfloat16."""
    if name != "auto":
        return name
    import torch  # takes seconds to import, and --help asks for these settings too

    units = torch.cpu.get_capabilities()
    is_fast = torch.cuda.is_available() or any(units.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if is_fast else "float32"


Dtype = Annotated[Literal["auto", "float32", "bfloat16"], AfterValidator(fast_dtype)]


class AdapterSettings(Settings):
    """Low-rank adapters (LoRA), `model.peft`."""

    lora_r: Count
    lora_alpha: Count
    lora_dropout: Share
    target_modules: Text | Annotated[list[Text], Field(min_length=1)]


class SAEHeadSettings(Settings):
    """`sae_head` in the config.json of a reward model whose head reads an SAE's features."""

    d_sae: Count
    k: Count | None


class ModelSettings(Settings):
    """`model` of the configuration."""

    name: Name
    name_or_path: PathName
    tokenizer_name_or_path: PathName | None
    load_from: PathName | None
    reference_path: PathName | None
    policy_dtype: Dtype
    weights_dtype: Dtype
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
