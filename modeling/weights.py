"""Weights on disk: find them, read each rank's slices into a model, and write a full model, one tensor at a time.

Two formats are read: safetensors in Hub format, and `policy.pt`. No pickle that could run code is loaded. Some models
have other names, or fewer and larger tensors, on disk than in memory; transformers knows the conversion.
"""

import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from distributed import parallel
from distributed.sharding import full_layout, full_tensor, local_ranges, local_slice, reshard
from modeling import adapters
from modeling.tensor_files import TensorFile, TorchFile, safetensors_file
from utils import UserError, fingerprint, resolve_path, sound_digest

# A directory can hold other safetensors: the value head of a PPO run, or the same weights under their authors' names.
WEIGHTS = "model*.safetensors"
POLICY_FILE = "policy.pt"
FORMATS = {"policy_pt": POLICY_FILE, "hub": WEIGHTS}  # of an export: the files that its weights are in
NOT_WEIGHTS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")  # buffers in older checkpoints
REWARD_HEAD = "score."
SAE_OF_HEAD = f"{REWARD_HEAD}W_enc"  # only in files of a reward model whose head reads an SAE's features
MEAN_ROWS = 4096  # rows read at once to compute a mean


class Weights(Protocol):
    """Named tensors, which can be read in parts."""

    source: Path  # for messages

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
        # Open the file for each tensor: what is read through a mapping counts as memory of this process until the
        # mapping is closed.
        with safe_open(self.files[name], "pt") as file:
            return file.get_slice(name)[ranges] if ranges else file.get_tensor(name)


class PolicyFile:
    """A `policy.pt` written by this repository or by HALOs."""

    def __init__(self, path: Path) -> None:
        self.source = path
        try:
            self.state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
            self.shapes = {str(name): tuple(tensor.shape) for name, tensor in self.state.items()}
            for name, tensor in self.state.items():
                if tensor.layout != torch.strided or tensor.is_complex() or not isinstance(name, str):
                    raise TypeError(f"{name!r} is none")
        except Exception as error:  # of a damaged file torch raises many kinds
            reason = str(error).partition(".")[0]  # without torch's advice to load it unsafely
            raise UserError(f"{path}: not a policy.pt of plain tensors ({reason})") from error

    def read(self, name: str, ranges: tuple[slice, ...]) -> Tensor:
        return self.state[name][ranges]


class CutWeights:
    """The weights of a model that ends after some layers, without its final norm, and those of a new reward head."""

    def __init__(self, weights: Weights, layers: int, norm: str, head: Mapping[str, Tensor]) -> None:
        self.source, self.weights = weights.source, weights
        self.head = {f"{REWARD_HEAD}{name}": tensor for name, tensor in head.items()}

        def is_kept(name: str) -> bool:
            *path, _ = name.split(".")
            number = next((int(part) for part in path if part.isdecimal()), None)
            is_norm = number is None and path[-1:] == [norm]
            return not is_norm and not name.startswith(REWARD_HEAD) and (number is None or number < layers)

        self.shapes = {name: shape for name, shape in weights.shapes.items() if is_kept(name)}
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in self.head.items()}

    def read(self, name: str, ranges: tuple[slice, ...]) -> Tensor:
        return self.head[name][ranges] if name in self.head else self.weights.read(name, ranges)


