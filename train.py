"""Train: `python train.py loss=fpo model=gemma2b [key=value ...]`. `--help` lists what can be chosen.

The way from here to a loss: config.loss.trainer names a class of trainers.py, and its `loss` method is the loss.
"""

import sys
import time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import assembly
import settings
import summary
from checkpoint import Run
from utils import UserError, console


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
        trainer = assembly.prepare(config, parts, sources, run)
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
    sys.argv[1:] = [spelled for argument in sys.argv[1:] for spelled in settings.spelled_out(argument)]
    if {"-h", "--help"} & set(sys.argv):  # Hydra composes before it helps
        sys.argv[1:] = ["--help", "loss=fpo", "model=tiny"]
    main()
