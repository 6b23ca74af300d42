"""The losses against numbers worked out by hand, and their gradients' directions."""

import math

import pytest
import torch

from trainers import DPOTrainer, FPOTrainer, SFTTrainer


def loss_of(trainer: type, *args: torch.Tensor, **options: float):
    return trainer.loss(None, *args, **options)


def column(*values: float) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], requires_grad=True)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_dpo_by_hand():
    # pair 1: h_w = -10 - -12 = 2, h_l = -9 - -8 = -1, beta * (h_w - h_l) = 0.1 * 3
    # pair 2: h_w = -20 - -15 = -5, h_l = -6 - -7 = 1, beta * (h_w - h_l) = 0.1 * -6
    losses, chosen, rejected = loss_of(
        DPOTrainer, column(-10, -20), column(-9, -6), column(-12, -15), column(-8, -7), beta=0.1
    )
    assert losses.tolist() == pytest.approx([softplus(-0.3), softplus(0.6)], rel=1e-6)
    assert chosen.tolist() == pytest.approx([0.2, -0.5])
    assert rejected.tolist() == pytest.approx([-0.1, 0.1])


def test_fpo_by_hand():
    # pair 1: 0.1 * ((-1.0 + 1.5) - (-0.8 + 0.6)) - 0.5 * (0.4 - 0.1) = 0.07 - 0.15
    # pair 2: 0.1 * ((-2.0 + 1.0) - (-0.5 + 0.9)) - 0.5 * (0.2 - 0.6) = -0.14 + 0.2
    chosen_drift, rejected_drift = column(0.1, 0.6), column(0.4, 0.2)
    losses, chosen, rejected = loss_of(
        FPOTrainer,
        column(-1.0, -2.0),
        column(-0.8, -0.5),
        column(-1.5, -1.0),
        column(-0.6, -0.9),
        chosen_drift,
        rejected_drift,
        beta=0.1,
        alpha=0.5,
    )
    assert losses.tolist() == pytest.approx([softplus(0.08), softplus(-0.06)], rel=1e-6)
    assert chosen.tolist() == pytest.approx([0.05, -0.1])
    assert rejected.tolist() == pytest.approx([-0.02, 0.04])
    losses.sum().backward()
    assert chosen_drift.grad is None  # stop-gradient
    # d/dF_l of -log sigmoid(z), z = ... - alpha F_l, is alpha * sigmoid(-z)
    expected = [0.5 / (1 + math.exp(-0.08)), 0.5 / (1 + math.exp(0.06))]
    assert rejected_drift.grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("trainer", [DPOTrainer, FPOTrainer])
def test_policy_equal_to_reference_gives_log_2(trainer):
    chosen, rejected, zero = column(-3, -7), column(-5, -1), column(0, 0)
    drifts, options = ((zero, zero), {"alpha": 0.5}) if trainer is FPOTrainer else ((), {})
    losses, *_ = loss_of(trainer, chosen, rejected, chosen, rejected, *drifts, beta=0.1, **options)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)


def test_dpo_swapped_is_its_mirror_image():
    a, b, c, d = column(-10), column(-9), column(-12), column(-8)
    right, *_ = loss_of(DPOTrainer, a, b, c, d, beta=0.1)
    wrong, *_ = loss_of(DPOTrainer, b, a, d, c, beta=0.1)
    assert (wrong - right).item() == pytest.approx(0.3)  # -log s(-x) + log s(x) = x


def test_sft_is_the_negative_log_likelihood():
    assert loss_of(SFTTrainer, column(-4, -6)).tolist() == [4, 6]
