"""The losses against numbers worked out by hand, and their gradients' directions."""

import math

import pytest
import torch

from trainers import (
    APODownTrainer,
    APOZeroTrainer,
    BCOTrainer,
    BradleyTerryTrainer,
    CDPOTrainer,
    DPONormTrainer,
    DPOTrainer,
    FPOTrainer,
    HumanlineTrainer,
    IPOTrainer,
    KTOLogSigmoidTrainer,
    KTOSurprisalTrainer,
    KTOTrainer,
    KTOZeroTrainer,
    LDDPOTrainer,
    ORPOTrainer,
    PPOTrainer,
    RobustDPOTrainer,
    SFTTrainer,
    SimPOTrainer,
    SLiCTrainer,
    TDPO1Trainer,
    TDPO2Trainer,
    WPOTrainer,
    generalised_advantages,
)


def loss_of(trainer: type, *args: torch.Tensor, **options):
    return trainer.loss(None, *args, **options)


def column(*values: float) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], requires_grad=True)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


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


def test_cdpo_by_hand():
    # margin 0.3 as in test_dpo_by_hand; a fifth of the preferences is wrong
    losses, *_ = loss_of(CDPOTrainer, column(-10), column(-9), column(-12), column(-8), beta=0.1, label_smoothing=0.2)
    assert losses.item() == pytest.approx(0.8 * softplus(-0.3) + 0.2 * softplus(0.3))


def test_robust_by_hand():
    # margin 0.3 as in test_dpo_by_hand
    logps = column(-10), column(-9), column(-12), column(-8)
    losses, *_ = loss_of(RobustDPOTrainer, *logps, beta=0.1, label_smoothing=0.2)
    assert losses.item() == pytest.approx((0.8 * softplus(-0.3) - 0.2 * softplus(0.3)) / 0.6)


def test_dpo_of_log_ratios_per_token_by_hand():
    # log-ratios per token 0.5 and -0.2
    losses, chosen, rejected = loss_of(DPONormTrainer, column(-1.0), column(-0.8), column(-1.5), column(-0.6), beta=5.0)
    assert losses.item() == pytest.approx(softplus(-3.5))
    assert (chosen.item(), rejected.item()) == pytest.approx((2.5, -1.0))


# Two pairs, of 3 and 1 and of 1 and 2 tokens, with the token log-ratios 1, 2, -4 and 0.5; -3 and 1, 2.
TOKENS = {
    "chosen_token_logps": column(0, 1, -5, -4),
    "rejected_token_logps": column(0.5, 2, 3),
    "ref_chosen_token_logps": column(-1, -1, -1, -1),
    "ref_rejected_token_logps": column(0, 1, 1),
    "chosen_sequence": torch.tensor([0, 0, 0, 1]),
    "rejected_sequence": torch.tensor([0, 1, 1]),
    "chosen_lengths": torch.tensor([3, 1]),
}


def test_ld_dpo_by_hand():
    # 1 + 0.25 * (2 - 4) = 0.5 against 0.5; -3 against 1 + 0.25 * 2 = 1.5
    losses, chosen, rejected = loss_of(
        LDDPOTrainer, **TOKENS, rejected_lengths=torch.tensor([1, 2]), beta=2.0, alpha=0.25
    )
    assert chosen.tolist() == pytest.approx([1, -6]) and rejected.tolist() == pytest.approx([1, 3])
    assert losses.tolist() == pytest.approx([softplus(0), softplus(9)])


def test_humanline_by_hand():
    # 1 + 1.5 - 1 = 1.5 against 0.5; -1 against 1 + 1.5 = 2.5
    losses, chosen, rejected = loss_of(HumanlineTrainer, **TOKENS, beta=2.0, lowest=-1.0, highest=1.5)
    assert chosen.tolist() == pytest.approx([3, -2]) and rejected.tolist() == pytest.approx([1, 5])
    assert losses.tolist() == pytest.approx([softplus(-2), softplus(7)])


def test_wpo_by_hand():
    weights = torch.tensor([0.5]), torch.tensor([0.4])
    losses, *_ = loss_of(WPOTrainer, column(-10), column(-9), column(-12), column(-8), *weights, beta=0.1)
    assert losses.item() == pytest.approx(0.2 * softplus(-0.3))


