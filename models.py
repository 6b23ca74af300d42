"""Load models, and score batches: from a batch's rows to the log-probability of each completion token.

Shape letters: R rows, T positions, S sequences, N completion tokens, M positions that an SAE reads, D hidden width.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from data.batch import Batch, collate, sum_by_sequence
from data.hub import download
from distributed import parallel
from distributed.sharding import allocate_parameters, backbone
from modeling.attention import choose, mask_inputs, whole_blocks
from modeling.head import in_fp32, token_statistics
from modeling.settings import ModelSettings, SAEHeadSettings
from modeling.weights import (
    REWARD_HEAD,
    SAE_OF_HEAD,
    WEIGHTS,
    CutWeights,
    Weights,
    check_weights,
    load_weights,
    open_weights,
    require_matching_weights,
    weight_files,
)
from sae import SAE, JointTap, MLPTap, ResidualTap, SAEHead
from utils import UserError, checked, flat, resolve_path

transformers_logging.disable_progress_bar()
# Selective checkpointing keeps the results of these operations. No bmm: attention scores are the largest tensors of a
# layer, and where they are in fp32 `attention.attend` overwrites them.
COSTLY = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
)
CONFIG_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]  # everything that a model needs except its weights
WEIGHT_FILES = [WEIGHTS]
MOST_LAYERS = 1000  # the deepest models in use have less than 200
MOST_WORDS = 300  # characters of what a library says is wrong


# ---------------------------------------------------------------------------------------------------- scoring


@dataclass
class Scores:
    """A language model's scores of the completions in a batch."""

    token_logps: Tensor  # [N] log-probability of each completion token, fp32
    hidden: Tensor  # [N, D] final hidden states at the positions that predict the tokens
    batch: Batch
    token_kl: Tensor | None = None  # [N] KL(reference || model) over the vocabulary; None without a live reference
    residual: Tensor | None = None  # [M, D] residual stream at `batch.read`; None without a tap
    token_log_squares: Tensor | None = None  # [N] log of the sum over the vocabulary of p^2, without gradient

    @cached_property
    def logps(self) -> Tensor:
        """The log-probability [S] of each completion: the sum over its tokens."""
        return sum_by_sequence(self.token_logps, self.batch.sequence, self.batch.num_sequences)

    @cached_property
    def lengths(self) -> Tensor:
        """The number of tokens [S] of each completion, with the end-of-sequence token."""
        return torch.tensor(self.batch.lengths, dtype=torch.long).to(self.token_logps.device, non_blocking=True)

    @cached_property
    def mean_logps(self) -> Tensor:
        """The mean log-probability per token [S] of each completion."""
        return self.logps / self.lengths


def score(model: PreTrainedModel, batch: Batch, tap: ResidualTap | None = None, *, log_squares: bool = False) -> Scores:
    """Log-probabilities of the completion tokens; with a tap, the residual stream where an SAE reads it; and
    `token_log_squares` where they are asked for.

    Only the N completion positions are projected onto the vocabulary, a chunk at a time (modeling/head.py).
    """
    with tap.reading() if tap else nullcontext():
        hidden = final_hidden_states(model, batch).flatten(0, 1)[batch.predictor]
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    other = (batch.reference["hidden"], batch.reference["head"]) if "head" in batch.reference else None
    token_logps, token_kl, squares = token_statistics(hidden, batch.target, head, softcap, other, log_squares)
    residual = take(tap, batch) if tap else None
    return Scores(token_logps, hidden, batch, token_kl, residual, squares)


def read_residual(model: PreTrainedModel, batch: Batch, tap: ResidualTap) -> Tensor:
    """The residual stream [M, D] where an SAE reads it, at the tap. Nothing is projected onto the vocabulary."""
    with tap.reading():
        final_hidden_states(model, batch)
    return take(tap, batch)


def take(tap: ResidualTap, batch: Batch) -> Tensor:
    """What a tap has just read [R, T, D], at the positions that an SAE reads: [M, D]."""
    return tap.take().flatten(0, 1)[batch.read]


