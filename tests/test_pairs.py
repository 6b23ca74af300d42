"""What preference data would teach: differences of pooled features over pairs, the pairs that say it, the page."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, look_at, random_sae, tiny_gemma
from test_features import reader, residuals, texts_of

from data import toy
from features import outcome, pairs
from features.pairs import Differences, groups
from launch import settings
from launch.policies import Policy, read_config
from training import reference
from utils import UserError

SAE = ["++sae.path=assets/tiny-sae/params.npz", "++sae.layer=2"]


def added(chosen, rejected, prompts, *chunks):
    """The differences of pairs [n, Q], added in chunks of whole prompts."""
    found = Differences(chosen.shape[1], len(set(prompts)))  # each prompt is a group
    for places in chunks:
        names = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts[i] for i in places))}
        numbers = torch.tensor([names[prompts[i]] for i in places])
        half, group = (torch.tensor(own) for own in ([prompts[i] % 2 for i in places], [prompts[i] for i in places]))
        found.add(chosen[places], rejected[places], places, numbers, half, group)
    return found


def test_figures_by_hand():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.rand(9, 5, generator=generator).round(decimals=1) for _ in range(2))
    chosen, rejected = chosen.double(), rejected.double()
    chosen[:, 3] = rejected[:, 3]
    prompts = [0, 0, 1, 2, 2, 2, 3, 4, 4]
    found = added(chosen, rejected, prompts, [0, 1, 2], [3, 4, 5, 6], [7, 8])
    columns, x = found.figures(), (chosen - rejected).double().numpy()
    delta = x.mean(0)
    np.testing.assert_allclose(columns["delta"], delta)
    moved = [0, 1, 2, 4]
    np.testing.assert_allclose(columns["d"][moved], (delta / x.std(0, ddof=1))[moved])
    clusters = np.stack([(x - delta)[np.array(prompts) == p].sum(0) for p in range(5)])
    error = np.sqrt(5 / 4 * (clusters**2).sum(0)) / 9
    np.testing.assert_allclose(columns["z"][moved], (delta / error)[moved])
    assert columns["d"][3] == columns["z"][3] == 0
    odd = np.array(prompts) % 2 == 1
    statistics = {
        "chosen_mean": lambda own: chosen.numpy()[own].mean(0),
        "rejected_mean": lambda own: rejected.numpy()[own].mean(0),
        "delta": lambda own: x[own].mean(0),
        "d": lambda own: x[own].mean(0) / np.where(x.std(0), x[own].std(0, ddof=1), 1),
        "delta_first": lambda own: x[own & ~odd].mean(0),
        "delta_second": lambda own: x[own & odd].mean(0),
        "more": lambda own: (x[own] > 0).mean(0),
        "less": lambda own: (x[own] < 0).mean(0),
    }
    assert set(statistics) == set(pairs.FIGURES)
    for name, statistic in statistics.items():  # the jackknife: each of the five prompts left out
        without = np.stack([statistic(np.array(prompts) != p) for p in range(5)])
        expected = 2.776 * np.sqrt(4 / 5 * np.square(without - without.mean(0)).sum(0))
        np.testing.assert_allclose(columns[f"{name}_error"], expected, atol=1e-12, err_msg=name)
        assert expected[[0, 1]].all()
    np.testing.assert_allclose(columns["delta_first"], x[~odd].mean(0))
    np.testing.assert_allclose(columns["delta_second"], x[odd].mean(0))
    np.testing.assert_allclose(columns["more"], (x > 0).mean(0))
    np.testing.assert_allclose(columns["less"], (x < 0).mean(0))
    for feature in range(5):
        largest = np.sort(x[:, feature])[::-1][:3]
        np.testing.assert_allclose(found.most[:3, feature], largest, rtol=1e-6)
        np.testing.assert_allclose(x[found.keys[:3, feature], feature], largest, rtol=1e-6)


def test_pairs_of_one_prompt_stay_together(monkeypatch):
    monkeypatch.setattr(pairs, "AT_ONCE", 3)
    prompts = ["b", "a", "b", "c", "a", "b", "b", "d"]
    found = list(groups(prompts))
    assert sorted(i for group in found for i in group) == list(range(8))
    assert [sorted({prompts[i] for i in group}) for group in found] == [["a", "b"], ["c", "d"]]


def planted(folder, count=60):
    """Pairs of English answers, one of them with a word too many, in either order; but in every third the chosen one is
    Spanish. Gives the file and the prompts of these."""
    file, made, spanish = folder / "planted.jsonl", [], set()
    for number, row in enumerate(toy.contrasts("language", "train", 0, count)):
        english = [row["first"], f"{row['first']} {row['first'].split()[-1]}"]
        chosen, rejected = english[:: 1 if number % 2 else -1]
        if number % 3 == 0:
            chosen, rejected = row["second"], row["first"]
            spanish.add(row["prompt"])
        made.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file, spanish


def read(folder, source, data, *overrides):
    own = [
        *SAE,
        "++mode=features",
        f"++data=[{data}]",
        f"++cache_dir={folder}",
        f"++eval_datasets=[{data}]",
        *overrides,
    ]
    config, _ = settings.check_config(read_config(source, own), modes=["features"])
    return pairs.write_data_features(config)


def test_the_pairs_that_teach_something_are_found(tmp_path, browser):
    """A feature of Spanish stands out; the pairs with the highest scores by it are those that were planted."""
    file, spanish = planted(tmp_path)
    tiny = REPO / "assets/tiny"
    table = pq.read_table(read(tmp_path, tiny, file, "++exp_name=tiny") / "data_features.parquet").to_pydict()
    assert table["feature"] == [*range(1024), None]  # the last is the length
    best = max(range(1024), key=table["z"].__getitem__)
    folder = read(tmp_path, tiny, file, "++exp_name=tiny", f"++score_by=[{best}]")
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 60 and [line["score"] for line in lines] == sorted((x["score"] for x in lines), reverse=True)
    assert {line["prompt"][0]["content"] for line in lines[:20]} == spanish
    again = read(tmp_path, tiny, folder / "pairs.jsonl", "++exp_name=again")  # what it writes is data
    assert pq.read_table(again / "data_features.parquet")["delta"].to_pylist() == pytest.approx(
        table["delta"], abs=1e-6
    )

    for width in (500, 1300):
        page, said = look_at(browser, folder / "report.html", tmp_path / f"browser{width}", width=width)
        assert not said and page.count("<article") > 4 and "planted.jsonl would teach tiny" in page
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", (folder / "report.html").read_text())


def test_pairs_scored_by_a_behaviour(tmp_path):
    """The planted pairs' direction is that from English to Spanish."""
    file, spanish = planted(tmp_path)
    folder = read(tmp_path, REPO / "assets/tiny", file, "++exp_name=tiny", "++probe=language", "++probe_texts=60")
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert all(-1 <= line["score"] <= 1 for line in lines)
    assert {line["prompt"][0]["content"] for line in lines[-20:]} == spanish  # english is the probe's first kind
    assert lines[-20]["score"] < -0.5 < lines[-21]["score"]


