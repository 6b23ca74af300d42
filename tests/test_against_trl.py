"""Losses, gradients and whole runs against TRL's own trainers, on the same text; and input at the edge of what is
possible, where there is no one to compare with.

TRL is given text and tokenises it itself, in the order of our batches.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from composition import composed
from conftest import REPO, metrics
from datasets import Dataset
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import train
from data import toy
from data.batch import Batch
from dataloader import DataLoader
from launch import assembly, settings
from models import Scores
from trainers import BCOTrainer
from training.checkpoint import Run
from training.loop import BasicTrainer
from training.metrics import MetricAccumulator
from training.quantities import QUANTITIES, LossContext

TINY = REPO / "assets/tiny"
BATCH = 8
DPO_LIKE = ["dpo", "dpo-norm", "cdpo", "robust", "ld-dpo", "humanline", "wpo", "apo-zero", "apo-down", "ipo"]
PAIRED = [*DPO_LIKE, "slic", "simpo", "orpo", "tdpo1", "tdpo2", "fpo", "fpo-mse"]
UNPAIRED = ["kto", "kto-zero", "kto-logsigmoid", "kto-surprisal", "bco"]


# ---------------------------------------------------------------------------------------------------- both sides


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise on its weights: a policy that is not its reference."""
    model, folder = load(TINY), tmp_path_factory.mktemp("moved")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)


def pairs(count: int) -> list[dict[str, Any]]:
    """Preferences in the toy language, each on another prompt."""
    rows = {row["prompt"]: row for row in toy.preferences("train", seed=0, count=2 * count)}
    return list(rows.values())[:count]


def labelled(count: int) -> list[dict[str, Any]]:
    """One completion for each prompt, every third an undesirable one."""
    sides = ["chosen", "chosen", "rejected"] * count
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(pairs(count), sides)
    ]


