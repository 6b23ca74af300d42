"""`++mode=plan`: what a run would take, counted without a weight being read.

The shapes of the models and SAEs that config/ names are in shapes.json beside this file, so that their plans need no
file of theirs.
"""

import contextlib
import json
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

import models
from autoencoders.formats import SAESource, place_of, read_files, require_format, sae_sections
from data.batch import Batch, collate, count_positions
from distributed import parallel
from distributed.sharding import DTYPES
from launch import assembly, settings
from launch.schema import Config
from launch.settings import RunClasses
from modeling import adapters
from modeling.attention import FUSED
from modeling.head import chunk_rows
from modeling.settings import ModelSettings
from models import decoder_layers, final_hidden_states
from sae import ENCODE_ELEMENTS, SAE, together
from training.loop import make_optimizer
from utils import UserError, console, resolve_path

SHAPES: dict[str, Any] = json.loads(Path(__file__).with_name("shapes.json").read_text())
NODE = 8  # ranks, that hybrid sharding splits a model over


@dataclass
class Plan:
    """Bytes. Memory is that of each rank."""

    ranks: int
    parameters: int  # of the model
    trained: int  # of these, or of the adapters
    held: dict[str, float] = field(default_factory=dict)  # all along,
    passing: dict[str, float] = field(default_factory=dict)  # beside it while a micro-batch goes forward and backward,
    updating: dict[str, float] = field(default_factory=dict)  # and while the optimiser changes the weights
    disk: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """The most memory at any time."""
        return sum(self.held.values()) + max(sum(self.passing.values()), sum(self.updating.values()))


def print_plan(config: Config, classes: RunClasses) -> None:
    """Print the plan of a run on `nproc` ranks (null: as many as there are GPUs here, or one).

    Raises UserError for a loss whose run cannot be planned.
    """
    if not classes.trainer.can_plan:
        raise UserError(f"mode=plan counts what training a language model takes; loss={config.loss.name} trains none")
    plan = make(config, classes, config.nproc or parallel.number_of_ranks(None))
    own = ", a GPU for each" if device_of(config.model).type == "cuda" else ""
    console.print(
        f"{config.model.name}: {plan.parameters / 1e6:,.1f} M parameters, {plan.trained / 1e6:,.1f} M trained, "
        f"on {plan.ranks} {'rank' if plan.ranks == 1 else 'ranks'}{own}, in {config.model.policy_dtype}"
    )
    table = Table("memory of each rank, GB", "forward and backward", "optimiser's update")
    for rows, columns in ((plan.held, (0, 1)), (plan.passing, (0,)), (plan.updating, (1,))):
        for name, size in rows.items():
            table.add_row(name, *(f"{size / 1e9:,.2f}" if column in columns else "" for column in (0, 1)))
    sums = [sum({**plan.held, **own}.values()) for own in (plan.passing, plan.updating)]
    table.add_row("together", *(f"{size / 1e9:,.2f}" for size in sums), style="bold")
    console.print(table)
    console.print(
        f"Each rank needs {plan.peak / 1e9:,.2f} GB, the larger of the two sums, and about a tenth of its memory for "
        "what is not counted (docs/scale.md)."
    )
    table = Table("disk", "GB")
    for name, size in plan.disk.items():
        table.add_row(name, f"{size / 1e9:,.2f}")
    console.print(table)


