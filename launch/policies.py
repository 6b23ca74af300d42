"""What eval.py works on: from the command line to a configuration, and to the model that it names."""

from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

import models
import trainers
from launch import settings
from modeling.weights import weights_digest
from utils import REPO, UserError, load_class

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
    """What is sampled from: a directory in the Hub's format, with other weights in place of its own, if any."""

    folder: Path
    tokenizer: Path
    load_from: str | None = None
    run: Path | None = None  # whose LATEST it is

    def digest(self) -> str:
        """Changes when the weights do."""
        return weights_digest(self.folder, self.load_from)

    def writes_text(self, config: DictConfig) -> bool:
        """Whether it is a language model: not so for a reward model, or an SAE."""
        return not trainer_class(config).is_reward and (self.folder / "config.json").is_file()


def read_config(path: Path, overrides: list[str]) -> DictConfig:
    """The configuration of a run, a YAML file or a model, with the mode's defaults and the overrides applied.

    Raises UserError where there is none, and for a key that it does not have.
    """
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
    given = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)}
    mode = str(given.get("mode", "sample"))
    if mode not in DEFAULTS:
        raise UserError(f"mode={mode}: not one of {', '.join(DEFAULTS)}")
    with initialize_config_dir(str(file.parent), version_base=None):
        if unknown := settings.unknown_keys([*own, *overrides], file.stem):
            raise UserError("\n".join(unknown))
        return compose(file.stem, overrides=[*own, f"++mode={mode}", *DEFAULTS[mode], *overrides])


def find_policy(path: Path, config: DictConfig, overrides: list[str]) -> Policy:
    """The model that the command line names (--config-path, or a model key), else the run's LATEST.

    Raises UserError where there is none.
    """
    named = {o.key_or_group for o in OverridesParser.create().parse_overrides(overrides)}
    if (path / "config.json").is_file() or named & {"model", "model.name_or_path", "model.load_from"}:
        model = config.model
        patterns = [*models.CONFIG_FILES, *models.WEIGHT_FILES]
        folder = models.fetch(model.name_or_path, patterns, "model.name_or_path")
        tokenizer = model.tokenizer_name_or_path or model.name_or_path
        tokenizer = models.fetch(tokenizer, models.CONFIG_FILES, "model.tokenizer_name_or_path")
        return Policy(folder, tokenizer, model.load_from)
    beside = path if path.is_dir() else path.parent
    run = beside if (beside / "LATEST").exists() else Path(config.cache_dir) / config.exp_name
    if not (run / "LATEST").exists():
        raise UserError(
            f"{run}: no LATEST there, so no trained policy; has the run finished? "
            "(++model.load_from=... or ++model.name_or_path=... samples another model)"
        )
    return Policy(run / "LATEST", run / "LATEST", run=run)


def trainer_class(config: DictConfig) -> type[trainers.BasicTrainer]:
    """The class whose loss trained the policy."""
    found: type[trainers.BasicTrainer] = load_class(config.loss.trainer, trainers, "loss.trainer")
    return found


def require_language_model(config: DictConfig, policy: Policy) -> None:
    """Raises UserError for a run that trained no language model."""
    if not policy.writes_text(config):
        raise UserError(
            f"{policy.run or policy.folder}: loss={config.loss.name} trained no language model, so there is nothing to "
            "sample from; ++mode=eval measures it, and --config-path=MODEL samples from the model that it started from"
        )
