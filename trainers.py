"""The losses: the shapes of data (paired, unpaired), and one small class for each loss.

A loss is a pure function of the quantities that its parameters name (training/quantities.py lists them). Keyword-only
parameters are its hyper-parameters; config/loss/<name>.yaml gives their values. It returns `losses` [B], or `losses,
chosen_rewards, rejected_rewards`. To add one: a class here, a YAML there, a test. The loop that calls it is
training/loop.py.

Shape letters: B records (pairs) of a batch, S sequences, N completion tokens.
"""

from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.batch import Batch, sum_by_sequence
from dataloader import BAD, GOOD, DataLoader, MismatchedRecords
from distributed import parallel
from modeling.tensor_files import write_safetensors
from modeling.weights import own_weights
from models import require_reward_model, score_rewards
from training.loop import BasicTrainer, Setup
from training.metrics import MetricAccumulator
from training.quantities import QUANTITIES, Binding, LossContext, MismatchedMeans
from training.reference import Reference
from training.settings import TrainingSettings
from utils import MOST, Count, NonNegative, Positive, Share, UserError

UnderHalf = Annotated[float, Field(ge=0, lt=0.5)]

# ---------------------------------------------------------------------------------------------------- SFT


class SFTTrainer(BasicTrainer):
    """Supervised fine-tuning: the negative log-likelihood of the completion tokens, a mean over the global batch."""

    def loss(self, policy_logps):
        return -policy_logps

    def weight(self, batch: Batch) -> float:
        return tokens_in(batch)


def tokens_in(batch: Batch) -> float:
    """The completion tokens of a batch, each by its record's weight."""
    if batch.weights is None:
        return sum(batch.lengths)
    return sum(length * weight for length, weight in zip(batch.lengths, batch.weights))


class CSFTTrainer(SFTTrainer):
    """Conditional SFT (Korbak et al. 2023, 2302.08582): preferred completions are learnt after one control token, the
    others after another, and sampling starts from the first."""

    control_tokens = (GOOD, BAD)


# ---------------------------------------------------------------------------------------------------- paired losses


class PairedPreferenceTrainer(BasicTrainer):
    """Losses on (prompt, chosen, rejected): the first half of the sequences are the chosen ones."""

    sides = token_sides = ("chosen", "rejected")

    def side(self, values: Tensor, side: str | None, batch: Batch) -> Tensor:
        if side is None:
            return values
        chosen, rejected = values.unflatten(0, (2, len(batch.index)))  # of a batch of no records too
        return chosen if side == "chosen" else rejected

    def side_of_tokens(self, values: Tensor, side: str | None, batch: Batch) -> Tensor:
        if side is None:
            return values
        first = sum(batch.lengths[: len(batch.index)])  # of the rejected completions' tokens
        return values[:first] if side == "chosen" else values[first:]

    @classmethod
    def evaluated(cls, binding: Binding) -> list[str]:
        own = [f"{name}_eval/{part}" for name in ("logps", "rewards") for part in ("chosen", "rejected", "accuracies")]
        return [*super().evaluated(binding), *own, "rewards_eval/margins"]

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:
        for side in ("chosen", "rejected"):
            means.add(f"logps_{split}/{side}", self.side(scores.logps, side, batch))
        means.add(f"logps_{split}/accuracies", self.margin(scores.mean_logps, batch) > 0)
        if rewards:
            # While the policy equals the reference, which reward is higher would be a matter of rounding.
            report_pair_rewards(means, split, *rewards, accuracy=self.moved or not self.starts_from_reference)

    def margin(self, values: Tensor, batch: Batch) -> Tensor:
        return self.side(values, "chosen", batch) - self.side(values, "rejected", batch)


def report_pair_rewards(
    means: MetricAccumulator, split: str, chosen: Tensor, rejected: Tensor, *, accuracy: bool = True
) -> None:
    """Each chosen completion's reward against that of its own rejected one."""
    means.add(f"rewards_{split}/chosen", chosen)
    means.add(f"rewards_{split}/rejected", rejected)
    if accuracy:
        means.add(f"rewards_{split}/accuracies", chosen > rejected)
    means.add(f"rewards_{split}/margins", chosen - rejected)


