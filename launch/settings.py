"""The whole configuration (launch/schema.py), and checks of it.

All that can be found wrong without reading a weight is found here, and said at once.
"""

import contextlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic_core import PydanticUndefined
from transformers import PretrainedConfig
from yaml import AliasToken, YAMLError

import dataloader
import models
import trainers
from autoencoders.formats import SAESource, find_sae, sae_sections
from data import tokenise
from data.settings import DataSettings
from launch.schema import Config, kinds, require_read
from modeling.weights import find_weights
from models import CONFIG_FILES, fetch, load_config, load_generation_config, require_positions
from training import loop
from training.checkpoint import MANIFEST
from training.metrics import check_trackers
from training.quantities import NEEDS, Binding, bind, bind_term, hyperparameters_of_term
from training.settings import LossSettings, TermSettings, TrainingSettings
from utils import (
    REPO,
    Settings,
    UserError,
    checked,
    console,
    flat,
    known_keys,
    load_class,
    load_function,
    suggest,
    valid_unicode,
)

S = TypeVar("S", bound=Settings)
GROUPS = ("loss", "term", "model", "sae", "experiment")  # each a directory of config/


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

    def raise_if_any(self) -> None:
        if self:
            raise UserError("\n".join(dict.fromkeys("\n".join(self).split("\n"))))  # each line once


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


# ---------------------------------------------------------------------------------------------- the command line

# What transformers, TRL and HALOs call a key that has another name here. (A key that is only in another section, such
# as max_length, needs no line.)
ELSEWHERE = {
    "bf16": "model.policy_dtype=bfloat16",
    "dataset_name": "datasets",
    "enabled": "log_to=[wandb]",
    "eval_steps": "eval_every",
    "gradient_checkpointing": "model.activation_checkpointing",
    "learning_rate": "lr",
    "logging_steps": "log_every",
    "lr_scheduler_type": "lr_schedule",
    "early_stop": "eval_best, which keeps the best weights; a run goes on to its end",
    "load_best_model_at_end": "eval_best=METRIC",
    "metric_for_best_model": "eval_best",
    "max_seq_length": "model.max_length",
    "max_steps": "n_examples",
    "model_name_or_path": "model.name_or_path",
    "num_train_epochs": "n_epochs",
    "optim": "optimizer",
    "output_dir": "cache_dir",
    "packing": "model.layout=packed",
    "per_device_eval_batch_size": "model.eval_batch_size",
    "per_device_train_batch_size": "model.batch_size",
    "run_name": "exp_name",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "tensorboard": "log_to=[tensorboard]",
    "torch_dtype": "model.policy_dtype",
    "use_wandb": "log_to=[wandb]",
    "report_to": "log_to",
    "weight_decay": "optimizer_options.weight_decay",
}


def translate_argument(argument: str) -> list[str]:
    """A command's argument in Hydra's words: `++config.key=value` as HALOs' FAQ has it; `model=` with a directory, a
    run or a Hub id; `sae=[a,b]`, where Hydra would lay the second over the first, and `sae=null`; `gemma-2-2b` as the
    earlier FPO code spells gemma2b; `term=nll` and `term=[nll,features]`, each of which goes into a section of its
    own."""
    argument = re.sub(r"^\+\+config\.", "++", argument)
    if argument.startswith("model="):
        source = argument.removeprefix("model=")
        if "/" in source or (Path(source).exists() and source not in choices_of("model")):
            return any_model(source)
        if source == "base":
            raise UserError(
                "model=base is no model; model=ORG/NAME takes one from the Hub, model=path/to/dir a local one"
            )
    if re.match(r"(model|sae)=", argument):
        argument = re.sub(r"\bgemma-2-(2b|9b)\b", r"gemma\1", argument)
    if re.fullmatch(r"\+{0,2}term=(null|\[\])?", argument):
        raise UserError(f"{argument}: names no term; there are {', '.join(choices_of('term'))}")
    if terms := re.fullmatch(r"\+{0,2}term=\[?([\w, -]+)\]?", argument):
        return [f"+term@term.{name.strip()}={name.strip()}" for name in terms[1].split(",")]
    if argument == "sae=null":
        return ["~sae"]
    if several := re.fullmatch(r"sae=\[(.*)\]", argument):
        names = [name.strip() for name in several[1].split(",")]
        return ["~sae", *(f"+sae@sae.parts.{re.sub(r'[^a-zA-Z0-9]', '_', name)}={name}" for name in names)]
    return [argument]


