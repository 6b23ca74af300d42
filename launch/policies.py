"""What eval.py works on: from the command line to a configuration, and to the model that it names."""

from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

import models
from launch import settings
from launch.settings import Config
from modeling.weights import weights_digest
from training import loop
from utils import REPO, UserError

OWN_DISTRIBUTION = ["++temperature=1.0", "++top_p=1.0", "++top_k=0"]  # of the policy: unbiased entropy, KL and means
# What a mode sets before the keys of the command line do.
DEFAULTS: dict[str, list[str]] = {
    "sample": [],
    "eval": OWN_DISTRIBUTION,
    "features": OWN_DISTRIBUTION,
    "alpacaeval": ["eval_datasets=[alpacaeval]", "eval_split=test"],
    "arenahard": ["eval_datasets=[arenahard]", "eval_split=test"],
    "mtbench": ["eval_datasets=[mtbench]", "eval_split=test", "++temperature=null"],
}


@dataclass(frozen=True)
class Policy:
    """The model to sample from: a directory in the Hub's format. `load_from` may replace its weights."""

    folder: Path
    tokenizer: Path
    load_from: str | None = None
    run: Path | None = None  # whose LATEST it is

    def digest(self) -> str:
        """Changes when the weights do."""
        return weights_digest(self.folder, self.load_from)

    def writes_text(self, config: Config) -> bool:
        """Whether it is a language model: not so for a reward model, or an SAE."""
        return not trainer_class(config).is_reward and (self.folder / "config.json").is_file()


def read_config(path: Path, overrides: list[str]) -> DictConfig:
    """The configuration of a run, a YAML file or a model, with the mode's defaults and the overrides applied.

    Raises UserError where there is none, and for a key that nothing reads.
    """
    settings.check_overrides(overrides)
    file, own = (path / "config.yaml" if path.is_dir() else path).resolve(), []
    if not file.is_file() and (path / "config.json").is_file():
        name = path.absolute().name
        file = REPO / "config" / "config.yaml"
        own = ["loss=sft", "model=base", f"model.name='{name}'", f"model.name_or_path='{path}'", f"exp_name='{name}'"]
    if not file.is_file():
        runs = ", ".join(str(found.parent) for found in sorted(Path("outputs").glob("*/config.yaml"))) or "none"
        raise UserError(
            f"--config-path={path}: no such run directory or YAML file, and no model in the Hub's format "
            f"(runs in outputs/: {runs})"
        )
    values = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)}
    mode = str(values.get("mode", "sample"))
    if mode not in DEFAULTS:
        raise UserError(f"mode={mode}: not one of {', '.join(DEFAULTS)}")
    given = [*own, f"++mode={mode}", *map(added, DEFAULTS[mode]), *map(added, overrides)]
    with initialize_config_dir(str(file.parent), version_base=None):
        return settings.completed(compose(file.stem, overrides=given))


def added(override: str) -> str:
    """The override as one that may add its key: a saved configuration lacks the keys that are newer than it."""
    is_plain = override[0] not in "+~" and override.partition("=")[0] not in settings.GROUPS
    return f"++{override}" if is_plain else override


def find_policy(path: Path, config: Config, overrides: list[str]) -> Policy:
    """The model that the command line names (--config-path, or a model key), else the run's LATEST.

    Raises UserError where there is none.
    """
    named = {o.key_or_group for o in OverridesParser.create().parse_overrides(overrides)}
    if (path / "config.json").is_file() or named & {"model", "model.name_or_path", "model.load_from"}:
        model = config.model
        patterns = [*models.CONFIG_FILES, *models.WEIGHT_FILES]
        folder = models.fetch(model.name_or_path, patterns, "model.name_or_path")
        tokenizer_source = model.tokenizer_name_or_path or model.name_or_path
        tokenizer = models.fetch(tokenizer_source, models.CONFIG_FILES, "model.tokenizer_name_or_path")
        return Policy(folder, tokenizer, model.load_from)
    beside = path if path.is_dir() else path.parent
    run = beside if (beside / "LATEST").exists() else Path(config.cache_dir) / config.exp_name
    if not (run / "LATEST").exists():
        raise UserError(
            f"{run}: no LATEST there, so no trained policy; has the run finished? "
            "(++model.load_from=... or ++model.name_or_path=... samples another model)"
        )
    return Policy(run / "LATEST", run / "LATEST", run=run)


def trainer_class(config: Config) -> type[loop.BasicTrainer]:
    """The class whose loss trained the policy."""
    return settings.run_classes(config.loss).trainer


def require_language_model(config: Config, policy: Policy) -> None:
    """Raises UserError for a run that trained no language model."""
    if not policy.writes_text(config):
        raise UserError(
            f"{policy.run or policy.folder}: loss={config.loss.name} trained no language model, so there is nothing to "
            "sample from; ++mode=eval measures it, and --config-path=MODEL samples from the model that it started from"
        )


def require_room(config: Config, policy: Policy) -> None:
    """Raises UserError where a prompt and its completion may be longer than the policy has positions."""
    prompt, completion = config.model.max_prompt_length, config.max_new_tokens
    models.require_positions(policy.folder, {"model.max_prompt_length": prompt, "max_new_tokens": completion})
