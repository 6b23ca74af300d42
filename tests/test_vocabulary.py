"""The signature of a loss is its schema."""

from types import SimpleNamespace
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import collate, pairs, random_sae
from pydantic import AfterValidator, Field

import sae as saes
import trainers
from autoencoders.training import SAETrainer
from dataloader import PairedPreferenceDataLoader, UnpairedPreferenceDataLoader
from trainers import (
    BCOTrainer,
    BradleyTerryTrainer,
    DPOTrainer,
    FPOTrainer,
    KTOTrainer,
    PairedPreferenceTrainer,
    PPOTrainer,
    SFTTrainer,
)
from training.quantities import QUANTITIES, LossContext, bind, bind_term, parse_parameter
from training.settings import LossSettings, TermSettings
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


def test_a_quantity_of_two_sides_is_computed_once(monkeypatch):
    binding = bound(FPOTrainer, {**DPO, "alpha": 0.5, "divergence": "kl", "k": 50, "feature_weights": None})
    computed = []
    for name in binding.quantities():
        monkeypatch.setitem(QUANTITIES, name, lambda *_, name=name, **__: computed.append(name))
    binding.compute(LossContext(None, None))
    assert sorted(computed) == sorted(binding.quantities()) and len(computed) < len(binding.inputs)


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


def term(trainer, function, **values):
    return bind_term(trainer, "own", function, checked(TermSettings, {"function": "f", "weight": 2.0, **values}))


def test_a_term_asks_as_a_loss_does_and_for_all_sequences_of_pairs_too():
    def pull(chosen_logps, policy_mean_logps, ref_token_logps, *, scale):
        """Nothing."""

    own = term(DPOTrainer, pull, scale=3)
    assert [(i.quantity, i.side) for i in own.binding.inputs] == [
        ("policy_logps", "chosen"),
        ("policy_mean_logps", None),
        ("reference_token_logps", None),
    ]
    assert own.weight == 2 and own.binding.options["loss"] == {"scale": 3} and own.binding.needs == {"reference"}
    assert term(KTOTrainer, pull, scale=3).binding.inputs == own.binding.inputs


def test_a_term_that_does_not_fit_is_told():
    def pull(policy_chosen_lops, *, scale):
        """Nothing."""

    with pytest.raises(UserError) as error:
        term(DPOTrainer, pull, scal=3)
    message = str(error.value)
    assert "pull of term.own asks for 'policy_chosen_lops' (did you mean 'policy_chosen_logps'?)" in message
    assert (
        "term.own.scal is read by nothing (did you mean 'scale'?)" in message and "term.own.scale is missing" in message
    )
    for trainer in (BradleyTerryTrainer, SAETrainer):
        with pytest.raises(UserError, match=f"term.own: {trainer.__name__} trains no language model"):
            term(trainer, trainers.nll)


@pytest.mark.parametrize(
    ("trainer", "parameter"),
    [
        (DPOTrainer, "kl"),
        (DPOTrainer, "mismatched_logps"),
        (DPOTrainer, "chosen_rewards"),
        (SFTTrainer, "kl"),
        (KTOTrainer, "mean_reward"),
        (KTOTrainer, "values"),
        (BCOTrainer, "rewards"),
        (PPOTrainer, "kl"),
    ],
)
def test_what_a_trainer_does_not_have_is_told(trainer, parameter):
    asks = eval(f"lambda {parameter}: 0")
    with pytest.raises(UserError, match=rf"asks for '{parameter}', which {trainer.__name__} does not have; it can"):
        term(trainer, asks)


def test_a_reward_model_has_rewards_alone():
    class Own(BradleyTerryTrainer):
        def loss(self, chosen_rewards, chosen_logps, rejected_lengths):
            """Nothing."""

    with pytest.raises(UserError) as error:
        bound(Own, {**DPO, "trainer": "Own"})
    message = "Own.loss asks for '{}', which Own does not have; it can have chosen_rewards, rejected_rewards"
    told = [message.format(name) for name in ("chosen_logps", "rejected_lengths")]
    assert str(error.value).splitlines()[:2] == told


