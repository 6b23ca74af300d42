"""Public SAE formats: find a file, detect its format, and convert its tensors to a `sae.SAE`.

A format is an entry of `SAE_FORMATS`: the files that it has, how they say where the SAE reads, and how their tensors
become an SAE. The conversion is exact: it folds all other steps into the weights ("folding"). An option that cannot be
folded exactly is an error that names it. No file can run code: npz without pickle, safetensors, and
`torch.load(weights_only=True)`.

Shape letters: D width of the vectors that the SAE reads, F features.
"""

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from autoencoders.settings import SAESection, SAESettings
from modeling.tensor_files import write_safetensors
from models import fetch
from sae import SAE, SINK_NORM, together
from utils import UserError, as_json, atomic_write, console, in_words, resolve_path, sound_digest, suggest

SMALL, MOST_PACKED = 1 << 20, 20  # bytes, and times its size: what a file may unpack to; random weights pack to 90 %
LISTED = 10  # SAEs of a directory, in an error, at most
Location = tuple[int | None, str | None]  # the layer and the hook that an SAE reads; None if its files do not say


# --------------------------------------------------------------------------------------------- the contents of files


class WeightsFile:
    """The tensors of one file, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.tensors = read_tensors(path)
        except Exception as error:  # what the three readers raise for a damaged file is of any kind
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not a readable {path.suffix[1:]} file of plain arrays ({said})") from error
        self.unread = set(self.tensors)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor with this name, in fp32. Raises UserError if it is missing, not finite or of another shape."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: lacks {name}; it has {', '.join(self.tensors) or 'no array'}")
        self.unread.discard(name)
        tensor = self.tensors[name]
        if tensor.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise UserError(f"{self.path}: {name} is of {tensor.dtype}, not real numbers")
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{self.path}: {name} has shape {list(tensor.shape)}, but the other arrays need {list(shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.path}: {name} has values that are not finite")
        return tensor.float()

    def length(self, name: str) -> int:
        """The length of a vector, for formats that give their sizes nowhere else."""
        return len(self.take(name, self.tensors[name].numel() if name in self.tensors else 0))

    def require_absent(self, name: str, why: str) -> None:
        """Raise UserError if there is a tensor with this name."""
        if name in self.tensors:
            raise UserError(f"{self.path}: has {name}: {why}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, by its suffix: .npz, .safetensors, else a file of torch.save. Raises ValueError
    for a small file that would fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
        if unpacked > SMALL + MOST_PACKED * path.stat().st_size:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, more than weights can be packed")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError(f"it holds a {type(state).__name__}, not tensors by name")
    return {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in state.items()}


class ConfigFile:
    """The JSON file beside the weights. It is empty for a format that has none."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        try:
            self.values = json.loads(path.read_text()) if path else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({in_words(error)})") from error
        if not isinstance(self.values, dict):
            raise UserError(f"{path}: is not a JSON object")

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a key such as `outer.inner`, or the default if it is absent or null."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def section(self, key: str) -> dict[str, Any]:
        """The values below a key. Raises UserError if it is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: {key}={value}, where keys with values have to be")
        return value

    def number(self, key: str) -> float:
        """The positive number at a key such as `outer.inner`. Raises UserError if there is none that float32 holds."""
        value, tensor_range = self.get(key), torch.finfo(torch.float32)
        a_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not a_number or not tensor_range.tiny <= value <= tensor_range.max:
            raise UserError(f"{self.path}: {key}={value}, where a positive number has to be")
        return float(value)

    def count(self, key: str) -> int:
        """As `number`, of one that is whole."""
        value = self.number(key)
        if not value.is_integer():
            raise UserError(f"{self.path}: {key}={value}, where a whole number has to be")
        return int(value)

    def expect(self, key: str, default: Any, *supported: Any) -> Any:
        """The value at a key such as `outer.inner`. Raises UserError unless it is one of the `supported` values."""
        value = self.get(key, default)
        if value not in supported:
            known = ", ".join(map(str, supported))
            raise UserError(f"{self.path}: {key}={value} cannot be folded exactly into an SAE; supported: {known}")
        return value


# --------------------------------------------------------------------------------------------------------- folding


def make_sae(
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    threshold: Tensor | float = 0.0,
    k: int | None = None,
    centred: bool = False,
    by_norm: bool = False,
) -> SAE:
    """An SAE from W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D] and a threshold, [F] or one for all features.

    `centred`: the SAE encodes x - b_dec. This folds into b_enc: (x - b_dec) @ W_enc = x @ W_enc - b_dec @ W_enc.
    `by_norm`: the format multiplies each feature by the norm of its decoder row. So W_enc, b_enc and threshold are
    multiplied by the norm, and the rows of W_dec are divided by it.
    """
    limit = torch.as_tensor(threshold, dtype=torch.float32).expand_as(b_enc)
    if centred:
        b_enc = (b_enc.double() - b_dec.double() @ W_enc.double()).float()
    if by_norm:
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, limit = W_enc * norm, b_enc * norm, limit * norm
        W_dec = W_dec / norm.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    return SAE(W_enc.contiguous(), b_enc, W_dec.contiguous(), b_dec, limit.clone(), k)


def gated_to_jump_relu(W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gated encoder (Rajamanoharan et al. 2024, 2404.16014) as W_enc, b_enc and threshold of a JumpReLU.

    (u + b_gate > 0) * relu(e^r u + b_mag) with u = x @ W_enc: the gate opens where e^r u + b_mag > b_mag - e^r b_gate.
    """
    scale = r_mag.exp()
    return W_enc * scale, b_mag, b_mag - scale * b_gate