def make(config: Config, classes: RunClasses, ranks: int) -> Plan:
    """Count what a run would take. Activations are those of the largest micro-batch that there can be.

    A run in bf16 is planned for a GPU, also where there is none. Raises UserError for a model that cannot be trained
    so, and where a model or an SAE is neither in shapes.json nor to be found.
    """
    own = config.model
    keeps, computes = DTYPES[own.weights_dtype], DTYPES[own.policy_dtype]
    architecture, reading = find(config, classes)
    pairs = None not in classes.trainer.sides
    device = device_of(own)
    implementation, layout = models.choose_attention(own, architecture, pairs=pairs, device=device)
    implementation = "outline" if implementation in FUSED else implementation
    kind: Any = AutoModelForSequenceClassification if classes.trainer.is_reward else AutoModelForCausalLM
    with init_empty_weights(include_buffers=True), no_init_weights():
        model = kind.from_config(architecture, dtype=computes, attn_implementation=implementation)
    model.tie_weights()
    layers = decoder_layers(model, own.block_name)
    whole, largest = count(model), max(map(count, layers))
    rest = whole - sum(map(count, layers))  # the embeddings, the head and the last norm
    if own.use_peft:
        adapters.add(model, own, keeps)
    trained, largest_trained = count_trained(model), max(map(count_trained, layers))
    rest_trained = trained - sum(map(count_trained, layers))
    plan = Plan(ranks, whole, trained)

    frozen = 0 if trained == whole else whole
    shards = min(ranks, NODE) if own.hybrid_sharding else ranks
    slots, temporary = optimizer_numbers(config)
    plan.held["weights"] = (frozen * computes.itemsize + trained * keeps.itemsize) / shards
    if own.load_in_4bit:  # all on every rank
        plan.held["weights"] = quantised(model, computes) + trained * keeps.itemsize
        shards = 1
    plan.held["gradients"] = trained * keeps.itemsize / shards
    plan.held["optimiser"] = trained * keeps.itemsize * slots / shards
    if temporary:
        plan.updating["temporary tensors of the optimiser"] = trained * keeps.itemsize * temporary / shards
    is_split = (ranks > 1 or keeps != computes) and not own.load_in_4bit
    if is_split:
        # The rest, and of the layers the one that runs, the next one, and a buffer that one of them is gathered into;
        # gradients as autograd gives them, and those of a layer in fp32, to be summed over the ranks.
        gathered = rest + 3 * largest, rest_trained + largest_trained
        plan.passing["gathered weights and their gradients"] = sum(gathered) * computes.itemsize + 4 * largest_trained
    batch = largest_micro_batch(own, layout, ranks, pairs=pairs)
    plan.passing["activations"], plan.passing["a layer in the backward pass"] = activations(model, own, batch)
    head = model.get_output_embeddings()
    if head is not None:
        words = len(head.weight)
        logits = 3 * 4 * min(chunk_rows(words, device), len(batch.target)) * words
        plan.passing["logits, a chunk at a time, and the head's gradient"] = logits + 4 * count_trained(head)
    if "live_reference" in classes.binding.needs and not own.use_peft:
        plan.held["live reference"] = (whole / shards + (rest if is_split else 0)) * computes.itemsize
    if reading is not None:
        size = sum(tensor.nbytes for tensor in reading.sae.buffers())
        plan.held["SAE"] = size * (2 if classes.trainer.has_sae_head else 1)  # with its decoder
        plan.passing["a chunk of the SAE's activations"] = 3 * 4 * ENCODE_ELEMENTS

    # Saving and exporting hold one full tensor at a time, when gradients and activations, which are more, are gone.
    kept = max(1, config.keep_checkpoints)
    state = trained * keeps.itemsize * (1 + slots)
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


def device_of(own: ModelSettings) -> torch.device:
    """What a plan is made for: a GPU wherever the model computes in bf16."""
    return torch.device("cuda") if own.policy_dtype == "bfloat16" else parallel.device()


