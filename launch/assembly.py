"""From a checked configuration to a trainer that is ready to start."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import PretrainedConfig, PreTrainedModel

import dataloader
import models
from autoencoders.formats import SAESource, load_sources
from distributed import parallel
from distributed.sharding import DTYPES, shard
from launch import settings
from modeling import adapters, attention, head
from modeling.weights import find_weights, weights_digest
from sae import SAE, drift_options
from trainers import BasicTrainer, Setup
from training.checkpoint import Run
from training.reference import LiveReference, Records, Reference, load_or_build
from utils import UserError, fingerprint


def prepare(
    config: DictConfig,
    parts: settings.RunClasses,
    sources: settings.RunPaths,
    run: Run,
    cached: Sequence[str] = ("train", "eval"),
) -> BasicTrainer:
    """Build everything that training needs: what is cheap and can fail first, the weights last.

    `cached` names the splits whose records the loss will see, and so have to be in the reference cache.
    """
    binding, model = parts.binding, config.model
    architecture = models.load_config(sources.model)
    sae, places = read_saes(sources.saes, model, architecture) if sources.saes else (None, [])
    if sae is not None and "feature_drift" in binding.options:
        binding.options["feature_drift"] |= drift_options(sae, **binding.options["feature_drift"])

    tokenizer = models.load_tokenizer(sources.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(parts.trainer.control_tokens)})
    load_tokens = functools.partial(
        dataloader.load_tokens,
        config,
        tokenizer=tokenizer,
        loader_class=parts.loader,
        options=binding.options["loader"],
    )
    tokens = {
        split: parallel.rank_zero_first(functools.partial(load_tokens, name))
        for split, name in (("train", "train"), ("eval", "test"))
    }
    device = parallel.device()
    choice = (model.attn_implementation, model.layout, architecture, device, model.policy_dtype)
    implementation, layout = attention.choose(*choice, pairs=None not in parts.trainer.sides)
    if device.type == "cpu" and layout != "padded":  # whose attention's large tensors seldom fit where others were
        parallel.keep_freed_memory()
    common = {
        "pad_id": tokenizer.pad_token_id,
        "eos_id": tokenizer.eos_token_id,
        "layout": layout,
        "rank": parallel.rank(),
        "world_size": parallel.world_size(),
    }
    loaders = {
        "train": parts.loader(
            tokens["train"],
            batch_size=model.batch_size,
            accumulation=model.gradient_accumulation_steps,
            max_tokens=model.max_tokens,
            n_epochs=config.n_epochs,
            n_examples=config.n_examples,
            seed=config.seed,
            **common,
        ),
        "eval": parts.loader(  # the same records whatever the run's seed, drawn from all data sets and their parts
            tokens["eval"], batch_size=model.eval_batch_size, n_examples=config.n_eval_examples, seed=0, **common
        ),
    }

    load = functools.partial(build_model, model, implementation)
    directory = models.fetch(model.name_or_path, models.WEIGHT_FILES, "model.name_or_path")
    new_tokens = models.tokens_to_add(architecture, tokenizer)
    policy = load(directory, model.load_from, reward=parts.trainer.is_reward, new_tokens=new_tokens)
    tap = None
    if sae is not None:
        sae.to(device)
        tap = models.make_tap(policy, places, model.block_name)

    records: dict[str, Records] = {split: loaders[split] for split in cached}
    if "kl" in binding.needs:
        records |= {f"{split}/mismatched": dataloader.MismatchedRecords(loaders[split]) for split in cached}
    references: dict[str, Reference] = {}
    if binding.needs & {"reference", "live_reference"}:
        source, teacher, teacher_tap = (directory, model.load_from), policy, tap
        if model.reference_path:
            source = (models.fetch(model.reference_path, models.WEIGHT_FILES, "model.reference_path"), None)
        if model.reference_path or ("live_reference" in binding.needs and not model.use_peft):
            teacher = load(*source, frozen=True)
            teacher_tap = models.make_tap(teacher, places, model.block_name) if sae else None
        if "live_reference" in binding.needs:
            references = dict.fromkeys(records, LiveReference(teacher, teacher_tap, sae))
        else:
            features = [read.identity() for read in sources.saes]
            quantised = model.load_in_4bit and teacher is policy
            numbers = (weights_digest(*source), features, model.policy_dtype, *([quantised] if quantised else []))
            for name, scored in records.items():
                key = fingerprint(numbers, tokens[name.split("/")[0]].fingerprint, scored.used())
                folder = Path(config.cache_dir) / ".cache" / "reference" / key
                references[name] = load_or_build(folder, scored, teacher, teacher_tap, sae, model.eval_batch_size)

    setup = Setup(config, binding, run, policy, tokenizer, loaders, load, sae, tap, references)
    return parts.trainer(setup, **binding.options["init"])


def read_saes(
    sources: Sequence[SAESource], model: DictConfig, architecture: PretrainedConfig
) -> tuple[SAE, list[tuple[int, str]]]:
    """The SAEs of a run, as one, and where each reads, (layer, hook), for `models.make_tap`.

    Raises UserError where they do not fit the model, whose weights are not needed for that.
    """
    sae, places = load_sources(sources), [(source.layer, source.hook) for source in sources]
    width = architecture.get_text_config().hidden_size
    for found, member in zip(sources, sae.members):
        if member.d_in != width:
            raise UserError(f"{found.path}: reads vectors of {member.d_in} numbers, but {model.name} has {width}")
    models.make_tap(models.skeleton(architecture), places, model.block_name)  # raises where it cannot be read
    return sae, places


def build_model(
    settings: DictConfig,
    attention: str,
    directory: Path,
    load_from: str | None = None,
    *,
    reward: bool = False,
    frozen: bool = False,
    new_tokens: int = 0,
) -> PreTrainedModel:
    """A model split over the ranks, as `settings` (config.model) says: the one to train, or a frozen one.

    What is not trained is kept in the dtype that is computed in.
    """
    if settings.load_in_4bit and not frozen:
        source = directory if load_from is None else find_weights(load_from)
        model = models.load_quantised(source, attention, parallel.device(), DTYPES[settings.policy_dtype])
        models.recompute_activations(model, settings.activation_checkpointing)
        adapters.add(model, settings, DTYPES[settings.weights_dtype])
        return model
    trained = DTYPES[settings.weights_dtype]
    dtype = DTYPES[settings.policy_dtype] if frozen or settings.use_peft else trained

    def shape(model: PreTrainedModel) -> None:
        layers = models.decoder_layers(model, settings.block_name)
        if frozen:
            model.requires_grad_(False)
        else:
            if settings.use_peft:
                adapters.add(model, settings, trained)
            models.recompute_activations(model, settings.activation_checkpointing)
        if settings.compile:
            head.compile_passes(model)
            for layer in layers:
                layer.forward = torch.compile(layer.forward, dynamic=True)  # not the layer: its hooks stay outside
        shard(model, layers, settings)

    return models.load_model(
        directory,
        attention,
        parallel.device(),
        load_from,
        reward=reward,
        dtype=dtype,
        new_tokens=new_tokens,
        shape=shape,
        offload=settings.cpu_offload,
    )
