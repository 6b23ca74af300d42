"""Which features tell two kinds of text apart, and the weights that come of it."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import REPO, random_sae
from scipy.stats import mannwhitneyu
from test_training import run

import models
from data import toy
from features import probe
from launch import settings
from launch.policies import read_config
from sae import compute_feature_drift, pooled_features, read_feature_weights
from utils import UserError

TINY = REPO / "assets/tiny"


def probed(folder, *overrides, sae="sae=tiny"):
    """What `eval.py --config-path=assets/tiny ++mode=features` does; gives the folder with what it wrote."""
    given = [*filter(None, [sae]), "++mode=features", f"++cache_dir={folder}", *overrides]
    given = settings.translate_arguments(given)
    probe.write_probe(settings.typed(read_config(TINY, given)), TINY, given)
    return folder / "tiny" / "features"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------------------------- the figures


def test_auc_is_the_mann_whitney_statistic(monkeypatch):
    """Ties included: features are zero in most texts."""
    generator = torch.Generator().manual_seed(0)
    a = (torch.randint(-3, 4, (23, 9), generator=generator) + torch.arange(9) / 3).floor().clamp(min=0)
    b = torch.randint(-3, 4, (31, 9), generator=generator).clamp(min=0).float()
    expected = mannwhitneyu(a.double().numpy(), b.double().numpy()).statistic / (23 * 31)
    torch.testing.assert_close(probe.auc(a, b), torch.from_numpy(expected))
    torch.testing.assert_close(probe.auc(b, a), 1 - probe.auc(a, b))
    assert probe.auc(torch.zeros(4, 1), torch.zeros(5, 1)).item() == 0.5
    monkeypatch.setattr(probe, "RANKED_AT_ONCE", 4)
    torch.testing.assert_close(probe.auc(a, b), torch.from_numpy(expected))


def test_effect_size_by_hand():
    a, b = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([[0.0], [2.0]])
    # means 3 and 1; variances 4 and 2, pooled (2 * 4 + 1 * 2) / 3
    assert probe.cohens_d(a, b).item() == pytest.approx(2 / (10 / 3) ** 0.5)
    constant = probe.cohens_d(torch.tensor([[0.0, 2.0]] * 3), torch.tensor([[0.0, 1.0]] * 3))
    assert constant.tolist() == [0, float("inf")]


OPTIONS = SimpleNamespace(probe_features=5, probe_min_auc=0.8, probe_weight=7.0, probe_others=0.0)


def planted(texts, features, plants):
    """Sparse noise, where the features in `plants` are higher in the first kind, or, negative, in the second."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(texts, features, generator=generator).clamp(min=0) for _ in range(2))
    for feature, size in plants.items():
        (a if size > 0 else b)[:, feature] += abs(size)
    half = torch.arange(texts) % 2
    return probe.ranking(a, b, half, half)


def test_planted_features_are_found_and_no_others():
    table = planted(120, 3000, {17: 3.0, 2020: -1.6, 5: 1.3})
    assert set(table["feature"][:3].tolist()) == {17, 2020, 5}
    assert table["effect_size"][table["feature"] == 2020].item() < -1
    weights = probe.weights_of(table, OPTIONS)
    assert weights[0] == {"index": "others", "weight": 0.0}
    assert {entry["index"]: entry["weight"] for entry in weights[1:]} == {17: 7.0, 2020: 7.0, 5: 7.0}


def test_the_best_of_many_by_chance_is_not_confirmed():
    """Of 20,000 features of pure noise the best look good on the texts that they are ranked on."""
    table = planted(40, 20_000, {})
    assert (table["auc"][:5] - 0.5).abs().min() > 0.3
    assert (table["auc_held_out"][:50] - 0.5).abs().mean() < 0.15
    assert probe.weights_of(table, OPTIONS) == [{"index": "others", "weight": 0.0}]


def test_weights_reach_the_loss(tmp_path):
    """Of the features that a probe found only those are compared, where the others weigh 0."""
    weights = probe.weights_of(planted(120, 48, {17: 3.0, 20: -3.0}), OPTIONS)
    (tmp_path / "w.json").write_text(json.dumps(weights))
    read = read_feature_weights(str(tmp_path / "w.json"), 48)
    assert read.nonzero().flatten().tolist() == [17, 20] and read[17] == 7
    sae, residual = random_sae(), torch.randn(6, 32)
    before = pooled_features(sae, torch.randn(6, 32), [6])
    drift = compute_feature_drift(sae, residual, [6], before, divergence="mse", k=48, feature_weights=read)
    own = pooled_features(sae, residual, [6])
    torch.testing.assert_close(drift, 7 * (own - before)[:, [17, 20]].square().sum(1) / 48)
    anywhere = [{"index": 1, "weight": 2}, {"index": "others", "weight": 0.5}]
    assert read_feature_weights(anywhere, 3).tolist() == [0.5, 2, 0.5]