def final_hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The hidden states [R, T, D] after the last layer and the final norm, which the vocabulary projection reads. There
    may be more at the end of a row (`whole_blocks`)."""
    batch = whole_blocks(model, batch)
    return backbone(model)(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **mask_inputs(model, batch)
    ).last_hidden_state


@torch.no_grad()
def require_own_scores(model: PreTrainedModel, source: Path, *, reward: bool) -> None:
    """Compare the scores of a short text with what the model's own forward pass says. Raises UserError, which names the
    model, where they differ: its logits are more than a projection of the last hidden states and soft-capping.

    A model that is split over ranks has to be asked by all of them.
    """
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)  # a reward model does not read it
    ids = [token for token in range(10) if token != pad][:9]
    record = {"prompt_ids": ids[:2], "completion_ids": [ids[2:]], "index": 0}
    batch = collate([record], "padded", pad_id=0, eos_id=-1).to(parallel.device())
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, **mask_inputs(model, batch)}
    logits = model(**inputs, use_cache=False).logits
    if reward:
        found, expected = score_rewards(model, batch).rewards, logits.float().squeeze(1)
    else:
        found = score(model, batch).token_logps
        every = logits.float().flatten(0, 1)[batch.predictor].log_softmax(1)
        expected = every.gather(1, batch.target.unsqueeze(1)).squeeze(1)
    rounding = 8 * torch.finfo(logits.dtype).eps * logits.abs().max()
    apart = (found - expected).abs().max()
    if apart > rounding + 1e-3:  # not so where both are not a number
        what = f"rewards are up to {apart:.3g}" if reward else f"log-probabilities are up to {apart:.3g} nats"
        raise UserError(
            f"{source}: {type(model).__name__} cannot be trained here. On a short text its own {what} away from those "
            "that a loss would get: it does something to its logits that is not known here, such as scaling them"
        )


@dataclass
class RewardScores:
    """A reward model's scores of the completions in a batch."""

    rewards: Tensor  # [S] one number for each completion, fp32
    hidden: Tensor  # [S, D] what its head read
    head: nn.Module

    @cached_property
    def reconstruction_error(self) -> Tensor:
        """How much of it the SAE of the head misses, [S]."""
        return cast(SAEHead, self.head).reconstruction_error(self.hidden)


def score_rewards(model: PreTrainedModel, batch: Batch) -> RewardScores:
    """The reward of each completion, read at its last token, as `AutoModelForSequenceClassification` does."""
    hidden = final_hidden_states(model, batch).flatten(0, 1)
    last = torch.tensor(batch.lengths, dtype=torch.long).cumsum(0) - 1
    at_last = hidden[batch.position[last.to(hidden.device, non_blocking=True)]]
    head = cast(Any, model).score
    return RewardScores(in_fp32(head, at_last).squeeze(1), at_last, head)


# ---------------------------------------------------------------------------------------------------- structure