def test_a_runs_reference_cache_is_enough(plain_run, monkeypatch, capsys):
    run = plain_run("fpo")
    monkeypatch.setattr(reference, "score", None)
    config, _ = settings.check_config(read_config(run, ["++mode=features", "++data=[x]"]), modes=["features"])
    raw = read_config(run, ["++mode=features", f"++data={config.datasets}"])
    folder = pairs.write_data_features(settings.check_config(raw, modes=["features"])[0])
    assert folder.parent.parent == run
    assert "reference cache: found 24 records" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- what training did, beside


def summed(groups, values):
    """Sums [G, ...] of values [S, ...] by the group of each text."""
    found = torch.zeros(max(groups) + 1, *values.shape[1:], dtype=torch.float64)
    return found.index_add_(0, torch.tensor(groups), values.double()).numpy()


@torch.no_grad()
def test_samples_are_read_and_reweighted_as_by_plain_computation():
    """Each kind of sample is the same six texts; the policy is another model."""
    start, policy, sae = tiny_gemma(), tiny_gemma(), random_sae()
    policy.model.layers[1].load_state_dict(tiny_gemma(seed=1).model.layers[1].state_dict())
    own = [text for text in texts_of(6) if text.kind == "chosen"]
    texts = [outcome.Text(kind, text.prompt_ids, text.completion_ids) for kind in outcome.KINDS for text in own]
    readers = [reader(model, sae, texts, [(1, "residual")]) for model in (start, policy)]
    sums, pooled, before = outcome.read_by_start(readers[0])
    after = outcome.scored(readers[0], "again")
    _, effective = outcome.reweighted(readers[0], pooled, before, after)
    assert effective == pytest.approx(1)  # of the same model

    acts = torch.stack([sae.encode(x).mean(0) if len(x := residuals(start, t, 1)) else torch.zeros(48) for t in own])
    expected = torch.cat([acts, torch.tensor([[float(len(t.completion_ids))] for t in own])], 1)
    each = list(range(6))  # each prompt is a group
    for kind in range(3):
        np.testing.assert_allclose(sums[:, 3 * kind], summed(each, expected), rtol=1e-3, atol=1e-5)
        assert (sums[:, 3 * kind + 1] == 1).all()
        np.testing.assert_array_equal(sums[:, 3 * kind + 2], summed(each, (expected > 0).float()))

    def logp(model, text):
        ids = torch.tensor([[*text.prompt_ids, *text.completion_ids]])
        logps = model(ids).logits[0, len(text.prompt_ids) - 1 : -1].log_softmax(1)
        return logps.gather(1, torch.tensor(text.completion_ids)[:, None]).sum()

    ratios = torch.stack([logp(policy, t) - logp(start, t) for t in own]).double()
    weights = (ratios - ratios.max()).exp()
    after = outcome.scored(readers[1], "by the policy")
    found, effective = outcome.reweighted(readers[1], pooled, before, after)
    np.testing.assert_allclose(found[:, 0], 2 * summed(each, weights[:, None] * expected), rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], 2 * summed(each, weights[:, None].expand(6, 49)), rtol=2e-3)
    assert effective == pytest.approx(float(weights.sum() ** 2 / weights.square().sum() / 6), rel=2e-3)


