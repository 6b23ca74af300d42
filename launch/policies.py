"""What eval.py works on: from the command line to a configuration, and to the model that it names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import models
from data import tokenise
from distributed import parallel
from launch import settings
from launch.schema import Config, require_read
from modeling.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from modeling.weights import only_policy_file, weights_digest
from training import loop
from utils import (
    DIGESTS,
    REPO,
    UserError,
    code_file,
    damaged,
    damaged_files,
    fingerprint,
    is_file_name,
    resolve_path,
    sound_digest,
)

OURS = REPO / "config"
OWN_DISTRIBUTION = ["++temperature=1.0", "++top_p=1.0", "++top_k=0"]  # of the policy: unbiased entropy, KL and means
# What a mode sets before the keys of the command line do.
DEFAULTS: dict[str, list[str]] = {
    "sample": [],
    "eval": OWN_DISTRIBUTION,
    "features": OWN_DISTRIBUTION,
    "label": [],
    "rewards": [],
    "alpacaeval": ["eval_datasets=[alpacaeval]", "eval_split=test"],
    "arenahard": ["eval_datasets=[arenahard]", "eval_split=test"],
    "mtbench": ["eval_datasets=[mtbench]", "eval_split=test", "++temperature=null"],
}


@dataclass(frozen=True)
class Policy:
    """The model to sample from: a directory in the Hub's format. `load_from` may replace its weights, or bring them."""

    folder: Path
    tokenizer: Path
    load_from: str | None = None
    run: Path | None = None  # whose LATEST it is

    @property
    def adapter(self) -> Path | None:
        """The adapter in peft's format that `load_from` names, if it does."""
        named = resolve_path(self.load_from) if self.load_from else None
        return named if named and (named / ADAPTER_CONFIG).is_file() else None

    def digest(self) -> str:
        """Changes when the weights do."""
        if self.adapter:
            files = [self.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
            return fingerprint([weights_digest(self.folder, None), *map(sound_digest, files)])
        return weights_digest(self.folder, self.load_from)

    def source(self) -> str:
        """The run or the model, as messages name it."""
        return str(self.run or self.load_from or self.folder)

    def writes_text(self) -> bool:
        """Whether it is a language model: not so for a reward model, or an SAE."""
        if not (self.folder / "config.json").is_file():
            return False
        kinds = models.load_config(self.folder).architectures or []
        return not any(kind.endswith("ForSequenceClassification") for kind in kinds)


def read_config(path: Path, overrides: list[str]) -> DictConfig:
    """The configuration of a run, a YAML file or a model, with the mode's defaults and the overrides applied.

    What it says is data: where something is sent or written, and which file's code is run, has to be said on the
    command line. Raises UserError where that is not so, where there is no configuration, and for a key that nothing
    reads.
    """
    config = read_unchecked(path, overrides)
    given = {o.key_or_group for o in OverridesParser.create().parse_overrides(overrides)}
    if config_file(path) is not None and not is_ours(path):
        require_orders(path, config, given)
    return config


def read_unchecked(path: Path, overrides: list[str]) -> DictConfig:
    """As `read_config`, for one that is only read."""
    settings.check_overrides(overrides)
    file, own = config_file(path), []
    if file is None and (path / "config.json").is_file():
        name = settings.name_of_model(path)
        file = OURS / "config.yaml"
        own = ["loss=sft", "model=base", f"model.name='{name}'", f"model.name_or_path='{path}'", f"exp_name='{name}'"]
    if file is None:
        runs = ", ".join(str(found.parent) for found in sorted(Path("outputs").glob("*/config.yaml"))) or "none"
        raise UserError(
            f"--config-path={path}: no such run directory or YAML file, and no model in the Hub's format "
            f"(runs in outputs/: {runs})"
        )
    values = settings.values_of(overrides)
    mode = str(values.get("mode", "sample"))
    if mode not in DEFAULTS:
        raise UserError(f"mode={mode}: not one of {', '.join(DEFAULTS)}")
    require_read(values, mode)
    given = [*own, f"++mode={mode}", *map(added, DEFAULTS[mode]), *map(added, overrides)]
    if not is_ours(file):
        return settings.completed(changed(settings.read_saved(file), given))
    with initialize_config_dir(str(file.resolve().parent), version_base=None):
        return settings.completed(compose(file.stem, overrides=given))


def config_file(path: Path) -> Path | None:
    """The YAML file that --config-path names; None for a model, and where there is nothing."""
    file = path / "config.yaml" if path.is_dir() else path
    return file if file.is_file() else None


def run_of(path: Path) -> Path | None:
    """The run directory that --config-path names; None for a copy of a run's configuration."""
    if path.is_dir():
        return path
    return path.parent if (path.parent / "LATEST").is_symlink() else None


def is_ours(path: Path) -> bool:
    """Whether it is in this repository's config/, and so part of the program."""
    return path.resolve().is_relative_to(OURS)


def changed(config: DictConfig, overrides: list[str]) -> DictConfig:
    """A configuration with overrides applied, as Hydra would to one of its own. Raises UserError for one that cannot
    be, such as a key below a number."""
    for override in OverridesParser.create().parse_overrides(overrides):
        section, _, key = override.key_or_group.rpartition(".")
        try:
            if not override.is_delete():
                OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
            elif isinstance(parent := OmegaConf.select(config, section) if section else config, DictConfig):
                parent.pop(key, None)
        except OmegaConfBaseException as error:
            raise UserError(f"{override.input_line}: {str(error).splitlines()[0]}") from None
    return config


def require_orders(path: Path, config: DictConfig, given: set[str]) -> None:
    """Set what only the command line may say to its default where a file said it. Raises UserError where the command
    would do something else without it."""
    values = settings.plain(config)
    defaults: Any = OmegaConf.load(OURS / "config.yaml")
    for key in ("backend", "base_url", "served_model", "samples_dir", "files", "labels"):
        if key not in given and values[key] != defaults[key]:
            raise UserError(
                f"{path}: its {key}={values[key]} is not followed; to go there, give ++{key}={values[key]} yourself"
            )
    for key in ("loss.trainer", "loss.dataloader", *(f"term.{name}.function" for name in settings.terms_of(values))):
        value = str(OmegaConf.select(config, key))
        if key not in given and (file := code_file(value)):
            raise UserError(f"{path}: its {key} is code in {file}; to run it, give ++{key}={value} yourself")
    if "exp_name" not in given and not is_file_name(str(values["exp_name"])):
        raise UserError(f"{path}: its exp_name={values['exp_name']} is no name of a file; ++exp_name=NAME gives one")
    if "nproc" not in given:
        config.nproc = defaults.nproc
    run, home = run_of(path), Path(str(values["cache_dir"]), str(values["exp_name"]))
    if run is None and config.mode in ("eval", "features"):
        raise UserError(f"mode={config.mode} writes into the run, so name that: --config-path={home}")
    if run is not None and run.resolve() != home.resolve() and "cache_dir" not in given:
        config.cache_dir = defaults.cache_dir


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
        return Policy(folder, tokenizer, model.load_from or only_policy_file(folder))
    run = run_of(path) or Path(config.cache_dir) / config.exp_name
    latest = run / "LATEST"
    if not latest.exists():
        what = f"{latest} leads to nothing" if latest.is_symlink() else f"{run}: no LATEST there, so no trained policy"
        raise UserError(
            f"{what}; has the run finished? (++model.load_from=... or ++model.name_or_path=... samples another model)"
        )
    if (run / "features").is_symlink():
        raise UserError(f"{run / 'features'} is a link, and could lead anywhere; reports are written into a directory")
    parallel.from_rank_zero(lambda: require_undamaged(latest))
    return Policy(latest, latest, only_policy_file(latest), run)


def require_undamaged(folder: Path) -> None:
    """Raises UserError where an export is not what the run wrote."""
    if (folder / DIGESTS).is_file() and (files := damaged_files(folder)):
        raise damaged(folder, files)


def trainer_class(config: Config) -> type[loop.BasicTrainer]:
    """The class whose loss trained the policy."""
    return settings.run_classes(config.loss, {}).trainer


def require_language_model(config: Config, policy: Policy) -> None:
    """Raises UserError for a run that trained no language model."""
    if not policy.writes_text():
        raise UserError(
            f"{policy.run or policy.folder}: loss={config.loss.name} trained no language model, so there is nothing to "
            "sample from; ++mode=eval measures it, and --config-path=MODEL samples from the model that it started from"
        )


def require_room(config: Config, policy: Policy, records: Sequence[dict[str, Any]]) -> None:
    """Raises UserError where a prompt and its completion may be longer than the policy has positions.

    How long later turns of a conversation are, nobody knows before: as long as is allowed.
    """
    prompt, tokenizer = config.model.max_prompt_length, models.load_tokenizer(policy.tokenizer)
    control = min(1, len(trainer_class(config).control_tokens))  # follows the prompt
    wanted = {"model.max_prompt_length": prompt + control, "max_new_tokens": config.max_new_tokens}
    if sum(wanted.values()) > models.positions_of(models.load_config(policy.folder)):
        if not any(record["followups"] for record in records):
            template = tokenise.make_template(config, tokenizer)
            rows = tokenise.tokenise_prompts(records, tokenizer, template, max_prompt_length=prompt)
            longest = max(len(row["prompt_ids"]) for row in rows)
            wanted = {"tokens of the longest prompt": longest + control, "max_new_tokens": config.max_new_tokens}
        models.require_positions(models.load_config(policy.folder), policy.folder, wanted)
