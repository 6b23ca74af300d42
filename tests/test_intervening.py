"""Features that training leaves out, and features that are added to a model that is sampled from."""

import json
import math

import pytest
import torch
from conftest import command, metrics
from test_training import assembled, run
from torch import nn

import sae as saes
from utils import UserError

TINY_SAE = ["++sae.path=assets/tiny-sae/params.npz", "++sae.layer=2"]


def test_no_component_is_left_in_training_and_all_is_there_elsewhere():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 16, generator=generator)
    directions = torch.cat([directions, directions[:1] + directions[1:2]])  # of rank 3
    layer, x = nn.Linear(16, 16), torch.randn(5, 16, generator=generator)
    plain = layer(x)
    saes.ablate(layer, directions)
    assert torch.equal(layer.eval()(x), plain)
    out = layer.train()(x)
    assert (out @ directions.T).abs().max() < 1e-5
    left = saes.basis_of(directions)
    torch.testing.assert_close(out, plain - plain @ left @ left.T)
    assert left.shape == (16, 3)


def test_the_mean_is_left():
    generator = torch.Generator().manual_seed(0)
    directions, centre = torch.randn(2, 16, generator=generator), torch.randn(16, generator=generator)
    layer = nn.Linear(16, 16)
    saes.ablate(layer, directions, centre)
    out = layer(torch.randn(5, 16, generator=generator))
    torch.testing.assert_close(out @ directions.T, (centre @ directions.T).expand(5, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", ["zero", "mean"])
def test_a_run_that_ablates(tmp_path, plain_run, left):
    """Reference and evaluation have all features; the losses that are trained on, and so the weights, differ."""
    plain = metrics(plain_run("dpo"))
    found = run(tmp_path, "loss=dpo", "exp_name=dpo", *TINY_SAE, "++sae.ablate=[17,203,547]", f"++sae.ablate_to={left}")
    assert found[0]["loss/eval"] == pytest.approx(math.log(2)) == plain[0]["loss/eval"]
    assert found[0]["logps_eval/chosen"] == pytest.approx(plain[0]["logps_eval/chosen"], rel=1e-5)
    first = [next(line for line in lines if "loss/train" in line)["logps_train/chosen"] for lines in (found, plain)]
    assert first[0] != pytest.approx(first[1], rel=1e-4)
    assert found[-1]["loss/eval"] != pytest.approx(plain[-1]["loss/eval"], rel=1e-6)


def test_an_empty_list_changes_nothing(tmp_path, plain_run):
    found = run(tmp_path, "loss=dpo", "exp_name=dpo", *TINY_SAE, "++sae.ablate=[]")
    assert found == metrics(plain_run("dpo"))


def test_what_cannot_be_left_out_is_told(tmp_path):
    file = tmp_path / "weights.json"
    file.write_text('[{"index": "others", "weight": 0}, {"index": 1024, "weight": 5}]')
    for named, message in (("[3,1024]", r"sae\.ablate: 1024 is no feature"), (file, "needs an index in")):
        with pytest.raises(UserError, match=message):
            assembled(tmp_path, "loss=dpo", *TINY_SAE, f"++sae.ablate={named}")
    file.write_text('[{"index": "others", "weight": 0}]')
    with pytest.raises(UserError, match="lists no feature"):
        assembled(tmp_path, "loss=dpo", *TINY_SAE, f"++sae.ablate={file}")
    with pytest.raises(UserError, match=r"sae\.ablate: a feature is named twice"):
        assembled(tmp_path, "loss=dpo", *TINY_SAE, "++sae.ablate=[3,3]")
    with pytest.raises(UserError, match=r"sae\.steer changes the model that eval\.py draws samples from"):
        assembled(tmp_path, "loss=dpo", *TINY_SAE, "++sae.steer=[{index: 3, weight: 1.0}]")
    with pytest.raises(UserError, match=r"sae\.ablate: an SAE at hook=mlp"):
        assembled(tmp_path, "loss=dpo", *TINY_SAE, "++sae.hook=mlp", "++sae.ablate=[3]")
    with pytest.raises(UserError, match=r"sae\.ablate: loss=sae trains no model"):
        assembled(tmp_path, "loss=sae", "++loss.layer=2", *TINY_SAE, "++sae.ablate=[3]")


def test_samples_of_a_model_with_a_feature_added(tmp_path):
    own = ["eval.py", "--config-path=assets/tiny", "++n_samples=4", "++temperature=0", "++max_new_tokens=8"]
    own += ["++datasets=[toy]", *TINY_SAE, f"++samples_dir={tmp_path}"]
    command(*own, "++exp_name=plain")
    command(*own, "++exp_name=nothing", "++sae.steer=[{index: 17, weight: 0.0}]")
    command(*own, "++exp_name=steered", "++sae.steer=[{index: 17, weight: 300.0}]")
    texts = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "nothing", "steered")}
    answers = {name: [sample["policy"] for sample in found["samples"]] for name, found in texts.items()}
    assert answers["plain"] == answers["nothing"] != answers["steered"]
    assert texts["steered"]["sampling"]["steer"] == [{"index": 17, "weight": 300.0}]
    done = command(*own, "++exp_name=beyond", "++sae.steer=[{index: 1024, weight: 1.0}]", check=False)
    assert done.returncode == 2 and "sae.steer: 1024 is no feature of the SAE, which has 1,024" in done.stdout