def decoder_layers(model: PreTrainedModel, block_name: str | None = None) -> Sequence[nn.Module]:
    """The decoder layers: the modules of the one ModuleList that has `num_hidden_layers` entries.

    If `block_name`, the class name of a layer, is given: all modules of that class. Raises UserError if there are none,
    or more than one such list.
    """
    if block_name is not None:
        found = [module for module in model.modules() if type(module).__name__ == block_name]
        if not found:
            raise UserError(f"model.block_name={block_name}: {type(model).__name__} has no such module")
        return found
    count = model.config.get_text_config().num_hidden_layers
    stacks = {
        name: module
        for name, module in cast(nn.Module, model.get_decoder()).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if len(stacks) != 1:
        raise UserError(f"{type(model).__name__}: cannot tell the decoder layers apart (candidates: {list(stacks)})")
    return list(next(iter(stacks.values())))


LARGE = 6e9  # parameters: about as many as the models that are called 7 B have, or more


def checkpointing(which: bool | str, model: PreTrainedModel) -> bool | str:
    """What `activation_checkpointing` says for a model that is not split yet: `auto` is full for a LARGE one."""
    if which != "auto":
        return which
    return "full" if model.num_parameters() >= LARGE else False


def recompute_activations(layers: Sequence[nn.Module], which: bool | str) -> None:
    """Turn on activation checkpointing: the backward pass computes activations again, so fewer are kept in memory.

    With True or "full" the forward pass keeps only each layer's input. With "selective" it also keeps the results of
    linear layers and fused attention (COSTLY). With False nothing changes. It goes around the `forward` that a layer
    has now: a compiled one, and not the hooks that read a layer or gather its weights.
    """
    if not which:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if which == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, list(COSTLY))
    for layer in layers:
        layer.forward = _recomputed(layer, layer.forward, options)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The forward pass of a layer with activation checkpointing, where it is trained."""

    def forward_again(*inputs: Any, **named: Any) -> Any:
        return checkpoint(forward, *inputs, **options, **named) if layer.training else forward(*inputs, **named)

    return forward_again


def find_mlp(model: PreTrainedModel, layer: nn.Module) -> nn.Module:
    """The MLP of a decoder layer: its one child with a projection from `intermediate_size` to the residual stream.

    Raises UserError if there is none, or more than one. A mixture of experts has several.
    """
    config = model.config.get_text_config()
    down = (config.hidden_size, config.intermediate_size)
    found = {
        name: child
        for name, child in layer.named_children()
        if any(isinstance(m, nn.Linear) and (m.out_features, m.in_features) == down for m in child.modules())
    }
    if len(found) != 1:
        raise UserError(
            f"sae.hook=mlp: cannot tell the MLP of {type(model).__name__}'s layers (candidates: {list(found)}); "
            "sae.hook=residual reads the residual stream"
        )
    return next(iter(found.values()))


def make_tap(model: PreTrainedModel, places: Sequence[tuple[int, str]], block_name: str | None = None) -> ResidualTap:
    """A tap that reads at each (layer, "residual" or "mlp"); a JointTap if there are several."""
    layers, taps = decoder_layers(model, block_name), list[ResidualTap]()
    # In Gemma 4 the last layers read keys and values of earlier ones, so these have to run.
    apart = not getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    for number, hook in places:
        layer, until = layers[number], layers[: number + 1] if apart else ()
        taps.append(MLPTap(layer, find_mlp(model, layer), until) if hook == "mlp" else ResidualTap(layer, until))
    return taps[0] if len(taps) == 1 else JointTap(taps)


@dataclass(frozen=True)
class NewHead:
    """What a reward model that can be read starts from: an SAE, and the layer that it reads."""

    sae: SAE
    layer: int
    trained: bool  # the SAE too

    def cut(self, config: PretrainedConfig) -> None:
        """Let a configuration be that of the reward model: no layer after the SAE's."""
        cut(config, self.layer + 1)
        config.sae_head = {"d_sae": self.sae.d_sae, "k": self.sae.k}


def cut(config: PretrainedConfig, layers: int) -> None:
    """Let a configuration be that of a model with so many of its layers."""
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers


def sae_head_of(config: PretrainedConfig, source: Path) -> SAEHeadSettings:
    """What a reward model's configuration says of its SAE head. Raises UserError where it describes none."""
    where = f"{source}/config.json: sae_head"
    found = checked(SAEHeadSettings, getattr(config, "sae_head", None), where)  # type: ignore[arg-type]
    if found.k is not None and found.k > found.d_sae:
        raise UserError(f"{where}.k={found.k}: more than its d_sae={found.d_sae}")
    return found


def require_sae_head(config: PretrainedConfig, source: Path, weights: Weights) -> None:
    """Raises UserError where a reward model's weights have no head such as its `config.sae_head` describes."""
    described, d_in = sae_head_of(config, source), config.get_text_config().hidden_size
    if (shape := weights.shapes.get(SAE_OF_HEAD)) != (d_in, described.d_sae):
        there = f"has {SAE_OF_HEAD} {list(shape)}" if shape else f"has no {SAE_OF_HEAD}"
        raise UserError(
            f"{source}/config.json: sae_head.d_sae={described.d_sae} needs {SAE_OF_HEAD} {[d_in, described.d_sae]}, "
            f"and {weights.source} {there}"
        )