# --------------------------------------------------------------------------------------------------------- formats


def read_jump_relu(arrays: WeightsFile, W_enc: str, W_dec: str) -> SAE:
    """A JumpReLU from arrays like Gemma Scope's; `W_enc` and `W_dec` are the matrices' names."""
    d, f = arrays.length("b_dec"), arrays.length("b_enc")
    return make_sae(
        arrays.take(W_enc, d, f),
        arrays.take("b_enc", f),
        arrays.take(W_dec, f, d),
        arrays.take("b_dec", d),
        threshold=arrays.take("threshold", f),
    )


def read_gemma_scope(arrays: WeightsFile, _: ConfigFile) -> SAE:
    return read_jump_relu(arrays, "W_enc", "W_dec")


def locate_gemma_scope(path: Path, _: ConfigFile) -> Location:
    layer = re.search(r"layer_(\d+)/width_\w+/average_l0_\w+/[^/]+$", path.as_posix())
    site = re.search(r"gemma-scope-\w+-\w+-(res|mlp|att)/", path.as_posix())
    embedding = re.search(r"/embedding/width_\w+/average_l0_\w+/[^/]+$", path.as_posix())
    if embedding or (site and site[1] == "att"):
        raise UserError(
            f"{path}: reads embeddings or attention heads; SAEs are read after blocks or at their MLP's output"
        )
    return int(layer[1]) if layer else None, {"res": "residual", "mlp": "mlp"}[site[1]] if site else None


def read_gemma_scope_2(arrays: WeightsFile, config: ConfigFile) -> SAE:
    arrays.require_absent("affine_skip_connection", "a transcoder, not an autoencoder")
    sae = read_jump_relu(arrays, "w_enc", "w_dec")
    if config.get("width", sae.d_sae) != sae.d_sae:
        raise UserError(f"{config.path}: width={config.get('width')}, but {arrays.path} has {sae.d_sae} features")
    return sae


def locate_gemma_scope_2(path: Path, config: ConfigFile) -> Location:
    config.expect("type", "sae", "sae")
    config.expect("architecture", "jump_relu", "jump_relu")
    config.expect("affine_connection", False, False)
    if point := config.get("hf_hook_point_in"):
        return location_of(point, path)
    name = re.search(r"(\w+)/layer_(\d+)_width_\w+/[^/]+$", path.as_posix())
    if not name:
        return None, None
    site = name[1].removesuffix("_all")
    if site not in ("resid_post", "mlp_out"):
        raise UserError(f"{path}: a {site}; SAEs are read at resid_post and mlp_out")
    return int(name[2]), {"resid_post": "residual", "mlp_out": "mlp"}[site]


def read_llama_scope(arrays: WeightsFile, config: ConfigFile) -> SAE:
    """Llama Scope as OpenMOSS loads it: the threshold applies to features of raw vectors times their decoder norm."""
    W_enc, b_enc, W_dec, b_dec, threshold, s_in, s_out = llama_scope_tensors(arrays, config)
    sae = make_sae(W_enc, b_enc / s_in, W_dec * (s_in / s_out), b_dec / s_out, by_norm=True)
    sae.threshold.fill_(threshold)
    return sae


