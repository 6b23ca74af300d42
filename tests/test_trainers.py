"""What trainers do beyond their loss: PPO's updates, reward models, control tokens, losses from elsewhere."""

import json
import math

import pytest
import safetensors.torch
import torch
from conftest import REPO, metrics
from hydra import compose, initialize_config_dir
from test_training import PAIRS, assembled, losses, run, settle
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import models
from launch import assembly, report, settings
from training import loop
from utils import UserError

# ---------------------------------------------------------------------------------------------------- PPO


def test_ppo_makes_every_update(tmp_path, monkeypatch):
    steps = []
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        steps.append(len(self.param_groups[0]["params"]))
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(tmp_path, "loss=ppo", "loss.ppo_epochs=3")
    assert steps.count(max(steps)) == 6 * 3  # 48 completions in batches of 8; a trial of the options has one parameter
    before = AutoModelForCausalLM.from_pretrained(REPO / "assets/tiny").state_dict()
    after = torch.load(tmp_path / "ppo_tiny/LATEST/policy.pt", weights_only=True)["state"]
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "ppo_tiny/LATEST/value_head.safetensors").is_file()
    goes_on = assembled(tmp_path, "loss=dpo", f"++model.load_from={tmp_path}/ppo_tiny")
    assert torch.equal(goes_on.policy.get_input_embeddings().weight.cpu(), after["model.embed_tokens.weight"])


def advantages(tmp_path, accumulation=1, rank=0, world_size=1):
    """The advantages of the first optimiser step, by record, with a value head that says something."""
    trainer = assembled(tmp_path, "loss=ppo", f"model.gradient_accumulation_steps={accumulation}")
    loader = trainer.loaders["train"]
    loader.rank, loader.world_size = rank, world_size
    torch.nn.init.constant_(trainer.value_head.weight, 0.01)
    micro_batches = next(iter(loader.steps()))
    trainer.before_step("train", 0, micro_batches)
    found = {}
    for batch in micro_batches:
        found |= dict(zip(batch.index, batch.record["advantages"].split(batch.lengths)))
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for index, own in expected.items():
        torch.testing.assert_close(found[index], own, rtol=1e-3, atol=1e-4)


def test_ppo_whitens_over_the_whole_batch(tmp_path):
    """Advantages of a step have mean 0 and deviation 1 over all micro-batches, and do not depend on the split."""
    whole = advantages(tmp_path)
    together = torch.cat(list(whole.values()))
    assert together.mean().item() == pytest.approx(0, abs=1e-5)
    assert together.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert_equal(advantages(tmp_path, accumulation=4), whole)


