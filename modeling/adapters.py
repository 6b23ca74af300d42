"""Low-rank adapters (LoRA, Hu et al. 2021, 2106.09685) with peft: add them, turn them off, merge them, write them.

They are inside the model's own modules, so all code that handles a model also handles one with adapters. With its
adapters turned off, the model is what it was before training, and so it is the reference.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distributed.sharding import full_tensor
from modeling.settings import ModelSettings
from modeling.tensor_files import TensorFile, safetensors_file
from utils import UserError, written

NAME = "default"  # the adapter's name within the model
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft names them


def add(model: PreTrainedModel, settings: ModelSettings, dtype: torch.dtype) -> None:
    """Freeze the model and add adapters, kept in `dtype`. `settings` is config.model; its `peft` describes them.

    Raises UserError for modules that the model has not."""
    from peft import LoraConfig  # an extra, and slow to import

    options = settings.peft
    adapters = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules,
        base_model_name_or_path=settings.name_or_path,
        task_type="CAUSAL_LM",
    )
    try:
        model.add_adapter(adapters, adapter_name=NAME)
    except ValueError as error:
        raise UserError(f"model.peft.target_modules={written(options.target_modules)}: {error}") from error
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)
            if not parameter.is_meta:
                parameter.data.copy_(init_adapter(name, parameter.shape))


def is_adapter(name: str) -> bool:
    """Whether a parameter with this name belongs to an adapter."""
    return ".lora_" in name


def name_in_base(name: str) -> str:
    """The name of a parameter in the model without adapters."""
    return name.replace(".base_layer.", ".")


def init_adapter(name: str, shape: torch.Size) -> Tensor:
    """An adapter's initial values: A as in a linear layer, B zero, so that the adapter first changes nothing."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


def merged(model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """A full weight [out, in] plus scaling * B @ A, if it has an adapter. Every rank must call it."""
    if not name.endswith(".base_layer.weight"):
        return weight
    layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
    down, up = full_tensor(layer.lora_A[NAME].weight).float(), full_tensor(layer.lora_B[NAME].weight).float()  # type: ignore
    return (weight.float() + layer.scaling[NAME] * (up @ down)).to(weight.dtype)  # type: ignore[index]


@contextlib.contextmanager
def off(model: PreTrainedModel) -> Iterator[None]:
    """Turn the adapters off and use eval mode inside the `with` block; restore both afterwards."""
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


def begin_adapter(model: PreTrainedModel, folder: Path, layout: Mapping[str, Tensor]) -> TensorFile:
    """A directory for peft's `PeftModel.from_pretrained`, with room for the adapter's tensors. `layout` has their
    shapes and dtypes, by name in the model; in the file each has its `name_alone`."""
    model.peft_config[NAME].save_pretrained(str(folder))
    tensors = {name_alone(name): tensor for name, tensor in layout.items()}
    return safetensors_file(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def name_alone(name: str) -> str:
    """What peft calls a parameter of an adapter that is written by itself."""
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"
