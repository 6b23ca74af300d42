"""Checks of the configuration. All that can be found wrong without reading a weight is found here, and said at once."""

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import dataloader
import trainers
from autoencoders.formats import SAESource, find_sae, sections
from data.batch import BATCH_LAYOUTS
from distributed.sharding import DTYPES
from modeling.weights import find_weights
from models import CONFIG_FILES, fetch, load_config
from training import loop
from training.metrics import check_trackers
from training.quantities import Binding, bind
from utils import REPO, UserError, flat, named_class, suggest

RENAMED = {"wandb.enabled": "log_to=[wandb]"}  # keys of before, and what to write now


class Problems(list[str]):
    """What is wrong with a configuration, collected to be told together."""

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.append(str(error))

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.append(otherwise)

    def tell(self) -> None:
        if self:
            raise UserError("\n".join(self))


@dataclass(frozen=True)
class RunClasses:
    """The classes that a configuration names, and how they fit."""

    trainer: type[loop.BasicTrainer]
    loader: type[dataloader.DataLoader]
    binding: Binding


@dataclass(frozen=True)
class RunPaths:
    """Where a run's model, tokenizer and SAEs are on this machine."""

    model: Path
    tokenizer: Path
    reference: Path
    saes: list[SAESource]


def spelled_out(argument: str) -> list[str]:
    """A command's argument in Hydra's words: `++config.key=value` as HALOs' FAQ has it, and `sae=[a,b]`, where Hydra
    would lay the second over the first. A renamed key is added, for `check_config` to name the new one."""
    if several := re.fullmatch(r"sae=\[(.*)\]", argument):
        names = [name.strip() for name in several[1].split(",")]
        return ["~sae", *(f"+sae@sae.parts.{re.sub(r'[^a-zA-Z0-9]', '_', name)}={name}" for name in names)]
    if argument.partition("=")[0] in RENAMED:
        return [f"++{argument}"]
    return [re.sub(r"^\+\+config\.", "++", argument)]


def renamed(key: str) -> str:
    return f"{key} is a key no more: {RENAMED[key]} has taken its place"


def check_config(config: DictConfig, overrides: Sequence[str], modes: Sequence[str] = ("train",)) -> RunClasses:
    """Everything that needs no file: names, values, and that the loss and its YAML agree.

    Raises UserError with all problems found.
    """
    problems = Problems()
    problems.extend(unknown_keys(overrides))
    given = {key for key in RENAMED if "train" in modes and OmegaConf.select(config, key)}  # in a config.yaml of before
    problems.extend(line for line in map(renamed, sorted(given)) if line not in problems)
    choices: dict[str, tuple[Any, Sequence[Any]]] = {
        "mode": (config.mode, modes),
        "resume": (config.resume, ["auto", "never"]),
        "template": (config.template, ["tulu", "chat"]),
        "lr_schedule": (config.lr_schedule, list(loop.SCHEDULES)),
        "model.policy_dtype": (config.model.policy_dtype, list(DTYPES)),
        "model.weights_dtype": (config.model.weights_dtype, list(DTYPES)),
        "model.activation_checkpointing": (config.model.activation_checkpointing, [False, True, "full", "selective"]),
        "model.layout": (config.model.layout, ["auto", *BATCH_LAYOUTS]),
    }
    for key, (value, known) in choices.items():
        hint = suggest(str(value), map(str, known))
        problems.expect(value in known, f"{key}={value}: not one of {', '.join(map(str, known))}{hint}")
    for key in ("model.batch_size", "model.eval_batch_size", "model.gradient_accumulation_steps", "log_every"):
        value = OmegaConf.select(config, key)
        problems.expect(isinstance(value, int) and value > 0, f"{key}={value}: has to be a whole number above 0")
    for key, package in (("use_peft", "peft"), ("load_in_4bit", "bitsandbytes")):
        missing = config.model[key] and importlib.util.find_spec(package) is None
        problems.expect(not missing, f"model.{key} needs the package {package}: pip install -e '.[peft]'")
    problems.expect(
        config.model.use_peft or not config.model.load_in_4bit, "model.load_in_4bit needs model.use_peft=true as well"
    )
    with problems.collected():
        loop.make_optimizer(config, [torch.zeros(1, requires_grad=True)])
    if "train" in modes:
        with problems.collected():
            check_trackers(config.log_to)
    with problems.collected():
        dataloader.check_datasets(config)
    parts = None
    with problems.collected():
        if OmegaConf.is_missing(config.loss, "trainer"):
            raise UserError(f"loss={config.loss.name} needs a trainer of yours: ++loss.trainer=path/to/file.py:Class")
        trainer = named_class(config.loss.trainer, trainers, "loss.trainer")
        loader = named_class(config.loss.dataloader, dataloader, "loss.dataloader")
        binding = bind(trainer, loader.records, dict(config.loss))
        parts = RunClasses(trainer, loader, binding)
        trainer.check(config, binding)
        if "sae" in binding.needs:
            require_sae(config, f"loss={config.loss.name}")
    problems.tell()
    assert parts is not None
    return parts