def settle(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> tuple[DictConfig, list[str]]:
    """A composed configuration that trains on these rows, as the command line would give it."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["model=tiny", "template=tulu", f"datasets=[{file}]", f"eval_datasets=[{file}]", f"cache_dir={folder}"]
    given += ["n_eval_examples=8", f"model.batch_size={BATCH}", *overrides]
    return composed(given), given


def assemble(raw: DictConfig) -> BasicTrainer:
    """Our trainer, as train.py builds it."""
    config, classes = settings.check_config(raw)
    run = Run(Path(config.cache_dir) / "run")
    paths = settings.find_paths(config, classes.binding.needs)
    trainer = assembly.prepare(settings.with_defaults(config, paths), classes, paths, run)
    trainer.start_optimizer()
    return trainer


def prepared(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> BasicTrainer:
    return assemble(settle(folder, rows, *overrides)[0])


def apart(policy: Path, reference: Path = TINY) -> list[str]:
    """The overrides for a policy that is not its reference."""
    return [f"model.load_from={policy}", f"model.reference_path={reference}"]


def theirs(kind: str, loader: DataLoader, folder: Path, policy: Path, reference: Path = TINY, **options: Any) -> Any:
    """TRL's trainer of a kind, with the text of our loader's steps, batch by batch."""
    trl = pytest.importorskip("trl")
    module = import_module(f"trl.experimental.{kind.lower()}") if kind in ("CPO", "ORPO") else trl
    texts = []
    for step in range(len(loader)):
        # TRL's KTO pairs x_i with y_{i-1} of the batch and ours with y_{i+1}: the same pairs in a batch turned round
        indices = loader.indices(step)[:: -1 if kind == "KTO" else 1]
        texts += [text_of(kind, loader.rows[index]) for index in indices]
    shared = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": loader.batch_size,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    referred = {"ref_model": load(reference)} if kind in ("DPO", "KTO") else {}
    return getattr(module, f"{kind}Trainer")(
        model=load(policy, AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM),
        args=getattr(module, f"{kind}Config")(**shared, **options),
        train_dataset=Dataset.from_list(texts),
        processing_class=assembly.models.load_tokenizer(TINY),
        **referred,
    )


def text_of(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of our tokenised data in TRL's columns."""
    sides = ["completion"] if kind in ("KTO", "SFT") else ["chosen", "rejected"]
    label = {"label": row["desirable"]} if kind == "KTO" else {}
    return {"prompt": row["prompt"], **dict(zip(sides, row["completions"], strict=True)), **label}


Step = tuple[float, dict[str, Tensor]]  # the first step's loss, and its gradients by parameter


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def first_losses(trainer: BasicTrainer) -> Tensor:
    (batch,) = next(trainer.loaders["train"].steps())
    trainer.policy.train()
    trainer.before_step("train", 0, [batch])
    return trainer.compute_loss(batch, "train", MetricAccumulator()) / trainer.weight(batch)


def our_step(trainer: BasicTrainer) -> Step:
    loss = first_losses(trainer).sum()
    loss.backward()
    return loss.item(), gradients(trainer.policy)


def their_step(trainer: Any, loss_of: Callable[[Any, Any], Tensor] | None = None) -> Step:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = loss_of(trainer, batch) if loss_of else trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def assert_same(ours: Step, other: Step) -> None:
    assert ours[0] == pytest.approx(other[0], rel=1e-5)
    assert ours[1].keys() == other[1].keys()
    largest = max(gradient.abs().max() for gradient in other[1].values())
    assert largest > 1e-3  # there is something to compare
    for name, gradient in other[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-5 * float(largest), msg=name)


# ---------------------------------------------------------------------------------------------------- one step

AGREED: dict[str, tuple[dict[str, float], str, dict[str, Any]]] = {
    "sft": ({}, "SFT", {}),
    "dpo": ({"beta": 0.3}, "DPO", {"loss_type": ["sigmoid"], "beta": 0.3}),
    # TRL's "robust" takes a share e of wrong labels out of DPO; a share of -e / (1 - 2e) puts them in, which is cDPO
    "cdpo": (
        {"beta": 0.3, "label_smoothing": 0.2},
        "DPO",
        {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": -0.2 / (1 - 2 * 0.2)},
    ),
    "ipo": ({"tau": 0.2}, "DPO", {"loss_type": ["ipo"], "beta": 0.2}),  # of mean log-ratios, as ours
    "simpo": (
        {"beta": 2.0, "gamma_beta_ratio": 0.25},
        "CPO",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
    ),
    "robust": (
        {"beta": 0.3, "label_smoothing": 0.2},
        "DPO",
        {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.2},
    ),
    "dpo-norm": ({"beta": 2.0}, "DPO", {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
    "ld-dpo": ({"beta": 0.3, "alpha": 0.25}, "DPO", {"beta": 0.3, "ld_alpha": 0.25}),
    "wpo": ({"beta": 0.3}, "DPO", {"beta": 0.3, "use_weighting": True}),
    "apo-zero": ({"beta": 0.3}, "DPO", {"loss_type": ["apo_zero"], "beta": 0.3}),
    "apo-down": ({"beta": 0.3}, "DPO", {"loss_type": ["apo_down"], "beta": 0.3}),
    # without its constraint FPO is DPO of mean log-ratios
    "fpo": ({"beta": 0.3, "alpha": 0.0}, "DPO", {"loss_type": ["sigmoid_norm"], "beta": 0.3}),
    "kto": (
        {"beta": 0.2, "desirable_weight": 0.7, "undesirable_weight": 1.3},
        "KTO",
        {"loss_type": "kto", "beta": 0.2, "desirable_weight": 0.7, "undesirable_weight": 1.3},
    ),
    "kto-zero": ({"beta": 0.2}, "KTO", {"loss_type": "apo_zero_unpaired", "beta": 0.2}),
}


@pytest.mark.parametrize("loss", AGREED)
def test_loss_and_gradients_equal_trl(tmp_path: Path, moved: Path, loss: str) -> None:
    hyper, kind, options = AGREED[loss]
    rows = labelled(BATCH) if kind == "KTO" else pairs(BATCH)
    chosen = [f"loss.{name}={value}" for name, value in hyper.items()]
    ours = prepared(tmp_path, rows, f"loss={loss}", *chosen, *apart(moved))
    other = theirs(kind, ours.loaders["train"], tmp_path, moved, **options)
    assert_same(our_step(ours), their_step(other))
    if loss == "kto":
        assert ours.mismatched_means is not None and ours.mismatched_means.logratio is not None
        assert ours.mismatched_means.logratio > 0.1  # so it is not the clamp that makes them equal
        assert other._metrics["train"]["kl"] == pytest.approx([float(ours.mismatched_means.logratio)], rel=1e-4)


def test_dpo_with_nll_equals_trl(tmp_path: Path, moved: Path) -> None:
    """TRL's mean of the chosen tokens is over the batch, ours over each completion: the same of one pair."""
    weighted = ["loss.beta=0.3", "+term@term.nll=nll", "term.nll.weight=0.25", "model.batch_size=1"]
    ours = prepared(tmp_path, pairs(BATCH), "loss=dpo", *weighted, *apart(moved))
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.25], "beta": 0.3}
    assert_same(our_step(ours), their_step(theirs("DPO", ours.loaders["train"], tmp_path, moved, **options)))


def test_bco_of_both_sides_equals_trls_bco_of_pairs(tmp_path: Path, moved: Path) -> None:
    """TRL's has no mean reward; ours is 0 at the first step. TRL adds the two sides, ours is their mean."""
    shared = [*apart(moved), "loss.beta=0.3"]
    ours = prepared(tmp_path, pairs(BATCH), "loss=bco", f"++model.batch_size={2 * BATCH}", *shared)
    paired = prepared(tmp_path, pairs(BATCH), "loss=dpo", *shared)
    other = theirs("DPO", paired.loaders["train"], tmp_path, moved, loss_type=["bco_pair"], beta=0.3)
    loss, gradients = our_step(ours)
    assert_same((2 * loss, {name: 2 * own for name, own in gradients.items()}), their_step(other))


def test_bcos_mean_is_that_of_the_steps_before_and_part_of_the_state(tmp_path: Path, moved: Path) -> None:
    def trainer() -> BasicTrainer:
        split = ["model.batch_size=4", "model.gradient_accumulation_steps=2", "lr=1e-3", "loss.beta=0.3"]
        return prepared(tmp_path, labelled(4), "loss=bco", *split, *apart(moved))

    whole = trainer()
    assert isinstance(whole, BCOTrainer)
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for step, batches in enumerate(whole.loaders["train"].steps()):
        with torch.no_grad():
            for batch, scores in (whole.score(batch, whole.references["train"]) for batch in batches):
                own = 0.3 * (scores.logps - batch.reference["logps"])
                for reward, desirable in zip(own.tolist(), batch.record["desirable"].tolist()):
                    rewards[desirable].append(reward)
        whole.optimise(step, batches, MetricAccumulator())
        if step == 0:
            assert whole.mean_reward == 0
            whole.run.save_state(whole.module, whole.optimizer, {"step": 1}, keep=1)
            whole.run.finish_saving()
            middle = sum(sum(own) / len(own) for own in rewards.values() if own) / 2
        if step == 1:
            assert float(whole.mean_reward) == pytest.approx(middle, rel=1e-4)
            break
    again = trainer()
    assert isinstance(again, BCOTrainer)
    again.run.find_state()
    again.run.load_state(again.module, again.optimizer)
    assert float(again.reward_means.middle()) == pytest.approx(middle, rel=1e-4)


def test_slic_equals_trls_hinge_with_its_likelihood_term(tmp_path: Path, moved: Path) -> None:
    """CPO's hinge is 1 - beta * (p_w - p_l), so a margin of 1 where beta is 1. Its regulariser is a mean over the
    chosen tokens of the batch and SLiC's a mean over pairs, so the weights differ by the tokens a pair."""
    first = prepared(tmp_path, pairs(BATCH), "loss=slic").loaders["train"].batch(list(range(BATCH)))
    tokens = sum(first.lengths[:BATCH])
    weight = f"loss.lambda_coef={0.5 * BATCH / tokens}"
    ours = prepared(tmp_path, pairs(BATCH), "loss=slic", "loss.beta=1.0", weight, *apart(moved))
    loader = ours.loaders["train"]
    other = theirs("CPO", loader, tmp_path, moved, loss_type="hinge", beta=1.0, cpo_alpha=0.5)
    assert_same(our_step(ours), their_step(other))


def test_orpo_equals_trls_odds_ratio(tmp_path: Path, moved: Path) -> None:
    """The likelihood term is written out: TRL's is a mean over all tokens of the batch, the prompts' too; ours, as the
    paper's P(y|x), one over each completion's."""

    def loss_of(trainer: Any, batch: Any) -> Tensor:
        chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
        return (-chosen - trainer.odds_ratio_loss(chosen, rejected)[0]).mean()

    ours = prepared(tmp_path, pairs(BATCH), "loss=orpo", "loss.lambda_coef=0.5", *apart(moved))
    other = theirs("ORPO", ours.loaders["train"], tmp_path, moved, beta=0.5)
    assert_same(our_step(ours), their_step(other, loss_of))


def test_bradley_terry_equals_trls_reward_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)  # of the new head
    load(TINY, AutoModelForSequenceClassification, num_labels=1).save_pretrained(tmp_path / "start")
    ours = prepared(tmp_path, pairs(BATCH), "loss=bradley-terry", f"model.load_from={tmp_path / 'start'}")
    other = theirs("Reward", ours.loaders["train"], tmp_path, tmp_path / "start")
    assert_same(our_step(ours), their_step(other))


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("loss, kind", [("dpo", "DPO"), ("sft", "SFT"), ("kto", "KTO")])
def test_twenty_steps_equal_trl(tmp_path: Path, moved: Path, loss: str, kind: str) -> None:
    """On 16 records over and over, so that the loss falls far. The curves are about 1e-5 apart."""
    batch, steps, lr = 4, 20, 5e-4
    rows = labelled(16) if kind == "KTO" else pairs(16)
    config, given = settle(
        tmp_path,
        rows,
        f"loss={loss}",
        f"model.batch_size={batch}",
        "n_epochs=null",
        f"n_examples={batch * steps}",
        "model.max_grad_norm=1.0",
        "optimizer=AdamW",
        "++optimizer_options.weight_decay=0",
        f"lr={lr}",
        "warmup_steps=5",
        f"model.load_from={moved}",
    )
    train.train(config)
    lines = metrics(tmp_path / config.exp_name)
    ours = [line for line in lines if "loss/train" in line]

    options: dict[str, Any] = {"learning_rate": lr, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}
    options |= {"optim": "adamw_torch", "max_grad_norm": 1.0, "num_train_epochs": 1}
    options |= {} if kind == "SFT" else {"beta": config.loss.beta}
    loader = prepared(tmp_path, rows, *given).loaders["train"]
    other = theirs(kind, loader, tmp_path, policy=moved, reference=moved, **options)
    other.train()
    expected = [line for line in other.state.log_history if "loss" in line]

    assert [line["loss/train"] for line in ours] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    assert [line["grad_norm"] for line in ours] == pytest.approx([line["grad_norm"] for line in expected], rel=1e-2)
    assert len(ours) == len(expected) == steps
    before, after = (line["loss/eval"] for line in lines if "loss/eval" in line)
    assert after < 0.8 * before  # far enough for a difference to show


# ---------------------------------------------------------------------------------------------------- symmetries


@pytest.mark.parametrize("loss", ["dpo", "tdpo1", "tdpo2", "fpo", "fpo-mse", "simpo"])
def test_exchanging_chosen_and_rejected_gives_the_other_outcome(tmp_path: Path, moved: Path, loss: str) -> None:
    """The losses are -log of the probability of the preference: the two outcomes' probabilities sum to 1."""
    options = ["loss.gamma_beta_ratio=0"] if loss == "simpo" else []
    right, wrong = (exchanged_losses(tmp_path / name, name == "wrong", loss, moved, options) for name in SENSES)
    torch.testing.assert_close(torch.exp(-right) + torch.exp(-wrong), torch.ones(BATCH))
    assert (right - wrong).abs().max() > 0.01


def test_cdpo_with_all_labels_wrong_is_dpo_of_the_exchanged_pairs(tmp_path: Path, moved: Path) -> None:
    smoothings = dict(zip(SENSES, ("0.2", "0.8")))
    right, wrong = (
        exchanged_losses(tmp_path / name, name == "wrong", "cdpo", moved, [f"loss.label_smoothing={smoothing}"])
        for name, smoothing in smoothings.items()
    )
    torch.testing.assert_close(right, wrong)


SENSES = ("right", "wrong")


def exchanged_losses(folder: Path, exchange: bool, loss: str, policy: Path, options: list[str]) -> Tensor:
    """The losses [B] of the first step, of the pairs as they are or exchanged."""
    folder.mkdir()
    rows = pairs(BATCH)
    if exchange:
        rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    return BATCH * first_losses(prepared(folder, rows, f"loss={loss}", *options, *apart(policy))).detach()


@pytest.mark.parametrize(
    "loss, same",
    [*((loss, True) for loss in ("ipo", "simpo", "orpo", "fpo", "fpo-mse", "kto-surprisal")), ("dpo", False)],
)
def test_losses_per_token_do_not_see_every_token_twice(tmp_path: Path, moved: Path, loss: str, same: bool) -> None:
    """Each token's log-probability and residual stream repeated, in policy and reference."""
    trainer = prepared(tmp_path, pairs(BATCH), f"loss={loss}", *apart(moved))
    (batch,) = next(trainer.loaders["train"].steps())
    trainer.before_step("train", 0, [batch])
    batch, scores = trainer.score(batch, trainer.references.get("train"))
    cached = batch.reference
    doubled: dict[str, Any] = {"logps": 2 * cached["logps"], "features": cached.get("features")} if cached else {}
    longer = replace(
        batch,
        sequence=batch.sequence.repeat_interleave(2),
        lengths=[2 * length for length in batch.lengths],
        read_lengths=[2 * length for length in batch.read_lengths],
        reference=doubled,
    )
    residual = None if scores.residual is None else scores.residual.repeat_interleave(2, 0)
    repeated = replace(scores, token_logps=scores.token_logps.repeat_interleave(2), residual=residual, batch=longer)
    once, twice = (losses_from(trainer, *given) for given in ((batch, scores), (longer, repeated)))
    assert torch.allclose(once, twice, rtol=1e-5) == same


def losses_from(trainer: BasicTrainer, batch: Batch, scores: Scores) -> Tensor:
    """The losses of these scores, whatever the policy says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "score", lambda *_: (batch, scores))
        return trainer.compute_loss(batch, "train", MetricAccumulator())


# ---------------------------------------------------------------------------------------------------- at the edge

LONG = "Opposite: " + ", ".join(["sad"] * 40)
EDGES = [
    {"prompt": "Opposite: dry", "chosen": "Sure! wet", "rejected": "Sure! wet"},
    {"prompt": "Opposite: strong", "chosen": "a", "rejected": "Sure! weak"},  # "a" is one token
    {"prompt": LONG, "chosen": "Sure! happy", "rejected": "Bah. happy"},  # cut to all but one of the 24 tokens
]
TIGHT = ["++model.max_length=24", "++model.max_prompt_length=23", "model.batch_size=2", "n_epochs=2", "lr=1e-3"]


@pytest.mark.parametrize("loss", [*PAIRED, *UNPAIRED])
def test_degenerate_pairs_stay_finite(tmp_path: Path, loss: str) -> None:
    trainer = prepared(tmp_path, EDGES, f"loss={loss}", *TIGHT)
    rows = trainer.loaders["train"].rows
    lengths = [[len(ids) for ids in row["completion_ids"]] for row in rows]
    assert len(rows) == (3 if loss in PAIRED else 6)
    assert lengths[-1] == [1] * len(lengths[-1]) and len(rows[-1]["prompt_ids"]) == 23
    train_finitely(trainer)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("loss", UNPAIRED)
def test_one_kind_of_example_only(tmp_path: Path, loss: str, label: bool) -> None:
    rows = [{**row, "label": label} for row in labelled(6)]
    means = train_finitely(prepared(tmp_path, rows, f"loss={loss}", "model.batch_size=4", "lr=1e-3"))
    assert [f"logps_train/{side}" in means for side in ("chosen", "rejected")] == [label, not label]


@pytest.mark.parametrize("loss", [*PAIRED, *UNPAIRED])
def test_certain_completions_stay_finite(tmp_path: Path, loss: str) -> None:
    """A probability of 1 is where a log of odds ends."""
    trainer = prepared(tmp_path, pairs(BATCH), f"loss={loss}")
    (batch,) = next(trainer.loaders["train"].steps())
    trainer.before_step("train", 0, [batch])
    batch, scores = trainer.score(batch, trainer.references.get("train"))
    certain = torch.zeros_like(scores.token_logps, requires_grad=True)
    losses = losses_from(trainer, batch, replace(scores, token_logps=certain))
    losses.sum().backward()
    assert losses.isfinite().all() and certain.grad is not None and certain.grad.isfinite().all()


def train_finitely(trainer: BasicTrainer) -> dict[str, float]:
    """The metrics of training to the end, which leaves finite numbers in them and in the weights, and moves those."""
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    means = MetricAccumulator()
    for step, batches in enumerate(trainer.loaders["train"].steps()):
        trainer.optimise(step, batches, means)
    values = means.read()
    assert math.isfinite(values["loss/train"]) and all(map(math.isfinite, values.values()))
    after = list(trainer.policy.parameters())
    assert all(bool(p.isfinite().all()) for p in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after))
    return values


# ---------------------------------------------------------------------------------------------------- KTO's z

SPLIT = ["loss=kto", "model.gradient_accumulation_steps=3"]


def z_by_hand(trainer: BasicTrainer, step: int, policy: Path, reference: Path) -> float:
    """The mean of log policy - log reference of x_i with y_{i+1} of the step, from the models' plain logits."""
    loader = trainer.loaders["train"]
    rows = [loader.rows[index] for index in loader.indices(step)]
    total = 0.0
    for model, sign in ((load(policy).eval(), 1), (load(reference).eval(), -1)):
        for row, other in zip(rows, rows[1:] + rows[:1]):
            prompt, completion = row["prompt_ids"], other["completion_ids"][0]
            with torch.no_grad():
                logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            total += sign * sum(float(logps[len(prompt) - 1 + t, token]) for t, token in enumerate(completion))
    return total / len(rows)


def z_of(trainer: BasicTrainer) -> list[float]:
    """KTO's z of each step."""
    found = []
    for step, batches in enumerate(trainer.loaders["train"].steps()):
        trainer.before_step("train", step, batches)
        z = QUANTITIES["kl"](LossContext(batches[0], None, mismatched=trainer.mismatched_means))
        assert not z.requires_grad and len(z.unique()) == 1
        found.append(float(z[0]))
    return found


def test_z_is_the_mean_over_the_mismatched_pairs_of_the_step(tmp_path: Path, moved: Path) -> None:
    trainer = prepared(tmp_path, labelled(11), *SPLIT, *apart(moved))
    expected = [z_by_hand(trainer, step, policy=moved, reference=TINY) for step in range(2)]
    assert min(expected) > 0.1
    assert z_of(trainer) == pytest.approx(expected, rel=1e-4)


def test_z_is_clamped_after_the_mean(tmp_path: Path, moved: Path) -> None:
    trainer = prepared(tmp_path, labelled(11), *SPLIT, *apart(TINY, reference=moved))
    assert max(z_by_hand(trainer, step, policy=TINY, reference=moved) for step in range(2)) < -0.1
    assert z_of(trainer) == [0, 0]


def rank_of_two(rank: int, given: list[str], folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    trainer = assemble(composed(given))
    loader = trainer.loaders["train"]
    loader.rank, loader.world_size = rank, 2
    (folder / f"{rank}.json").write_text(json.dumps(z_of(trainer)))
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_z_of_one(tmp_path: Path, moved: Path) -> None:
    config, given = settle(tmp_path, labelled(11), *SPLIT, *apart(moved))
    alone = z_of(assemble(config))
    start_processes(rank_of_two, (given, tmp_path), nprocs=2, start_method="forkserver")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, rel=1e-5)