class DPOTrainer(PairedPreferenceTrainer):
    """Direct preference optimisation (Rafailov et al. 2023, 2305.18290, Eq. 7)."""

    def loss(
        self,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        *,
        beta: Positive,
    ):
        chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
        rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
        return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


class CDPOTrainer(PairedPreferenceTrainer):
    """Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3).

    A share `label_smoothing` of the preferences is taken to be the wrong way round.
    """

    def loss(
        self,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        *,
        beta: Positive,
        label_smoothing: Share,
    ):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        right = -F.logsigmoid(chosen_rewards - rejected_rewards)
        wrong = -F.logsigmoid(rejected_rewards - chosen_rewards)
        return (1 - label_smoothing) * right + label_smoothing * wrong, chosen_rewards, rejected_rewards


class RobustDPOTrainer(PairedPreferenceTrainer):
    """Robust DPO (Chowdhury et al. 2024, 2403.00409, Eq. 12): DPO's loss without the bias that a share
    `label_smoothing` of preferences the wrong way round gives it."""

    def loss(
        self,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        *,
        beta: Positive,
        label_smoothing: UnderHalf,
    ):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        right = -F.logsigmoid(chosen_rewards - rejected_rewards)
        wrong = -F.logsigmoid(rejected_rewards - chosen_rewards)
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
        return losses, chosen_rewards, rejected_rewards


class DPONormTrainer(PairedPreferenceTrainer):
    """DPO of log-ratios per token (Lambert et al. 2024, Tulu 3, 2411.15124, Eq. 6): FPO without its constraint."""

    def loss(
        self, chosen_mean_logps, rejected_mean_logps, ref_chosen_mean_logps, ref_rejected_mean_logps, *, beta: Positive
    ):
        chosen_rewards = beta * (chosen_mean_logps - ref_chosen_mean_logps)
        rejected_rewards = beta * (rejected_mean_logps - ref_rejected_mean_logps)
        return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


class LDDPOTrainer(PairedPreferenceTrainer):
    """Length-desensitised DPO (Liu et al. 2024, 2409.06411): beyond the length of the pair's shorter completion a
    token's log-ratio counts `alpha`."""

    def loss(
        self,
        chosen_token_logps,
        rejected_token_logps,
        ref_chosen_token_logps,
        ref_rejected_token_logps,
        chosen_sequence,
        rejected_sequence,
        chosen_lengths,
        rejected_lengths,
        *,
        beta: Positive,
        alpha: Share,
    ):
        shared = torch.minimum(chosen_lengths, rejected_lengths)

        def reward(logratios: Tensor, pair: Tensor, lengths: Tensor) -> Tensor:
            starts = lengths.cumsum(0) - lengths
            places = torch.arange(len(pair), device=pair.device) - starts[pair]
            return beta * sum_by_sequence(torch.where(places < shared[pair], 1, alpha) * logratios, pair, len(lengths))

        chosen_rewards = reward(chosen_token_logps - ref_chosen_token_logps, chosen_sequence, chosen_lengths)
        rejected_rewards = reward(rejected_token_logps - ref_rejected_token_logps, rejected_sequence, rejected_lengths)
        return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


class HumanlineTrainer(PairedPreferenceTrainer):
    """DPO of token log-ratios that are clamped to a range, as HALOs has it (Liu et al. 2025, 2509.24207)."""

    def loss(
        self,
        chosen_token_logps,
        rejected_token_logps,
        ref_chosen_token_logps,
        ref_rejected_token_logps,
        chosen_sequence,
        rejected_sequence,
        chosen_lengths,
        *,
        beta: Positive,
        lowest: Annotated[float, Field(ge=-MOST, le=0)],
        highest: NonNegative,
    ):
        def reward(logratios: Tensor, pair: Tensor) -> Tensor:
            return beta * sum_by_sequence(logratios.clamp(lowest, highest), pair, len(chosen_lengths))

        chosen_rewards = reward(chosen_token_logps - ref_chosen_token_logps, chosen_sequence)
        rejected_rewards = reward(rejected_token_logps - ref_rejected_token_logps, rejected_sequence)
        return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