def test_apo_by_hand():
    # rewards 0.2 and -0.1
    logps = column(-10), column(-9), column(-12), column(-8)
    zero, *_ = loss_of(APOZeroTrainer, *logps, beta=0.1)
    down, *_ = loss_of(APODownTrainer, *logps, beta=0.1)
    assert zero.item() == pytest.approx(sigmoid(-0.2) + sigmoid(-0.1))
    assert down.item() == pytest.approx(sigmoid(0.2) + sigmoid(-0.3))


def test_bco_by_hand():
    # rewards 0.2 and -0.1, around 0.15
    middle, labels = torch.tensor([0.15, 0.15]), torch.tensor([True, False])
    losses, rewards = loss_of(BCOTrainer, column(-10, -9), column(-12, -8), labels, middle, beta=0.1)
    assert losses.tolist() == pytest.approx([softplus(-0.05), softplus(-0.25)])
    assert rewards.tolist() == pytest.approx([0.2, -0.1])


def test_ipo_by_hand():
    # log-ratios per token 0.5 and -0.2, summed 1 and -0.8; the gap aimed at is 1 / (2 * 0.1) = 5
    inputs = column(-1.0), column(-0.8), column(-1.5), column(-0.6), torch.tensor([2]), torch.tensor([4])
    losses, *_ = loss_of(IPOTrainer, *inputs, tau=0.1, average=True)
    assert losses.item() == pytest.approx((0.7 - 5) ** 2)
    losses, *_ = loss_of(IPOTrainer, *inputs, tau=0.1, average=False)
    assert losses.item() == pytest.approx((1.8 - 5) ** 2)


def test_slic_by_hand():
    # the first pair is already further apart than beta, so only the regulariser is left
    losses, *_ = loss_of(SLiCTrainer, column(-4, -6), column(-9, -5.5), beta=1.0, lambda_coef=0.1)
    assert losses.tolist() == pytest.approx([0.4, 1.5 + 0.6])


def test_simpo_by_hand():
    # the gap per token is 0.5, times beta 1; so is the margin aimed at
    losses, *_ = loss_of(SimPOTrainer, column(-1.0), column(-1.5), beta=2.0, gamma_beta_ratio=0.5)
    assert losses.item() == pytest.approx(math.log(2))


def test_orpo_by_hand():
    # p = 1/2 has odds 1, p = 1/5 has odds 1/4: log odds ratio log 4, sigmoid 4/5
    losses, *_ = loss_of(ORPOTrainer, column(math.log(1 / 2)), column(math.log(1 / 5)), lambda_coef=0.25)
    assert losses.item() == pytest.approx(math.log(2) + 0.25 * math.log(5 / 4))


def test_orpo_of_a_certain_completion_is_finite():
    certain = column(0.0)
    losses, *_ = loss_of(ORPOTrainer, certain, column(-1.0), lambda_coef=0.25)
    losses.sum().backward()
    assert losses.isfinite().all() and certain.grad.isfinite().all()


def test_tdpo_by_hand():
    # beta * (h_w - h_l) = 0.3; D_w = 0.4, D_l = 1.0
    logps = {
        "chosen_logps": column(-10),
        "rejected_logps": column(-9),
        "ref_chosen_logps": column(-12),
        "ref_rejected_logps": column(-8),
        "rejected_position_kl": column(1.0),
    }
    chosen_kl = [column(0.4), column(0.4)]
    one, *_ = loss_of(TDPO1Trainer, **logps, chosen_position_kl=chosen_kl[0], beta=0.1)
    two, *_ = loss_of(TDPO2Trainer, **logps, chosen_position_kl=chosen_kl[1], beta=0.1, alpha=0.5)
    assert one.item() == pytest.approx(softplus(-(0.3 - 0.06)))
    assert two.item() == pytest.approx(softplus(-(0.3 - 0.03)))
    (one + two).sum().backward()
    assert chosen_kl[0].grad is not None and chosen_kl[1].grad is None


