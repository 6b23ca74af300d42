"""Any model by its place, and the defaults that depend on it."""

import json
import random
import shutil

import pytest
import torch
from composition import composed
from conftest import REPO, fuzzed, metrics
from hypothesis import given
from hypothesis import settings as chosen
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_training import run, settle
from transformers import AutoTokenizer

import models
from launch import assembly, settings, summary
from modeling.weights import weights_digest
from utils import UserError


def test_model_takes_a_directory_a_run_or_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "outputs/sft/LATEST").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()  # a name of ours means ours
    expected = {
        "model=Qwen/Qwen3-0.6B": ("Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        "model=my-model": ("my-model", "my-model"),
        f"model={tmp_path}/my-model": ("my-model", f"{tmp_path}/my-model"),
        "model=outputs/sft": ("sft", "outputs/sft/LATEST"),
    }
    for argument, (name, place) in expected.items():
        own = ["model=base", f"model.name='{name}'", f"model.name_or_path='{place}'"]
        assert settings.translate_argument(argument) == own
    for argument in ("term=[nll,features]", "+term=[nll, features]"):
        assert settings.translate_argument(argument) == ["+term@term.nll=nll", "+term@term.features=features"]
    assert settings.translate_argument("+term=nll") == ["+term@term.nll=nll"]
    for wrong in (["+term=null"], ["+term=[]"], ["+term=[nll,nll]"], ["+term=nll", "+term=nll"]):
        with pytest.raises(UserError, match=r"term=.*(names no term|twice)"):
            settings.translate_arguments(wrong)
    assert settings.translate_argument("model=tiny") == ["model=tiny"]


def test_what_is_no_model_is_told(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(UserError, match=r"a file; .* scripts/from_gguf.py makes a directory of it"):
        settings.translate_argument(f"model={file}")
    with pytest.raises(UserError, match="model=base is no model"):
        settings.translate_argument("model=base")


@pytest.mark.parametrize(
    ("units", "has_gpu", "dtype"),
    [
        ({"avx2": True}, False, "float32"),
        ({"avx2": True, "avx512_bf16": True}, False, "bfloat16"),
        ({"amx_bf16": True}, False, "bfloat16"),
        ({}, True, "bfloat16"),
    ],
)
def test_a_model_computes_in_what_the_machine_multiplies_fast(monkeypatch, units, has_gpu, dtype):
    """Unless a dtype is given. A plan is for GPUs, wherever it is made."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    base = ["loss=dpo", "model=base", "model.name=x", "model.name_or_path=a/b"]

    def chosen(*own):
        return settings.check_config(composed([*base, *own]), modes=["train", "plan"])[0].model.policy_dtype

    assert (chosen(), chosen("mode=plan")) == (dtype, "bfloat16")
    for named in ("float32", "bfloat16"):
        assert chosen(f"model.policy_dtype={named}") == chosen(f"model.policy_dtype={named}", "mode=plan") == named


def prepared(tmp_path, *overrides):
    raw, _ = settle(tmp_path, *overrides)
    config, classes = settings.check_config(raw)
    return settings.with_defaults(config, settings.find_paths(config, classes.binding.needs))


def test_the_learning_rate_follows_loss_and_size(tmp_path):
    """The built-in model has 1,090,560 parameters, so 5e-7 becomes 5e-7 * 6418.7^0.75."""
    assert prepared(tmp_path, "loss=dpo", "lr=null").lr == 0.00036
    assert prepared(tmp_path, "loss=sft", "lr=null").lr == 0.0036
    assert prepared(tmp_path, "loss=dpo", "lr=null", "++model.use_peft=true").lr == 0.0036
    assert prepared(tmp_path, "loss=dpo", "lr=2e-5").lr == 2e-5


def test_the_tokenizers_template_is_the_default(tmp_path, capsys):
    assert prepared(tmp_path, "loss=dpo").template == "chat"
    assert "template=chat; there is also tulu" in capsys.readouterr().out
    assert prepared(tmp_path, "loss=dpo", "template=tulu").template == "tulu"
    assert "template=tulu; there is also chat" in capsys.readouterr().out


def test_a_run_says_what_it_reads_and_keeps_its_defaults(tmp_path, capsys):
    run(tmp_path, "loss=dpo", "lr=null", "++warmup_steps=null", "++show_tokens=2", "exp_name=run")
    out = capsys.readouterr().out
    assert out.count("token by token") == 2 and "completion 2: |" in out
    saved = OmegaConf.load(tmp_path / "run/config.yaml")
    assert saved.template == "chat" and saved.lr == 0.00036
    rates = [line["lr"] for line in metrics(tmp_path / "run") if "lr" in line]
    assert rates[-1] == 0.00036


def test_tokens_are_shown_as_the_model_reads_them(capsys):
    tokenizer = AutoTokenizer.from_pretrained(REPO / "assets/tiny")
    prompt = tokenizer.encode("<bos>\n<|user|>\nRepeat: salt", add_special_tokens=False)
    row = {"prompt_ids": prompt, "completion_ids": [[*tokenizer.encode("salt", add_special_tokens=False), 1] * 100]}
    assembly.print_tokens([row, row], tokenizer, 1)
    out = capsys.readouterr().out
    assert out.count("prompt: |") == 1 and f"prompt: |{tokenizer.bos_token}|\\n" in out
    assert " more ... |" in out and "".join(out.split("|")).count("salt") < 120


def evaluations(*losses, accuracy=(0.5, 0.5), rewards=0.5):
    lines = [{"step": n, "loss/eval": loss} for n, loss in enumerate(losses)]
    for line, value in zip(lines, accuracy):
        line |= {"logps_eval/accuracies": value, "rewards_eval/accuracies": rewards}
    return lines


@pytest.mark.parametrize(
    ("lines", "little"),
    [
        (evaluations(0.6931, 0.6929), True),
        (evaluations(0.6931, 0.65), False),
        (evaluations(0.6931, 0.6929, accuracy=(0.5, 0.62)), False),  # 2 standard errors of 100 records are 0.1
        (evaluations(0.6931, 0.6929, rewards=0.75), False),
        (evaluations(0.6931, 0.6929, accuracy=(0.5, 0.55), rewards=0.55), True),
        (evaluations(0.6931), False),
        ([], False),
    ],
)
def test_a_run_that_learnt_next_to_nothing(lines, little):
    assert summary.learnt_little(lines, 100) is little


def weightless(folder):
    """A copy of the built-in model, without its weights."""
    shutil.copytree(REPO / "assets/tiny", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


ODD = [None, "x", -1, 0, 0.5, True, [], ["a"], {}, {"a": 1}, 10**9]


@chosen(fuzzed, max_examples=max(1, fuzzed.max_examples // 20))
@given(st.integers(0, 2**40))
def test_any_configuration_is_a_models_or_refused(tmp_path_factory, seed):
    draw = random.Random(seed)
    folder = tmp_path_factory.getbasetemp() / "odd"
    if not folder.exists():
        weightless(folder)
    values = json.loads((REPO / "assets/tiny/config.json").read_text())
    values |= {key: draw.choice(ODD) for key in draw.sample([*values], draw.choice([1, 1, 2]))}
    if isinstance(values["vocab_size"], int):
        values["vocab_size"] = min(values["vocab_size"], 1000)  # no skeleton of a large one is made without memory
    (folder / "config.json").write_text(json.dumps(values))
    try:
        config = models.load_config(folder)
        models.require_positions(config, folder, {"model.max_length": 8})
        models.skeleton(config)
    except UserError as error:
        assert str(error).startswith((str(folder), "model.max_length")) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("num_hidden_layers", {"num_hidden_layers": 10_000_000}),
        ("n_layer", {"model_type": "gpt2", "n_layer": 10**30}),
        ("text_config.num_hidden_layers", {"model_type": "gemma3", "text_config": {"num_hidden_layers": 1001}}),
    ],
)
def test_a_model_of_endless_layers_is_refused(tmp_path, key, changes):
    folder = weightless(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=rf"config\.json: {key}=\d+: a model may have 1,000 layers at most"):
        models.load_config(folder)


@pytest.mark.parametrize("text", ["", "[]", "5", '{"a":', "[" * 100_000, "\ufeff{}"])
def test_damaged_files_of_a_model_are_named(tmp_path, text):
    reading = {
        "config.json": (models.load_config, "no usable config.json"),
        "tokenizer.json": (models.load_tokenizer, "no usable tokenizer"),
        "tokenizer_config.json": (models.load_tokenizer, "no usable tokenizer"),
        "generation_config.json": (models.load_generation_config, "generation_config.json: cannot be used"),
    }
    for name, (read, message) in reading.items():
        folder = weightless(tmp_path / name)
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read(folder)


def test_the_digest_of_other_weights_covers_the_architecture_too(tmp_path):
    """What a cached reference says depends on both, and so does a run that goes on."""
    folder, weights = weightless(tmp_path / "model"), str(REPO / "assets/tiny")
    before = weights_digest(folder, weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert weights_digest(folder, weights) != before