def read_llama_scope_saelens(arrays: WeightsFile, config: ConfigFile) -> SAE:
    """Llama Scope as SAELens loads it and folds its scale: into encoder and threshold, without decoder norms."""
    W_enc, b_enc, W_dec, b_dec, threshold, s_in, _ = llama_scope_tensors(arrays, config)
    return make_sae(W_enc * s_in, b_enc, W_dec / s_in, b_dec / s_in, threshold=threshold * s_in)


def llama_scope_tensors(
    arrays: WeightsFile, config: ConfigFile
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float, float]:
    """W_enc, b_enc, W_dec, b_dec, the threshold, and the factors that scale input and output vectors."""
    config.expect("act_fn", "jumprelu", "jumprelu")
    config.expect("norm_activation", "dataset-wise", "dataset-wise")
    config.expect("sparsity_include_decoder_norm", True, True)
    config.expect("apply_decoder_bias_to_pre_encoder", False, False)
    config.expect("use_decoder_bias", True, True)
    config.expect("use_glu_encoder", False, False)
    d, f = config.count("d_model"), config.count("d_sae")
    return (
        arrays.take("encoder.weight", f, d).T,
        arrays.take("encoder.bias", f),
        arrays.take("decoder.weight", d, f).T,
        arrays.take("decoder.bias", d),
        config.number("jump_relu_threshold"),
        d**0.5 / config.number("dataset_average_activation_norm.in"),
        d**0.5 / config.number("dataset_average_activation_norm.out"),
    )


def locate_llama_scope(path: Path, config: ConfigFile) -> Location:
    point = config.get("hook_point_in", "")
    if config.get("hook_point_out", point) != point:
        raise UserError(f"{config.path}: from {point} to {config.get('hook_point_out')}: a transcoder, not an SAE")
    return location_of(point, path) if point else (None, None)


def read_sparsify(arrays: WeightsFile, config: ConfigFile) -> SAE:
    arrays.require_absent("W_skip", "a transcoder, not an autoencoder")
    config.expect("activation", "topk", "topk")
    config.expect("signed", False, False)
    config.expect("transcode", False, False)
    config.expect("skip_connection", False, False)
    d = config.count("d_in")
    f = config.count("num_latents") if config.get("num_latents") else d * config.count("expansion_factor")
    return make_sae(
        arrays.take("encoder.weight", f, d).T,
        arrays.take("encoder.bias", f),
        arrays.take("W_dec", f, d),
        arrays.take("b_dec", d),
        k=config.count("k"),
        centred=True,
    )


def locate_sparsify(path: Path, _: ConfigFile) -> Location:
    name = path.parent.name
    return location_of(name, path) if re.search(r"\b(layers|h|blocks)\.\d", name) else (None, None)


def read_saelens(arrays: WeightsFile, config: ConfigFile) -> SAE:
    arrays.require_absent("W_skip", "a transcoder, not an autoencoder")
    normalised = config.get("normalize_activations", "none")
    if normalised in (True, "expected_average_only_in"):
        raise UserError(
            f"{config.path}: normalize_activations={normalised}: made for vectors scaled by a number that is not in "
            "the file; fold it in with SAELens (fold_activation_norm_scaling_factor) and save again"
        )
    config.expect("normalize_activations", "none", "none", False)
    config.expect("reshape_activations", "none", "none")
    config.expect("finetuning_scaling_factor", False, False)
    for key in ("model_from_pretrained_kwargs", "metadata.model_from_pretrained_kwargs"):
        config.expect(f"{key}.center_writing_weights", False, False)
    if "scaling_factor" in arrays.tensors and (arrays.tensors["scaling_factor"] != 1).any():
        raise UserError(f"{arrays.path}: has a scaling_factor that is not 1")
    # Before version 6 the config gives the activation separately; with topk, the standard architecture is a TopK.
    activation = config.expect("activation_fn", config.get("activation_fn_str", "relu"), "relu", "topk")
    architecture = "topk" if activation == "topk" else config.get("architecture", "standard")
    if architecture not in ("standard", "gated", "jumprelu", "topk"):
        hint = "; SAELens's save_inference_model writes it as jumprelu" if "batchtopk" in str(architecture) else ""
        raise UserError(f"{config.path}: architecture={architecture}: not standard, gated, jumprelu or topk{hint}")
    d, f = config.count("d_in"), config.count("d_sae")
    W_enc = arrays.take("W_enc", d, f)
    threshold: Tensor | float = 0.0
    if architecture == "gated":
        W_enc, b_enc, threshold = gated_to_jump_relu(
            W_enc, *(arrays.take(name, f) for name in ("b_gate", "b_mag", "r_mag"))
        )
    else:
        b_enc = arrays.take("b_enc", f)
    if architecture == "jumprelu":
        threshold = arrays.take("threshold", f)
    options = {}
    if architecture == "topk":
        key = "k" if "k" in config.values else "activation_fn_kwargs.k"
        options = {"k": config.count(key), "by_norm": config.expect("rescale_acts_by_decoder_norm", False, True, False)}
    return make_sae(
        W_enc,
        b_enc,
        arrays.take("W_dec", f, d),
        arrays.take("b_dec", d),
        threshold=threshold,
        centred=config.expect("apply_b_dec_to_input", True, True, False),
        **options,
    )