def test_kto_by_hand():
    # h = 2 and -3, z = 1
    inputs = column(-10, -8), column(-12, -5), torch.tensor([True, False])
    z, weights = torch.tensor([1.0, 1.0]), {"desirable_weight": 2.0, "undesirable_weight": 3.0}
    losses, rewards = loss_of(KTOTrainer, *inputs, z, beta=0.1, **weights)
    assert losses.tolist() == pytest.approx([2 * (1 - sigmoid(0.1)), 3 * (1 - sigmoid(0.4))])
    assert rewards.tolist() == pytest.approx([0.2, -0.3])
    losses, _ = loss_of(KTOLogSigmoidTrainer, *inputs, z, beta=0.1, **weights)
    assert losses.tolist() == pytest.approx([2 * softplus(-0.1), 3 * softplus(-0.4)])
    losses, _ = loss_of(KTOZeroTrainer, *inputs, beta=0.1)
    assert losses.tolist() == pytest.approx([1 - sigmoid(0.2), 1 - sigmoid(0.3)])
    losses, _ = loss_of(KTOSurprisalTrainer, column(-1, -2), inputs[2], -1.5 * z, beta=0.1, **weights)  # 0.5 and -0.5
    assert losses.tolist() == pytest.approx([2 * (1 - sigmoid(0.05)), 3 * (1 - sigmoid(0.05))])


def test_bradley_terry_by_hand():
    losses, *_ = loss_of(BradleyTerryTrainer, column(1.5), column(0.5))
    assert losses.item() == pytest.approx(softplus(-1))


def test_advantages_and_returns_by_hand():
    # values 0.5, 0.2, 0.4; reward 1 on the last token; gamma 0.9, lambda 0.5
    # deltas: 0.9 * 0.2 - 0.5 = -0.32;  0.9 * 0.4 - 0.2 = 0.16;  1 - 0.4 = 0.6
    # advantages from the end: 0.6;  0.16 + 0.45 * 0.6 = 0.43;  -0.32 + 0.45 * 0.43 = -0.1265
    values, rewards = torch.tensor([0.5, 0.2, 0.4]), torch.tensor([1.0])
    sequence = torch.zeros(3, dtype=torch.long)
    advantages, returns = generalised_advantages(values, rewards, sequence, 3, gamma=0.9, lam=0.5)
    assert advantages.tolist() == pytest.approx([-0.1265, 0.43, 0.6])
    assert returns.tolist() == pytest.approx([0.3735, 0.63, 1.0])


@pytest.mark.parametrize("lengths", [[], [1], [7], [3, 1, 8, 1, 13], [64, 5]])
def test_advantages_of_many_equal_those_token_by_token(lengths):
    draw = torch.Generator().manual_seed(0)
    values, rewards = torch.randn(sum(lengths), generator=draw), torch.randn(len(lengths), generator=draw)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    expected = []
    for own, reward in zip(values.split(lengths) if lengths else [], rewards):
        following, advantage, reversed_ = 0.0, 0.0, []
        for value in reversed(own.tolist()):
            ends = float(reward) if not reversed_ else 0.0
            advantage = ends + 0.9 * following - value + 0.9 * 0.95 * advantage
            following = value
            reversed_.append(advantage)
        expected += reversed_[::-1]
    longest = max(lengths, default=0)
    advantages, returns = generalised_advantages(values, rewards, sequence, longest, gamma=0.9, lam=0.95)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(returns, advantages + values)


def test_ppo_by_hand():
    # ratios e^0 = 1, 3 (clipped to 2) and 1/3 (clipped to 1/2); advantages 1, 1 and -1
    policy = torch.tensor([-1.0, math.log(0.3), math.log(0.1)])
    reference = torch.tensor([-1.0, math.log(0.1), math.log(0.3)])
    losses = loss_of(
        PPOTrainer,
        policy,
        reference,
        torch.tensor([1.0, 1.0, -1.0]),
        torch.tensor([0.5, 0.0, 0.0]),
        torch.tensor([0.1, 0.0, 1.0]),
        cliprange=0.5,
        critic_coef=0.01,
        KL_coef=0.1,
    )
    critic = [0.01 * 0.5 * 0.16, 0.0, 0.01 * 0.5]
    penalty = [0.0, -0.1 * math.log(3), 0.1 * math.log(3)]
    expected = [part + c + k for part, c, k in zip([-1.0, -2.0, 0.5], critic, penalty)]
    assert losses.tolist() == pytest.approx(expected)
