"""Bad configuration ends in one clear message, before a weight is read."""

import json
import re
import shutil

import pytest
import torch
from conftest import REPO, random_sae
from test_training import run

import eval as evaluation
import models
from autoencoders.formats import save_sae
from launch.policies import read_config
from utils import UserError


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def load_model(*_args, **_options):
        raise AssertionError("weights were read before the error")

    monkeypatch.setattr(models, "load_model", load_model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=fpo", "++loss.alhpa=0.1"], r"loss\.alhpa is read by nothing \(did you mean 'alpha'\?\)"),
        (["loss=dpo", "++betta=0.1"], "betta is read by nothing"),
        (["loss=dpo", "++tensorboard=true"], "tensorboard is read by nothing$"),  # it is not tensor_parallel
        (["loss=dpo", "++model.batchsize=4"], r"model\.batchsize is read by nothing \(did you mean 'model.batch_size'"),
        (["loss=dpo", "datasets=[toyy]"], r"no data set 'toyy' \(did you mean 'toy'\?\)"),
        (["loss=dpo", "datasets=[missing.jsonl]"], "missing.jsonl is no file here"),
        (["loss=fpo", "sae.path=/no/such/params.npz"], r"sae\.path=/no/such/params\.npz: no such file"),
        (["loss=fpo", "sae.path=org/repo/params.npz"], "point sae.path at a local copy"),
        (["loss=dpo", "model.name_or_path=org/absent"], "point model.name_or_path at a local copy"),
        (["loss=fpo", "sae.layer=4"], r"sae\.layer=4: tiny has layers 0 to 3"),
        (["loss=fpo", "loss.k=5000"], r"loss\.k=5000: has to be between 1 and the SAE's 1024 features"),
        (["loss=fpo", "loss.divergence=l1"], "loss.divergence=l1: not one of kl, mse"),
        (["loss=dpo", "optimizer=adamw"], r"optimizer=adamw: not in torch\.optim \(did you mean 'AdamW'\?\)"),
        (["loss=dpo", "++optimizer_options.weight_deca=1"], "unexpected keyword argument 'weight_deca'"),
        (["loss=dpo", "model.policy_dtype=float16"], "model.policy_dtype=float16: not one of auto, float32, bfloat16"),
        (["loss=dpo", "model.batch_size=0"], "model.batch_size=0"),
        (["loss=dpo", "loss.trainer=DPOTraner"], r"no class DPOTraner in trainers \(did you mean 'DPOTrainer'\?\)"),
        (["loss=dpo", "loss.trainer=nowhere.py:T"], r"no Python file nowhere\.py"),
        (["loss=dpo", "++model.load_from=/no/policy.pt"], r"model\.load_from=/no/policy\.pt: no policy\.pt"),
        (["loss=csft", "model.use_peft=true"], r"loss=csft has to learn its control tokens.*model\.use_peft=false"),
    ],
)
def test_message(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, *overrides)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_every_problem_is_told_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        run(tmp_path, "loss=dpo", "++betta=1", "datasets=[toyy]", "optimizer=adamw", "++loss.gamma=2")
    for part in ("betta", "toyy", "adamw", "loss.gamma"):
        assert part in str(error.value)


def test_an_sae_of_another_model(tmp_path):
    save_sae(random_sae(d_in=32), tmp_path / "params.npz")
    with pytest.raises(UserError, match="reads vectors of 32 numbers, but tiny has 128"):
        run(tmp_path, "loss=fpo", f"sae.path={tmp_path}/params.npz")


def test_no_sae_at_all(tmp_path):
    with pytest.raises(UserError, match=r"loss=fpo needs an SAE that fits the model: sae="):
        run(tmp_path, "loss=fpo", "~sae")


def test_weights_that_do_not_fit_are_listed(tmp_path, monkeypatch):
    monkeypatch.undo()
    state = {"model.norm.weight": torch.zeros(128), "another": torch.zeros(1)}
    torch.save({"state": state}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match=r"missing: .*q_proj.*left over: another"):
        run(tmp_path, "loss=sft", f"++model.load_from={tmp_path}/policy.pt")


def test_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.undo()

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state": Payload()}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match=r"not a policy\.pt of plain tensors"):
        run(tmp_path, "loss=sft", f"++model.load_from={tmp_path}/policy.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "name", "key"),
    [
        ({"max_position_embeddings": 64}, "max_position_embeddings", "model.name_or_path"),
        ({"max_position_embeddings": 64}, "max_position_embeddings", "model.reference_path"),
        (
            {"model_type": "gpt2", "n_positions": 64, "max_position_embeddings": None},
            "n_positions",
            "model.name_or_path",
        ),
    ],
)
def test_a_model_with_fewer_positions_than_tokens(tmp_path, changes, name, key):
    folder = model_with(tmp_path / "model", changes)
    message = rf"model\.max_length=512: more tokens than the model in .*, which are 64 \({name} "
    with pytest.raises(UserError, match=message):
        run(tmp_path, "loss=dpo", f"++{key}={folder}")
    with pytest.raises(AssertionError, match="weights were read"):
        run(tmp_path, "loss=dpo", f"++{key}={folder}", "model.max_length=64", "model.max_prompt_length=32")


def test_sampling_beyond_a_models_positions(tmp_path):
    folder = model_with(tmp_path / "model", {"max_position_embeddings": 64})
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    options = [f"++samples_dir={tmp_path}", f"eval_datasets=[{tmp_path}/a.jsonl]"]

    def sample(*more):
        evaluation.write_samples(read_config(folder, [*options, *more]), folder, [*options, *more])

    message = (
        r"tokens of the longest prompt=(\d+) and max_new_tokens=64: more tokens together than .* which are 64 \(max"
    )
    with pytest.raises(UserError, match=message) as error:
        sample("++max_new_tokens=64")
    room = 64 - int(re.search(message, str(error.value))[1])
    with pytest.raises(UserError, match="longest prompt"):
        sample(f"++max_new_tokens={room + 1}")
    with pytest.raises(AssertionError, match="weights were read"):
        sample(f"++max_new_tokens={room}")


def model_with(folder, changes):
    """A copy of the built-in model without its weights, and with another configuration."""
    shutil.copytree(REPO / "assets/tiny", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))
    (folder / "model.safetensors").touch()
    return folder