def one_rank_of_two(rank, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=rank, world_size=2)
    torch.save(advantages(tmp_path, rank=rank, world_size=2), tmp_path / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ppo_whitens_over_all_ranks(tmp_path):
    whole = advantages(tmp_path)
    torch.multiprocessing.start_processes(one_rank_of_two, (tmp_path,), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(len(found) == 4 for found in ranks)
    assert_equal(ranks[0] | ranks[1], whole)


def test_ppo_takes_its_rewards_from_labels_scores_or_a_model(tmp_path, plain_run):
    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": n % 2, "score": n / 4}
        for n, pair in enumerate(PAIRS["train"])
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"datasets=[{tmp_path}/scored.jsonl]", f"eval_datasets=[{tmp_path}/scored.jsonl]"]

    def rewards(*options):
        trainer = assembled(tmp_path, "loss=ppo", *data, *options)
        batch = trainer.loaders["train"].batch(list(range(8)))
        return trainer.rewards(batch)

    assert rewards().tolist() == [-1.0, 1.0] * 4
    assert rewards("loss.reward=score").tolist() == [n / 4 for n in range(8)]
    by_model = rewards(f"loss.reward={plain_run('bradley-terry')}")
    by_file = rewards(f"loss.reward={policy_file(plain_run('bradley-terry'), tmp_path)}")
    assert by_model.shape == (8,) and by_model.std() > 0
    torch.testing.assert_close(by_file, by_model)


def test_the_digest_of_a_reward_model_is_of_its_own_architecture(tmp_path, plain_run):
    """A run does not go on with another one."""
    policy_file(plain_run("bradley-terry"), tmp_path)
    raw, _ = settle(tmp_path, "loss=ppo", f"loss.reward={tmp_path}/only")
    config, classes = settings.check_config(raw)
    paths = settings.find_paths(config, classes.binding.needs)
    inputs = assembly.read_inputs(config, classes, paths)
    before = assembly.digests(config, classes, paths, inputs)
    own = tmp_path / "only/LATEST/config.json"
    changed = json.dumps(json.loads(own.read_text()) | {"rms_norm_eps": 0.1})
    own.unlink()  # a link to the file of the run
    own.write_text(changed)
    after = assembly.digests(config, classes, paths, inputs)
    assert {key for key in before if before[key] != after[key]} == {"loss.reward"}


def policy_file(run, folder):
    """A run that exported nothing but policy.pt."""
    latest = folder / "only/LATEST"
    latest.mkdir(parents=True)
    for name in ("policy.pt", "config.json"):
        (latest / name).symlink_to(run / "LATEST" / name)
    return latest.parent


def reward_model(run, folder, change):
    """The reward model of a run, with other tensors."""
    folder.mkdir()
    (folder / "config.json").symlink_to(run / "LATEST/config.json")
    tensors = change(safetensors.torch.load_file(run / "LATEST/model.safetensors"))
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: {k: v for k, v in own.items() if k != "score.weight"}, "its weights have no reward head"),
        (lambda own: {**own, "score.weight": torch.zeros(1, 64)}, r"of another shape: score\.weight"),
        (lambda own: {**own, "score.W_enc": torch.zeros(1)}, r"do not fit the model\. left over: score\.W_enc"),
    ],
)
def test_a_reward_model_that_cannot_be_one_is_told_before_a_weight_is_read(
    tmp_path, plain_run, monkeypatch, change, message
):
    folder = reward_model(plain_run("bradley-terry"), tmp_path / "odd", change)
    monkeypatch.setattr(models, "load_model", None)
    with pytest.raises(UserError, match=rf"{folder}.*{message}"):
        run(tmp_path, "loss=ppo", f"loss.reward={folder}", f"cache_dir={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_refused_with_its_weights_leaves_what_was_there(tmp_path, monkeypatch):
    """What only reading the weights tells, too: resume=never replaces nothing by it."""

    def refuses(*_, **__):
        raise UserError("its logits are scaled")

    monkeypatch.setattr(models, "require_own_scores", refuses)
    old = tmp_path / "out/sft_tiny/summary.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    (old.parent / "manifest.json").write_text('{"id": "1", "files": ["summary.json"]}')
    for name in ("sft_tiny", "new"):
        with pytest.raises(UserError, match="its logits are scaled"):
            run(tmp_path, "loss=sft", "resume=never", f"exp_name={name}", f"cache_dir={tmp_path}/out")
    assert old.read_text() == "{}" and [own.name for own in old.parent.parent.glob("[!.]*")] == ["sft_tiny"]


def test_rewards_that_are_no_numbers_are_the_reward_models_fault(tmp_path, plain_run):
    head = {"score.weight": torch.full((1, 128), math.nan)}
    folder = reward_model(plain_run("bradley-terry"), tmp_path / "odd", lambda own: own | head)
    trainer = assembled(tmp_path, "loss=ppo", f"loss.reward={folder}")
    with pytest.raises(UserError, match=rf"^loss\.reward={folder}: a reward is not a number; that model's weights"):
        trainer.evaluate()


def test_rows_without_a_score_are_told_before_a_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    with pytest.raises(UserError, match=r"loss\.reward=score: 48 of 48 rows have none .*train\.jsonl:1"):
        run(tmp_path, "loss=ppo", "loss.reward=score")


def test_ppo_resumes_as_if_uninterrupted(tmp_path, monkeypatch):
    options = ["loss=ppo", "loss.ppo_epochs=2", "++save_every=16", "loss.reward=label"]
    whole = run(tmp_path, *options, "exp_name=whole")
    original = loop.BasicTrainer.optimise

    def stops(self, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        return original(self, step, *rest)

    monkeypatch.setattr(loop.BasicTrainer, "optimise", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *options, "exp_name=cut")
    monkeypatch.undo()
    assert losses(run(tmp_path, *options, "exp_name=cut")) == losses(whole)


# ---------------------------------------------------------------------------------------------------- reward models


def test_reward_model_loads_elsewhere_with_the_same_rewards(tmp_path, plain_run):
    latest = plain_run("bradley-terry") / "LATEST"
    classifier = AutoModelForSequenceClassification.from_pretrained(latest, attn_implementation="eager")
    trainer = assembled(tmp_path, "loss=bradley-terry", "model.layout=padded")
    trainer.read_export(latest)
    batch = trainer.loaders["train"].batch([0, 1, 2])
    with torch.no_grad():
        ours = models.score_rewards(trainer.policy, batch).rewards
        theirs = classifier(batch.input_ids, attention_mask=(batch.document >= 0).long()).logits.squeeze(1)
    torch.testing.assert_close(ours, theirs)
    assert "rewards_eval/accuracies" in metrics(latest.parent)[-1]


# ---------------------------------------------------------------------------------------------------- control tokens


def test_a_reward_model_shows_its_accuracy(plain_run, capsys):
    folder = plain_run("bradley-terry")
    report.show_summary(folder)
    figures, lines = json.loads((folder / "summary.json").read_text()), metrics(folder)
    assert "reward accuracy after" in capsys.readouterr().out
    assert figures["reward_accuracy_before"] == lines[0]["rewards_eval/accuracies"]
    assert figures["reward_accuracy_after"] == lines[-1]["rewards_eval/accuracies"]


def test_control_tokens_survive_and_are_learnt(tmp_path, plain_run):
    latest = plain_run("csft") / "LATEST"
    tokenizer = AutoTokenizer.from_pretrained(latest)
    good, bad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|good|>", "<|bad|>"))
    plain = AutoTokenizer.from_pretrained(REPO / "assets/tiny")
    assert {good, bad} == {len(plain), len(plain) + 1}
    model = AutoModelForCausalLM.from_pretrained(latest)
    assert model.get_input_embeddings().num_embeddings == len(plain) + 2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    trainer = assembled(tmp_path, "loss=csft")
    rows = trainer.loaders["train"].rows
    assert len(rows) == 48
    for row in rows:
        (ids,) = row["completion_ids"]
        assert ids[0] == (good if row["desirable"] else bad)
        assert good not in ids[1:] and bad not in ids[1:]
        assert ids[-1] == tokenizer.eos_token_id
    # loading what was resized does not resize again
    run(tmp_path, "loss=csft", "exp_name=again", f"++model.name_or_path={latest}")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again/LATEST")
    assert again.get_input_embeddings().num_embeddings == len(plain) + 2


def test_sampling_starts_from_the_good_token(tmp_path, plain_run, monkeypatch):
    import eval as evaluation
    from launch.policies import read_config
    from sampling import backends
    from sampling.generate import Sample

    given, forbidden, folder = [], [], plain_run("csft")

    def batches(_model, _tokenizer, requests, _settings, never, **_options):
        given.extend(requests)
        forbidden.extend(never)
        yield {place: Sample("text", [5], "stop") for place in range(len(requests))}

    monkeypatch.setattr(backends, "sample_batches", batches)
    overrides = [f"++samples_dir={tmp_path}"]
    evaluation.write_samples(read_config(folder, overrides), folder, overrides)
    tokenizer = AutoTokenizer.from_pretrained(folder / "LATEST")
    control = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    assert given and all(request.prompt_ids[-1] == control[0] for request in given)
    assert forbidden == control


# ---------------------------------------------------------------------------------------------------- from elsewhere

CUSTOM = """
import torch
import torch.nn.functional as F

from trainers import PairedPreferenceTrainer, UnpairedPreferenceTrainer


class CustomKTOTrainer(UnpairedPreferenceTrainer):
    def loss(self, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):
        chosen = 1 - torch.sigmoid(0.1 * (chosen_logps - ref_chosen_logps))
        rejected = 1 - torch.sigmoid(0.1 * (ref_rejected_logps - rejected_logps))
        loss = torch.cat([chosen, rejected]).mean()
        return loss


class CustomPairedTrainer(PairedPreferenceTrainer):
    def loss(self, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
        return -F.logsigmoid(beta * (chosen_logps - ref_chosen_logps - rejected_logps + ref_rejected_logps))
"""


def test_custom_trainers_from_a_file_outside(tmp_path, plain_run):
    (tmp_path / "my_trainers.py").write_text(CUSTOM)
    custom = f"++loss.trainer={tmp_path}/my_trainers.py"
    paired = run(tmp_path, "loss=paired", f"{custom}:CustomPairedTrainer", "++loss.beta=0.1", "exp_name=paired")
    assert losses(paired) == pytest.approx(losses(metrics(plain_run("dpo"))))
    unpaired = run(tmp_path, "loss=unpaired", f"{custom}:CustomKTOTrainer", "exp_name=unpaired")
    assert losses(unpaired) == pytest.approx(losses(metrics(plain_run("kto-zero"))), rel=1e-5)


def test_a_custom_loss_needs_its_trainer(tmp_path):
    with pytest.raises(UserError, match=r"loss=paired needs a trainer of yours: \+\+loss\.trainer="):
        run(tmp_path, "loss=paired")


# ---------------------------------------------------------------------------------------------------- KTO


def test_kto_needs_two_examples_a_batch(tmp_path):
    with pytest.raises(UserError, match=r"model\.batch_size=1: KTO's z needs"):
        run(tmp_path, "loss=kto", "model.batch_size=1")


@pytest.mark.parametrize("option", ["model.eval_batch_size=1", "n_examples=1", "n_eval_examples=1"])
def test_kto_is_refused_where_there_is_nothing_to_mismatch(tmp_path, option):
    with pytest.raises(UserError, match="KTO's z needs the completion of another example"):
        run(tmp_path, "loss=kto", f"++{option}")


@pytest.mark.parametrize("kept", ["frac_unique_undesirable=0", "frac_unique_desirable=0"])
@pytest.mark.parametrize("loss", ["kto", "kto-zero", "kto-surprisal", "ppo"])
def test_batches_of_one_kind_only(tmp_path, loss, kept):
    lines = run(tmp_path, f"loss={loss}", f"loss.{kept}")
    assert len(losses(lines)) == 3
    assert all(value == value for line in lines for value in line.values())


def test_a_last_batch_of_one(tmp_path):
    """49 records in batches of 8: the last one's z needs a neighbour."""
    lines = run(tmp_path, "loss=kto", "++n_epochs=2", "++n_examples=49")
    assert len(losses(lines)) == 7
    assert losses(lines)[-1] == losses(lines)[-1]


@pytest.mark.parametrize("group", ["model", "sae"])
def test_every_yaml_composes(group):
    names = sorted(path.stem for path in (REPO / "config" / group).glob("*.yaml") if path.stem != "base")
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        for name in names:
            choice = ["loss=fpo", f"model={name}"] if group == "model" else ["loss=fpo", "model=tiny", f"sae={name}"]
            config = compose("config", overrides=choice)
            assert config[group].name
            if group == "model":
                settings.check_config(compose("config", overrides=["loss=dpo", *choice[1:]]))
