"""From a pretrained chat model to judged samples: SmolLM2-135M-Instruct, by the commands that a user types."""

import json
import math

import pytest
from conftest import HH_100, command, look_at, metrics, transformers_server

pytestmark = [pytest.mark.real, pytest.mark.slow]
DATA = ["datasets=[hh]", f"data_dir={HH_100}"]
SHORT = ["++model.max_length=96", "++model.max_prompt_length=64", "++model.policy_dtype=float32"]
FEW = ["++model.batch_size=4", "++n_eval_examples=4", "++max_new_tokens=8"]


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory):
    """An SAE of the model, and FPO through it."""
    folder = tmp_path_factory.mktemp("real")
    own = [f"model={smollm2}", *DATA, *SHORT, *FEW, f"cache_dir={folder}"]
    sae = ["loss=sae", "loss.layer=14", "loss.d_sae=1024", "loss.k=32", "loss.batch_tokens=256", "++warmup_steps=2"]
    said = command("train.py", *sae, *own, "n_examples=48", "lr=1e-3", "++train_on=all", "exp_name=sae").stdout
    said += command("train.py", "loss=fpo", *own, "n_examples=8", f"++sae.path={folder}/sae", "exp_name=fpo").stdout
    return folder, said


def test_what_is_said_and_what_is_equal(trained):
    """The template, the tokens, the learning rate; log 2 without drift at the start; SAE figures without the sinks."""
    folder, said = trained
    for words in ("template=chat", "|<|im_start|>|user|\\n|", "|<|im_end|>|", "lr=9.7e-06: the default of loss=fpo"):
        assert words in said
    first, *_, last = metrics(folder / "fpo")
    assert first["loss/eval"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["feature_drift_eval/chosen"] == pytest.approx(0, abs=1e-5)
    assert last["feature_drift_eval/chosen"] > 0 and math.isfinite(last["loss/eval"])
    assert 0.05 < metrics(folder / "sae")[-1]["sae_eval/fvu"] < 1


def test_samples_are_clean_and_judged_by_a_real_server(trained, smollm2, tmp_path):
    folder, _ = trained
    sampling = ["++n_samples=3", "++max_new_tokens=24", "++model.policy_dtype=float32", f"++samples_dir={tmp_path}"]
    for path in (folder / "fpo", smollm2):
        command("eval.py", f"--config-path={path}", *sampling, *DATA, "++temperature=0")
    for file in ("fpo.json", "smollm2.json"):
        for sample in json.loads((tmp_path / file).read_text())["samples"]:
            assert len(sample["policy"].split()) > 3 and "<|im" not in sample["policy"]
    with transformers_server(smollm2, tmp_path / "log") as address:
        judge = ["-j", smollm2, "--base_url", address, "-r", tmp_path / "results.jsonl", "--max_tokens", "16"]
        pair = ["-f", tmp_path / "fpo.json", "--against", tmp_path / "smollm2.json"]
        command("compare.py", *pair, *judge, "--concurrency", "1", "--no-both_orders")
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert result["total"] + result["malformed"] == 3  # a judge of this size often says something else


def test_its_features_in_a_browser(trained, browser, tmp_path):
    folder, _ = trained
    options = ["++mode=features", "++n_samples=4", "++max_new_tokens=16"]
    command("eval.py", f"--config-path={folder / 'fpo'}", *options)
    page, said = look_at(browser, folder / "fpo/features/report.html", tmp_path / "browser")
    assert said == [] and "What fpo did to the features: fpo" in page