def locate_saelens(path: Path, config: ConfigFile) -> Location:
    keys = ("metadata.hook_name", "hook_name", "hook_point")
    names = [name for key in keys if (name := config.get(key))]
    return location_of(names[0], path) if names else (None, None)


def read_qwen_scope(arrays: WeightsFile, config: ConfigFile) -> SAE:
    config.expect("model_type", "topk_sae", "topk_sae")
    d, f = config.count("d_model"), config.count("d_sae")
    return make_sae(
        arrays.take("W_enc", f, d).T,
        arrays.take("b_enc", f),
        arrays.take("W_dec", d, f).T,
        arrays.take("b_dec", d),
        k=config.count("k"),
    )


def locate_qwen_scope(path: Path, config: ConfigFile) -> Location:
    config.expect("hook_point", "resid_post", "resid_post")
    layer = re.search(r"layer(\d+)\.sae\.pt$", path.name)
    return int(layer[1]) if layer else None, "residual"


def read_dictionary_learning(arrays: WeightsFile, config: ConfigFile) -> SAE:
    """dictionary_learning: what `encode` and `decode` compute in the class that the config names.

    Until January 2025 those of Gated and JumpReLU multiplied features by the norms of decoder rows. Since the end of
    December 2024 their trainers write `sparsity_warmup_steps` into the config, by which files are told apart. A
    standard AutoEncoder has its decoder rows scaled to norm 1 when the library loads it.
    """
    by_norm = "sparsity_warmup_steps" not in config.section("trainer")
    d, f = config.count("trainer.activation_dim"), config.count("trainer.dict_size")
    kind = config.expect(
        "trainer.dict_class",
        None,
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "GatedAutoEncoder",
        "JumpReluAutoEncoder",
        "MatryoshkaBatchTopKSAE",
    )
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        W_enc, W_dec, b_enc = arrays.take("W_enc", d, f), arrays.take("W_dec", f, d), arrays.take("b_enc", f)
        b_dec = arrays.take("b_dec", d)
        if kind == "JumpReluAutoEncoder":
            return make_sae(W_enc, b_enc, W_dec, b_dec, threshold=arrays.take("threshold", f), by_norm=by_norm)
        return make_sae(W_enc, b_enc, W_dec, b_dec, threshold=arrays.take("threshold"), centred=True)
    W_enc, W_dec = arrays.take("encoder.weight", f, d).T, arrays.take("decoder.weight", d, f).T
    if kind == "GatedAutoEncoder":
        biases = (arrays.take(name, f) for name in ("gate_bias", "mag_bias", "r_mag"))
        W_enc, b_enc, threshold = gated_to_jump_relu(W_enc, *biases)
        b_dec = arrays.take("decoder_bias", d)
        return make_sae(W_enc, b_enc, W_dec, b_dec, threshold=threshold, centred=True, by_norm=by_norm)
    b_enc = arrays.take("encoder.bias", f)
    if kind == "AutoEncoderNew":
        return make_sae(W_enc, b_enc, W_dec, arrays.take("decoder.bias", d))
    if kind == "AutoEncoder":
        return make_sae(W_enc, b_enc, W_dec, arrays.take("bias", d), centred=True, by_norm=True)
    b_dec = arrays.take("b_dec", d)
    if kind == "AutoEncoderTopK":
        return make_sae(W_enc, b_enc, W_dec, b_dec, k=int(arrays.take("k")), centred=True)
    return make_sae(W_enc, b_enc, W_dec, b_dec, threshold=arrays.take("threshold"), centred=True)