def any_model(source: str) -> list[str]:
    """What `model=` stands for with a directory in the Hub's format, a run (its LATEST) or a Hub id. Its name is the
    last part. Raises UserError for a file."""
    path = Path(source)
    if path.is_file():
        way = " (python scripts/from_gguf.py makes a directory of it)" if path.suffix == ".gguf" else ""
        raise UserError(f"model={source}: a file; it has to be a directory in the Hub's format, or a Hub id{way}")
    name, own = name_of_model(path), "LATEST" if (path / "LATEST").is_dir() else ""
    return ["model=base", f"model.name='{name}'", f"model.name_or_path='{path / own}'"]


def name_of_model(folder: Path) -> str:
    """What a model in a directory is called: by its last part; an export of a run, such as BEST, after that run."""
    folder = folder.absolute()
    is_export = (folder.parent / "config.yaml").is_file() and (folder.parent / MANIFEST).is_file()
    return f"{folder.parent.name}-{folder.name}" if is_export else folder.name


def translate_arguments(arguments: Sequence[str]) -> list[str]:
    """`translate_argument` of each. With another `sae.path` the model's own YAML of an SAE says nothing about layer,
    hook and format any more: the file does, or the YAML that `sae=` names."""
    translated = [found for argument in arguments for found in translate_argument(argument)]
    terms = [argument for argument in translated if argument.startswith("+term@")]
    if len(set(terms)) < len(terms):
        raise UserError(f"term= names {terms[0].rpartition('=')[2]} or another one twice")
    given = {argument.lstrip("+").partition("=")[0] for argument in translated}
    unsaid = {"name": "null", "format": "auto", "layer": "null", "hook": "null"}
    if "sae.path" in given and not given & {"sae", "~sae"}:
        translated += [f"++sae.{key}={value}" for key, value in unsaid.items() if f"sae.{key}" not in given]
    return translated


def checked_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of train.py in Hydra's words. Ends the process with a line for each choice or key that is wrong."""
    try:
        translated = translate_arguments(arguments)
        overrides = get_args_parser().parse_args(translated).overrides
        check_overrides(overrides)
        if len(overrides) == len(translated):  # else the command only prints something
            require_choices(overrides)
            given = values_of(overrides)
            require_read(given, str(given.get("mode") or mode_of_experiment(given.get("experiment"))))
            require_composable(overrides)
    except UserError as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(2)
    return translated


def require_choices(overrides: Sequence[str]) -> None:
    """Raises UserError where neither an experiment nor a loss and a model are chosen."""
    given = {override.partition("=")[0] for override in overrides}
    missing = [group for group in ("loss", "model") if group not in given and "experiment" not in given]
    if missing:
        lines = [f"{group}= has to be one of {', '.join(choices_of(group))}" for group in missing]
        if "model" in missing:
            lines.append("or model=ORG/NAME from the Hub, or model=path/to/dir in its format")
        raise UserError("\n".join(lines))


def values_of(overrides: Sequence[str]) -> dict[str, Any]:
    """The values that a command line gives, by key."""
    return {own.key_or_group: own.value() for own in OverridesParser.create().parse_overrides(list(overrides))}


def mode_of_experiment(name: Any) -> str:
    """The mode that an experiment chooses, if there is one."""
    file = REPO / f"config/experiment/{name}.yaml"
    return str(OmegaConf.select(OmegaConf.load(file), "mode", default="train")) if file.is_file() else "train"


def require_composable(overrides: Sequence[str]) -> None:
    """Raises UserError for arguments that Hydra makes no configuration of."""
    try:
        with initialize_config_dir(str(REPO / "config"), version_base=None):
            compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(str(error)) from error


