"""Values of the configuration that are of the wrong kind or out of range: each ends in a line that names its key."""

import copy
import functools
import math
import random
import re

import pytest
import torch
import yaml
from conftest import REPO, fuzzed, tiny_gemma
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import settings as chosen
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launch import settings, startup
from launch.policies import read_config
from launch.schema import EVERYWHERE, READ, Config
from modeling import adapters
from modeling.settings import ModelSettings
from training.settings import LossSettings
from utils import MOST, UserError, checked, flat, known_keys

LOSSES = ("dpo", "fpo", "kto", "ppo", "sae", "csft")  # between them every kind of hyper-parameter


@functools.cache
def base(loss):
    """The configuration of a loss as dictionaries, without changes."""
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        raw = compose("config", overrides=[f"loss={loss}", "model=tiny", "datasets=[toy]"])
    return settings.plain(raw)


def base_of(loss):
    """The keys of a loss's YAML."""
    return settings.default_values("loss", loss)


def changed(values, **changes):
    """The dictionaries with other values; the keys have `__` for a dot."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *path, last = key.split("__")
        section = values
        for step in path:
            section = section[step]
        section[last] = value
    return values


WRONG = {  # a value, and what the message says
    "use_peft": ("model__use_peft", "no", "model.use_peft=no: has to be true or false"),
    "enabled": ("wandb__enabled", "no", "wandb.enabled is read by nothing"),
    "gradient": ("model__max_grad_norm", -1, "model.max_grad_norm=-1: has to be above 0"),
    "kept": ("keep_checkpoints", -1, "keep_checkpoints=-1: has to be at least 0"),
    "beta": ("loss__beta", -1, "loss.beta=-1: has to be above 0"),
    "endless": ("loss__beta", 1e300, r"loss.beta=1e\+300: has to be at most 1e\+09"),
    "weight": ("optimizer_options", {"weight_decay": 1e300}, "optimizer=RMSprop, .*: value cannot be converted"),
    "bool": ("model__batch_size", True, "model.batch_size=true: has to be a whole number"),
    "held out": ("held_out", -0.5, "held_out=-0.5: has to be above 0"),
    "lr": ("lr", "fast", "lr=fast: has to be a number"),
    "seed": ("seed", None, "seed=null: has to be a whole number"),
    "large seed": ("seed", 2**64, "seed=18446744073709551616: has to be below 9.2"),
    "every": ("eval_every", 0, "eval_every=0: has to be at least 1"),
    "many": ("n_epochs", 10**30, r"n_epochs=1000000\d*: has to be at most 1e\+09"),
    "nan": ("lr", math.nan, "lr=NaN: has to be a finite number"),
    "section": ("wandb", True, "wandb=true: has to be keys with values"),
    "stop": ("stop", "", "stop=: has to be text that is not empty"),
    "no name": ("exp_name", "", "exp_name=: has to be text that is not empty"),
    "place": ("exp_name", "../a", r"exp_name=\.\./a: has to be the name of a directory"),
    "long": ("exp_name", "a" * 256, r"exp_name=a*\.\.\.: has to be a path that a file can have"),
    "nul": ("cache_dir", "a\0b", r'cache_dir="a.u0000b": has to be a path that a file can have'),
    "weights": ("loss__frac_unique_desirable", 1.5, "loss.frac_unique_desirable.* is read by nothing"),
    "modules": ("model__peft__target_modules", [], r"target_modules=\[\]: has to be text or a list that is not empty"),
    "closure": ("optimizer", "LBFGS", "optimizer=LBFGS, {}: .*closure"),
    "sparse": ("optimizer", "SparseAdam", "optimizer=SparseAdam, {}: .*dense"),
    "flag": ("optimizer_options", {"centered": "no"}, "optimizer_options.centered=no: has to be true or false"),
    "number": ("optimizer_options", {"eps": True}, "optimizer_options.eps=true: has to be a number"),
    "text": ("optimizer_options", {"eps": "small"}, 'optimizer=RMSprop, {"eps": "small"}: '),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named(name):
    key, value, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        settings.check_values(changed(base("dpo"), **{key: value}))


@pytest.mark.parametrize("loss", settings.choices_of("loss"))
def test_every_number_of_a_loss_has_an_end(loss):
    """1e300 is finite, and nothing that is computed from it is."""
    if base_of(loss)["trainer"] is None:  # the user's own
        return
    classes = settings.classes_of_loss(loss)
    values = checked(LossSettings, base_of(loss), "loss").hyperparameters
    for key, value in values.items():
        if isinstance(value, float):
            for wrong in (1e300, -1e300):
                with pytest.raises(UserError, match=rf"^loss\.{key}={wrong}".replace("+", r"\+")):
                    checked(classes.binding.settings, values | {key: wrong}, "loss")


@pytest.mark.parametrize(("loss", "key"), [("ipo", "tau"), ("ppo", "cliprange")])
def test_what_is_divided_by_is_not_next_to_0(loss, key):
    binding = settings.classes_of_loss(loss).binding
    values = checked(LossSettings, base_of(loss), "loss").hyperparameters
    with pytest.raises(UserError, match=rf"loss\.{key}=.*: has to be at least 1e-09"):
        checked(binding.settings, values | {key: 1e-300}, "loss")


def test_what_is_no_unicode_is_named():
    with pytest.raises(UserError, match=r"human_prefix='\\udcff': not valid Unicode"):
        settings.plain(OmegaConf.create({"human_prefix": "\udcff"}))


def test_adapters_for_modules_that_the_model_has_not():
    model = changed(base("dpo"), model__peft__target_modules=["nope"])["model"]
    with pytest.raises(UserError, match=r'model\.peft\.target_modules=\["nope"\]: .*not found'):
        adapters.add(tiny_gemma(), checked(ModelSettings, model), torch.float32)


ARGUMENTS = {  # what Hydra would answer with a page of its own
    "datasets={name: toy}": r'datasets=\{"name": "toy"\}: has to be text or a list',
    "datasets={toy: 0.3, hh: 0.7}": "datasets=.*: has to be text or a list",
    "model.peft=[1]": r"model\.peft=\[1\]: has to be keys with values",
    "stop={a: 1}": "stop=.*: has to be text or a list",
    "optimizer_options=[1]": r"optimizer_options=\[1\]: has to be keys with values",
    "sae.parts=[1]": r"sae\.parts=\[1\]: has to be keys with values",
    "sae={a: 1}": r"sae=\{a: 1\}: has to be one name; there are gemma2b",
    "sae=3": "sae=3: has to be one name",
    "loss={beta: 1}": r"loss=\{beta: 1\}: has to be one name; there are .*dpo",
    "experiment=[a,b]": r"experiment=\[a,b\]: has to be one name; there are online, quickstart",
    "term.nll=3": r"Could not override 'term\.nll'",
    "loss.beta.x=1": r"Could not override 'loss\.beta\.x'",
    "lr=1,2": "Ambiguous value for argument 'lr=1,2'",
    "~term.nll": "Could not delete from config",
    "n_samples=4": "n_samples does nothing with mode=train; it is for online, sample, eval, features",
    "++files=[a.json]": "files does nothing with mode=train; it is for label, rewards",
    "online.rounds=2": "online does nothing with mode=train; it is for online",
    "mode=plan ++temperature=0": "temperature does nothing with mode=plan",
    "experiment=quickstart samples=2": "samples does nothing with mode=train",
    "experiment=online samples=2": "samples does nothing with mode=online; it is for sample",
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_a_wrong_argument_is_answered_in_a_line(arguments, capsys):
    given = re.split(r" (?=\S+=)", arguments) if "{" not in arguments else [arguments]
    chosen_here = any(own.startswith(("loss=", "experiment=")) for own in given)
    with pytest.raises(SystemExit) as ended:
        settings.checked_arguments([*([] if chosen_here else ["loss=fpo"]), "model=tiny", *given])
    assert ended.value.code == 2 and re.match(ARGUMENTS[arguments], capsys.readouterr().out)


def test_what_an_experiment_and_a_mode_read_may_be_given():
    for arguments in (["experiment=online", "online.rounds=2", "n_samples=4"], ["loss=dpo", "model=tiny", "mode=plan"]):
        assert settings.checked_arguments(arguments) == arguments


def test_modes_read_keys_that_there_are():
    known = {key.partition(".")[0] for key in known_keys(Config)}
    assert set().union(*READ.values()) | EVERYWHERE == known
    assert READ.keys() == set(Config.model_fields["mode"].annotation.__args__)


def test_an_export_is_called_after_its_run(tmp_path):
    """So that the samples of two runs' BEST have files of their own."""
    for run in ("one", "two"):
        (tmp_path / run / "step-8").mkdir(parents=True)
        (tmp_path / run / "BEST").symlink_to("step-8")
        for file in ("config.yaml", "manifest.json", "step-8/config.json"):
            (tmp_path / run / file).write_text("{}")
        assert read_config(tmp_path / run / "BEST", []).exp_name == f"{run}-BEST"
    assert settings.any_model(f"{tmp_path}/one/step-8")[1] == "model.name='one-step-8'"
    (tmp_path / "one/manifest.json").unlink()
    assert read_config(tmp_path / "one/step-8", []).exp_name == "step-8"