def locate_dictionary_learning(_: Path, config: ConfigFile) -> Location:
    module = str(config.get("trainer.submodule_name", "resid_post"))
    if module.startswith("resid_post"):
        return config.get("trainer.layer"), "residual"
    assert config.path is not None
    return location_of(module, config.path)


def location_of(point: Any, source: Path) -> Location:
    """The layer and hook of a TransformerLens hook point, or of a module's name in transformers, such as
    `gpt_neox.layers.3`, `transformer.h.3.mlp` or `model.language_model.layers.3`. Raises UserError for other places."""
    module = r"(?:(?:base_model|model|language_model|decoder|transformer|gpt_neox)\.)*(?:layers|h|blocks)\.(\d+)"
    patterns = {
        r"blocks\.(\d+)\.hook_resid_post": (0, "residual"),
        r"blocks\.(\d+)\.hook_resid_pre": (-1, "residual"),  # the output of the block before
        r"blocks\.(\d+)\.hook_mlp_out": (0, "mlp"),
        rf"{module}(?:\.output)?": (0, "residual"),
        rf"{module}\.mlp(?:\.output)?": (0, "mlp"),
        rf"{module}\.post_feedforward_layernorm(?:\.output)?": (0, "mlp"),
    }
    for pattern, (shift, hook) in patterns.items():
        found = re.fullmatch(pattern, str(point), re.ASCII)
        if found and int(found[1]) + shift >= 0:
            return int(found[1]) + shift, hook
    raise UserError(f"{source}: reads {point}; SAEs are read after blocks or at their MLP's output")


@dataclass(frozen=True)
class Format:
    """The files of one format, and how to read them."""

    weights: str  # the file with the weights, as a glob
    config: str | None  # the JSON file beside it
    read: Callable[[WeightsFile, ConfigFile], SAE]
    locate: Callable[[Path, ConfigFile], Location]  # takes the path of the weights
    config_optional: bool = False
    by_name_only: bool = False  # used only if `sae.format` names it, never detected


LLAMA_SCOPE_FILES = ("checkpoints/final.safetensors", "hyperparams.json")
SAE_FORMATS = {
    "gemma_scope": Format("params.npz", None, read_gemma_scope, locate_gemma_scope),
    "gemma_scope_2": Format(
        "params.safetensors", "config.json", read_gemma_scope_2, locate_gemma_scope_2, config_optional=True
    ),
    "llama_scope": Format(*LLAMA_SCOPE_FILES, read_llama_scope, locate_llama_scope),
    "llama_scope_saelens": Format(*LLAMA_SCOPE_FILES, read_llama_scope_saelens, locate_llama_scope, by_name_only=True),
    "sparsify": Format("sae.safetensors", "cfg.json", read_sparsify, locate_sparsify),
    "saelens": Format("sae_weights.safetensors", "cfg.json", read_saelens, locate_saelens),
    "qwen_scope": Format("layer*.sae.pt", "config.json", read_qwen_scope, locate_qwen_scope),
    "dictionary_learning": Format("ae.pt", "config.json", read_dictionary_learning, locate_dictionary_learning),
}


# --------------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class SAEFiles:
    """The files of one SAE on this machine, and their format."""

    format: str
    weights: Path
    config: Path | None

    def config_file(self) -> ConfigFile:
        return ConfigFile(self.config)


@dataclass(frozen=True)
class SAESource:
    """An SAE that the configuration names and that was found: its files, and where it reads."""

    where: str  # the section of the configuration
    files: SAEFiles
    layer: int
    hook: str
    weight: float

    @property
    def path(self) -> Path:
        return self.files.weights

    def identity(self) -> list[Any]:
        """Everything that its features depend on, for a fingerprint. Raises UserError for files of a run that are not
        what it wrote."""
        digests = [sound_digest(path) for path in (self.files.weights, self.files.config) if path]
        return [self.files.format, *digests, self.layer, self.hook, SINK_NORM]


def sae_sections(settings: SAESection) -> dict[str, SAESettings]:
    """The SAEs that the configuration asks for, by where it does: `sae` itself, or each of `sae.parts`.

    Raises UserError where it asks for one and for several, and for a part without a path.
    """
    if not settings.parts:
        return {"sae": settings} if settings.path else {}
    if settings.path:
        raise UserError("sae.path and sae.parts: one SAE or several? ~sae takes the one that comes with the model out")
    for name, part in settings.parts.items():
        if not part.path:
            raise UserError(
                f"sae.parts.{name}.path is missing: a file or directory, or organisation/repository/path on the Hub"
            )
    return {f"sae.parts.{name}": part for name, part in settings.parts.items()}