def choices_of(group: str) -> list[str]:
    """The names of the YAML files of a group; model/base.yaml is the part that models share."""
    return sorted(path.stem for path in (REPO / "config" / group).glob("*.yaml") if path.stem != "base")


def ranks_of(raw: DictConfig) -> int | None:
    """How many processes to start here; one for a plan, which counts for many without them, and for a value that is
    no number, which `check_config` then tells."""
    if raw.mode in ("plan", "online") or not isinstance(raw.nproc, int | None):
        return 1
    return raw.nproc


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises UserError with a line for each choice that does not exist and each key that nothing reads."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(str(error).splitlines()[0]) from None
    problems = Problems()
    for override in parsed:
        group, value = override.key_or_group.partition("@")[0], override.value()
        if group in GROUPS:
            there = choices_of(group)
            if not isinstance(value, str | None):
                problems.append(f"{override.input_line}: has to be one name; there are {', '.join(there)}")
            elif value and not override.is_delete() and value not in [*there, "base"]:
                hint = suggest(value, there)
                problems.append(f"{group}={value}: there is none{hint}; there are {', '.join(there)}")
        elif not is_known(override.key_or_group):
            problems.append(f"{override.key_or_group} is read by nothing{hint_for(override.key_or_group)}")
        elif isinstance(value, dict | list):  # where Hydra might not take it
            problems += wrong_with(override.key_or_group, value)
    problems.raise_if_any()


def wrong_with(key: str, value: Any) -> list[str]:
    """What the schema says against the value of a key, what is below it apart."""
    *sections, last = key.split(".")
    values: dict[str, Any] = {last: value}
    for section in reversed(sections):
        values = {section: values}
    try:
        checked(Config, values)
    except UserError as error:
        return [line for line in str(error).splitlines() if line.startswith(f"{key}=")]
    return []


def is_known(key: str) -> bool:
    """Whether something may read the key. The keys of the loss are for its signature to know (`quantities.bind`)."""
    free = ("loss.", "term.", "optimizer_options.", "sae.parts.", "hydra.")  # any key may be added below these
    return key.startswith(free) or any(f"{known}.".startswith(f"{key}.") for known in known_keys(Config))


def hint_for(key: str) -> str:
    """What the user may have meant by a key that nothing reads."""
    known = known_keys(Config)
    leaf = key.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == leaf]
    if leaf in ELSEWHERE or len(same) == 1:
        return f" (here it is {ELSEWHERE.get(leaf) or same[0]})"
    return suggest(key, [other for other in known if other.count(".") == key.count(".")])


# ---------------------------------------------------------------------------------------------- the configuration

MOVED = {"sae_training.py:SAETrainer": "autoencoders/training.py:SAETrainer"}  # what older configurations name


def typed(raw: DictConfig) -> Config:
    """The configuration with every key's type and range checked. Raises UserError with all that is wrong."""
    return checked(Config, plain(raw))


def plain(raw: DictConfig) -> dict[str, Any]:
    """The configuration as dictionaries. Raises UserError where a key refers to one that is left open, and for text
    that no file can hold (bytes of the command line that are no UTF-8)."""
    try:
        values: dict[str, Any] = without_missing(OmegaConf.to_container(raw, resolve=True))
    except OmegaConfBaseException as error:
        left_open = re.search(r"Missing mandatory value: (\S+)", str(error))
        raise UserError(f"++{left_open[1]}= has to be given" if left_open else str(error).splitlines()[0]) from None
    for key, value in flat(values).items():
        if valid_unicode([key, value]) != [key, value]:
            raise UserError(f"{key}={value!r}: not valid Unicode")
    return values


def part_of(kind: type[S], values: dict[str, Any]) -> S:
    """Those of the values that belong to some settings, as these."""
    return checked(kind, {key: value for key, value in values.items() if key in kind.model_fields})


def without_missing(values: Any) -> Any:
    """Nested dictionaries without the keys that are left open (`???` in YAML)."""
    if not isinstance(values, dict):
        return values
    return {key: without_missing(value) for key, value in values.items() if value != "???"}