def test_a_key_in_a_list_is_named():
    steer = changed(base("dpo"), sae__steer=[{"index": 3, "weight": 1.0}, {"index": 17}])
    with pytest.raises(UserError, match=r"^sae\.steer\[1\]\.weight is missing$"):
        checked(Config, steer)
    steer["sae"]["steer"] = [{"index": 3, "weight": "much"}]
    with pytest.raises(UserError, match=r"^sae\.steer\[0\]\.weight=much: has to be a number$"):
        checked(Config, steer)
    steer["sae"]["steer"] = [{"index": 3, "weight": 1.0, "wait": 1}]
    with pytest.raises(UserError, match=r"^sae\.steer\[0\]\.wait is read by nothing"):
        checked(Config, steer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__trainer": "Tensor"}, "loss.trainer=Tensor: not a subclass of training.loop.BasicTrainer"),
        ({"loss__dataloader": "Batch"}, "loss.dataloader=Batch: not a subclass of dataloader.DataLoader"),
        ({"loss__trainer": "PairedPreferenceTrainer"}, "PairedPreferenceTrainer has no method `loss`"),
        ({"sae__ablate": [3]}, r"^sae\.ablate needs an SAE that fits the model"),
        (
            {"term": {"f": {"function": "features", "weight": 1.0, "k": 5, "divergence": "kl"}}},
            r"^term\.f needs an SAE",
        ),
    ],
)
def test_who_asks_for_what_there_is_not_is_named(changes, message):
    values = changed(base("dpo"), **changes)
    values["sae"] |= {"path": None, "layer": None}
    with pytest.raises(UserError, match=message):
        settings.check_values(values)