class WPOTrainer(PairedPreferenceTrainer):
    """Weighted preference optimisation (Zhou et al. 2024, 2406.11827, Eq. 2 and 4): DPO, where a pair counts more the
    likelier the policy would be to sample both of its completions."""

    def loss(
        self,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_on_policy_weight,
        rejected_on_policy_weight,
        *,
        beta: Positive,
    ):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
        return chosen_on_policy_weight * rejected_on_policy_weight * losses, chosen_rewards, rejected_rewards


class APOZeroTrainer(PairedPreferenceTrainer):
    """Anchored preference optimisation (D'Oosterlinck et al. 2024, 2408.06266, Eq. 7), for chosen completions that are
    better than what the model writes: the chosen ones become likelier and the rejected ones less likely."""

    def loss(self, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta: Positive):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        losses = torch.sigmoid(-chosen_rewards) + torch.sigmoid(rejected_rewards)
        return losses, chosen_rewards, rejected_rewards


class APODownTrainer(PairedPreferenceTrainer):
    """Anchored preference optimisation (2408.06266, Eq. 8), for a model that writes better than the chosen completions:
    both become less likely, the rejected ones more so."""

    def loss(self, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta: Positive):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        losses = torch.sigmoid(chosen_rewards) + torch.sigmoid(rejected_rewards - chosen_rewards)
        return losses, chosen_rewards, rejected_rewards


class IPOTrainer(PairedPreferenceTrainer):
    """Identity preference optimisation (Azar et al. 2023, 2310.12036, Eq. 17), of log-ratios per token (`average`) or,
    as in the paper, of summed ones."""

    def loss(
        self,
        chosen_mean_logps,
        rejected_mean_logps,
        ref_chosen_mean_logps,
        ref_rejected_mean_logps,
        chosen_lengths,
        rejected_lengths,
        *,
        tau: Annotated[float, Field(ge=1 / MOST, le=MOST)],
        average: bool,
    ):
        chosen_logratios = (chosen_mean_logps - ref_chosen_mean_logps) * (1 if average else chosen_lengths)
        rejected_logratios = (rejected_mean_logps - ref_rejected_mean_logps) * (1 if average else rejected_lengths)
        losses = (chosen_logratios - rejected_logratios - 1 / (2 * tau)).square()
        return losses, tau * chosen_logratios, tau * rejected_logratios


class SLiCTrainer(PairedPreferenceTrainer):
    """Sequence likelihood calibration (Zhao et al. 2023, 2305.10425) with a regulariser on the chosen one."""

    def loss(self, policy_chosen_logps, policy_rejected_logps, *, beta: Positive, lambda_coef: NonNegative):
        losses = F.relu(beta - policy_chosen_logps + policy_rejected_logps) - lambda_coef * policy_chosen_logps
        return losses, beta * policy_chosen_logps, beta * policy_rejected_logps


class SimPOTrainer(PairedPreferenceTrainer):
    """Simple preference optimisation (Meng et al. 2024, 2405.14734, Eq. 6); the margin is gamma_beta_ratio * beta."""

    def loss(
        self, policy_chosen_mean_logps, policy_rejected_mean_logps, *, beta: Positive, gamma_beta_ratio: NonNegative
    ):
        chosen_rewards = beta * policy_chosen_mean_logps
        rejected_rewards = beta * policy_rejected_mean_logps
        losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma_beta_ratio * beta)
        return losses, chosen_rewards, rejected_rewards


class ORPOTrainer(PairedPreferenceTrainer):
    """Odds ratio preference optimisation (Hong et al. 2024, 2403.07691, Eq. 6-7)."""

    def loss(self, policy_chosen_mean_logps, policy_rejected_mean_logps, *, lambda_coef: NonNegative):
        log_odds = log_odds_of(policy_chosen_mean_logps) - log_odds_of(policy_rejected_mean_logps)
        losses = -policy_chosen_mean_logps - lambda_coef * F.logsigmoid(log_odds)
        return losses, lambda_coef * policy_chosen_mean_logps, lambda_coef * policy_rejected_mean_logps