def completed(saved: DictConfig) -> DictConfig:
    """A saved configuration with the defaults of keys that are newer than it, and with names as they are today."""
    defaults: Any = OmegaConf.load(REPO / "config/config.yaml")
    model = OmegaConf.load(REPO / "config/model/base.yaml")
    for section in ("defaults", "hydra"):
        del defaults[section]
    try:
        merged = OmegaConf.merge(defaults, {"model": model}, saved)
    except OmegaConfBaseException as error:
        raise UserError(f"a section of the configuration is none ({str(error).splitlines()[0]})") from None
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, False)
    if isinstance(merged.wandb, DictConfig) and merged.wandb.pop("enabled", False):
        merged.log_to = ["wandb"]
    trainer = OmegaConf.select(merged, "loss.trainer")
    if trainer in MOVED:
        OmegaConf.update(merged, "loss.trainer", MOVED[trainer])
    return merged


def as_text(values: Any) -> Any:
    """Nested values in which `${...}` is text. What was saved refers to nothing: not to other keys, which were resolved
    before, and not to the environment, whose secrets are nobody's who wrote the file."""
    if isinstance(values, dict):
        return {key: as_text(value) for key, value in values.items()}
    if isinstance(values, list):
        return [as_text(value) for value in values]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", values) if isinstance(values, str) else values


def read_saved(file: Path) -> DictConfig:
    """A configuration from a file, as data (`as_text`). Raises UserError where there is none in it."""
    try:
        with file.open(encoding="utf-8") as stream:  # a few aliases of aliases can stand for any amount of data
            tokens = yaml.scan(stream, yaml.CSafeLoader)
            assert not any(isinstance(token, AliasToken) for token in tokens), "it has aliases"
        loaded = OmegaConf.load(file)
        values = as_text(OmegaConf.to_container(loaded))
        assert isinstance(values, dict) and values.keys() & Config.model_fields.keys(), "it has no key of one"
        return OmegaConf.create(values)
    except (OSError, ValueError, AssertionError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file}: not a configuration ({' '.join(str(error).split())})") from error


def saved_config(run: Path) -> Config | None:
    """The configuration that a run directory was last started with; None where there is none."""
    file = run / "config.yaml"
    return typed(completed(read_saved(file))) if file.is_file() else None


def check_config(raw: DictConfig, modes: Sequence[str] = ("train",)) -> tuple[Config, RunClasses]:
    """Check everything that needs no file: types, ranges, names, and that the loss and its YAML agree.

    Raises UserError with all problems found.
    """
    values = plain(raw)
    if values["mode"] == "plan":  # which is for GPUs, also where it is made on a machine without one
        values["model"] |= {
            key: "bfloat16" for key, dtype in values["model"].items() if dtype == "auto" and "dtype" in key
        }
    return check_values(values, modes)