def put_sae_head(model: PreTrainedModel, source: Path, *, trained: bool, dtype: torch.dtype) -> str:
    """Give a reward model the head that its `config.sae_head` describes, which reads what the last layer gives: the
    final norm goes. Gives the name that this had. Raises UserError where that cannot be."""
    decoder: Any = model.get_decoder()
    norms = [name for name, child in decoder.named_children() if type(child).__name__.endswith("Norm")]
    if not norms:
        raise UserError(
            f"{source}: cannot tell the final norm of {type(model).__name__}, which an SAE head goes without"
        )
    head, d_in = sae_head_of(model.config, source), model.config.get_text_config().hidden_size
    model.score = SAEHead(d_in, head.d_sae, head.k, trained=trained, dtype=dtype)
    setattr(decoder, norms[-1], nn.Identity())
    return norms[-1]


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device: its structure, without memory for weights. Raises UserError where it is of none."""
    what = f"{config.name_or_path}: its config.json makes no language model"
    with torch.device("meta"), no_init_weights(), refused(what):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    return model


# ---------------------------------------------------------------------------------------------------- loading


def fetch(source: str, patterns: list[str], setting: str) -> Path:
    """A local directory with the files that match `patterns`: `source`, or a snapshot of the Hub repository `source`.

    Raises UserError, which names the setting to change, if it is neither.
    """
    if (local := resolve_path(source)).is_dir():
        return local
    try:
        return download(source, patterns)
    except UserError as error:
        raise UserError(
            f"{setting}: there is no local directory {source}, and {error}. Offline, point {setting} at a local copy"
        ) from error


def start_weights(settings: ModelSettings) -> tuple[Path, str | None]:
    """The weights that training starts from, as `open_weights` takes them."""
    return fetch(settings.name_or_path, [*CONFIG_FILES, *WEIGHT_FILES], "model.name_or_path"), settings.load_from


def reference_weights(settings: ModelSettings) -> tuple[Path, str | None]:
    """The weights of the reference, as `open_weights` takes them: those that training starts from, or those of
    `model.reference_path`."""
    if not settings.reference_path:
        return start_weights(settings)
    return fetch(settings.reference_path, [*CONFIG_FILES, *WEIGHT_FILES], "model.reference_path"), None


def choose_attention(
    settings: ModelSettings, architecture: PretrainedConfig, *, pairs: bool, device: torch.device | None = None
) -> tuple[str, str]:
    """The implementation of attention and the layout for a model on a device (None: that of this rank); `pairs` as
    `attention.choose` has it."""
    on = device or parallel.device()
    return choose(settings.attn_implementation, settings.layout, architecture, on, settings.policy_dtype, pairs=pairs)


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Whatever transformers raises of a model's files becomes a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # files can hold anything, and it has many kinds
        raise UserError(f"{what} ({' '.join(str(error).split())[:MOST_WORDS] or type(error).__name__})") from error


def load_config(directory: Path) -> PretrainedConfig:
    """The model's configuration. Raises UserError if config.json cannot be used."""
    with refused(f"{directory}: no usable config.json"):
        require_few_layers(directory / "config.json")
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def require_few_layers(file: Path) -> None:
    """Raises UserError for a config.json with so many layers that only to lay the model out would take hours."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # which transformers will tell
        return
    for key, value in flat(values).items():
        if key.endswith(("layer", "layers")) and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"{file}: {key}={value}: a model may have {MOST_LAYERS:,} layers at most")


def load_generation_config(directory: Path) -> GenerationConfig | None:
    """The model's defaults for generating, which an export holds too; None if it has none. Raises UserError if they
    cannot be used."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return None
    with refused(f"{file}: cannot be used"):
        found = GenerationConfig.from_pretrained(directory)
        found.validate(strict=True)
    return found


def load_tokenizer(directory: Path) -> Tokenizer:
    """The model's tokenizer. If it has no pad token, the end-of-sequence token becomes its pad token.

    Raises UserError if it cannot be loaded or has no end-of-sequence token.
    """
    with refused(f"{directory}: no usable tokenizer"):
        # What it is saved as says whether only local files were allowed, and so has to be the same without a network.
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no end-of-sequence token, which completions need")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    directory: Path,
    attention: str,
    device: torch.device,
    load_from: str | None = None,
    *,
    reward: bool = False,
    new_head: NewHead | None = None,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = 0,
    shape: Callable[[PreTrainedModel], None] | None = None,
    offload: bool = False,
) -> PreTrainedModel:
    """A causal language model, or a reward model, in eval mode on `device`. Its weights are kept in `dtype`.

    `directory` is in Hub format. `load_from` names other weights: a `policy.pt`, a Hub-format directory, or a run
    directory (its LATEST). A reward model may get a new head, and then ends with the layer that this reads. The model
    gets embeddings for at least `vocabulary` tokens. `shape` may change it before it has memory: split it over ranks,
    add adapters. Each rank then reads only its slices. `offload` keeps the weights in host memory.
    Raises UserError with a list of the weights that are missing, left over or of another shape.
    """
    model, weights, new_tokens = outline(
        directory, load_from, attention, reward=reward, new_head=new_head, dtype=dtype, vocabulary=vocabulary
    )
    if (generation := load_generation_config(directory)) is not None:
        model.generation_config = generation
    if shape is not None:
        shape(model)
    allocate_parameters(model, device, offload=offload)
    model.tie_weights()  # again, since each parameter has got its own memory
    load_weights(model, weights, new_tokens)
    return model.eval()