def log_odds_of(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, for p up to 1 - 1e-6, beyond which it would run to infinity."""
    logps = logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))


class TDPO1Trainer(PairedPreferenceTrainer):
    """Token-level DPO (Zeng et al. 2024, 2404.11999): DPO less the difference in sequential KL."""

    def loss(
        self,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_position_kl,
        rejected_position_kl,
        *,
        beta: Positive,
    ):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        constraint = beta * (rejected_position_kl - chosen_position_kl)
        return -F.logsigmoid(chosen_rewards - rejected_rewards - constraint), chosen_rewards, rejected_rewards


class TDPO2Trainer(PairedPreferenceTrainer):
    """Token-level DPO's second form (2404.11999): the difference in sequential KL weighs alpha, and no gradient
    flows through the chosen side's."""

    def loss(
        self,
        chosen_logps,
        ref_chosen_logps,
        chosen_position_kl,
        rejected_logps,
        ref_rejected_logps,
        rejected_position_kl,
        *,
        beta: Positive,
        alpha: NonNegative,
    ):
        chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
        rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
        constraint = alpha * beta * (rejected_position_kl - chosen_position_kl.detach())
        return -F.logsigmoid(chosen_rewards - rejected_rewards - constraint), chosen_rewards, rejected_rewards


class FPOTrainer(PairedPreferenceTrainer):
    """Feature-level preference optimisation (Yin et al. 2024, 2411.07618 v4, Eq. 8-11).

    A length-normalised DPO whose margin is the reference's own, held back by how much further the rejected
    completion's SAE features have drifted from the reference's than the chosen one's. No gradient flows through the
    chosen side's drift.
    """

    def loss(
        self,
        policy_chosen_mean_logps,
        policy_rejected_mean_logps,
        reference_chosen_mean_logps,
        reference_rejected_mean_logps,
        chosen_feature_drift,
        rejected_feature_drift,
        *,
        beta: Positive,
        alpha: NonNegative,
    ):
        chosen_rewards = beta * (policy_chosen_mean_logps - reference_chosen_mean_logps)
        rejected_rewards = beta * (policy_rejected_mean_logps - reference_rejected_mean_logps)
        constraint = alpha * (rejected_feature_drift - chosen_feature_drift.detach())
        return -F.logsigmoid(chosen_rewards - rejected_rewards - constraint), chosen_rewards, rejected_rewards


class RewardTrainer(PairedPreferenceTrainer):
    """Losses of reward models, which have a scalar head on the last token."""

    is_reward, trains_policy = True, False
    gives = frozenset({"rewards"})

    def score(self, batch: Batch, reference: Reference | None) -> tuple[Batch, Any]:  # noqa: ARG002
        batch = batch.to(self.device)
        return batch, score_rewards(self.policy, batch)

    @classmethod
    def evaluated(cls, binding: Binding) -> list[str]:
        return [name for name in super().evaluated(binding) if not name.startswith("logps")]

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:  # noqa: ARG002
        # A head on an SAE starts at 0: until it has moved all rewards are equal, and none is right or wrong.
        report_pair_rewards(means, split, *rewards, accuracy=self.moved or not self.has_sae_head)


class BradleyTerryTrainer(RewardTrainer):
    """A reward model (Bradley & Terry 1952; Ouyang et al. 2022, 2203.02155, Eq. 1)."""

    def loss(self, chosen_rewards, rejected_rewards):
        return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


class BradleyTerrySAETrainer(RewardTrainer):
    """A reward model that can be read (SARM, 2508.08746): the reward is linear in SAE features of the last token.

    The model ends with the layer that the SAE reads. With `reconstruction` above 0 the SAE is trained too, by the loss
    and by its squared error, as a share of the vectors' square, on vectors without gradient.
    """

    has_sae_head = True
    needs = frozenset({"sae"})
    gives = RewardTrainer.gives | {"reconstruction_error"}

    def loss(
        self,
        chosen_rewards,
        rejected_rewards,
        chosen_reconstruction_error,
        rejected_reconstruction_error,
        *,
        reconstruction: NonNegative,
    ):
        errors = (chosen_reconstruction_error + rejected_reconstruction_error) / 2
        losses = -F.logsigmoid(chosen_rewards - rejected_rewards) + reconstruction * errors
        return losses, chosen_rewards, rejected_rewards

    @classmethod
    def evaluated(cls, binding: Binding) -> list[str]:
        return [*super().evaluated(binding), "reconstruction_error/eval"]

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:
        super().report(means, split, batch, scores, rewards)
        means.add(f"reconstruction_error/{split}", scores.reconstruction_error.detach())


# ---------------------------------------------------------------------------------------------------- unpaired losses


class UnpairedPreferenceTrainer(BasicTrainer):
    """Losses on single completions labelled desirable or not. `chosen_...` in a loss's parameters are the values of
    the desirable ones in the batch, `rejected_...` of the others; there may be none of either."""

    sides = (None, "chosen", "rejected")
    gives = frozenset({"kl", "mismatched_logps"})

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mismatched = Mismatched(self) if "mismatched" in self.binding.needs else None

    @classmethod
    def check(cls, config: TrainingSettings, binding: Binding) -> None:
        for key in ("batch_size", "eval_batch_size"):
            if "mismatched" in binding.needs and getattr(config.model, key) == 1:
                raise UserError(f"model.{key}=1: KTO's z needs the completion of another example, so at least 2")

    @classmethod
    def evaluated(cls, binding: Binding) -> list[str]:
        own = [f"{name}_eval/{side}" for name in ("logps", "rewards") for side in ("chosen", "rejected")]
        means = [f"{name}/eval" for name in ("kl", "mismatched_logps") if name in binding.quantities()]
        return [*super().evaluated(binding), *own, *means]

    def side(self, values: Tensor, side: str | None, batch: Batch) -> Tensor:
        return values if side is None else values[batch.record[side]]

    def prepare_step(self, split: str, step: int, micro_batches: list[Batch]) -> list[Batch]:
        if self.mismatched:
            self.mismatched.prepare(split, step)
        return super().prepare_step(split, step, micro_batches)

    def before_step(self, split: str, step: int, micro_batches: list[Batch]) -> None:  # noqa: ARG002
        if self.mismatched:
            self.mismatched_means = self.mismatched.estimate(split, step)

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:
        for side in ("chosen", "rejected"):
            means.add(f"logps_{split}/{side}", self.side(scores.logps, side, batch))
            for values in rewards:
                means.add(f"rewards_{split}/{side}", self.side(values, side, batch))
        for name in ("kl", "mismatched_logps"):
            if name in self.binding.quantities():
                context = LossContext(batch, scores, mismatched=self.mismatched_means)
                means.add(f"{name}/{split}", QUANTITIES[name](context)[:1])


class Mismatched:
    """Each prompt of an optimiser step, on all ranks, with another record's completion."""

    def __init__(self, trainer: BasicTrainer) -> None:
        self.trainer = trainer
        self.records = {split: MismatchedRecords(loader) for split, loader in trainer.loaders.items()}
        self.prepared: dict[tuple[str, int], list[Batch]] = {}  # for steps that are still to come

    def batches(self, split: str, step: int) -> list[Batch]:
        """This rank's micro-batches of each prompt of a step with another record's completion."""
        return self.trainer.prepare_batches(f"{split}/mismatched", self.records[split].batches(step))

    def prepare(self, split: str, step: int) -> None:
        """Make the batches of a step while an earlier one is in use."""
        self.prepared[split, step] = self.batches(split, step)

    @torch.no_grad()
    def estimate(self, split: str, step: int) -> MismatchedMeans:
        """The means, the same on all ranks."""
        reference = self.trainer.references.get(f"{split}/mismatched")
        total = torch.zeros(3, device=self.trainer.device, dtype=torch.float64)
        for batch in self.prepared.pop((split, step), None) or self.batches(split, step):
            batch, scores = self.trainer.score(batch, reference)
            logratios = scores.logps - batch.reference["logps"] if reference else scores.logps.new_zeros(())
            sums = [scores.mean_logps.double().sum(), logratios.double().sum()]
            total += torch.stack([*sums, total.new_full((), batch.num_sequences)])
        logps, logratios, count = parallel.sum_over_ranks(total)
        return MismatchedMeans((logps / count).float(), (logratios / count).float() if reference else None)


class KTOTrainer(UnpairedPreferenceTrainer):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306, Eq. 8)."""

    def loss(
        self,
        policy_logps,
        reference_logps,
        desirable,
        kl,
        *,
        beta: Positive,
        desirable_weight: NonNegative,
        undesirable_weight: NonNegative,
    ):
        logratios = policy_logps - reference_logps
        values = torch.sigmoid(beta * signed(logratios - kl, desirable))
        return torch.where(desirable, desirable_weight, undesirable_weight) * (1 - values), beta * logratios


class KTOLogSigmoidTrainer(UnpairedPreferenceTrainer):
    """KTO with the loss -log sigmoid(.) instead of 1 - sigmoid(.), as in HALOs."""

    def loss(
        self,
        policy_logps,
        reference_logps,
        desirable,
        kl,
        *,
        beta: Positive,
        desirable_weight: NonNegative,
        undesirable_weight: NonNegative,
    ):
        logratios = policy_logps - reference_logps
        losses = -F.logsigmoid(beta * signed(logratios - kl, desirable))
        return torch.where(desirable, desirable_weight, undesirable_weight) * losses, beta * logratios


class KTOZeroTrainer(UnpairedPreferenceTrainer):
    """KTO with 0 as its reference point and no weights, as HALOs has it."""

    def loss(self, policy_logps, reference_logps, desirable, *, beta: Positive):
        logratios = policy_logps - reference_logps
        return 1 - torch.sigmoid(beta * signed(logratios, desirable)), beta * logratios


class KTOSurprisalTrainer(UnpairedPreferenceTrainer):
    """KTO without a reference: log-probabilities per token replace log-ratios, as in HALOs. So z is a mean of these."""

    def loss(
        self,
        policy_mean_logps,
        desirable,
        mismatched_logps,
        *,
        beta: Positive,
        desirable_weight: NonNegative,
        undesirable_weight: NonNegative,
    ):
        values = torch.sigmoid(beta * signed(policy_mean_logps - mismatched_logps, desirable))
        return torch.where(desirable, desirable_weight, undesirable_weight) * (1 - values), beta * policy_mean_logps


class RewardMeans(nn.Module):
    """The mean rewards of desirable and of other completions so far. Its buffers are part of a run's state."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.sums, self.counts = (nn.Buffer(torch.zeros(2, device=device)) for _ in range(2))

    def add(self, sums: Tensor, counts: Tensor) -> None:
        self.sums.add_(sums)
        self.counts.add_(counts)

    def middle(self) -> Tensor:
        """Half way between the two means, []; a mean of no rewards is 0."""
        return (self.sums / self.counts.clamp(min=1)).mean()