def check_values(values: dict[str, Any], modes: Sequence[str] = ("train",)) -> tuple[Config, RunClasses]:
    """As `check_config`, of dictionaries."""
    problems = Problems()
    classes = config = None
    with problems.collected():
        config = checked(Config, values)
    with problems.collected():
        classes = run_classes(checked(LossSettings, values.get("loss", {}), "loss"), terms_of(values))
    with problems.collected():
        training = part_of(TrainingSettings, values)
        loop.check_optimizer(training)
    with problems.collected():
        dataloader.check_datasets(part_of(DataSettings, values))
    problems.raise_if_any()
    assert config is not None and classes is not None
    problems.expect(config.mode in modes, f"mode={config.mode}: not one of {', '.join(modes)}")
    for key, package in (("use_peft", "peft"), ("load_in_4bit", "bitsandbytes")):
        missing = getattr(config.model, key) and importlib.util.find_spec(package) is None
        problems.expect(not missing, f"model.{key} needs the package {package}: pip install -e '.[peft]'")
    problems.expect(
        config.model.use_peft or not config.model.load_in_4bit, "model.load_in_4bit needs model.use_peft=true as well"
    )
    problems.expect(
        not (config.model.compile and config.model.activation_checkpointing == "selective"),
        "model.activation_checkpointing=selective keeps the results of single operations, which model.compile=true "
        "fuses: take activation_checkpointing=full, or compile=false",
    )
    problems.expect(
        not (config.model.use_peft and classes.trainer.control_tokens),
        f"loss={config.loss.name} has to learn its control tokens, which adapters do not: model.use_peft=false",
    )
    problems.expect(
        not (config.model.use_peft and classes.trainer.is_reward),
        f"loss={config.loss.name} has to learn its head, which adapters do not: model.use_peft=false",
    )
    takes = "train_on" in inspect.signature(classes.loader.records).parameters
    problems.expect(
        takes or config.train_on == "targets",
        f"train_on={config.train_on}: loss={config.loss.name} does not read single completions, as sft and sae do",
    )
    problems.expect(not config.sae.steer, "sae.steer changes the model that eval.py draws samples from, and no other")
    problems.expect(
        classes.trainer.trains_policy or config.toy_comparison is None,
        f"toy_comparison={config.toy_comparison}: loss={config.loss.name} trains no model that writes text",
    )
    if config.sae.ablate:
        classes = with_ablation(config, classes, problems)
    if config.sae.at != "text":
        at = f"sae.at={config.sae.at}"
        problems.expect(
            bool(parts_with_features(classes)),
            f"{at}: it says where features are compared; loss={config.loss.name} compares none",
        )
        problems.expect(config.mode != "features", f"{at}: mode=features reads them at the text itself: ++sae.at=text")
    if config.eval_best is not None:
        there, wanted = classes.trainer.evaluated(classes.binding), config.eval_best.removeprefix("-")
        problems.expect(
            wanted in there,
            f"eval_best={config.eval_best}: loss={config.loss.name} has no such metric{suggest(wanted, there)}; "
            f"it has {', '.join(there)}; with a minus before its name the lowest is best",
        )
    with problems.collected():
        check_trackers(config.log_to)
    with problems.collected():
        classes.trainer.check(config, classes.binding)
    with problems.collected():
        if "sae" in classes.binding.needs:
            require_sae(config, what_reads_sae(config, classes))
    problems.raise_if_any()
    return config, classes


def what_reads_sae(config: Config, classes: RunClasses) -> str:
    """What a run needs its SAE for: its loss, a term, or the ablation of features."""
    parts = [classes.binding] if classes.trainer.has_sae_head else parts_with_features(classes)
    if not parts:
        return "sae.ablate"
    return f"loss={config.loss.name}" if parts[0] is classes.binding else parts[0].where


def parts_with_features(classes: RunClasses) -> list[Binding]:
    """The loss and the terms that read the SAE's features of completions, at the positions of `sae.at`. A reward head
    reads those of the last token."""
    if classes.trainer.has_sae_head:
        return []
    return [part for part in classes.binding.parts() if any("sae" in NEEDS.get(i.quantity, ()) for i in part.inputs)]


def with_ablation(config: Config, classes: RunClasses, problems: Problems) -> RunClasses:
    """The classes of a run that ablates features, so that it needs an SAE whatever its loss."""
    binding = classes.binding
    problems.expect(classes.trainer.can_plan, f"sae.ablate: loss={config.loss.name} trains no model")
    problems.expect(
        not classes.trainer.has_sae_head, f"sae.ablate: loss={config.loss.name} rewards the features that would be gone"
    )
    problems.expect(
        not (config.model.use_peft and "live_reference" in binding.needs),
        f"sae.ablate: with adapters, loss={config.loss.name} reads its reference by the model that is trained, from "
        "which the features would be missing too: model.use_peft=false",
    )
    return replace(classes, binding=replace(binding, needs=binding.needs | {"sae"}))


def terms_of(values: dict[str, Any]) -> dict[str, TermSettings]:
    """The terms that a configuration adds to its loss, by name."""
    terms = values.get("term")
    named = terms.items() if isinstance(terms, dict) else ()  # what else it is `Config` tells
    return {name: checked(TermSettings, own, f"term.{name}") for name, own in named}