class ConvertedWeights:
    """Weights under the names, and in the shapes, that a model gives them, as `from_pretrained` converts them.

    A tensor that is only renamed is read in parts; one that is made of several, such as the experts of a layer, is made
    whole to read a part.
    """

    def __init__(self, weights: Weights, model: PreTrainedModel) -> None:
        self.source, self.weights, self.model = weights.source, weights, model
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.names: dict[str, str] = {}  # in the files, by the name in the model
        self.groups: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}  # (pattern, name in the files)
        self.whole: dict[str, Tensor] = {}  # what the group that was read last becomes
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self.find_names(conversions)
        # `revert_weight_conversion` reads it. A prefix belongs to the files that were read; all else to the model.
        model._weight_conversions = [  # type: ignore[assignment]
            each for each in conversions if each.was_used() or not isinstance(each, PrefixChange)
        ]

    def find_names(self, conversions: Sequence[object]) -> None:
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        tensors = {adapters.name_in_base(name): tensor for name, tensor in self.model.state_dict().items()}
        prefix = self.model.base_model_prefix
        for name in sorted(self.weights.shapes, key=dot_natural_key):
            found, pattern = rename_source_key(name, renamings, converters, prefix, tensors)
            if found not in tensors:  # the files have the model's names, or it has no use for this tensor
                found, pattern = rename_source_key(name, [], [], prefix, tensors)
            if pattern is None:
                self.names[found], self.shapes[found] = name, self.weights.shapes[name]
            else:
                self.groups.setdefault(found, (by_pattern[pattern], []))[1].append((pattern, name))
        for first in list(self.groups):
            made = self.convert(first, lambda name: torch.empty(self.weights.shapes[name], device="meta"))
            self.shapes |= {name: tuple(tensor.shape) for name, tensor in made.items()}
            self.groups |= dict.fromkeys(made, self.groups[first])

    def convert(self, first: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors that a group of tensors in the files becomes, by their names in the model."""
        converter, members = self.groups[first]
        own = copy.deepcopy(converter)
        for pattern, name in members:
            own.add_tensor(first, name, pattern, read(name))  # type: ignore[arg-type]
        made = own.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def read(self, name: str, ranges: tuple[slice, ...]) -> Tensor:
        if name in self.names:
            return self.weights.read(self.names[name], ranges)
        if name not in self.whole:
            self.whole = self.convert(name, lambda name: self.weights.read(name, ()))
        return self.whole[name][ranges]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model in a Hub-format directory. Raises UserError if there are none."""
    files = sorted(directory.glob(WEIGHTS))
    if not files:
        raise UserError(f"{directory}: no {WEIGHTS} (pickled weights are not loaded; convert them to safetensors)")
    return files


def find_weights(load_from: str, setting: str = "model.load_from") -> Path:
    """The weights that `model.load_from`, or another setting, names: a `policy.pt` or a Hub-format directory; LATEST of
    a run directory.

    Raises UserError if there are none.
    """
    path = resolve_path(load_from)
    if (path / "LATEST").is_dir():
        path = path / "LATEST"
    if path.is_file() or list(path.glob(WEIGHTS)):
        return path
    if (path / POLICY_FILE).is_file():
        return path / POLICY_FILE
    raise UserError(f"{setting}={load_from}: no policy.pt, safetensors or run directory there")


def formats_in(folder: Path) -> set[str]:
    """The formats in which a directory holds weights, of those that an export may have."""
    return {name for name, files in FORMATS.items() if list(folder.glob(files))}


def dtype_of(folder: Path) -> str | None:
    """The dtype that a model's config.json says its weights have."""
    said = json.loads((folder / "config.json").read_text())
    return said.get("dtype") or said.get("torch_dtype")


def only_policy_file(folder: Path) -> str | None:
    """The path of a directory's policy.pt, if it holds no weights in the Hub's format beside it."""
    return str(folder / POLICY_FILE) if formats_in(folder) == {"policy_pt"} else None


def source_of(directory: Path, load_from: str | None) -> Path:
    """Where weights are: in `directory`, or what `load_from` names."""
    load_from = load_from or only_policy_file(directory)
    return directory if load_from is None else find_weights(load_from)


def open_weights(directory: Path, load_from: str | None = None) -> Weights:
    """The weights in `directory` or, unless it is None, those that `load_from` names."""
    source = source_of(directory, load_from)
    return PolicyFile(source) if source.is_file() else SafetensorsWeights(source)


def weights_digest(directory: Path, load_from: str | None) -> str:
    """A digest of the architecture, and of the files that `open_weights` would read. It does not depend on the number
    of ranks.

    Raises UserError where a run has exported them and they are not what it wrote.
    """
    source = source_of(directory, load_from)
    files = [directory / "config.json", *([source] if source.is_file() else weight_files(source))]
    return parallel.from_rank_zero(lambda: fingerprint([sound_digest(file) for file in files]))


# ---------------------------------------------------------------------------------------------------- into a model


def load_weights(model: PreTrainedModel, weights: Weights, new_tokens: int = 0) -> None:
    """Read each parameter into the model; every rank reads only its own slice.

    Some parameters may be in no file and get initial values: adapters, a reward model's head, and the embeddings of
    `new_tokens`, which are new in the vocabulary. Raises UserError, before anything is read, with a list of all weights
    that are missing, left over or of another shape.
    """
    weights, tensors = ConvertedWeights(weights, model), model.state_dict(keep_vars=True)
    sources = match_weights(tensors, weights, new_tokens)
    with torch.no_grad():
        for name, *_ in names_by_parameter(tensors):
            tensor = tensors[name]
            if name not in sources:
                initial = init_missing(name, tensor.shape, model.config.initializer_range)
                local_slice(tensor).copy_(initial[local_ranges(tensor)])
            elif local_slice(tensor).numel():
                local_slice(tensor).copy_(read_rows(weights, sources[name], local_ranges(tensor)))


def check_weights(model: PreTrainedModel, weights: Weights, new_tokens: int = 0) -> None:
    """Raises UserError as `load_weights` does, for a model without memory; nothing is read."""
    match_weights(model.state_dict(keep_vars=True), ConvertedWeights(weights, model), new_tokens)


def names_by_parameter(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """All names of each parameter. A tied one has several, and files have one of them or all."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def match_weights(tensors: Mapping[str, Tensor], weights: Weights, new_tokens: int) -> dict[str, str]:
    """For each parameter that is in the files, by its first name in the model: its name in the files.

    Raises UserError as `load_weights` says.
    """
    problems: dict[str, list[str]] = {"missing": [], "left over": [], "of another shape": []}
    sources: dict[str, str] = {}
    known = set()
    for own_names in names_by_parameter(tensors):
        first = own_names[0]
        candidates = [adapters.name_in_base(name) for name in own_names]
        known.update(candidates)
        source = next((name for name in candidates if name in weights.shapes), None)
        shape = tuple(tensors[first].shape)
        if source is not None:
            sources[first] = source
            found = weights.shapes[source]
            if found not in (shape, (shape[0] - new_tokens, *shape[1:])):
                problems["of another shape"].append(f"{source} ({list(found)}, the model's is {list(shape)})")
        elif not may_be_missing(first):
            problems["missing"].append(candidates[0])
    is_reward_model = any(name.startswith(REWARD_HEAD) for name in tensors)
    unused_heads = {"lm_head.weight", "embed_out.weight"} if is_reward_model else set()
    left_over = sorted(weights.shapes.keys() - known - unused_heads)
    problems["left over"] += [name for name in left_over if not name.endswith(NOT_WEIGHTS)]
    require_matching_weights(weights.source, problems)
    return sources


def require_matching_weights(source: Path, problems: Mapping[str, list[str]]) -> None:
    """Raise UserError if there are problems: names of weights, by what is wrong with them."""
    if any(problems.values()):
        lists = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{source}: the weights do not fit the model. {lists}")


def may_be_missing(name: str) -> bool:
    """Whether a parameter gets initial values when no file has it."""
    return adapters.is_adapter(name) or name == f"{REWARD_HEAD}weight"


def init_missing(name: str, shape: torch.Size, std: float) -> Tensor:
    """Initial values of a full parameter. They do not depend on the number of ranks if all ranks ask in one order."""
    if adapters.is_adapter(name):
        return adapters.init_adapter(name, shape)
    return nn.init.normal_(torch.empty(shape), std=std)


def read_rows(weights: Weights, name: str, ranges: tuple[slice, ...]) -> Tensor:
    """A part of a tensor. Rows beyond the end of the file's are its mean row, so that a new token changes little."""
    rows = weights.shapes[name][0] if ranges else 0
    if not ranges or ranges[0].stop <= rows:
        return weights.read(name, ranges)
    existing = weights.read(name, (slice(min(ranges[0].start, rows), rows), *ranges[1:]))
    total = torch.zeros(weights.shapes[name][1:])
    for start in range(0, rows, MEAN_ROWS):
        total += weights.read(name, (slice(start, min(start + MEAN_ROWS, rows)), *ranges[1:])).float().sum(0)
    new_rows = ranges[0].stop - max(ranges[0].start, rows)
    return torch.cat([existing, (total / rows).to(existing.dtype).expand(new_rows, *total.shape)])


# ---------------------------------------------------------------------------------------------------- out of a model


class Export:
    """The files of an export, which rank 0 writes: in `hub` format for `from_pretrained` and vLLM, as `policy_pt`, or
    both. Beside them the model's configuration and, of a model with adapters, these by themselves."""

    def __init__(
        self, model: PreTrainedModel, folder: Path, formats: Collection[str], dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.folder, self.formats, self.dtype = model, folder, formats, dtype
        self.policy: TorchFile | None = None
        self.hub: dict[str, TensorFile] = {}  # by the name of a tensor in it
        self.adapter: TensorFile | None = None

    def open(self, layout: dict[str, Tensor], aliases: dict[str, str], rest: dict[str, Any]) -> None:
        """Begin the files. `layout` has the shapes and dtypes of what `write` will get."""
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__]
        config.dtype = self.dtype or config.dtype
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights written are not quantised
        config.save_pretrained(self.folder)
        if isinstance(self.model.generation_config, GenerationConfig):
            self.model.generation_config.save_pretrained(self.folder)
        added = {name: tensor for name, tensor in layout.items() if adapters.is_adapter(name)}
        own = {name: tensor for name, tensor in layout.items() if name not in added}
        if added:
            self.adapter = adapters.begin_adapter(self.model, self.folder / "adapter", added)
        if "policy_pt" in self.formats:
            self.policy = TorchFile(self.folder / POLICY_FILE, own, aliases, rest)
        if "hub" in self.formats:
            self.open_hub(own)

    def open_hub(self, layout: dict[str, Tensor]) -> None:
        converted = revert_weight_conversion(self.model, layout)
        tensors = {name: full_layout(tensor) for name, tensor in converted.items()}  # some were parts of one
        shards = split_torch_state_dict_into_shards(tensors)
        for file_name, names in shards.filename_to_tensors.items():
            file = safetensors_file(self.folder / file_name, {name: tensors[name] for name in names}, {"format": "pt"})
            self.hub |= dict.fromkeys(names, file)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Put some weights, that belong together, into each file."""
        if adapters.is_adapter(next(iter(tensors))):
            assert self.adapter is not None
            for name, tensor in tensors.items():
                self.adapter.write(adapters.name_alone(name), tensor)
            return
        if self.policy:
            for name, tensor in tensors.items():
                self.policy.write(name, tensor)
        if self.hub:
            for name, tensor in revert_weight_conversion(self.model, tensors).items():
                self.hub[name].write(name, tensor)

    def close(self) -> None:
        for file in {*self.hub.values(), self.policy, self.adapter}:
            if file is not None:
                file.close()


def write_weights(
    model: PreTrainedModel, folder: Path, formats: Collection[str], dtype: torch.dtype | None = None, **rest: Any
) -> None:
    """Write all weights of a model, full, with adapters merged, in a `dtype` (None: as they are kept); `rest` goes into
    the `policy_pt`. See `Export`.

    Only one tensor is gathered at a time; or a few, if they become tensors of the files together. For all ranks to
    call. Raises OSError on rank 0 where it cannot write, once the other ranks need it no more.
    """
    reshard(model)
    state = model.state_dict(keep_vars=True)
    names, aliases = names_of_weights(model, state)
    layout = {own: in_dtype(full_layout(state[name]), own, dtype) for own, name in names.items()}
    export, failures = Export(model, folder, formats, dtype), list[OSError]()

    def on_rank_zero(work: Callable[..., None], *arguments: Any) -> None:
        if parallel.rank() == 0 and not failures:
            try:
                work(*arguments)
            except OSError as error:
                failures.append(error)

    on_rank_zero(export.open, layout, aliases, rest)
    added = [name for name in names if adapters.is_adapter(name)]
    own = [name for name in names if name not in added]
    for group in (*converted_together(model, own), *([name] for name in added)):
        full = {
            name: in_dtype(adapters.merged(model, names[name], full_tensor(state[names[name]])), name, dtype)
            for name in group
        }
        on_rank_zero(export.write, full)
        del full  # before the next one is there
    on_rank_zero(export.close)
    if failures:
        raise failures[0]


def in_dtype(tensor: Tensor, name: str, dtype: torch.dtype | None) -> Tensor:
    """A weight as it is exported; adapters by themselves, and whole numbers, as they are."""
    converts = dtype is not None and tensor.is_floating_point() and not adapters.is_adapter(name)
    return tensor.to(dtype) if converts else tensor


def names_of_weights(model: PreTrainedModel, state: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """The weights in a model's state by their names without adapters: {name: name in the state}. And the other names of
    tied ones: {name: the first}."""
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    first: dict[int, str] = {}
    names, aliases = {}, {}
    for name, tensor in state.items():
        if name not in known:  # quantisation keeps other tensors beside a weight
            continue
        own = adapters.name_in_base(name)
        if id(tensor) in first:
            aliases[own] = first[id(tensor)]
        else:
            first[id(tensor)] = own
            names[own] = name
    return names, aliases


def converted_together(model: PreTrainedModel, names: Sequence[str]) -> list[list[str]]:
    """The names in groups: weights of one group become tensors of the files together (`revert_weight_conversion`)."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    reversed_ones: list[Any] = [
        each.reverse_transform() for each in conversions[::-1] if isinstance(each, WeightConverter)
    ]
    groups: dict[str, list[str]] = {}
    for name in names:
        becomes, pattern = rename_source_key(name, [], reversed_ones, reverse=True)
        groups.setdefault(name if pattern is None else becomes, []).append(name)
    return list(groups.values())
