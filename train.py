"""Train a model: python train.py loss=LOSS model=MODEL [key=value ...]

    python train.py experiment=quickstart                       FPO on the built-in model, on a laptop
    python train.py loss=fpo model=gemma2b
    python train.py experiment=online                           three rounds of sampling, labelling and training
    python train.py loss=dpo model=llama7b datasets=[shp,hh,oasst] exp_name=my_run ++cache_dir=/data/models

config.loss.trainer names a class of trainers.py, and its method `loss` is the loss; training/loop.py calls it.
Add --cfg job to print the composed configuration, ++mode=plan to see what a run would take of memory, --help beside
loss=LOSS for what that loss's own keys may be.
"""

from launch import startup

if __name__ == "__main__":
    startup.begin(
        __doc__,
        ["run", "data", "the sparse autoencoder", "optimisation", "what is measured and kept", "model"],
        groups=["loss", "term", "model", "sae", "experiment"],
    )

import sys
import time
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from distributed import parallel
from launch import assembly, completions, online, plan, report, resuming, settings
from training.checkpoint import Run


def train(raw: DictConfig) -> None:
    """Check, prepare, train, summarise; of a run that is finished, say what it found."""
    started = time.monotonic()
    config, classes = settings.check_config(raw, modes=("train", "plan", "online"))
    if config.mode == "online":
        online.run(config, classes.binding, sys.argv[1:])
        return
    if config.mode == "plan":
        plan.print_plan(config, classes)
        return
    paths = settings.find_paths(config, classes.binding.needs)
    run = Run(Path(config.cache_dir) / config.exp_name)
    with run.writing():
        config, finished = resuming.begin(run, config, classes.trainer, paths)
        torch.manual_seed(config.seed)
        inputs = assembly.read_inputs(config, classes, paths)
        digests, loader = assembly.digests(config, classes, paths, inputs), inputs.data.loaders["train"]
        resuming.require_same_inputs(run, digests, loader, can_grow=classes.trainer.can_grow)
        if not finished:
            parallel.from_rank_zero(lambda: run.require_places(config))
            trainer = assembly.build_trainer(config, classes, paths, run, inputs)  # refuses, before the run begins
            parallel.from_rank_zero(lambda: run.start(config))
            trainer.began = started
            completions.write_completions(trainer, config, "before")
            with trainer.stopping:
                trainer.train()
                from launch import summary  # takes a while to import, and the first step need not wait for it

                summary.write_summary(trainer, config, paths.model)
        if parallel.rank() == 0:
            report.show_summary(run.folder, finished_before=finished)
            if config.keep_checkpoints == 0:
                run.remove(["state"])


@hydra.main(version_base=None, config_path="config", config_name="config")
def main(raw: DictConfig) -> None:
    parallel.run(lambda: train(raw), settings.ranks_of(raw))


if __name__ == "__main__":
    sys.argv[1:] = settings.checked_arguments(sys.argv[1:])
    main()