def run_classes(loss: LossSettings, terms: dict[str, TermSettings]) -> RunClasses:
    """The classes that the loss names, and the functions that the terms name, matched with their hyper-parameters.
    Raises UserError where they do not fit."""
    if loss.trainer is None:
        raise UserError(f"loss={loss.name} needs a trainer of yours: ++loss.trainer=path/to/file.py:Class")
    trainer = load_class(loss.trainer, trainers, "loss.trainer")
    loader = load_class(loss.dataloader, dataloader, "loss.dataloader")
    for key, kind, base in (("trainer", trainer, loop.BasicTrainer), ("dataloader", loader, dataloader.DataLoader)):
        if not issubclass(kind, base):
            raise UserError(f"loss.{key}={getattr(loss, key)}: not a subclass of {base.__module__}.{base.__name__}")
    if not callable(getattr(trainer, "loss", None)):
        raise UserError(f"loss.trainer={loss.trainer}: {trainer.__name__} has no method `loss`")
    binding = bind(trainer, loader.records, loss)
    added = []
    for name, own in terms.items():
        function = load_function(own.function, trainers, f"term.{name}.function")
        added.append(bind_term(trainer, name, function, own))
    needs = binding.needs.union(*(term.binding.needs for term in added))
    return RunClasses(trainer, loader, replace(binding, needs=needs, terms=tuple(added)))


def classes_of_loss(name: str) -> RunClasses:
    """Those of a loss of this repo, with its YAML as it is."""
    return run_classes(checked(LossSettings, default_values("loss", name), "loss"), {})