# -------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("attribute", ["language", "tone", "format"])
def test_an_attribute_has_features_in_the_built_in_model(tmp_path, attribute, capsys):
    folder = probed(tmp_path, f"++probe={attribute}", "++probe_texts=120", "++probe_others=0")
    table = datasets.Dataset.from_parquet(str(folder / f"probe-{attribute}.parquet")).to_dict()
    assert sorted(table["feature"]) == list(range(1024))
    separation = [abs(value - 0.5) for value in table["auc"]]
    assert separation == sorted(separation, reverse=True)
    assert all(abs(value - 0.5) > 0.4 for value in table["auc_held_out"][:1])
    assert table["effect_size"][0] * (table["mean_first"][0] - table["mean_second"][0]) > 0
    weights = json.loads((folder / f"probe-{attribute}.json").read_text())
    assert weights[0] == {"index": "others", "weight": 0}
    assert [entry["index"] for entry in weights[1:]][:1] == table["feature"][:1]
    first, second = toy.ATTRIBUTES[attribute]
    assert f"{first} (120 texts) or {second} (120)" in capsys.readouterr().out


def test_two_data_sets_and_what_they_give_to_training(tmp_path):
    """The texts are the demonstrations; the same two as of the attribute give the same table."""
    rows = toy.contrasts("language", "train", 0, 100)

    def talk(row, side):
        return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]}

    files = [jsonl(tmp_path / f"{side}.jsonl", [talk(row, side) for row in rows]) for side in ("first", "second")]
    folder = probed(tmp_path, f"++probe=[{files[0]},{files[1]}]")
    probed(tmp_path, "++probe=language", "++probe_texts=100")
    tables = [(folder / f"probe-{name}.parquet").read_bytes() for name in ("first-vs-second", "language")]
    assert tables[0] == tables[1]
    options = ["loss=fpo", "loss.alpha=5"]
    held = run(tmp_path, *options, f"loss.feature_weights={folder}/probe-first-vs-second.json", "exp_name=held")
    free = run(tmp_path, *options, "exp_name=free")
    assert held[0] == pytest.approx(free[0], abs=1e-6)  # no drift yet
    assert held[-1]["loss/eval"] != free[-1]["loss/eval"]


def test_no_feature_knows_what_is_right(tmp_path):
    """Pooled activations do not tell right answers from wrong ones; an older file of weights does not stay."""
    stale = tmp_path / "tiny" / "features" / "probe-correct.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("[]")
    with pytest.raises(UserError, match=r"none of the 20 best features has a held-out AUC of probe_min_auc=0\.8"):
        probed(tmp_path, "++probe=correct", "++probe_texts=200")
    assert not stale.exists() and (stale.parent / "probe-correct.parquet").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["++probe=langage"], r"no attribute 'langage' \(did you mean 'language'\?\); it has language, tone"),
        (["++probe=[a.jsonl]"], r"has to be two different data sets, \[a,b\], or one of language, tone"),
        (["++probe=5"], "probe=5: has to be text or a list"),
        (["++probe=[toy,toy]"], "has to be two different data sets"),
        (["++probe=[toy,toyy]"], r"no data set 'toyy' \(did you mean 'toy'"),
        (["++probe=[FILES/bad.jsonl,toy]"], r"bad\.jsonl has no demonstrations"),
        (["++probe=[FILES/one.jsonl,toy]"], r"one\.jsonl has 1 texts, too few"),
        (["++probe=tone", "++probe_texts=0"], "probe_texts=0: has to be at least 1"),
        (["++probe=tone", "++probe_min_auc=0.3"], r"probe_min_auc=0\.3: has to be at least 0.5"),
        (["++probe=tone", "++probe_weight=-1"], "probe_weight=-1: has to be at least 0"),
        (["++probe=tone", "sae.path=/no/params.npz"], r"sae\.path=/no/params\.npz: no such file"),
        (["++probe=tone", "sae.layer=4"], r"sae\.layer=4: tiny has layers 0 to 3"),
    ],
)
def test_errors_come_before_a_weight_is_read(tmp_path, overrides, message, monkeypatch):
    monkeypatch.setattr(models, "load_model", None)
    jsonl(tmp_path / "bad.jsonl", [{"prompt": "Add: one, two", "completion": "Fine. four", "label": False}])
    jsonl(tmp_path / "one.jsonl", [{"prompt": "Add: one, two", "completion": "Fine. three", "label": True}])
    with pytest.raises(UserError, match=message):
        probed(tmp_path, *(text.replace("FILES", str(tmp_path)) for text in overrides))


def test_without_an_sae(tmp_path):
    with pytest.raises(
        UserError, match=r"mode=features needs an SAE that fits the model: sae=.*tiny.*or \+\+sae\.path="
    ):
        probed(tmp_path, "++probe=tone", sae=None)


# --------------------------------------------------------------------------------------------------------- contrasts


@pytest.mark.parametrize("attribute", toy.ATTRIBUTES)
def test_contrasts_differ_in_their_attribute_alone(attribute):
    rows = toy.contrasts(attribute, "train", 3, 200)
    assert len(rows) == 200
    values = [value if attribute != "correct" else value == "right" for value in toy.ATTRIBUTES[attribute]]
    seen = set()
    for row in rows:
        sides = [vars(toy.attributes(row["prompt"], row[side])) for side in ("first", "second")]
        assert [side.pop(attribute) for side in sides] == values
        assert sides[0] == sides[1]
        seen.add(tuple(sides[0].values()))
    assert len(seen) > 40  # the others vary
