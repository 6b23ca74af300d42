"""Train: `python train.py loss=fpo model=gemma2b [key=value ...]`. `--help` lists what can be chosen.

The way from here to a loss: config.loss.trainer names a class of trainers.py, and its `loss` method is the loss.
"""

import gc

gc.set_threshold(100_000)  # Python's own 700 costs a fifth of the imports' time, and more of the tokenising's

import sys
import time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from distributed import parallel
from launch import assembly, completions, plan, settings
from training.checkpoint import Run

MODES = ("train", "plan")


def train(config: DictConfig, overrides: list[str]) -> None:
    """Check, prepare, train, summarise."""
    started = time.monotonic()
    config.exp_name = str(config.exp_name)  # YAML reads exp_name=7 as a number
    parts = settings.check_config(config, overrides, modes=MODES)
    sources = settings.find_sources(config, parts.binding.needs)
    if config.mode == "plan":
        plan.print_plan(config, parts, sources)
        return
    run = Run(Path(config.cache_dir) / config.exp_name)
    with run.writing():
        parallel.from_rank_zero(lambda: run.start(config))
        torch.manual_seed(config.seed)
        trainer = assembly.prepare(config, parts, sources, run)
        completions.write_completions(trainer, "before")
        trainer.train()
        from launch import summary  # takes a while to import, and the first step need not wait for it

        summary.summarise(trainer, sources.model, started)


@hydra.main(version_base=None, config_path="config", config_name="config")
def main(config: DictConfig) -> None:
    overrides = list(HydraConfig.get().overrides.task)
    ranks = 1 if config.mode == "plan" else config.nproc  # a plan for many ranks needs only one
    parallel.run(lambda: train(config, overrides), ranks)


if __name__ == "__main__":
    sys.argv[1:] = [spelled for argument in sys.argv[1:] for spelled in settings.spelled_out(argument)]
    if {"-h", "--help"} & set(sys.argv):  # Hydra composes before it helps
        sys.argv[1:] = ["--help", "loss=fpo", "model=tiny"]
    main()
