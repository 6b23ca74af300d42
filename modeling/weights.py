"""Weights on disk: where they are, reading into a model each rank's own slices, and writing a model whole.

Read: safetensors in Hub format, or a `policy.pt`. Nothing here loads a pickle that could run code.
"""

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from distributed import parallel
from distributed.sharding import full_tensor, local, own_ranges, reshard
from modeling import adapters
from utils import UserError, file_digest, fingerprint, resolve_path

WEIGHTS = "model*.safetensors"  # beside others: a PPO run's value head, the same weights under names of their authors'
NOT_WEIGHTS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")  # buffers in older checkpoints


class Weights(Protocol):
    """Named tensors of which any part can be read."""

    source: Path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, ranges: tuple[slice, ...]) -> Tensor: ...


class SafetensorsWeights:
    """The safetensors files of a Hub-format directory."""

    def __init__(self, directory: Path) -> None:
        self.source = directory
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_files(directory):
            try:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dictionary)
                        self.files[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a safetensors file ({error})") from error

    def read(self, name: str, ranges: tuple[slice, ...]) -> Tensor:
        # Opened anew for each tensor: what was read through one mapping of the file counts as this process's memory
        # until that mapping goes.
        with safe_open(self.files[name], "pt") as file:
            return file.get_slice(name)[ranges] if ranges else file.get_tensor(name)


class PolicyFile:
    """A `policy.pt` of this repo or of HALOs."""

    def __init__(self, path: Path) -> None:
        self.source = path
        try:
            self.state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        except (RuntimeError, KeyError, TypeError, AttributeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).partition(".")[0]  # torch adds advice on how to load it all the same
            raise UserError(f"{path}: not a policy.pt of plain tensors ({reason})") from error

    def read(self, name: str, ranges: tuple[slice, ...]) -> Tensor:
        return self.state[name][ranges]


def weight_files(directory: Path) -> list[Path]:
    """The model's own safetensors files in a Hub-format directory. Raises UserError where there are none."""
    files = sorted(directory.glob(WEIGHTS))
    if not files:
        raise UserError(f"{directory}: no {WEIGHTS} (pickled weights are not loaded; convert them to safetensors)")
    return files


def find_weights(load_from: str) -> Path:
    """What `model.load_from` names: a `policy.pt`, or a Hub-format directory (for a run directory, its LATEST)."""
    path = resolve_path(load_from)
    if (path / "LATEST").is_dir():
        path = path / "LATEST"
    if path.is_file() or list(path.glob(WEIGHTS)):
        return path
    if (path / "policy.pt").is_file():
        return path / "policy.pt"
    raise UserError(f"model.load_from={load_from}: no policy.pt, safetensors or run directory there")


def open_weights(directory: Path, load_from: str | None) -> Weights:
    """The weights in `directory`, or those that `load_from` replaces them with."""
    source = directory if load_from is None else find_weights(load_from)
    return PolicyFile(source) if source.is_file() else SafetensorsWeights(source)


def weights_digest(directory: Path, load_from: str | None) -> str:
    """Changes whenever the weights that `open_weights` would read do, on any number of ranks."""
    source = directory if load_from is None else find_weights(load_from)
    files = [source] if source.is_file() else [source / "config.json", *weight_files(source)]
    return parallel.from_rank_zero(lambda: fingerprint([file_digest(file) for file in files]))


# ---------------------------------------------------------------------------------------------------- into a model


def fill(model: PreTrainedModel, weights: Weights, new_tokens: int = 0) -> None:
    """Read into each parameter this rank's own slice of it.

    What no file has is made: adapters, a reward model's head and the embeddings of `new_tokens` that the vocabulary has
    grown by. Raises UserError listing all that is missing, left over or of another shape, before anything is read.
    """
    names: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():  # a tied parameter has several names, and files have one of them or all
        names.setdefault(id(tensor), []).append(name)
    problems: dict[str, list[str]] = {"missing": [], "left over": [], "of another shape": []}
    sources: dict[str, str] = {}  # of a tensor of the model: its name in the file
    known = set()
    for own in names.values():
        candidates = [adapters.name_in_base(name) for name in own]
        known.update(candidates)
        source = next((name for name in candidates if name in weights.shapes), None)
        shape = tuple(tensors[own[0]].shape)
        if source is not None:
            sources[own[0]] = source
            there = weights.shapes[source]
            if there not in (shape, (shape[0] - new_tokens, *shape[1:])):
                problems["of another shape"].append(f"{source} ({list(there)}, the model's is {list(shape)})")
        elif not is_new(own[0]):
            problems["missing"].append(candidates[0])
    heads = {"lm_head.weight", "embed_out.weight"} if any(name.startswith(REWARD_HEAD) for name in tensors) else set()
    left_over = sorted(weights.shapes.keys() - known - heads)
    problems["left over"] += [name for name in left_over if not name.endswith(NOT_WEIGHTS)]
    require_matching_weights(weights.source, problems)
    with torch.no_grad():
        for own in names.values():
            tensor = tensors[own[0]]
            if own[0] not in sources:
                made = init_missing(own[0], tensor.shape, model.config.initializer_range)
                local(tensor).copy_(made[own_ranges(tensor)])
            elif local(tensor).numel():
                local(tensor).copy_(read_rows(weights, sources[own[0]], own_ranges(tensor)))


def require_matching_weights(source: Path, problems: Mapping[str, list[str]]) -> None:
    """Raise UserError for weights that do not fit, if there are any, by what is wrong with them."""
    if any(problems.values()):
        lists = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(found)}" for kind, found in problems.items() if found)
        raise UserError(f"{source}: the weights do not fit the model. {lists}")


