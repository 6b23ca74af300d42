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

from launch import settings
from launch.policies import read_config
from modeling import adapters
from modeling.settings import ModelSettings
from utils import UserError, checked, flat

LOSSES = ("dpo", "fpo", "kto", "ppo", "sae", "csft")  # between them every kind of hyper-parameter


@functools.cache
def base(loss):
    """The configuration of a loss as dictionaries, without changes."""
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        raw = compose("config", overrides=[f"loss={loss}", "model=tiny", "datasets=[toy]"])
    return settings.plain(raw)


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


def test_what_is_no_unicode_is_named():
    with pytest.raises(UserError, match=r"human_prefix='\\udcff': not valid Unicode"):
        settings.plain(OmegaConf.create({"human_prefix": "\udcff"}))


def test_adapters_for_modules_that_the_model_has_not():
    model = changed(base("dpo"), model__peft__target_modules=["nope"])["model"]
    with pytest.raises(UserError, match=r'model\.peft\.target_modules=\["nope"\]: .*not found'):
        adapters.add(tiny_gemma(), checked(ModelSettings, model), torch.float32)


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
        return isinstance(default, int | float | str | None) and not isinstance(default, bool) and 0 <= value < 1e308
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
        assert key not in found or found[key] == pytest.approx(value) or str(value) in (found[key], "~"), (key, value)


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
        settings.typed(read_config(file, overrides))
    except UserError as error:
        assert str(error)


def test_aliases_of_aliases_are_not_followed(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "lr: *a11"]))
    with pytest.raises(UserError, match=r"config\.yaml: not a configuration \(it has aliases\)"):
        read_config(tmp_path, [])
