"""Train: `python train.py loss=fpo model=gemma2b [key=value ...]`. `--help` lists what can be chosen.

The way from here to a loss: config.loss.trainer names a class of trainers.py, and its `loss` method is the loss.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import dataloader
import models
import reference
import settings
import summary
from checkpoint import Run
from sae import ResidualTap, drift_options, load_sae
from trainers import BasicTrainer, Setup
from utils import UserError, console, file_digest, fingerprint


def prepare(
    config: DictConfig,
    parts: settings.Parts,
    sources: settings.Sources,
    run: Run,
    cached: Sequence[str] = ("train", "test"),
) -> BasicTrainer:
    """Build everything that training needs: what is cheap and can fail first, the weights last.

    `cached` names the splits whose records the loss will see, and so have to be in the reference cache.
    """
    binding, model = parts.binding, config.model
    sae = load_sae(sources.sae) if sources.sae else None
    architecture = models.load_config(sources.model)
    if sae is not None:
        width = architecture.get_text_config().hidden_size
        if sae.d_in != width:
            raise UserError(f"{sources.sae}: reads vectors of {sae.d_in} numbers, but {model.name} has {width}")
        if "feature_drift" in binding.options:
            binding.options["feature_drift"] |= drift_options(sae.d_sae, **binding.options["feature_drift"])

    tokenizer = models.load_tokenizer(sources.tokenizer)
    tokens = {
        split: dataloader.load_tokens(config, split, tokenizer, parts.loader, binding.options["loader"])
        for split in ("train", "test")
    }
    ids = {"pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    train_loader = parts.loader(
        tokens["train"],
        batch_size=model.batch_size,
        accumulation=model.gradient_accumulation_steps,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        seed=config.seed,
        **ids,
    )
    eval_loader = parts.loader(
        tokens["test"], batch_size=model.eval_batch_size, n_examples=config.n_eval_examples, shuffle=False, **ids
    )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = models.choose_attention(model.attn_implementation, architecture, device, model.policy_dtype)
    weights = models.fetch(model.name_or_path, models.WEIGHT_FILES, "model.name_or_path")
    policy = models.load_model(weights, attention, device, model.load_from)
    layers = models.decoder_layers(policy)
    tap = ResidualTap(layers[config.sae.layer]) if sae is not None else None

    caches: dict[str, reference.ReferenceCache | None] = {"train": None, "test": None}
    if "reference" in binding.needs:
        teacher, teacher_tap, source = policy, tap, (weights, model.load_from)
        if model.reference_path:
            source = (models.fetch(model.reference_path, models.WEIGHT_FILES, "model.reference_path"), None)
            teacher = models.load_model(source[0], attention, device)
            teacher_tap = ResidualTap(models.decoder_layers(teacher)[config.sae.layer]) if tap else None
        features = (file_digest(sources.sae), config.sae.layer) if sources.sae else None
        numbers = (models.weights_digest(*source), features, model.policy_dtype)
        if sae is not None:
            sae.to(device)
        for split in cached:
            loader = {"train": train_loader, "test": eval_loader}[split]
            key = fingerprint(numbers, tokens[split].fingerprint, loader.used())
            folder = Path(config.cache_dir) / ".cache" / "reference" / key
            with models.autocast(device, model.policy_dtype):
                caches[split] = reference.load_or_build(
                    folder, loader, teacher, teacher_tap, sae, model.eval_batch_size
                )
        del teacher, teacher_tap

    return parts.trainer(
        Setup(
            config,
            binding,
            run,
            policy,
            tokenizer,
            train_loader,
            eval_loader,
            sae,
            tap,
            caches["train"],
            caches["test"],
        ),
        **binding.options["init"],
    )


def train(config: DictConfig, overrides: list[str]) -> None:
    """Check, prepare, train, summarise."""
    started = time.monotonic()
    config.exp_name = str(config.exp_name)  # YAML reads exp_name=7 as a number
    parts = settings.check(config, overrides)
    sources = settings.find_sources(config, parts.binding.needs)
    run = Run(Path(config.cache_dir) / config.exp_name)
    with run.writing():
        run.start(config)
        torch.manual_seed(config.seed)
        trainer = prepare(config, parts, sources, run)
        if config.model.activation_checkpointing:
            trainer.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainer.train()
        summary.summarise(trainer, sources.model, started)


@hydra.main(version_base=None, config_path="config", config_name="config")
def main(config: DictConfig) -> None:
    try:
        train(config, list(HydraConfig.get().overrides.task))
    except UserError as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    sys.argv = [argument.replace("++config.", "++", 1) for argument in sys.argv]  # as the line's FAQ spells it
    if {"-h", "--help"} & set(sys.argv):  # Hydra composes before it helps
        sys.argv[1:] = ["--help", "loss=fpo", "model=tiny"]
    main()