def outline(
    directory: Path,
    load_from: str | None,
    attention: str = "eager",
    *,
    reward: bool = False,
    new_head: NewHead | None = None,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = 0,
) -> tuple[PreTrainedModel, Weights, int]:
    """The model that `load_model` makes, without memory for weights; the weights that go into it; and how many
    embeddings it gets that these lack."""
    weights: Weights = open_weights(directory, load_from)
    config = load_config(directory)
    new_tokens = tokens_to_add(config, vocabulary)
    auto_class: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    if reward:
        config.num_labels = 1
    if new_head is not None:
        new_head.cut(config)
    elif reward and hasattr(config, "sae_head"):
        require_sae_head(config, directory, weights)
    what = f"{directory}: its config.json makes no model"
    with init_empty_weights(include_buffers=False), no_init_weights(), refused(what):
        model = auto_class.from_config(config, dtype=dtype, attn_implementation=attention)
        if reward and hasattr(config, "sae_head"):
            norm = put_sae_head(model, directory, trained=new_head is not None and new_head.trained, dtype=dtype)
            if new_head is not None:
                weights = CutWeights(weights, new_head.layer + 1, norm, SAEHead.start(new_head.sae))
        if new_tokens:
            tokens = model.get_input_embeddings().num_embeddings + new_tokens
            model.resize_token_embeddings(tokens, mean_resizing=False)
    model.tie_weights()
    return model, weights, new_tokens


def require_reward_model(folder: Path, load_from: str | None, named: str) -> PretrainedConfig:
    """The configuration of a reward model. Raises UserError, before a weight is read, where it is of another kind, or
    its weights do not fit it or have no reward head, for which `load_model` would draw one."""
    config = load_config(folder)
    kinds = ", ".join(config.architectures or []) or "no architecture"
    if not kinds.endswith("ForSequenceClassification") or config.num_labels != 1:
        outputs = f" with {config.num_labels} outputs" if kinds.endswith("Classification") else ""
        raise UserError(
            f"{named}: no reward model ({kinds}{outputs}); rewards come from a run of loss=bradley-terry, or a "
            "sequence classifier with one output"
        )
    model, weights, _ = outline(folder, load_from, reward=True)
    check_weights(model, weights)
    if f"{REWARD_HEAD}weight" not in weights.shapes:
        raise UserError(f"{named}: its weights have no reward head ({REWARD_HEAD}weight)")
    return config


def reads_sae(directory: Path, load_from: str | None) -> bool:
    """Whether start weights are those of a reward model whose head reads an SAE's features."""
    if load_from is None:  # the weights may still be on the Hub
        return hasattr(load_config(directory), "sae_head")
    return SAE_OF_HEAD in open_weights(directory, load_from).shapes


def load_quantised(directory: Path, attention: str, device: torch.device, compute: torch.dtype) -> PreTrainedModel:
    """A language model with linear layers in 4 bits (NF4, Dettmers et al. 2023, 2305.14314), to train adapters on.

    Every rank holds the full model. It computes in the dtype `compute`. `directory` is in Hub format. Raises UserError
    with a list of weights that do not match.
    """
    weight_files(directory)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=quantisation,
        device_map={"": device},
        dtype=compute,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, loading = loaded
    require_matching_weights(directory, {kind: sorted(map(str, names)) for kind, names in loading.items() if names})
    return model.eval()


def tokens_to_add(config: PretrainedConfig, vocabulary: int) -> int:
    """How many embeddings the model lacks for as many tokens as a tokenizer knows."""
    return max(0, vocabulary - config.get_text_config().vocab_size)


def positions_of(config: PretrainedConfig) -> float:
    """How many tokens a model was made to read at once; infinity where it does not say."""
    there = getattr(config.get_text_config(), "max_position_embeddings", None)
    return there if there and there > 0 else math.inf


def require_positions(config: PretrainedConfig, source: Path | str, wanted: dict[str, int]) -> None:
    """Raises UserError where settings together ask for more tokens than a model, whose files are at `source`, has
    positions."""
    there = positions_of(config)
    if sum(wanted.values()) > there:
        key = config.get_text_config().attribute_map.get("max_position_embeddings", "max_position_embeddings")
        asked = " and ".join(f"{name}={count}" for name, count in wanted.items())
        together = " together" if len(wanted) > 1 else ""
        raise UserError(
            f"{asked}: more tokens{together} than the model in {source} has positions for, which are {there} "
            f"({key} in its config.json)"
        )