def find(config: Config, classes: RunClasses) -> tuple[PretrainedConfig, assembly.Reading | None]:
    """The architecture of what is trained and, where the run needs them, the SAEs: found and checked as those of a run
    are. Those in shapes.json need no file; such an SAE is on the meta device.

    Raises UserError where a run would.
    """
    own = config.model
    known = {name: shape for kind in SHAPES.values() for name, shape in kind.items() if not resolve_path(name).exists()}
    files, sources = settings.find_files(config, classes.binding.needs, known)
    folder = files.get("model")
    architecture = models.load_config(folder) if folder else AutoConfig.for_model(**known[own.name_or_path])
    models.require_positions(architecture, own.name_or_path, {"model.max_length": own.max_length})
    reading = new_head = None
    if "sae" in classes.binding.needs:
        reading = read_saes(config, architecture, sources, known)
        new_head = reading.new_head(classes)
    classes.trainer.check_weights(classes.binding)
    if folder and "tokenizer" in files:
        assembly.check_start(config, classes, folder, files["tokenizer"], new_head)
    if new_head is not None:
        new_head.cut(architecture)
    return architecture, reading


def read_saes(
    config: Config, architecture: PretrainedConfig, sources: Sequence[SAESource], known: Mapping[str, Any]
) -> assembly.Reading:
    """The SAEs of the configuration: those that were found, and those of which only the shape is `known`. Raises
    UserError where they do not fit the model."""
    here = {source.where: source for source in sources}
    sections, members, places = sae_sections(config.sae), list[SAE](), list[tuple[int, str]]()
    for where, section in sections.items():
        if where in here:
            members.append(read_files(here[where].files))
            places.append((here[where].layer, here[where].hook))
        else:
            require_format(section, where)
            d_in, d_sae, *said = known[str(section.path)]
            places.append(place_of(section, where, (said[0], said[1]), str(section.path)))
            members.append(empty_sae(d_in, d_sae))
    read = {where: layer for where, (layer, _) in zip(sections, places)}
    settings.require_layers(config.model.name, architecture, read)
    reading = assembly.Reading(together(members, [section.weight for section in sections.values()]), places)
    reading.require_fit(config.model, architecture, [str(section.path) for section in sections.values()])
    return reading


