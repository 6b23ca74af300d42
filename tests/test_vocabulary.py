"""The signature of a loss is its schema."""

import pytest

from dataloader import PairedPreferenceDataLoader, UnpairedPreferenceDataLoader
from trainers import DPOTrainer, FPOTrainer, KTOTrainer, PairedPreferenceTrainer
from training.quantities import bind, parse_parameter
from training.settings import LossSettings
from utils import UserError, checked

PAIRED = PairedPreferenceDataLoader.records
DPO = {"name": "dpo", "trainer": "DPOTrainer", "dataloader": "PairedPreferenceDataLoader", "beta": 0.1}


def bound(trainer, values):
    return bind(trainer, PAIRED, checked(LossSettings, values))


def test_names():
    def found(parameter):
        i = parse_parameter(parameter)
        return i and (i.quantity, i.side)

    assert found("policy_chosen_logps") == found("chosen_logps") == ("policy_logps", "chosen")
    assert found("ref_rejected_logps") == found("reference_rejected_logps") == ("reference_logps", "rejected")
    assert found("reference_chosen_mean_logps") == ("reference_mean_logps", "chosen")
    assert found("rejected_feature_drift") == ("feature_drift", "rejected")
    assert found("policy_logps") == ("policy_logps", None)
    assert found("policy_chosen_lops") is None


def test_what_a_loss_asks_for_is_what_it_needs():
    fpo = {**DPO, "alpha": 0.5, "divergence": "kl", "k": 50, "feature_weights": None}
    assert bound(DPOTrainer, DPO).needs == {"reference"}
    binding = bound(FPOTrainer, fpo)
    assert binding.needs == {"reference", "sae"}
    assert binding.options["loss"] == {"beta": 0.1, "alpha": 0.5}
    assert binding.options["feature_drift"] == {"divergence": "kl", "k": 50, "feature_weights": None}


def test_all_that_does_not_fit_is_told_at_once():
    class Mistaken(PairedPreferenceTrainer):
        def loss(self, policy_chosen_lops, policy_logps, *, beta, gamma):
            """Two parameters that are no quantities of pairs, and a hyper-parameter without a value."""

    with pytest.raises(UserError) as error:
        bound(Mistaken, {**DPO, "betta": 1})
    message = str(error.value)
    assert "'policy_chosen_lops' (did you mean 'policy_chosen_logps'?)" in message
    assert "asks for 'policy_logps'" in message  # a loss on pairs says whose
    assert "loss.betta is read by nothing (did you mean 'beta'?)" in message
    assert "loss.gamma is missing" in message


def test_a_value_that_the_annotation_does_not_allow_is_told():
    kto = {"name": "kto", "trainer": "KTOTrainer", "dataloader": "UnpairedPreferenceDataLoader"}
    kto |= {"beta": -1, "desirable_weight": "heavy", "undesirable_weight": 1, "frac_unique_undesirable": 1.5}
    with pytest.raises(UserError) as error:
        bind(KTOTrainer, UnpairedPreferenceDataLoader.records, checked(LossSettings, kto))
    assert str(error.value).splitlines() == [
        "loss.beta=-1: has to be above 0",
        "loss.desirable_weight=heavy: has to be a number",
        "loss.frac_unique_undesirable=1.5: has to be at most 1",
    ]


def test_a_default_in_the_signature_needs_no_value():
    class Defaulted(PairedPreferenceTrainer):
        def loss(self, chosen_logps, rejected_logps, *, beta, margin=0.0):
            """Nothing."""

    assert bound(Defaulted, DPO).options["loss"] == {"beta": 0.1}
