"""A run that was made before modules moved and keys were added can be sampled from and resumed.

old_runs/ holds the config.yaml files that commit 871146a wrote for two commands. The runs here are shorter (SHORT).
"""

import json
import shutil
from pathlib import Path

import pytest
from composition import composed
from conftest import metrics
from omegaconf import OmegaConf

import dataloader
import eval as evaluation
import train
from launch.policies import read_config
from training.checkpoint import Run
from utils import seal

OLD = Path(__file__).parent / "old_runs"
COMMANDS = {
    "dpo": "loss=dpo model=tiny datasets=[toy] warmup_steps=4 lr=1e-4",
    "sae": "loss=sae model=tiny datasets=[toy_sft] loss.layer=1 loss.d_sae=256 loss.k=8 loss.batch_tokens=512 lr=1e-3 "
    "warmup_steps=5",
}
SHORT = {"n_examples": 250, "n_eval_examples": 16, "save_every": 128, "max_new_tokens": 4}
FEW_ROWS = {"toy": {"train": 400, "test": 40}, "toy_sft": {"train": 400, "test": 40}}  # all take long to make


def run(name: str, folder: Path) -> None:
    overrides = [*COMMANDS[name].split(), "template=tulu", f"exp_name=old_{name}", f"cache_dir={folder}"]
    overrides += [f"{key}={value}" for key, value in SHORT.items()]
    train.train(composed(overrides))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_old_run_is_resumed_and_sampled(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dataloader, "TOY_ROWS", FEW_ROWS)
    run(name, tmp_path)
    folder = tmp_path / f"old_{name}"
    before = metrics(folder)
    for state in Run(folder).saved():
        place = json.loads((state / "trainer.json").read_text())
        old = {**OmegaConf.to_container(OmegaConf.load(OLD / f"{name}.yaml")), **SHORT}
        (state / "trainer.json").write_text(json.dumps({**place, "config": old}))
        seal(state)
    shutil.copy(OLD / f"{name}.yaml", folder / "config.yaml")
    (folder / "summary.json").unlink()  # else the run is finished
    run(name, tmp_path)
    assert "resuming after" in capsys.readouterr().out
    assert metrics(folder) == before
    if name == "dpo":
        shutil.copy(OLD / f"{name}.yaml", folder / "config.yaml")
        overrides = ["++n_samples=4", "++max_new_tokens=4", f"++samples_dir={tmp_path}"]
        evaluation.write_samples(read_config(folder, overrides), folder, overrides)
        assert len(json.loads((tmp_path / "old_dpo.json").read_text())["samples"]) == 4