def test_parameters_that_can_be_no_quantity_are_told():
    def any_number(chosen_logps, *more):
        """Nothing."""

    def by_place(chosen_logps, /):
        """Nothing."""

    def taken(chosen_logps, *, weight):
        """Nothing."""

    for function, message in (
        (any_number, r"any_number of term.own has the parameter \*more, which names no quantity"),
        (by_place, "has the parameter chosen_logps, which names no quantity"),
        (taken, "term.own.weight is a key of every term"),
    ):
        with pytest.raises(UserError, match=message):
            term(DPOTrainer, function)


ODD = {  # the parameters of a function of somebody's file, and what is said of them
    "a name that is not there": ("*, by: 'Positve'", r"pull: an annotation has no value \(NameError: name 'Positve'"),
    "no expression": ("*, by: 'float or or'", r"pull: an annotation has no value \(SyntaxError"),
    "a name within a type": ("*, by: list['Nope']", r"pull: its hyper-parameter 'by' cannot be checked \(\w+"),
    "a tensor": ("*, by: torch.Tensor", r"pull: its hyper-parameter 'by' cannot be checked \(PydanticSchema"),
    "no type": ("*, by: 3", r"pull: its hyper-parameter 'by' cannot be checked \("),
    "a private name": ("*, _by: float", r"pull: its hyper-parameter '_by' cannot be checked \(NameError"),
    "pydantic's name": ("*, model_config: float", r"pull: its hyper-parameter 'model_config' cannot be checked \("),
    "another type's bound": (
        "*, by: Annotated[str, Field(ge=0)]",
        r"pull of term\.own: .* cannot check term\.own",
    ),
    "a check that fails": (
        "*, by: Annotated[str, AfterValidator(int.bit_count)]",
        r"cannot check term\.own",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_annotations_end_in_a_line(name):
    parameters, message = ODD[name]
    there = {"torch": torch, "Annotated": Annotated, "Field": Field, "AfterValidator": AfterValidator}
    exec(f"def pull(chosen_logps, {parameters}):\n    return chosen_logps", there)
    with pytest.raises(UserError, match=message) as error:
        term(DPOTrainer, there["pull"], by="a")
    assert len(str(error.value).splitlines()) == 1


def test_what_is_to_be_learnt():
    batch = collate(pairs(2))
    desirable = QUANTITIES["desirable"](LossContext(batch, None))
    assert desirable.tolist() == [True, True, False, False]
    batch.record["desirable"] = torch.tensor([True, False, False, True])
    assert QUANTITIES["desirable"](LossContext(batch, None)).tolist() == [True, False, False, True]


def test_terms_by_hand():
    logps, desirable = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([True, False, True])
    assert trainers.nll(logps, desirable).tolist() == [1, 0, 4]
    drift = torch.tensor([0.25, 0.5])
    assert trainers.features(drift) is drift


def test_features_that_a_loss_names():
    """With gradient through the policy's; the reference's come from the cache. An index beyond the SAE is named."""
    sae, batch = random_sae(), collate(pairs(2))
    residual = torch.randn(len(batch.read), 32, requires_grad=True)
    batch.reference["features"] = torch.rand(4, 48)
    context = LossContext(batch, SimpleNamespace(residual=residual), sae)
    found = QUANTITIES["policy_features"](context, latents=[7, 3])
    expected = saes.pooled_features(sae, residual, batch.read_lengths)[:, [7, 3]]
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert residual.grad.abs().sum() > 0
    cached = QUANTITIES["reference_features"](context, latents=[7, 3])
    assert torch.equal(cached, batch.reference["features"][:, [7, 3]])

    def pull(chosen_features, ref_rejected_features):
        """Nothing."""

    binding = term(DPOTrainer, pull, latents=[0, 48]).binding
    assert binding.needs == {"reference", "sae"}
    with pytest.raises(UserError, match=r"term\.own\.latents: 48 is no feature of the SAE, which has 48"):
        binding.with_sae(sae)
    with pytest.raises(UserError, match=r"term\.own\.latents"):
        term(DPOTrainer, pull, latents=[-1])


def test_features_of_several_saes_leave_out_the_sinks_of_each():
    joint, batch = saes.JointSAE([random_sae(), random_sae(seed=1)], [1, 3]), collate(pairs(2))
    residual = torch.randn(len(batch.read), 64)
    residual[1, :32] *= 1000  # a sink for the first alone
    found = QUANTITIES["policy_features"](
        LossContext(batch, SimpleNamespace(residual=residual), joint), latents=[60, 3]
    )
    torch.testing.assert_close(found, saes.pooled_features(joint, residual, batch.read_lengths)[:, [60, 3]])


def test_figures_of_features_from_a_table(tmp_path):
    """As a quantity of a loss, and as the weights of drift; the last row is of the length."""
    sae = saes.JointSAE([random_sae(), random_sae(seed=1)], [1, 3])
    z = [*(torch.arange(96) - 40.5).tolist(), 7.0]
    columns = {"sae": [*"a" * 48, *"b" * 48, None], "feature": [*range(48), *range(48), None], "z": z, "d": [None] * 97}
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")

    def pull(chosen_features, feature_figures):
        """Nothing."""

    def read(latents, column):
        named = f"{tmp_path}/table.parquet:{column}" if column else f"{tmp_path}/table.json"
        return term(DPOTrainer, pull, latents=latents, figures=named).binding.with_sae(sae)

    binding = read([50, 3], "z")
    assert binding.needs == {"sae"}
    figures = QUANTITIES["feature_figures"](LossContext(collate(pairs(2)), None), **binding.options["feature_figures"])
    assert figures.tolist() == [z[50], z[3]]
    for latents, column, message in (
        ([96], "z", r"term\.own\.latents: 96 is no feature"),
        ([0], "w", "lacks a column feature or w; it has sae, feature, z, d"),
        ([0], "d", "d of feature 0 in .* is None, no number"),
        ([0], "", r"term\.own\.figures=.*table\.json: has to be FILE\.parquet:COLUMN"),
    ):
        with pytest.raises(UserError, match=message):
            read(latents, column)
    source = f"{tmp_path}/table.parquet:z"
    drift = saes.drift_options(sae, "loss", divergence="kl", k=5, feature_weights=source)
    assert drift["feature_weights"].tolist() == [abs(value) for value in z[:96]]
    with pytest.raises(UserError, match=r"loss\.feature_weights=.*table\.parquet: has to be FILE\.parquet:COLUMN"):
        saes.drift_options(sae, "loss", divergence="kl", k=5, feature_weights=source.removesuffix(":z"))
    with pytest.raises(UserError, match=r"loss\.feature_weights: the rows of .* are not the 48 features of the SAE"):
        saes.drift_options(random_sae(), "loss", divergence="kl", k=5, feature_weights=source)
    (tmp_path / "table.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"loss\.feature_weights: cannot read .* as Parquet"):
        saes.drift_options(sae, "loss", divergence="kl", k=5, feature_weights=source)


def test_a_records_weight_counts_for_its_sequences_and_their_tokens():
    batch = collate(pairs(2))
    ones = torch.ones(len(batch.target))
    assert torch.equal(batch.weighted(ones), ones)
    batch.weights = [0.5, 2.0]
    assert batch.weighted(torch.ones(2)).tolist() == [0.5, 2]
    assert batch.weighted(torch.ones(4)).tolist() == [0.5, 2, 0.5, 2]
    by_token = [weight for length, weight in zip(batch.lengths, [0.5, 2, 0.5, 2]) for _ in range(length)]
    assert batch.weighted(ones).tolist() == by_token
    assert trainers.tokens_in(collate(pairs(2))) == len(ones)