class BCOTrainer(UnpairedPreferenceTrainer):
    """Binary classifier optimisation (Jung et al. 2024, 2404.04656, Eq. 12): whether a completion is desirable is read
    from its reward, above or below a point half way between the mean rewards of both kinds.

    The means are over the steps before, on all ranks, so that a step needs no second pass over its batch.
    """

    gives = UnpairedPreferenceTrainer.gives | {"mean_reward"}

    def __init__(self, setup: Setup) -> None:
        self.reward_means = RewardMeans(parallel.device())
        self.both = nn.ModuleDict({"policy": setup.policy, "reward_means": self.reward_means})
        super().__init__(setup)
        self.new_rewards = torch.zeros(2, 2, device=self.device)  # of the step: sums and counts

    def trained_module(self) -> nn.Module:
        return self.both

    @classmethod
    def evaluated(cls, binding: Binding) -> list[str]:
        return [*super().evaluated(binding), "mean_reward/eval"]

    def before_step(self, split: str, step: int, micro_batches: list[Batch]) -> None:
        super().before_step(split, step, micro_batches)
        self.mean_reward = self.reward_means.middle()

    def loss(self, policy_logps, reference_logps, desirable, mean_reward, *, beta: Positive):
        rewards = beta * (policy_logps - reference_logps)
        return -F.logsigmoid(signed(rewards - mean_reward, desirable)), rewards

    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:
        super().report(means, split, batch, scores, rewards)
        assert self.mean_reward is not None
        means.add(f"mean_reward/{split}", self.mean_reward)
        if split == "train":
            kinds = torch.stack([batch.record["desirable"], ~batch.record["desirable"]]).float()
            self.new_rewards += torch.stack([kinds @ rewards[0].detach(), kinds.sum(1)])

    def clip_gradients(self) -> Tensor:
        """The step's losses are all there: its rewards count from the next step on."""
        self.reward_means.add(*parallel.sum_over_ranks(self.new_rewards))
        self.new_rewards = torch.zeros_like(self.new_rewards)
        return super().clip_gradients()