def settings_of(section: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys of a loss or a term, as `loss/fpo`, with their defaults, and what each may be: from its YAML, the
    signatures that it names, and the settings of all losses or terms."""
    group, _, name = section.partition("/")
    kinds_of: list[type[Settings]] = [LossSettings if group == "loss" else TermSettings]
    values = default_values(group, name)
    if group == "term":
        function = load_function(values["function"], trainers, f"term.{name}.function")
        kinds_of.append(hyperparameters_of_term(function))
    elif values["trainer"] is not None:
        kinds_of.append(run_classes(checked(LossSettings, values, "loss"), {}).binding.settings)
    defaults = {key: field.default for kind in kinds_of for key, field in kind.model_fields.items()}
    values |= {key: value for key, value in defaults.items() if key not in values and value is not PydanticUndefined}
    return values, {key: text for kind in kinds_of for key, text in kinds(kind).items()}


def yaml_files(group: str, name: str) -> list[Path]:
    """The YAML file of a loss or a term, after those that it builds on."""
    file = REPO / f"config/{group}/{name}.yaml"
    values: Any = OmegaConf.load(file)
    below = [own for own in values.get("defaults", []) if own != "_self_"]
    return [*(path for own in below for path in yaml_files(group, own)), file]


def default_values(group: str, name: str) -> dict[str, Any]:
    """The values in these files."""
    found: dict[str, Any] = {}
    for file in yaml_files(group, name):
        values: Any = OmegaConf.to_container(OmegaConf.load(file))
        found |= values.get(group, values)  # a file may set keys outside its section
    return {key: value for key, value in found.items() if key != "defaults"}


# ---------------------------------------------------------------------------------------------- files


LORA_LR = 10  # times the learning rate of full training (Schulman et al. 2025, "LoRA without regret")


LEFT_OPEN = ("template", "lr", "warmup_steps")  # null: found for the model, or for the number of steps


def with_defaults(config: Config, paths: RunPaths, saved: Config | None = None) -> Config:
    """The configuration with the values that depend on the model: the template, and the learning rate. A run that goes
    on, from the configuration `saved`, keeps its own.

    The default learning rate is the loss's own at 7 B parameters, times (7e9 / parameters)^(3/4) (docs/losses.md).
    """
    if saved is not None:
        kept = {key: getattr(saved, key) for key in LEFT_OPEN if getattr(config, key) is None}
        config = config.model_copy(update=kept)
    tokenizer = models.load_tokenizer(paths.tokenizer)
    template = tokenise.template_name(config, tokenizer)
    if tokenizer.chat_template:
        other = "tulu: the prefixes of config.yaml" if template == "chat" else "chat: the tokenizer's own"
        console.print(f"template={template}; there is also {other}", markup=False)
    lr = config.lr
    if lr is None:
        count = models.skeleton(load_config(paths.model)).num_parameters()
        lora = LORA_LR if config.model.use_peft else 1
        lr = float(f"{lora * config.loss.lr_at_7b * (7e9 / count) ** 0.75:.2g}")
        size = f"{count / 1e6:,.0f} M parameters{', adapters alone' * config.model.use_peft}"
        console.print(f"lr={lr:g}: the default of loss={config.loss.name} for {size}", markup=False)
    return config.model_copy(update={"lr": lr, "template": template})


def require_sae(config: Config, who: str) -> None:
    """Raises UserError where the configuration has no SAE."""
    if not sae_sections(config.sae):
        own = f"sae={config.model.name}, or " if config.model.name in choices_of("sae") else ""
        raise UserError(
            f"{who} needs an SAE that fits the model: {own}++sae.path=... ++sae.layer=...; to go without one (~sae) is "
            "for losses that read no features"
        )


def find_required_paths(config: Config) -> RunPaths:
    """As `find_paths`, with the SAEs that the configuration asks for, whatever its loss. Raises UserError where there
    is none, or where they do not go with the model."""
    require_sae(config, f"mode={config.mode}")
    return find_paths(config, frozenset({"sae"}))


def find_paths(config: Config, needs: frozenset[str]) -> RunPaths:
    """Find, or fetch from the Hub, all but the weights; check that the SAEs' layers are ones the model has.

    Raises UserError with all problems found.
    """
    found, saes = find_files(config, needs)
    return RunPaths(**found, saes=saes)


def find_files(
    config: Config, needs: frozenset[str], known: Collection[str] = ()
) -> tuple[dict[str, Path], list[SAESource]]:
    """As `find_paths`: the paths by their names there, and the SAEs. What is `known` needs no files and is left out."""
    problems, model = Problems(), config.model
    found: dict[str, Path] = {}
    saes: list[SAESource] = []
    wanted = {
        "model": (model.name_or_path, "model.name_or_path"),
        "tokenizer": (model.tokenizer_name_or_path or model.name_or_path, "model.tokenizer_name_or_path"),
        "reference": (model.reference_path or model.name_or_path, "model.reference_path"),
    }
    for name, (source, setting) in wanted.items():
        with problems.collected():
            if source in known:
                continue
            if name == "model" or source != model.name_or_path:
                found[name] = fetch(source, CONFIG_FILES, setting)
            elif "model" in found:
                found[name] = found["model"]
    if "sae" in needs:
        for where, section in sae_sections(config.sae).items():
            with problems.collected():
                if section.path not in known:
                    saes.append(find_sae(section, where))
    if model.load_from is not None:
        with problems.collected():
            find_weights(model.load_from)
    for name in ("model", "reference"):
        if (folder := found.get(name)) is not None:
            with problems.collected():
                require_positions(load_config(folder), folder, {"model.max_length": model.max_length})
    if "model" in found:
        with problems.collected():
            load_generation_config(found["model"])
        with problems.collected():
            require_layers(model.name, load_config(found["model"]), {sae.where: sae.layer for sae in saes})
    problems.raise_if_any()
    return found, saes


def require_layers(model: str, architecture: PretrainedConfig, read: Mapping[str, int]) -> None:
    """Raises UserError for SAEs, by where the configuration has them, that read layers which the model lacks."""
    layers, problems = architecture.get_text_config().num_hidden_layers, Problems()
    for where, layer in read.items():
        problems.expect(0 <= layer < layers, f"{where}.layer={layer}: {model} has layers 0 to {layers - 1}")
    problems.raise_if_any()