@pytest.mark.parametrize("section", [*(f"loss/{name}" for name in settings.choices_of("loss")), "term/features"])
def test_the_help_says_what_each_key_of_a_loss_may_be(section):
    """Each key that the checks know, with the default of the run that names nothing else."""
    lines = startup.own_keys(section).splitlines()[1:]
    found = dict(re.match(r"  ([\w.]+)=(.*?)(?: {2,}|$| (?=\S+ ))", own).groups() for own in lines)
    values, kinds = settings.settings_of(section)
    assert [key.rpartition(".")[2] for key in found] == [*values]
    assert all(f"[{kinds[key]}]" in own for key, own in zip(values, lines) if kinds[key] != "text")


def test_the_help_has_ranges_and_defaults_of_a_loss():
    def help_of(section):
        return {own.split("=")[0].strip(): own for own in startup.own_keys(section).splitlines()[1:]}

    fpo, kto, ppo, cdpo = (help_of(f"loss/{name}") for name in ("fpo-mse", "kto", "ppo", "cdpo"))
    assert re.search(r"loss\.beta=0\.1 .*log-ratios \[number > 0\]", fpo["loss.beta"])
    assert re.search(r"loss\.divergence=mse .*\[kl\|mse\]", fpo["loss.divergence"])
    assert re.search(r"loss\.feature_weights=null .*\[text or \[.*\] or null\]", fpo["loss.feature_weights"])
    assert "[whole number >= 1]" in fpo["loss.k"] and "[number >= 0]" in fpo["loss.lr_at_7b"]
    assert (
        "[number >= 0 and <= 1]" in kto["loss.frac_unique_desirable"]
        and "[whole number >= 1]" in ppo["loss.ppo_epochs"]
    )
    assert "[number >= 0 and <= 1]" in cdpo["loss.label_smoothing"] and "[number > 0]" in cdpo["loss.beta"]
    assert "[whole number >= 1]" in help_of("term/features")["term.features.k"]


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_help_has_the_keys_of_an_sae_and_whole_sentences(command):
    """A line stands by itself: its comment does not begin in the line before."""
    sections = re.search(r"startup\.begin\([^[]*(\[[^]]*\])", (REPO / f"{command}.py").read_text())[1]
    found = "\n".join(map(startup.keys, yaml.safe_load(sections)))
    keys = re.findall(r"^  (\S+?)=", found, re.MULTILINE)
    assert {"sae.path", "sae.layer", "sae.at"} <= {*keys} and keys.count("sae.path") == 1
    assert [line for line in found.splitlines() if re.search(r",( \[[^]]*\])?$", line)] == []


def test_a_run_without_its_models_sae():
    """However it is said; and who needs one is told what would work, which are not other models' SAEs."""
    assert settings.translate_argument("sae=null") == ["~sae"]
    for loss, model in (("dpo", "tiny"), ("dpo", "llama7b")):
        arguments = settings.checked_arguments([f"loss={loss}", f"model={model}", "sae=null"])
        with initialize_config_dir(str(REPO / "config"), version_base=None):
            assert compose("config", overrides=arguments).sae.path is None
    for model, own in (("tiny", "sae=tiny, or "), ("llama7b", "")):
        values = changed(base("fpo"), model__name=model, sae__path=None)
        message = (
            rf"^loss=fpo needs an SAE that fits the model: {own}\+\+sae\.path=.*; to go without one \(~sae\) is for"
        )
        with pytest.raises(UserError, match=message):
            settings.check_values(values)