def signed(values: Tensor, desirable: Tensor) -> Tensor:
    """The values [S] where desirable, their negatives elsewhere."""
    return torch.where(desirable, values, -values)


# ---------------------------------------------------------------------------------------------------- offline PPO


class PPOTrainer(UnpairedPreferenceTrainer):
    """Offline, one-step PPO (Schulman et al. 2017, 1707.06347), as HALOs has it: the completions are the data's, the
    old policy is the reference, and a completion is rewarded at its last token.

    `reward` is `label` (1 for a desirable completion, -1 for another), `score` (the data's own field), or a reward
    model that loss=bradley-terry trained. `ppo_epochs` updates are made from each batch.
    """

    gives = frozenset({"values", "advantages", "returns"})

    def __init__(
        self,
        setup: Setup,
        *,
        reward: str,
        gamma: Share,
        lam: Share,
        ppo_epochs: Count,
        value_head_max_grad_norm: Positive,
    ) -> None:
        width = setup.policy.config.get_text_config().hidden_size
        value_head = nn.Linear(width, 1).to(parallel.device())  # so small that every rank holds it whole
        nn.init.zeros_(value_head.weight)
        nn.init.zeros_(value_head.bias)
        self.both = nn.ModuleDict({"policy": setup.policy, "value_head": value_head})
        super().__init__(setup)
        self.value_head, self.reward, self.gamma, self.lam = value_head, reward, gamma, lam
        self.passes, self.value_head_max_grad_norm = ppo_epochs, value_head_max_grad_norm
        self.reward_model: PreTrainedModel | None = None
        if reward not in ("label", "score"):
            self.reward_model = setup.load(*own_weights(reward, "loss.reward"), reward=True, frozen=True)

    @classmethod
    def check_data(cls, binding: Binding, loader: DataLoader) -> None:
        if binding.options["init"]["reward"] == "score":
            without = loader.rows.data.column("score").is_null().to_numpy().nonzero()[0]
            places = ", ".join(loader.rows[int(row)]["source"] for row in without[:3])
            if len(without):
                raise UserError(
                    f"loss.reward=score: {len(without):,} of {len(loader.rows):,} rows have none ({places})"
                )

    @classmethod
    def other_weights(cls, binding: Binding) -> dict[str, str]:
        reward = binding.options["init"]["reward"]
        return {} if reward in ("label", "score") else {"loss.reward": reward}

    @classmethod
    def check_weights(cls, binding: Binding) -> None:
        for key, named in cls.other_weights(binding).items():
            require_reward_model(*own_weights(named, key), f"{key}={named}")

    def trained_module(self) -> nn.Module:
        return self.both

    def loss(
        self,
        policy_token_logps,
        reference_token_logps,
        advantages,
        returns,
        values,
        *,
        cliprange: Annotated[float, Field(ge=1 / MOST, le=1)],
        critic_coef: NonNegative,
        KL_coef: NonNegative,
    ):
        ratio = torch.exp(policy_token_logps - reference_token_logps)
        clipped = ratio.clamp(cliprange, 1 / cliprange)
        policy_losses = -torch.minimum(advantages * ratio, advantages * clipped)
        critic_losses = 0.5 * (values - returns).square()
        return policy_losses + critic_coef * critic_losses + KL_coef * (reference_token_logps - policy_token_logps)

    def weight(self, batch: Batch) -> float:
        return tokens_in(batch)

    @classmethod
    def evaluated(cls, binding: Binding) -> list[str]:
        return [*super().evaluated(binding), "kl/eval", "value_loss/eval"]

    @torch.no_grad()
    def report(self, means: MetricAccumulator, split: str, batch: Batch, scores: Any, rewards: list[Tensor]) -> None:  # noqa: ARG002
        """The rewards; the KL to the reference, estimated from the data's completions as the reference's samples
        (Schulman 2020, "Approximating KL divergence", k3: never negative); half the squared error of the value head."""
        super().report(means, split, batch, scores, [batch.record["reward"]])
        logratios = scores.token_logps - batch.reference["token_logps"]
        means.add(f"kl/{split}", torch.expm1(logratios) - logratios, batch.num_sequences)
        values = QUANTITIES["values"](LossContext(batch, scores, value_head=self.value_head))
        means.add(f"value_loss/{split}", 0.5 * (values - batch.record["returns"]).square())

    @torch.no_grad()
    def before_step(self, split: str, step: int, micro_batches: list[Batch]) -> None:  # noqa: ARG002
        """Rewards, returns and advantages of the whole batch; the advantages whitened over it, on all ranks."""
        moments = torch.zeros(4, device=self.device, dtype=torch.float64)
        for batch in micro_batches:
            moved, scores = self.score(batch, None)
            values = QUANTITIES["values"](LossContext(moved, scores, value_head=self.value_head))
            longest, reward = max(batch.lengths, default=0), self.rewards(moved)
            episodes = (values, reward, moved.sequence, longest)
            advantages, returns = generalised_advantages(*episodes, gamma=self.gamma, lam=self.lam)
            batch.record |= {"advantages": advantages, "returns": returns, "reward": reward}
            wide = advantages.double()
            wrong = (~reward.isfinite()).sum()
            moments += torch.stack([wide.sum(), wide.square().sum(), wide.new_full((), len(wide)), wrong])
        total, squares, count, wrong = parallel.sum_over_ranks(moments)
        if self.reward_model is not None and wrong:
            self.run.finish_saving()
            raise UserError(
                f"loss.reward={self.reward}: a reward is not a number; that model's weights, or model.policy_dtype, "
                f"are at fault. The last checkpoint is good: {next(iter(self.run.saved()), 'none yet')}"
            )
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        for batch in micro_batches:
            batch.record["advantages"] = ((batch.record["advantages"] - mean) / (deviation + 1e-8)).float()

    def rewards(self, batch: Batch) -> Tensor:
        """The reward [S] of each completion."""
        if self.reward_model is not None:
            return score_rewards(self.reward_model, batch).rewards
        if self.reward == "score":
            return batch.record["score"].float()
        return signed(torch.ones_like(batch.record["desirable"], dtype=torch.float32), batch.record["desirable"])

    def clip_gradients(self) -> Tensor:
        assert self.value_head is not None
        self.clip(self.value_head, self.value_head_max_grad_norm)
        return self.clip(self.policy, self.config.model.max_grad_norm)

    def write_export(self, folder: Path, step: int) -> None:
        super().write_export(folder, step)
        assert self.value_head is not None
        if parallel.rank() == 0:
            write_safetensors(folder / "value_head.safetensors", self.value_head.state_dict(), {"format": "pt"})

    def read_export(self, folder: Path) -> None:
        super().read_export(folder)
        assert self.value_head is not None
        safetensors.torch.load_model(self.value_head, str(folder / "value_head.safetensors"))


