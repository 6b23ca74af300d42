"""What preference data would teach: differences of pooled features over pairs, the pairs that say it, the page."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, look_at

from data import toy
from features import pairs
from features.pairs import Differences, groups
from launch import settings
from launch.policies import read_config
from training import reference
from utils import UserError

SAE = ["++sae.path=assets/tiny-sae/params.npz", "++sae.layer=2"]


def added(chosen, rejected, prompts, *chunks):
    """The differences of pairs [n, Q], added in chunks of whole prompts."""
    found = Differences(chosen.shape[1])
    for places in chunks:
        names = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts[i] for i in places))}
        numbers = torch.tensor([names[prompts[i]] for i in places])
        found.add(chosen[places], rejected[places], places, numbers, torch.tensor([prompts[i] % 2 for i in places]))
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
