"""FPO with its constraint as a penalty of its own, on both completions.

python train.py loss=fpo ++loss.trainer=benchmarks/fpo_symmetric.py:SymmetricFPOTrainer ...
"""

import torch.nn.functional as F

from trainers import FPOTrainer


class SymmetricFPOTrainer(FPOTrainer):
    """As FPO, but the drift of the chosen completion is held like that of the rejected one, and how strongly does not
    depend on how well the pair is told apart."""

    def loss(
        self,
        policy_chosen_mean_logps,
        policy_rejected_mean_logps,
        reference_chosen_mean_logps,
        reference_rejected_mean_logps,
        chosen_feature_drift,
        rejected_feature_drift,
        *,
        beta,
        alpha,
    ):
        chosen_rewards = beta * (policy_chosen_mean_logps - reference_chosen_mean_logps)
        rejected_rewards = beta * (policy_rejected_mean_logps - reference_rejected_mean_logps)
        constraint = alpha * (chosen_feature_drift + rejected_feature_drift)
        return -F.logsigmoid(chosen_rewards - rejected_rewards) + constraint, chosen_rewards, rejected_rewards