def find_sae(section: SAESettings, where: str) -> SAESource:
    """Find, or fetch from the Hub, the SAE that a section of the configuration asks for, and where it reads.

    Raises UserError if its files are missing or not of one format, if neither they nor the section say which layer it
    reads, and if they disagree.
    """
    require_format(section, where)
    assert section.path is not None
    path = one_of_many(fetch_sae(section.path, f"{where}.path"), section.layer, where)
    files = detect_format(path, section.format)
    said = SAE_FORMATS[files.format].locate(files.weights, files.config_file())
    return SAESource(where, files, *place_of(section, where, said, files.weights), section.weight)


def require_format(section: SAESettings, where: str) -> None:
    """Raises UserError for a format that there is not."""
    known = ("auto", *SAE_FORMATS)
    if section.format not in known:
        hint = suggest(section.format, known)
        raise UserError(f"{where}.format={section.format}: not one of {', '.join(known)}{hint}")


def place_of(section: SAESettings, where: str, said: Location, source: Path | str) -> tuple[int, str]:
    """The layer and the hook that an SAE reads, from what a section of the configuration asks for and what its files
    say, which are at `source`. Raises UserError where they disagree, or neither says the layer."""
    layer, hook = said
    for key, value in (("layer", layer), ("hook", hook)):
        asked = getattr(section, key)
        if value is not None and asked not in (None, value):
            raise UserError(f"{where}.{key}={asked}, but {source} says {value}; {where}.{key}=null uses that")
    layer = layer if section.layer is None else section.layer
    if type(layer) is not int or layer < 0:
        raise UserError(f"{where}.layer={layer}: set it to the layer whose output is read, from 0; the file says none")
    return layer, section.hook or hook or "residual"


def one_of_many(path: Path, layer: int | None, where: str) -> Path:
    """The SAE in a run of loss=sae, in its LATEST or in another directory of Gemma Scope's layout; other paths as they
    are. Raises UserError, with what is there, unless one SAE fits the layer that is asked for."""
    is_run = (path / "metrics.jsonl").is_file()
    folder = path / "LATEST" if is_run else path
    names = ["layer_*", "width_*", "average_l0_*", "params.npz"]
    found = [file for start in range(3) for file in folder.glob("/".join(names[start:]))]
    if is_run and not found:
        raise UserError(f"{where}.path={path}: a run without SAEs: of another loss, or not finished")
    layers = {file: locate_gemma_scope(file.absolute(), ConfigFile(None))[0] for file in found}
    fitting = [file for file in found if layer in (None, layers[file])] or found
    if len(fitting) <= 1:
        return fitting[0] if fitting else path
    there = [str(file.parent) for file in sorted(fitting, key=lambda file: (layers[file] or 0, file))]
    more = [f"and {len(there) - LISTED} more"] if len(there) > LISTED else []
    listed = "\n  ".join(["", *there[:LISTED], *more])
    raise UserError(f"{where}.path={path} holds several SAEs; name one, or its layer by {where}.layer=:{listed}")


def fetch_sae(source: str, setting: str) -> Path:
    """A local file or directory: `source` itself, or a copy of `organisation/repository/path` on the Hub.

    It fetches only the files that an SAE at that path can have. Raises UserError, which names the setting.
    """
    if (local := resolve_path(source)).exists():
        return local
    organisation, *rest = source.rstrip("/").split("/")
    if not rest or source.startswith(("/", ".", "~")):
        raise UserError(f"{setting}={source}: no such file or directory")
    repository, *inside = rest
    patterns = ["/".join(inside)] if inside else []
    for form in SAE_FORMATS.values():
        folder = inside
        if inside and fnmatch(inside[-1], Path(form.weights).name):
            folder = inside[: -len(Path(form.weights).parts)]
        elif "*" not in form.weights:
            patterns.append("/".join([*folder, form.weights]))
        if form.config:
            patterns.append("/".join([*folder, form.config]))
    found = fetch(f"{organisation}/{repository}", sorted(set(patterns)), setting).joinpath(*inside)
    if not found.exists():
        raise UserError(f"{setting}={source}: {organisation}/{repository} has no {'/'.join(inside)}")
    return found