# ------------------------------------------------------------------------------------------------- random values

VALUES = [
    None, True, False, 0, 1, -1, 2, -2, 0.5, -0.5, 1.5, 1e-9, 1e300, -1e300, 10**30, -(2**63), 2**64, math.nan,
    math.inf, -math.inf, "", "no", "true", "null", "1", "1e-3", "abc", "~", "a/b", "../x", "\x00", "é\u2028", "[/b]",
    "\x1b[31m", "a" * 5000, [], [1], ["a"], [[]], [None], {}, {"a": 1}, {"x": {"y": []}}, {1: 2},
]  # fmt: skip
SECTIONS = ["model", "loss", "sae", "wandb", "model.peft", "optimizer_options", "sae.parts"]


def random_changes(draw, values):
    """Some keys with other values."""
    keys = [*flat(values)] * 2 + SECTIONS
    return {key.replace(".", "__"): draw.choice(VALUES) for key in draw.sample(keys, draw.choice([1, 1, 1, 3]))}


def is_kept_in_kind(default, value):
    """Whether a value may stand where this default stands: no kind becomes another, no number is out of all ranges."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        known = isinstance(default, int | float | str | None) and not isinstance(default, bool)
        return known and (0 <= value <= MOST or isinstance(default, str))
    if isinstance(value, bool):
        return isinstance(default, bool)
    return not isinstance(value, str | list | dict) or not isinstance(default, bool | int | float)


@fuzzed
@given(st.integers(0, 2**40))
def test_any_value_is_refused_or_of_its_keys_kind(seed):
    draw = random.Random(seed)
    loss = draw.choice(LOSSES)
    changes = random_changes(draw, base(loss))
    try:
        values = changed(base(loss), **changes)
    except (TypeError, KeyError):  # below a section that is a value by now
        return
    try:
        config, _ = settings.check_values(values)
    except UserError as error:
        assert str(error) and all(re.match(r"[\w.]+", line) for line in str(error).split("\n"))
        return
    known, found = flat(base(loss)), flat(config.model_dump())
    for key in (key.replace("__", ".") for key in changes):
        default, value = known.get(key), flat(values).get(key)
        numeric_name = isinstance(default, str) and isinstance(value, int | float)
        assert numeric_name or is_kept_in_kind(default, value) or key in FREE, (key, value)
        kept = found.get(key, value)
        assert kept == value or str(value) in (kept, "~") or kept == pytest.approx(value), (key, value)


# True or a name; names, which may be numbers; a number below 0 too.
FREE = {"model.activation_checkpointing", "served_model", "sae.name", "threshold"}


WORDS = ["loss", "model", "sae", "lr", "model.batch_size", "++", "+", "~", "=", "=", ",", "[", "]", "{", "}", ":", "'"]
WORDS += ['"', "\\", "$", "${", "oc.env", "dpo", "1", "null", " ", "\n", "é", "\x00", "datasets", "@", "/", "(", "a"]


@fuzzed
@given(st.integers(0, 2**40))
def test_any_argument_is_read_or_refused(seed):
    draw = random.Random(seed)
    arguments = ["".join(draw.choice(WORDS) for _ in range(draw.randrange(7))) for _ in range(draw.randrange(3))]
    try:
        settings.check_overrides(settings.translate_arguments(arguments))
    except UserError as error:
        assert str(error)


@chosen(fuzzed, max_examples=max(1, fuzzed.max_examples // 40))  # reading one takes 50 ms
@given(st.integers(0, 2**40))
def test_any_saved_configuration_is_read_or_refused(tmp_path_factory, seed):
    """A stranger's run: its config.yaml may hold anything."""
    draw = random.Random(seed)
    try:
        values = changed(base("dpo"), **random_changes(draw, base("dpo")))
    except (TypeError, KeyError):
        return
    for key in draw.sample([*values], draw.randrange(len(values))):
        del values[key]
    file = tmp_path_factory.getbasetemp() / "saved.yaml"
    text = yaml.dump(values, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    cut = draw.randrange(len(text) + 1) if draw.random() < 0.2 else len(text)
    file.write_text(text[:cut], encoding="utf-8")
    overrides = draw.sample(["++model.batch_size=2", "~loss.beta", "~wandb", "++loss.a.b=1", "~sae.parts.a", "lr=1"], 2)
    try:
        settings.check_config(read_config(file, overrides))
    except UserError as error:
        assert str(error)


def test_aliases_of_aliases_are_not_followed(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "lr: *a11"]))
    with pytest.raises(UserError, match=r"config\.yaml: not a configuration \(it has aliases\)"):
        read_config(tmp_path, [])
