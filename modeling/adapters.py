"""Low-rank adapters (LoRA, Hu et al. 2021, 2106.09685) through peft: added, turned off, merged, written.

They sit inside the model's own modules, so all else that handles a model handles one with adapters. The model with its
adapters turned off is the model before training, and so the reference.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distributed import parallel
from distributed.sharding import full_tensor, reshard
from modeling.settings import ModelSettings

NAME = "default"  # of the adapter within the model


def add(model: PreTrainedModel, settings: ModelSettings, dtype: torch.dtype) -> None:
    """Freeze the model and add adapters, kept in `dtype`, as `settings`, config.model, says (`peft`)."""
    from peft import LoraConfig  # an extra, and slow to import

    own = settings.peft
    model.add_adapter(
        LoraConfig(
            r=own.lora_r,
            lora_alpha=own.lora_alpha,
            lora_dropout=own.lora_dropout,
            target_modules=own.target_modules,
            base_model_name_or_path=settings.name_or_path,
            task_type="CAUSAL_LM",
        ),
        adapter_name=NAME,
    )
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)
            if not parameter.is_meta:
                parameter.data.copy_(init_adapter(name, parameter.shape))


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name


def name_in_base(name: str) -> str:
    """What a parameter is called in the model without adapters."""
    return name.replace(".base_layer.", ".")


def init_adapter(name: str, shape: torch.Size) -> Tensor:
    """An adapter's start: A as a linear layer's, B zero, so that the model is first what it was."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


def merged(model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """A whole weight [out, in] with what its adapter, if it has one, adds: scaling * B @ A. For all ranks to call."""
    if not name.endswith(".base_layer.weight"):
        return weight
    layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
    down, up = full_tensor(layer.lora_A[NAME].weight).float(), full_tensor(layer.lora_B[NAME].weight).float()  # type: ignore
    return (weight.float() + layer.scaling[NAME] * (up @ down)).to(weight.dtype)  # type: ignore[index]


@contextlib.contextmanager
def off(model: PreTrainedModel) -> Iterator[None]:
    """The model without its adapters, in eval mode; afterwards as it was."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    training = model.training
    model.eval()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(training)


def write_adapter(model: PreTrainedModel, folder: Path) -> None:
    """The adapter alone, as peft's `PeftModel.from_pretrained` reads it. For all ranks to call; rank 0 writes."""
    reshard(model)
    state = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": full_tensor(parameter).cpu().contiguous()
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }
    if parallel.rank() == 0:
        model.peft_config[NAME].save_pretrained(str(folder))
        safetensors.torch.save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