def require_sae(config: DictConfig, who: str) -> None:
    """Raises UserError where the configuration has no SAE."""
    if not sections(config):
        known = sorted(path.stem for path in (REPO / "config/sae").glob("*.yaml"))
        raise UserError(
            f"{who} needs an SAE: sae={'|'.join(known)}, fitting the model, or ++sae.path=... ++sae.layer=..."
        )


def sae_sources(config: DictConfig) -> list[SAESource]:
    """The SAEs that the configuration asks for, whatever its loss. Raises UserError where there is none, or where they
    do not go with the model."""
    require_sae(config, f"mode={config.mode}")
    return find_sources(config, frozenset({"sae"})).saes


def unknown_keys(overrides: Sequence[str], config_name: str = "config") -> list[str]:
    """Keys that the command line adds with + or ++ and that no YAML of the composition has, so nothing would read.

    The loss's own keys are left to its signature (`vocabulary.bind`).
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    added = [o for o in parsed if o.is_add() or o.is_force_add()]
    if not added:
        return []
    rest = [o.input_line for o in parsed if o not in added and o.input_line is not None]
    plain = compose(config_name, overrides=rest)
    keys = flat(OmegaConf.to_container(plain))

    def is_known(key: str) -> bool:
        free = [known for known, value in keys.items() if value == {}]  # a dictionary that any key may be added to
        return key.startswith(("loss.", *(f"{f}." for f in free))) or any(f"{k}.".startswith(f"{key}.") for k in keys)

    return [
        renamed(o.key_or_group)
        if o.key_or_group in RENAMED
        else f"{o.key_or_group} is read by nothing{suggest(o.key_or_group, keys)}"
        for o in added
        if not is_known(o.key_or_group)
    ]


def find_sources(config: DictConfig, needs: frozenset[str]) -> RunPaths:
    """Find, or fetch from the Hub, all but the weights; check that the SAEs' layers are ones the model has.

    Raises UserError with all problems found.
    """
    problems, model = Problems(), config.model
    found: dict[str, Path | None] = {"model": None, "tokenizer": None, "reference": None}
    saes: list[SAESource] = []
    wanted: dict[str, tuple[Callable[..., Path], str, str]] = {
        "model": (fetch, model.name_or_path, "model.name_or_path"),
        "tokenizer": (fetch, model.tokenizer_name_or_path or model.name_or_path, "model.tokenizer_name_or_path"),
        "reference": (fetch, model.reference_path or model.name_or_path, "model.reference_path"),
    }
    for name, (get, source, setting) in wanted.items():
        with problems.collected():
            if name == "model" or source != model.name_or_path:
                found[name] = get(source, CONFIG_FILES, setting)
            else:
                found[name] = found["model"]
    if "sae" in needs:
        for where, section in sections(config).items():
            with problems.collected():
                saes.append(find_sae(section, where))
    if model.load_from is not None:
        with problems.collected():
            find_weights(model.load_from)
    if found["model"] is not None:
        with problems.collected():
            text = load_config(found["model"]).get_text_config()
            layers = text.num_hidden_layers
            for sae in saes:
                there = f"{sae.where}.layer={sae.layer}: {model.name} has layers 0 to {layers - 1}"
                problems.expect(0 <= sae.layer < layers, there)
    problems.tell()
    return RunPaths(**found, saes=saes)  # type: ignore[arg-type]