def empty_sae(d_in: int, d_sae: int) -> SAE:
    """An SAE without values."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    return SAE(empty(d_in, d_sae), empty(d_sae), empty(d_sae, d_in), empty(d_in), empty(d_sae))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def quantised(model: PreTrainedModel, computes: torch.dtype) -> float:
    """Bytes of a frozen model whose linear layers, but for the head, are in 4 bits, with a scale for 64 numbers in 8
    bits."""
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    small = sum(m.weight.numel() for m in linear if not m.weight.requires_grad)
    return small * (1 / 2 + 1 / 64) + (count(model) - count_trained(model) - small) * computes.itemsize


class Alive(TorchDispatchMode):
    """Counts the numbers in the tensors that operations make, as long as these are there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        before = {tensor.data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.numel() > 1 and made.data_ptr() not in before:
                self.now += made.numel()
                self.most = max(self.most, self.now)
                weakref.finalize(made, self.gone, made.numel())
        return result

    def gone(self, numbers: int) -> None:
        self.now -= numbers


def optimizer_numbers(config: Config) -> tuple[float, float]:
    """How many numbers the optimiser keeps for each parameter, and how many more it makes at once in a step that works
    on many tensors together (`foreach`), as on a GPU: counted with small parameters."""
    parameters = [torch.zeros(64, requires_grad=True) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.ones(64)
    optimizer = make_optimizer(config, parameters, lr=0.0)
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    optimizer.step()
    kept = optimizer.state_dict()["state"].get(0, {})
    with Alive() as alive:
        optimizer.step()
    slots = sum(value.numel() for value in kept.values() if isinstance(value, Tensor) and value.numel() > 1)
    return slots / 64, round(alive.most / (64 * len(parameters)))


def largest_micro_batch(own: ModelSettings, layout: str, ranks: int, *, pairs: bool) -> Batch:
    """The largest micro-batch that there can be, of a rank, on the meta device: as many records of the greatest length
    as fit, at least one, and of a shorter one as many positions as are left."""
    prompt, completion = own.max_prompt_length, max(1, own.max_length - own.max_prompt_length)
    longest = (prompt, [completion] * (2 if pairs else 1))
    size, records = count_positions([longest], layout), -(-own.batch_size // ranks)
    records = -(-records // own.gradient_accumulation_steps)
    full = records if own.max_tokens is None else max(1, min(records, own.max_tokens // size))
    shapes = [longest] * full
    if own.max_tokens is not None and full < records and (left := own.max_tokens - full * size) > 0:
        shorter = (max(1, prompt * left // size), [max(1, completion * left // size)] * (2 if pairs else 1))
        shapes.append(shorter)
    found = [
        {"prompt_ids": [number + 1] * prompt, "completion_ids": [[0] * own for own in completions], "index": number}
        for number, (prompt, completions) in enumerate(shapes)
    ]
    return collate(found, layout, pad_id=0, eos_id=-1).to("meta")


def activations(model: PreTrainedModel, own: ModelSettings, batch: Batch) -> tuple[float, float]:
    """Bytes that the layers keep for the backward pass; and those that a layer then takes: the gradients of its
    activations and, where these are computed again, the activations."""
    layers = decoder_layers(model, own.block_name)
    kinds = [kind_of(layer) for layer in layers]
    with few_layers(layers, kinds) as weight:
        everything = kept_for_backward(model, batch, weight)
    one_layer = everything / len(layers)
    which = models.checkpointing(own.activation_checkpointing, model)
    if not which:
        return everything, one_layer
    products = 0
    if which == "selective":
        with few_layers(layers, kinds) as weight, Products(weight) as counted:
            final_hidden_states(model, batch)
        products = counted.size
    models.recompute_activations(layers, which)
    with few_layers(layers, kinds) as weight:
        return kept_for_backward(model, batch, weight) + products, 2 * one_layer


@contextlib.contextmanager
def few_layers(layers: Sequence[nn.Module], kinds: Sequence[Hashable]) -> Iterator[Callable[[], int]]:
    """Let two layers of each kind compute, and the others give tensors like what these gave. What it gives says how
    often that counts which is counted at the moment: in the second layer of a kind, once for each but the first."""
    counts, given, running = Counter(kinds), dict[Hashable, list[Any]](), [1]

    def computed_twice(forward: Callable[..., Any], kind: Hashable) -> Callable[..., Any]:
        def run(*inputs: Any, **named: Any) -> Any:
            results = given.setdefault(kind, [])
            if len(results) == 2:
                return tree_map_only(Tensor, like, results[-1])
            running[0] = counts[kind] - 1 if results else 1
            results.append(forward(*inputs, **named))
            running[0] = 1
            return results[-1]

        return run

    forwards = [layer.forward for layer in layers]
    for layer, kind in zip(layers, kinds):
        layer.forward = computed_twice(layer.forward, kind)
    try:
        yield lambda: running[0]
    finally:
        for layer, forward in zip(layers, forwards):
            layer.forward = forward


def like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor).requires_grad_(tensor.requires_grad)


def kind_of(layer: nn.Module) -> Hashable:
    """Equal for layers that differ in their weights and their number alone."""
    plain = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | None) and key != "layer_idx"
    ]
    return type(layer), tuple(plain), tuple(parameter.shape for parameter in layer.parameters())


class Products(TorchDispatchMode):
    """Counts the bytes that selective checkpointing keeps; no hook sees them."""

    def __init__(self, weight: Callable[[], int]) -> None:
        super().__init__()
        self.size, self.weight = 0, weight

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in models.COSTLY:
            first = result[0] if isinstance(result, tuple) else result
            self.size += self.weight() * first.nbytes
        return result


def kept_for_backward(model: PreTrainedModel, batch: Batch, weight: Callable[[], int] = lambda: 1) -> float:
    """Bytes that a forward pass keeps, beside the parameters; each time as often as `weight` says."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # else the address of a storage may be used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in sizes:
            sizes[storage._cdata] = weight() * storage.nbytes()
            alive.append(tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        final_hidden_states(model, batch)
    return float(sum(sizes.values()))