def detect_format(path: Path, format: str = "auto") -> SAEFiles:
    """The files of the SAE at `path`, a weights file or its directory, and their format, from the files' names.

    `format` names the format, `auto` detects it. Raises UserError if no format fits, if several do, or if a file is
    missing.
    """
    fitting = {}
    for name, form in SAE_FORMATS.items():
        if format == name or (format == "auto" and not form.by_name_only):
            if path.is_dir():
                fitting[name] = sorted(path.glob(form.weights))
            else:
                fitting[name] = [path] if format == name or fnmatch(path.name, Path(form.weights).name) else []
    found = {name: weights for name, weights in fitting.items() if weights}
    if len(found) != 1:
        layouts = "; ".join(f"{n}: {' and '.join(filter(None, (f.weights, f.config)))}" for n, f in SAE_FORMATS.items())
        what = f"could be {' or '.join(found)}: set sae.format" if found else "no SAE of a known layout"
        raise UserError(f"{path}: {what} ({layouts})")
    ((name, weights),) = found.items()
    if len(weights) > 1:
        raise UserError(f"{path}: has {len(weights)} files of {name}: name one, such as {weights[0]}")
    form = SAE_FORMATS[name]
    depth = len(Path(form.weights).parts)
    config = weights[0].parents[depth - 1] / form.config if form.config and len(weights[0].parents) >= depth else None
    if config and not config.is_file():
        if not form.config_optional:
            raise UserError(f"{weights[0]}: {name} has {form.config} beside it, but {config} is missing")
        config = None
    return SAEFiles(name, weights[0], config)


# --------------------------------------------------------------------------------------------------------- reading


def read_files(files: SAEFiles) -> SAE:
    """Read one SAE, and print what it is.

    Raises UserError, which names the file, for arrays that are missing, of a wrong shape or not finite, for pickled
    objects, and for options that cannot be folded exactly.
    """
    arrays = WeightsFile(files.weights)
    sae = SAE_FORMATS[files.format].read(arrays, files.config_file())
    if not all(values.isfinite().all() for values in [*sae.state_dict().values(), sae.W_dec]):
        raise UserError(f"{files.weights}: has values that are not finite once all is folded into the weights")
    if sae.k is not None and not 1 <= sae.k <= sae.d_sae:
        raise UserError(f"{files.weights}: k={sae.k} of {sae.d_sae} features")
    unread = f"; not used: {', '.join(sorted(arrays.unread))}" if arrays.unread else ""
    kind = f"TopK {sae.k}" if sae.k else "JumpReLU" if sae.threshold.any() else "ReLU"
    console.print(f"SAE: {files.weights} is {files.format}, {kind}, {sae.d_in} to {sae.d_sae:,} features{unread}")
    return sae


def load_sae(path: Path, format: str = "auto") -> SAE:
    """Read the SAE at `path`, a weights file or its directory."""
    return read_files(detect_format(path, format))


def load_sources(sources: Sequence[SAESource]) -> SAE:
    """Read the SAEs of a run; several become a `JointSAE`."""
    members = []
    for source in sources:
        members.append(read_files(source.files))
        console.print(f"  read at layer {source.layer}, {source.hook}")
    return together(members, [source.weight for source in sources])


GEMMA_SCOPE_ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def save_sae(sae: SAE, path: Path) -> None:
    """Write an SAE to `path` as `params.npz` in Gemma Scope's layout, in one step."""
    assert sae.k is None, "Gemma Scope's layout has no TopK"
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, **{name: getattr(sae, name).numpy(force=True) for name in GEMMA_SCOPE_ARRAYS})


def save_saelens(sae: SAE, folder: Path, layer: int, metadata: dict[str, Any]) -> None:
    """Write the directory of a SAELens 6 JumpReLU that reads a layer's output, in one step.

    It holds `cfg.json`, with `metadata` added, and `sae_weights.safetensors`.
    """
    assert sae.k is None, "a TopK cannot be written as a JumpReLU"
    fields = {
        "architecture": "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": f"blocks.{layer}.hook_resid_post", **metadata},
    }
    with atomic_write(folder) as part:
        part.mkdir()
        tensors = {name: getattr(sae, name) for name in GEMMA_SCOPE_ARRAYS}
        write_safetensors(part / "sae_weights.safetensors", tensors, {"format": "pt"})
        (part / "cfg.json").write_text(as_json(fields, indent=2) + "\n")
