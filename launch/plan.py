"""`++mode=plan`: what a run would take, counted without a weight being read."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import models
from autoencoders.formats import load_sources
from data.batch import Batch, collate, micro_batches
from distributed import parallel
from distributed.sharding import DTYPES
from launch.settings import Config, RunClasses, RunPaths
from modeling import adapters
from modeling.attention import FUSED
from modeling.head import CHUNK_ELEMENTS
from modeling.settings import ModelSettings
from models import decoder_layers, final_hidden_states
from sae import ENCODE_ELEMENTS
from training.loop import make_optimizer
from utils import UserError, console


@dataclass
class Plan:
    """Bytes, for each rank unless it says otherwise."""

    ranks: int
    parameters: int  # of the model
    trained: int  # of these, or of the adapters
    memory: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)


def print_plan(config: Config, classes: RunClasses, paths: RunPaths) -> None:
    """Print the plan of a run on `nproc` ranks (null: as many as there are GPUs here, or one).

    Raises UserError for a loss whose run cannot be planned.
    """
    if not classes.trainer.can_plan:
        raise UserError(f"mode=plan counts what training a language model takes; loss={config.loss.name} trains none")
    plan = make(config, classes, paths, config.nproc or parallel.number_of_ranks(None))
    console.print(
        f"{config.model.name}: {plan.parameters / 1e6:,.1f} M parameters, {plan.trained / 1e6:,.1f} M trained, "
        f"on {plan.ranks} {'rank' if plan.ranks == 1 else 'ranks'}"
    )
    for title, rows in (("memory of each rank, at its peak", plan.memory), ("disk", plan.disk)):
        table = Table(title, "GB")
        for name, size in rows.items():
            table.add_row(name, f"{size / 1e9:,.2f}")
        if rows is plan.memory:
            table.add_row("together", f"{sum(rows.values()) / 1e9:,.2f}", style="bold")
        console.print(table)


def make(config: Config, classes: RunClasses, paths: RunPaths, ranks: int) -> Plan:
    """Count what a run would take. Activations are those of a micro-batch of the longest records there can be."""
    own = config.model
    keeps, computes = DTYPES[own.weights_dtype], DTYPES[own.policy_dtype]
    architecture = models.load_config(paths.model)
    pairs = None not in classes.trainer.sides
    implementation, layout = models.choose_attention(own, architecture, pairs=pairs)
    implementation = "outline" if implementation in FUSED else implementation
    kind: Any = AutoModelForSequenceClassification if classes.trainer.is_reward else AutoModelForCausalLM
    with init_empty_weights(include_buffers=True):
        model = kind.from_config(architecture, dtype=computes, attn_implementation=implementation)
    model.tie_weights()
    layers = decoder_layers(model, own.block_name)
    whole = count(model)
    if own.use_peft:
        adapters.add(model, own, keeps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = Plan(ranks, whole, trained)

    frozen = 0 if trained == whole else whole
    split = ranks > 1 or keeps != computes
    largest = max(map(count, layers))
    plan.memory["weights"] = (frozen * computes.itemsize + trained * keeps.itemsize) / ranks
    plan.memory["gradients"] = trained * keeps.itemsize / ranks
    plan.memory["optimiser"] = trained * keeps.itemsize * optimizer_slots(config) / ranks
    if split:  # the embeddings and the head, and two layers: the one that runs and the next one
        rest = whole - sum(map(count, layers))
        plan.memory["gathered weights and their gradients"] = 2 * (rest + 2 * largest) * computes.itemsize
    batch = longest_micro_batch(own, layout, ranks, pairs=pairs)
    plan.memory["activations"] = activations(model, own, batch)
    plan.memory["logits, a chunk at a time"] = (
        3 * 4 * min(CHUNK_ELEMENTS, len(batch.target) * architecture.get_text_config().vocab_size)
    )
    if "live_reference" in classes.binding.needs and not own.use_peft:
        plan.memory["live reference"] = whole * computes.itemsize / ranks
    if "sae" in classes.binding.needs:
        own_tensors = sum(tensor.nbytes for tensor in load_sources(paths.saes).buffers())
        plan.memory["SAE, and a chunk of its activations"] = own_tensors + 3 * 4 * ENCODE_ELEMENTS

    # Saving and exporting hold one full tensor at a time, when gradients and activations, which are more, are gone.
    kept = max(1, config.keep_checkpoints)
    state = trained * keeps.itemsize * (1 + optimizer_slots(config))
    until = "" if config.keep_checkpoints else ", until the run has ended"
    plan.disk[f"states to resume from ({kept}, and one being written){until}"] = (kept + 1) * state
    export = whole * (computes if frozen else keeps).itemsize
    formats = " and ".join({"policy_pt": "policy.pt", "hub": "safetensors"}[name] for name in config.export)
    plan.disk[f"each export ({formats})"] = len(config.export) * export
    if "reference" in classes.binding.needs:
        completions = len([side for side in classes.trainer.sides if side]) or 1
        tokens = completions * (own.max_length - own.max_prompt_length)
        plan.disk["reference cache, at most, without features, of 100,000 records"] = 1e5 * 4 * tokens
    return plan


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def optimizer_slots(config: Config) -> float:
    """How many numbers the optimiser keeps for each parameter: counted after a step of a small one."""
    parameter = torch.zeros(64, requires_grad=True)
    parameter.grad = torch.ones(64)
    optimizer = make_optimizer(config, [parameter], lr=0.0)
    optimizer.step()
    kept = optimizer.state_dict()["state"].get(0, {})
    return sum(value.numel() for value in kept.values() if isinstance(value, Tensor) and value.numel() > 1) / 64


def longest_micro_batch(own: ModelSettings, layout: str, ranks: int, *, pairs: bool) -> Batch:
    """A micro-batch of the longest records that there can be, on the meta device."""
    prompt, completion = own.max_prompt_length, own.max_length - own.max_prompt_length
    completions = 2 if pairs else 1
    shapes = [(prompt, [completion] * completions)] * own.batch_size
    parts = micro_batches(shapes, layout, ranks=ranks, least=own.gradient_accumulation_steps, max_tokens=own.max_tokens)
    longest = max((part for rank in parts for part in rank), key=len)
    records = [
        {"prompt_ids": [number + 1] * prompt, "completion_ids": [[0] * completion] * completions, "index": number}
        for number in longest
    ]
    return collate(records, layout, pad_id=0, eos_id=-1).to("meta")


def activations(model: PreTrainedModel, own: ModelSettings, batch: Batch) -> float:
    """Bytes that the layers keep for the backward pass, at its peak."""
    everything = kept_for_backward(model, batch)
    if not own.activation_checkpointing:
        return everything
    layers = decoder_layers(model, own.block_name)
    one_layer = everything / len(layers)  # has all of its own in the backward pass
    with Products() as products:
        final_hidden_states(model, batch)
    models.recompute_activations(layers, own.activation_checkpointing)
    kept = kept_for_backward(model, batch) + (products.size if own.activation_checkpointing == "selective" else 0)
    return kept + one_layer


class Products(TorchDispatchMode):
    """Counts the bytes that selective checkpointing keeps; no hook sees them."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in models.COSTLY:
            first = result[0] if isinstance(result, tuple) else result
            self.size += first.nbytes
        return result


def kept_for_backward(model: PreTrainedModel, batch: Batch) -> float:
    """Bytes that a forward pass keeps, beside the parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # else the address of a storage may be used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        final_hidden_states(model, batch)
    return float(sum(sizes.values()))
