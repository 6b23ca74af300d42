"""Loading models, and scoring: from a batch's rows to the log-probability of each completion token.

Shape letters: R rows, T positions, N completion tokens, M of them text, S sequences, D hidden width, V vocabulary.
"""

import importlib.util
import pickle
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from batch import PAD, Batch
from sae import JointTap, MLPTap, ResidualTap
from utils import UserError, console, file_digest, fingerprint, local_path

transformers_logging.disable_progress_bar()
HEAD_ELEMENTS = 1 << 26  # logits held at once: 256 MiB in fp32
CONFIG_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]  # everything a model needs but its weights
WEIGHT_FILES = ["*.safetensors"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------- scoring


@dataclass
class Scores:
    """What a model says about the completions of a batch."""

    token_logps: Tensor  # [N] fp32
    hidden: Tensor  # [N, D] final hidden states at the positions that predict the tokens
    head: nn.Module  # the model's vocabulary projection
    softcap: float | None  # on its logits
    batch: Batch
    residual: Tensor | None = None  # [M, D] at the text tokens of the completions, where a tap was given

    @cached_property
    def logps(self) -> Tensor:
        """Summed log-probability [S] of each completion."""
        zeros = self.token_logps.new_zeros(self.batch.num_sequences)
        return zeros.index_add(0, self.batch.sequence, self.token_logps)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens [S] of each completion, end of sequence included."""
        return torch.tensor(self.batch.lengths, device=self.token_logps.device)

    @cached_property
    def mean_logps(self) -> Tensor:
        """Log-probability per token [S]."""
        return self.logps / self.lengths


def score(model: PreTrainedModel, batch: Batch, tap: ResidualTap | None = None) -> Scores:
    """Log-probabilities of the completion tokens and, with a tap, the residual stream at them.

    Only the N completion positions are projected onto the vocabulary, a chunk at a time.
    """
    with tap.reading() if tap else nullcontext():
        hidden = final_hidden_states(model, batch).flatten(0, 1)[batch.predictor]
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    token_logps = completion_logps(hidden, batch.target, head, softcap)
    residual = tap.take().flatten(0, 1)[batch.position[batch.content]] if tap else None
    return Scores(token_logps, hidden, head, softcap, batch, residual)


def final_hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the vocabulary projection reads, [R, T, D]."""
    return model.base_model(
        input_ids=batch.input_ids,
        attention_mask=(batch.document != PAD).long(),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state


def completion_logps(hidden: Tensor, target: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    """log p(target) [N] in fp32 from the final hidden states [N, D].

    The logits exist for one chunk of positions at a time, in the backward pass too, which computes them again.
    """
    parts = zip(in_chunks(hidden, head), in_chunks(target, head))
    return torch.cat([checkpoint(_chunk_logps, h, t, head, softcap, use_reentrant=False) for h, t in parts])


def completion_kl(
    hidden: Tensor, head: nn.Module, other: Tensor, other_head: nn.Module, softcap: float | None
) -> Tensor:
    """KL(other || own) [N] over the whole vocabulary, in fp32, from the final hidden states [N, D] of two models.

    In chunks, as `completion_logps`: neither model's logits exist whole.
    """
    parts = zip(in_chunks(hidden, head), in_chunks(other, head))
    return torch.cat([checkpoint(_chunk_kl, h, head, o, other_head, softcap, use_reentrant=False) for h, o in parts])


def in_chunks(rows: Tensor, head: nn.Module) -> tuple[Tensor, ...]:
    """The rows in parts small enough for their logits to fit into HEAD_ELEMENTS."""
    return rows.split(max(1, HEAD_ELEMENTS // cast(Tensor, head.weight).shape[0]))


def _logits(hidden: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    logits = head(hidden).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _chunk_logps(hidden: Tensor, target: Tensor, head: nn.Module, softcap: float | None) -> Tensor:
    logits = _logits(hidden, head, softcap)
    return logits.gather(1, target.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)


def _chunk_kl(hidden: Tensor, head: nn.Module, other: Tensor, other_head: nn.Module, softcap: float | None) -> Tensor:
    own = _logits(hidden, head, softcap).log_softmax(1)
    others = _logits(other, other_head, softcap).log_softmax(1)
    return (others.exp() * (others - own)).sum(1)


@dataclass
class RewardScores:
    """What a reward model says about the completions of a batch."""

    rewards: Tensor  # [S] fp32


def score_rewards(model: PreTrainedModel, batch: Batch) -> RewardScores:
    """The reward model's one number for each completion, read at its last token, as
    `AutoModelForSequenceClassification` does."""
    hidden = final_hidden_states(model, batch).flatten(0, 1)
    last = torch.tensor(batch.lengths, device=hidden.device).cumsum(0) - 1
    return RewardScores(cast(Any, model).score(hidden[batch.position[last]]).float().squeeze(1))


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context that a forward pass runs in: fp32 weights, computation in `dtype` ("float32" or "bfloat16")."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


# ---------------------------------------------------------------------------------------------------- structure


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers, found by structure: the one ModuleList with `num_hidden_layers` entries.

    Raises UserError where there is none, or more than one.
    """
    count = model.config.get_text_config().num_hidden_layers
    stacks = {
        name: module
        for name, module in cast(nn.Module, model.get_decoder()).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if len(stacks) != 1:
        raise UserError(f"{type(model).__name__}: cannot tell the decoder layers apart (candidates: {list(stacks)})")
    return next(iter(stacks.values()))


def feed_forward(model: PreTrainedModel, layer: nn.Module) -> nn.Module:
    """The MLP of a decoder layer, found by structure: the one part with a projection from `intermediate_size` back to
    the residual stream.

    Raises UserError where there is none (a mixture of experts has several), or more than one.
    """
    config = model.config.get_text_config()
    down = (config.hidden_size, config.intermediate_size)
    found = {
        name: part
        for name, part in layer.named_children()
        if any(isinstance(m, nn.Linear) and tuple(m.weight.shape) == down for m in part.modules())
    }
    if len(found) != 1:
        raise UserError(
            f"sae.hook=mlp: cannot tell the MLP of {type(model).__name__}'s layers (candidates: {list(found)}); "
            "sae.hook=residual reads the residual stream"
        )
    return next(iter(found.values()))


def make_tap(model: PreTrainedModel, places: Sequence[tuple[int, str]]) -> ResidualTap:
    """A tap at each (layer, "residual" or "mlp"), as one where there are several."""
    layers = decoder_layers(model)
    taps = [
        MLPTap(layers[layer], feed_forward(model, layers[layer])) if hook == "mlp" else ResidualTap(layers[layer])
        for layer, hook in places
    ]
    return taps[0] if len(taps) == 1 else JointTap(taps)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights, to look at its structure."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# ---------------------------------------------------------------------------------------------------- loading


def fetch(source: str, patterns: list[str], setting: str) -> Path:
    """A local directory with those files of a model: `source` itself, or a snapshot of a Hub repository.

    Raises UserError, naming the setting to change, where it is neither.
    """
    if (local := local_path(source)).is_dir():
        return local
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"{setting}: {source} is not a local path, and the Hub did not give it ({str(error).splitlines()[0]}). "
            f"If it is gated or private, run `hf auth login`; offline, point {setting} at a local copy."
        ) from error


def load_config(directory: Path) -> PretrainedConfig:
    """The model's architecture, without its weights."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no usable config.json ({str(error).splitlines()[0]})") from error


def load_tokenizer(directory: Path) -> Tokenizer:
    """The model's tokenizer, with a pad token (the end-of-sequence one where it has none of its own)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no usable tokenizer ({str(error).splitlines()[0]})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no end-of-sequence token, which completions need")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fit_vocabulary(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Add embeddings for tokens that the tokenizer has and the model has no room for: the mean of the others, so that
    a new token first changes little."""
    known = cast(Any, model).get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = cast(Any, embeddings).weight.data
            weight[known:] = weight[:known].mean(0)


def choose_attention(wanted: str, config: PretrainedConfig, device: torch.device, dtype: str) -> str:
    """`wanted`, or for `auto` the fastest implementation that computes this model exactly; says which and why."""
    if wanted != "auto":
        return wanted
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if device.type == "cuda" and dtype == "bfloat16" and importlib.util.find_spec("flash_attn"):
        chosen, reason = "flash_attention_2", "flash-attn is installed"
    elif softcap is not None:
        chosen, reason = "eager", "the model soft-caps its attention scores, which SDPA cannot"
    else:
        chosen, reason = "sdpa", "no flash-attn for this device and dtype"
    console.print(f"attention: {chosen} ({reason})")
    return chosen


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hub-format directory. Raises UserError where there are none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no *.safetensors (pickled weights are not loaded; convert them to safetensors)")
    return files


def load_model(
    directory: Path, attention: str, device: torch.device, load_from: str | None = None, *, reward: bool = False
) -> PreTrainedModel:
    """A causal language model, or a reward model, in fp32, on `device`, in eval mode.

    `directory` is in Hub format. `load_from` replaces the weights: a `policy.pt`, a Hub-format directory, or a run
    directory (its LATEST). Raises UserError listing weights that are missing, left over or of another shape.
    """
    policy_file = None
    if load_from is not None:
        found = find_weights(load_from)
        directory, policy_file = (directory, found) if found.is_file() else (found, None)
    weight_files(directory)
    kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    loaded = kind.from_pretrained(
        directory,
        **({"num_labels": 1} if reward else {}),
        dtype=torch.float32,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, loading = loaded
    problems = {
        kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    refuse_misfits(directory, problems, reward)
    if policy_file is not None:
        load_policy_file(model, policy_file, reward=reward)
    cast(nn.Module, model).to(device)
    return model.eval()


def load_policy_file(model: PreTrainedModel, path: Path, *, reward: bool = False) -> None:
    """Load a `policy.pt` of this repo or of HALOs. Raises UserError where it does not fit the model exactly."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"]
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: not a policy.pt of this model ({error})") from error
    refuse_misfits(path, {"missing_keys": result.missing_keys, "unexpected_keys": result.unexpected_keys}, reward)


def refuse_misfits(source: Path, problems: dict[str, list[str]], reward: bool) -> None:
    """Raise UserError for weights that are missing or left over. A reward model may start from a language model: it
    has a head of its own, `score`, for the projection onto the vocabulary."""
    heads = ("score.", "lm_head.", "embed_out.") if reward else ()
    problems = {kind: [name for name in names if not name.startswith(heads)] for kind, names in problems.items()}
    if any(problems.values()):
        lists = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{source}: the weights do not fit the model. {lists}")


def find_weights(load_from: str) -> Path:
    """What `model.load_from` names: a `policy.pt`, or a Hub-format directory (for a run directory, its LATEST)."""
    path = local_path(load_from)
    if (path / "LATEST").is_dir():
        path = path / "LATEST"
    if path.is_file() or list(path.glob("*.safetensors")):
        return path
    if (path / "policy.pt").is_file():
        return path / "policy.pt"
    raise UserError(f"model.load_from={load_from}: no policy.pt, safetensors or run directory there")


def weights_digest(directory: Path, load_from: str | None) -> str:
    """Changes whenever the weights that `load_model` would read do, on any number of ranks."""
    source = directory if load_from is None else find_weights(load_from)
    files = [source] if source.is_file() else [source / "config.json", *weight_files(source)]
    return fingerprint([file_digest(file) for file in files])
