"""From a checked configuration to a trainer that is ready to start."""

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

import dataloader
import models
import settings
from checkpoint import Run
from reference import LiveReference, Records, Reference, load_or_build
from sae import drift_options
from sae_formats import load_sources
from trainers import BasicTrainer, Setup
from utils import UserError, fingerprint


def prepare(
    config: DictConfig,
    parts: settings.Parts,
    sources: settings.Sources,
    run: Run,
    cached: Sequence[str] = ("train", "eval"),
) -> BasicTrainer:
    """Build everything that training needs: what is cheap and can fail first, the weights last.

    `cached` names the splits whose records the loss will see, and so have to be in the reference cache.
    """
    binding, model = parts.binding, config.model
    sae, places = load_sources(sources.saes) if sources.saes else None, [(s.layer, s.hook) for s in sources.saes]
    architecture = models.load_config(sources.model)
    if sae is not None:
        width = architecture.get_text_config().hidden_size
        for found, member in zip(sources.saes, sae.members):
            if member.d_in != width:
                raise UserError(f"{found.path}: reads vectors of {member.d_in} numbers, but {model.name} has {width}")
        models.make_tap(models.skeleton(architecture), places)  # raises where the model is not built as it has to be
        if "feature_drift" in binding.options:
            binding.options["feature_drift"] |= drift_options(sae, **binding.options["feature_drift"])

    tokenizer = models.load_tokenizer(sources.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(parts.trainer.control_tokens)})
    tokens = {
        split: dataloader.load_tokens(config, name, tokenizer, parts.loader, binding.options["loader"])
        for split, name in (("train", "train"), ("eval", "test"))
    }
    ids = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    loaders = {
        "train": parts.loader(
            tokens["train"],
            batch_size=model.batch_size,
            accumulation=model.gradient_accumulation_steps,
            n_epochs=config.n_epochs,
            n_examples=config.n_examples,
            seed=config.seed,
            **ids,
        ),
        "eval": parts.loader(  # the same records whatever the run's seed, drawn from all data sets and their parts
            tokens["eval"], batch_size=model.eval_batch_size, n_examples=config.n_eval_examples, seed=0, **ids
        ),
    }

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = models.choose_attention(model.attn_implementation, architecture, device, model.policy_dtype)
    weights = models.fetch(model.name_or_path, models.WEIGHT_FILES, "model.name_or_path")
    policy = models.load_model(weights, attention, device, model.load_from, reward=parts.trainer.is_reward)
    models.fit_vocabulary(policy, tokenizer)
    tap = None
    if sae is not None:
        sae.to(device)
        tap = models.make_tap(policy, places)

    records: dict[str, Records] = {split: loaders[split] for split in cached}
    if "kl" in binding.needs:
        records |= {f"{split}/mismatched": dataloader.MismatchedRecords(loaders[split]) for split in cached}
    references: dict[str, Reference] = {}
    if binding.needs & {"reference", "live_reference"}:
        source, teacher, teacher_tap = (weights, model.load_from), policy, tap
        if model.reference_path:
            source = (models.fetch(model.reference_path, models.WEIGHT_FILES, "model.reference_path"), None)
        if model.reference_path or "live_reference" in binding.needs:
            teacher = models.load_model(source[0], attention, device, source[1])
            teacher_tap = models.make_tap(teacher, places) if sae else None
        if "live_reference" in binding.needs:
            references = dict.fromkeys(records, LiveReference(teacher, teacher_tap, sae))
        else:
            features = [read.identity() for read in sources.saes]
            numbers = (models.weights_digest(*source), features, model.policy_dtype)
            for name, scored in records.items():
                key = fingerprint(numbers, tokens[name.split("/")[0]].fingerprint, scored.used())
                folder = Path(config.cache_dir) / ".cache" / "reference" / key
                with models.autocast(device, model.policy_dtype):
                    references[name] = load_or_build(folder, scored, teacher, teacher_tap, sae, model.eval_batch_size)

    setup = Setup(config, binding, run, policy, tokenizer, loaders, sae, tap, references)
    return parts.trainer(setup, **binding.options["init"])