def test_the_outcome_beside_the_pairs_by_hand():
    generator = np.random.default_rng(0)
    groups, width = 4, 6
    policy, start, again = generator.random((3, groups, width))  # one sample a group
    weights = np.array([0.5, 1.0, 2.0, 0.25])[:, None]
    one, some = np.ones((groups, width)), np.ones((groups, width))
    some[:, 4] = 0  # no sample has this feature, the last quantity is the length
    rows = [policy, one, some, start, one, some, again, one, some]
    rows += [weights * (start + again), np.broadcast_to(2 * weights, (groups, width))]
    delta = np.array([1.0, 3.0, -2.0, 0.5, 9.0, 4.0])
    figures = {"delta": delta, "delta_first": delta + 0.1, "delta_second": 2 * delta}
    found = outcome.outcome_of(np.stack(rows, 1), figures, 0.4, "", 4, 4)
    assert found.features == 4 and [fit.name for fit in found.fits] == ["drawn", "reweighted", "null"]
    changes = {
        "drawn": policy.mean(0) - start.mean(0),
        "reweighted": (weights * (start + again)).sum(0) / (2 * weights.sum()) - (start + again).mean(0) / 2,
        "null": again.mean(0) - start.mean(0),
    }
    for fit in found.fits:
        change = changes[fit.name]
        np.testing.assert_allclose(found.columns[f"outcome_{fit.name}"], change)
        assert fit.r2.value == pytest.approx(np.corrcoef(delta[:4], change[:4])[0, 1] ** 2)
        order, expected = delta[:4].argsort().argsort(), change[:4].argsort().argsort()
        assert fit.rank.value == pytest.approx(np.corrcoef(order, expected)[0, 1])
        assert fit.r2_features[0] <= fit.r2.value <= fit.r2_features[1]
    error = 3.182 / 2 * (policy - start).std(0, ddof=1)
    np.testing.assert_allclose(found.columns["outcome_drawn_error"], error)
    alone = outcome.outcome_of(np.stack(rows, 1), figures, 0.05, "too few", 4, 4)
    assert [fit.name for fit in alone.fits] == ["drawn", "null"] and "outcome_reweighted" not in alone.columns
    assert alone.shown == "drawn"


def test_the_noise_ceiling_by_hand():
    assert outcome.reliability([0.5]) == pytest.approx(2 * 0.5 / 1.5)  # Spearman and Brown
    assert outcome.reliability([-0.5, 0.1]) == 0 and np.isnan(outcome.reliability([]))
    assert outcome.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    same = np.ones((2, 11, 3)) * np.array([1.0, 2.0, 4.0])  # two groups that agree: the change is 2 x, less 1
    same[:, 0], same[:, 1], same[:, 4] = 3 * same[:, 0], 1, 1
    assert outcome.reliability(outcome.halves("drawn", same)) == pytest.approx(1)


