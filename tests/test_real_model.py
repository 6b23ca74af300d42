"""From a pretrained chat model to judged samples: SmolLM2-135M-Instruct, by the commands that a user types."""

import json
import math

import pytest
import torch
from conftest import HH_100, command, look_at, metrics, transformers_server
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.real, pytest.mark.slow]
DATA = ["datasets=[hh]", f"data_dir={HH_100}"]
SHORT = ["++model.max_length=64", "++model.max_prompt_length=40", "++model.policy_dtype=float32", "export=[hub]"]
FEW = ["++model.batch_size=2", "++n_eval_examples=2", "++max_new_tokens=4"]


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory):
    """An SAE of the model, and FPO through it."""
    folder = tmp_path_factory.mktemp("real")
    own = [f"model={smollm2}", *DATA, *SHORT, *FEW, f"cache_dir={folder}"]
    sae = ["loss=sae", "loss.layer=14", "loss.d_sae=1024", "loss.k=32", "loss.batch_tokens=64", "++warmup_steps=2"]
    said = command("train.py", *sae, *own, "n_examples=8", "lr=1e-3", "++train_on=all", "exp_name=sae").stdout
    said += command("train.py", "loss=fpo", *own, "n_examples=4", f"++sae.path={folder}/sae", "exp_name=fpo").stdout
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
    sampling = ["++n_samples=2", "++max_new_tokens=16", "++model.policy_dtype=float32", f"++samples_dir={tmp_path}"]
    for path in (folder / "fpo", smollm2):
        command("eval.py", f"--config-path={path}", *sampling, *DATA, "++temperature=0")
    for file in ("fpo.json", "smollm2.json"):
        for sample in json.loads((tmp_path / file).read_text())["samples"]:
            assert len(sample["policy"].split()) > 3 and "<|im" not in sample["policy"]
    with transformers_server(smollm2) as address:
        judge = ["-j", smollm2, "--base_url", address, "-r", tmp_path / "results.jsonl", "--max_tokens", "16"]
        pair = ["-f", tmp_path / "fpo.json", "--against", tmp_path / "smollm2.json"]
        done = command("compare.py", *pair, *judge, "--concurrency", "1", "--no-both_orders", check=False)
    replies = [json.loads(line) for line in (tmp_path / "results.verdicts.jsonl").read_text().splitlines()]
    assert len(replies) == 2 and all(len(reply["reply"].split()) > 3 for reply in replies)
    if done.returncode:  # a judge of this size often gives no verdict at all
        assert "gave no verdict on fpo against smollm2; the last of its 2 replies" in " ".join(done.stderr.split())
    else:
        result = json.loads((tmp_path / "results.jsonl").read_text())
        assert result["total"] + result["malformed"] == 2


def test_its_features_in_a_browser(trained, browser, tmp_path):
    folder, _ = trained
    options = ["++mode=features", "++n_samples=2", "++max_new_tokens=8"]
    command("eval.py", f"--config-path={folder / 'fpo'}", *options)
    page, said = look_at(browser, folder / "fpo/features/report.html", tmp_path / "browser")
    assert said == [] and "What fpo did to the features: fpo" in page


def test_dpo_equals_trls_on_the_same_pairs(smollm2, tmp_path):
    """The loss before the first step, and the summed log-probabilities, of TRL's trainer on the same conversations."""
    trl = pytest.importorskip("trl")
    pairs = [
        ("Name a fruit.", "An apple.", "No."),
        ("What is two plus two?", "Two plus two is four.", "Five, I think, or six."),
    ]
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in pairs
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"model={smollm2}", *SHORT, f"cache_dir={tmp_path}", "exp_name=dpo", "++max_new_tokens=1"]
    command("train.py", "loss=dpo", *own, f"datasets=[{file}]", f"eval_datasets=[{file}]", "++model.batch_size=2")
    ours = metrics(tmp_path / "dpo")[0]

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # TRL also scores the line break that the template writes after <|im_end|>; a sample stops before it, and so do we
    ending = "'<|im_end|>' + '\n'"
    assert tokenizer.chat_template.count(ending) == 1
    last = "'<|im_end|>' + ('' if message['role'] == 'assistant' else '\n')"
    tokenizer.chat_template = tokenizer.chat_template.replace(ending, last)
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32),
        args=trl.DPOConfig(str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, per_device_eval_batch_size=2),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = trainer.evaluate()
    assert ours["loss/eval"] == pytest.approx(theirs["eval_loss"], abs=1e-6) == pytest.approx(math.log(2), abs=1e-6)
    for side in ("chosen", "rejected"):
        assert ours[f"logps_eval/{side}"] == pytest.approx(theirs[f"eval_logps/{side}"], abs=1e-4)