def generalised_advantages(
    values: Tensor, rewards: Tensor, sequence: Tensor, longest: int, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [N] of some completions, `longest` tokens at most, from the values [N] of their tokens,
    the rewards [S] of their last ones, and which completion each token belongs to [N], ascending.

    Schulman et al. 2015, 1506.02438, Eq. 16; the episode ends with the completion, so nothing is forecast beyond it.
    """
    places = torch.arange(len(values), device=values.device)
    left = torch.searchsorted(sequence, sequence, right=True) - 1 - places  # tokens that follow in the completion
    ends = torch.where(left == 0, rewards[sequence], 0)
    advantages = gamma * torch.where(left > 0, values.roll(-1), 0) - values + ends
    reach = 1  # how many tokens each advantage sums so far; adding its neighbour's sum doubles that
    while reach < longest:
        further = torch.where(left >= reach, advantages.roll(-reach), 0)
        advantages = advantages + (gamma * lam) ** reach * further
        reach *= 2
    return advantages, advantages + values


# ---------------------------------------------------------------------------------------------------- terms

# Functions that `+term=NAME` adds to any loss on log-probabilities, with config/term/NAME.yaml. Each gives a value for
# each sequence, and their mean over records counts: of a pair, the values of both completions are added.


def nll(policy_mean_logps, desirable):
    """Negative log-likelihood per token of the chosen completions (Pang et al. 2024, 2404.19733, Eq. 1; Llama 3,
    2407.21783, Sec. 4.1.4)."""
    return torch.where(desirable, -policy_mean_logps, 0)


def features(feature_drift):
    """How far the SAE features of both completions have drifted from the reference's (FPO's constraint, 2411.07618, on
    both sides and outside the margin)."""
    return feature_drift