def test_a_run_that_changed_nothing(tmp_path):
    """The policy is the start: with the same random numbers it draws the same, and all weights are 1."""
    file, _ = planted(tmp_path, count=12)
    own = [*SAE, "++mode=features", f"++data=[{file}]", f"++eval_datasets=[{file}]", f"++cache_dir={tmp_path}"]
    own += ["++n_samples=6", "++max_new_tokens=8", "++exp_name=tiny"]
    config, _ = settings.check_config(read_config(REPO / "assets/tiny", own), modes=["features"])
    records = outcome.samples.records_to_sample(config)
    tiny = REPO / "assets/tiny"
    run = outcome.Finished(config, Policy(tiny, tiny, None, tmp_path), records)
    table = pq.read_table(pairs.write_data_features(config, run) / "data_features.parquet")
    about = json.loads(table.schema.metadata[b"data_features"])["outcome"]
    assert about["effective"] == pytest.approx(1) and about["left_out"] == "" and about["prompts"] == 6
    columns = table.to_pydict()
    assert not any(columns["outcome_drawn"]) and any(columns["outcome_null"])
    assert columns["outcome_reweighted"] == pytest.approx([0] * 1025, abs=1e-4)
    assert about["fits"][0]["r2"] == [None, None]  # nothing to account for
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_what_training_did_beside_the_pairs(plain_run, browser, tmp_path):
    run = plain_run("fpo")
    own = ["++mode=features", "++n_samples=16", "++max_new_tokens=8"]
    raw = read_config(run, own)
    raw = read_config(run, [*own, f"++data={raw.datasets}", f"++cache_dir={tmp_path}"])
    config, _ = settings.check_config(raw, modes=["features"])
    folder = pairs.write_data_features(config, outcome.finished(config, run, own))
    table = pq.read_table(folder / "data_features.parquet")
    about = json.loads(table.schema.metadata[b"data_features"])["outcome"]
    assert about["features"] > 50 and about["samples"] == about["prompts"] == 8  # all that are held out
    assert {"start_mean", "outcome_drawn", "outcome_drawn_error", "outcome_null"} <= set(table.column_names)
    for width in (500, 1300):
        page, said = look_at(browser, folder / "report.html", tmp_path / f"browser{width}", width=width)
        assert not said and "NaN" not in page
    assert page.count("<circle") > 50 and "delta accounts for" in page and '<section id="outcome">' in page
    assert outcome.finished(config, REPO / "assets/tiny", []) is None  # a model is no run


def test_what_cannot_be_read_is_told(tmp_path):
    file, _ = planted(tmp_path, count=4)
    tiny = REPO / "assets/tiny"
    with pytest.raises(UserError, match=r"score_by: 1024 is no feature of the SAE, which has 1,024"):
        read(tmp_path, tiny, file, "++score_by=[3,1024]")
    with pytest.raises(UserError, match=r"has .* prompts but no"):
        read(tmp_path, tiny, "toy_sft")
    with pytest.raises(UserError, match=r"mode=features needs an SAE that fits"):
        read(tmp_path, tiny, file, "++sae.path=null")
    first = file.read_text().splitlines()[0]
    file.write_text(f"{first}\n{first}\n")
    with pytest.raises(UserError, match="data: pairs of 1 prompt"):
        read(tmp_path, tiny, file)


def test_nothing_of_others_is_replaced(tmp_path):
    file, _ = planted(tmp_path, count=6)
    tiny, home = REPO / "assets/tiny", tmp_path / "tiny" / "data_features"
    folder = read(tmp_path, tiny, file)
    assert folder == home / "planted"
    (folder / "notes.txt").write_text("mine")
    read(tmp_path, tiny, file, "++score_by=[3]")
    read(tmp_path, tiny, file)
    assert {path.name for path in folder.iterdir()} == {"notes.txt", pairs.TABLE, "report.html", "pairs.jsonl"}
    (tmp_path / "other").mkdir()
    other = file.rename(tmp_path / "other" / "planted.jsonl")
    with pytest.raises(UserError, match=r"planted is on .*, not on .*other"):
        read(tmp_path, tiny, other)
    with pytest.raises(UserError, match=r"planted is on .*assets/tiny, not on elsewhere/tiny"):
        pairs.require_own_folder(folder, [str(file)], "elsewhere/tiny")
    (folder / pairs.TABLE).write_text("no table")
    with pytest.raises(UserError, match="is there already, and not of this command"):
        read(tmp_path, tiny, other)
    home.rename(tmp_path / "elsewhere")
    home.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="data_features: a link or a file"):
        read(tmp_path, tiny, other)
    with pytest.raises(UserError, match="a feature is named twice"):
        read(tmp_path, tiny, other, "++score_by=[3,3]", "++exp_name=new")
    with pytest.raises(UserError, match="probe"):  # before a weight is read
        read(tmp_path, tiny, other, "++probe=[a]", "++exp_name=new")