REWARD_HEAD = "score."


def is_new(name: str) -> bool:
    return adapters.is_adapter(name) or name.startswith(REWARD_HEAD)


def init_missing(name: str, shape: torch.Size, std: float) -> Tensor:
    """The start of a parameter that no file has: the same on any number of ranks, as long as all ask in one order."""
    if adapters.is_adapter(name):
        return adapters.init_adapter(name, shape)
    return nn.init.normal_(torch.empty(shape), std=std)


def read_rows(weights: Weights, name: str, ranges: tuple[slice, ...]) -> Tensor:
    """A part of a tensor; rows beyond the file's own are the mean of all, so that a new token first changes little."""
    rows = weights.shapes[name][0] if ranges else 0
    if not ranges or ranges[0].stop <= rows:
        return weights.read(name, ranges)
    own = weights.read(name, (slice(min(ranges[0].start, rows), rows), *ranges[1:]))
    total = torch.zeros(weights.shapes[name][1:])
    for start in range(0, rows, MEAN_ROWS):
        total += weights.read(name, (slice(start, min(start + MEAN_ROWS, rows)), *ranges[1:])).float().sum(0)
    more = ranges[0].stop - max(ranges[0].start, rows)
    return torch.cat([own, (total / rows).to(own.dtype).expand(more, *total.shape)])


MEAN_ROWS = 4096  # read at once


# ---------------------------------------------------------------------------------------------------- out of a model


def gather(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights, whole, on the CPU of rank 0, adapters merged into what they adapt; nothing on the others.

    Every rank has to call it. A tied parameter is there once, under each of its names.
    """
    reshard(model)
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    own = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if adapters.is_adapter(name) or name not in own:  # what quantisation keeps beside a weight
            continue
        if id(tensor) not in seen:
            full = adapters.merged(model, name, full_tensor(tensor))
            # A copy of its own: what was gathered on the CPU may be a view of more.
            seen[id(tensor)] = torch.empty_like(full, device="cpu").copy_(full) if parallel.rank() == 0 else full[:0]
        state[adapters.name_in_base(name)] = seen[id(tensor)]
    return state if parallel.rank() == 0 else {}


def write_hub_format(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """The directory that `from_pretrained` and vLLM read, from what `gather` gives on rank 0."""
    once = {id(tensor): name for name, tensor in reversed(state.items())}
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights written are not quantised
    config.save_pretrained(folder)
    if isinstance(model.generation_config, GenerationConfig):
        model.generation_config.save_pretrained(folder)
    save_torch_state_dict({name: state[name] for name in once.values()}, folder)
