"""Sample from a trained policy, or measure it: `python eval.py --config-path=RUN [++key=value ...]`.

    python eval.py --config-path=outputs/my_run                     writes samples/my_run.json
    python eval.py --config-path=outputs/my_run ++mode=eval         the metrics of the evaluation set

--config-path is a run directory or a config.yaml that a run wrote; any of its keys can be changed.
"""

import argparse
import json
import random
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import assembly
import dataloader
import models
import settings
import tokenise
import trainers
from checkpoint import Run
from sampling import sample
from sharding import DTYPES
from utils import UserError, console, write_json


def read_config(path: Path, overrides: list[str]) -> tuple[DictConfig, Path]:
    """A run's configuration with the overrides applied, and the run directory with its LATEST.

    Raises UserError where there is no configuration, a key that it does not have, or no trained policy.
    """
    file = (path / "config.yaml" if path.is_dir() else path).resolve()
    if not file.is_file():
        runs = ", ".join(str(found.parent) for found in sorted(Path("outputs").glob("*/config.yaml"))) or "none"
        raise UserError(f"--config-path={path}: no such run directory or YAML file (runs in outputs/: {runs})")
    with initialize_config_dir(str(file.parent), version_base=None):
        if unknown := settings.unknown_keys(overrides, file.stem):
            raise UserError("\n".join(unknown))
        config = compose(file.stem, overrides=["++mode=sample", *overrides])
    run = file.parent if (file.parent / "LATEST").exists() else Path(config.cache_dir) / config.exp_name
    if not (run / "LATEST").exists():
        raise UserError(f"{run}: no LATEST there, so no trained policy; has the run finished?")
    return config, run


def write_samples(config: DictConfig, run: Path) -> None:
    """One completion for each of n_samples test prompts, drawn at random, in `<samples_dir>/<exp_name>.json`."""
    trainer = settings.named_class(config.loss.trainer, trainers, "loss.trainer")
    if trainer.is_reward:
        raise UserError(f"{run}: a reward model writes no text; ++mode=eval measures it")
    tokenizer = models.load_tokenizer(run / "LATEST")
    control = [tokenizer.encode(token, add_special_tokens=False)[0] for token in trainer.control_tokens]
    template = tokenise.make_template(config, tokenizer)
    records = [r for data in dataloader.load_datasets(config, "test") for r in dataloader.prompt_records(data)]
    chosen = sorted(random.Random(0).sample(range(len(records)), min(config.n_samples, len(records))))
    prompts = tokenise.tokenise_prompts(
        [records[i] for i in chosen], tokenizer, template, max_prompt_length=config.model.max_prompt_length
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = models.load_config(run / "LATEST")
    attention = models.choose_attention(
        config.model.attn_implementation, architecture, device, config.model.policy_dtype
    )
    policy = models.load_model(run / "LATEST", attention, device, dtype=DTYPES[config.model.policy_dtype])
    samples = sample(
        policy,
        tokenizer,
        [[*prompt["prompt_ids"], *control[:1]] for prompt in prompts],
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.model.eval_batch_size,
        seed=config.seed,
        never=control,
    )
    content: dict[str, Any] = {
        "sampled_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": OmegaConf.to_container(config, resolve=True),
        "samples": [
            {
                "prompt": prompt["prompt"],
                "messages": json.loads(prompt["messages"]),
                **({"chosen": prompt["completions"][0]} if prompt["completions"] else {}),
                "policy": drawn.text,
            }
            for prompt, drawn in zip(prompts, samples, strict=True)
        ],
    }
    path = Path(config.samples_dir) / f"{config.exp_name}.json"
    write_json(path, content)
    console.print(f"{len(samples)} samples in {path}; judge them: python compare.py -f {path}")


def write_metrics(config: DictConfig, run: Path) -> None:
    """The metrics of the whole evaluation set, in `<run>/eval.json`."""
    parts = settings.check(config, [], modes=["eval"])
    sources = settings.find_sources(config, parts.binding.needs)
    trainer = assembly.prepare(config, parts, sources, Run(run), cached=["eval"])
    trainer.read_export(run / "LATEST")
    values = trainer.evaluate()
    write_json(run / "eval.json", values)
    for name, value in values.items():
        console.print(f"{name:32} {value:.6g}")
    console.print(f"written to {run / 'eval.json'}")


MODES = {"sample": write_samples, "eval": write_metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-path", required=True, type=Path, help="a run directory or a YAML file")
    parser.add_argument("overrides", nargs="*", help="++key=value, of the run's config.yaml (mode, n_samples, ...)")
    arguments = parser.parse_args()
    try:
        config, run = read_config(arguments.config_path, arguments.overrides)
        if config.mode not in MODES:
            raise UserError(f"mode={config.mode}: not one of {', '.join(MODES)}")
        MODES[config.mode](config, run)
    except UserError as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
