"""The report on features: its numbers against plain dense computation, its page in a browser."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import EOS_ID, REPO, collate, command, look_at, on_ranks, pairs, random_sae, tiny_gemma

import models
from data import toy
from features import intervals, measure, neuronpedia, reading, report, trust
from features.measure import Measured, Part, Report, TrainedRun
from features.reading import Context, Figures, Reader, Text
from features.trust import Causes, Estimate, Trust
from sae import SAE, JointSAE, compute_feature_drift

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>{{data}}\u2028"
FEW = ["++n_samples=8", "++n_eval_examples=12", "++max_new_tokens=12"]


# ----------------------------------------------------------------------------------------------------------- numbers


def reader(model: Any, sae: Any, texts: list[Text], places: list[tuple[int, str]], **options: Any) -> Reader:
    """A reader of a random model, as a run would give it one."""
    loader = SimpleNamespace(
        collate=lambda prompts, completions, index: collate(
            [{"prompt_ids": p, "completion_ids": c, "index": i} for p, c, i in zip(prompts, completions, index)]
        )
    )
    subject: Any = SimpleNamespace(
        sae=sae,
        tap=models.make_tap(model, places),
        policy=model,
        tokenizer=SimpleNamespace(eos_token_id=EOS_ID, decode=lambda ids, **_: " ".join(map(str, ids))),
        loaders={"eval": loader},
    )
    return Reader(subject, texts, batch_size=4, **options)


def texts_of(count: int) -> list[Text]:
    return [
        Text(kind, record["prompt_ids"], ids)
        for record in pairs(count)
        for kind, ids in zip(("chosen", "rejected"), record["completion_ids"])
    ]


@torch.no_grad()
def residuals(model: Any, text: Text, layer: int) -> torch.Tensor:
    """The residual stream [M, D] at the text tokens of one completion, as transformers gives it."""
    ids = torch.tensor([[*text.prompt_ids, *text.completion_ids]])
    hidden = model(ids, output_hidden_states=True).hidden_states[layer + 1][0, len(text.prompt_ids) :]
    return hidden[torch.tensor(text.completion_ids) != EOS_ID]


@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_figures_are_those_of_dense_computation(divergence, layers):
    model, start = tiny_gemma(1), tiny_gemma(0)
    members = [random_sae(seed=layer) for layer in layers]
    sae = members[0] if len(members) == 1 else JointSAE(members, [1.0, 3.0])
    texts, places = texts_of(7), [(layer, "residual") for layer in layers]
    options = {"divergence": divergence, "k": 5}
    before, pooled = reader(start, sae, texts, places, **options).measure("before", ["chosen", "rejected"])
    after, _ = reader(model, sae, texts, places, **options).measure("after", ["chosen", "rejected"], pooled)
    for kind in ("chosen", "rejected"):
        own = [text for text in texts if text.kind == kind]
        read = [[torch.cat([residuals(m, t, layer) for layer in layers], 1) for t in own] for m in (start, model)]
        for figures, vectors in zip((before[kind], after[kind]), read):
            acts = sae.encode(torch.cat(vectors))
            assert figures.mean == pytest.approx(acts.mean(0).numpy(), rel=1e-3, abs=1e-4)
            assert figures.sums.shape == (7, 5, sae.d_sae)  # each pair is of a prompt of its own
            assert figures.rate == pytest.approx((acts > 0).double().mean(0).numpy(), abs=1e-6)
        reference = torch.stack([sae.encode(x).mean(0) if len(x) else torch.zeros(sae.d_sae) for x in read[0]])
        expected = compute_feature_drift(sae, torch.cat(read[1]), [len(x) for x in read[1]], reference, **options)
        assert after[kind].drift.sum() == pytest.approx(expected.mean().item(), rel=1e-3)
        assert (after[kind].drift >= 0).all() and after[kind].drift.sum() > 0
        assert not before[kind].drift.any()


def test_sinks_are_no_part_of_the_figures_or_contexts():
    model, sae, texts, sink = tiny_gemma(), random_sae(), texts_of(8), 25
    with torch.no_grad():
        model.model.embed_tokens.weight[sink] *= 1000
    one = reader(model, sae, texts, [(1, "residual")], divergence="kl", k=5)
    profile, _ = one.measure("before", ["chosen", "rejected"])
    acts = one.activations("before", {"chosen": [3, 7], "rejected": [3, 7]})
    planted = 0
    for kind in ("chosen", "rejected"):
        expected = []
        for i, text in ((i, text) for i, text in enumerate(texts) if text.kind == kind):
            is_sink = torch.tensor([token for token in text.completion_ids if token != EOS_ID]) == sink
            dense = sae.encode(residuals(model, text, 1))
            expected.append(dense[~is_sink])
            torch.testing.assert_close(acts[i], dense[:, [3, 7]] * ~is_sink.unsqueeze(1), rtol=1e-3, atol=1e-4)
            planted += int(is_sink.sum())
        assert profile[kind].mean == pytest.approx(torch.cat(expected).mean(0).numpy(), rel=1e-3, abs=1e-4)
    assert planted


def test_the_same_policy_has_no_drift():
    texts = texts_of(5)
    one = reader(tiny_gemma(), random_sae(), texts, [(1, "residual")], divergence="kl", k=50)
    before, pooled = one.measure("before", one.kinds)
    after, _ = one.measure("after", one.kinds, pooled)
    for kind in one.kinds:
        assert not after[kind].drift.any()
        assert np.array_equal(before[kind].mean, after[kind].mean)
    assert measure.most_changed(after["chosen"].mean - before["chosen"].mean) == []


def test_contexts_are_the_strongest_ones():
    texts, model, sae = texts_of(6), tiny_gemma(), random_sae()
    one = reader(model, sae, texts, [(1, "residual")], divergence="kl", k=5)
    shown = {"chosen": [3, 7], "rejected": []}
    acts = one.activations("before", shown)
    found = one.contexts(shown, acts, {i: 2 * values for i, values in acts.items()})
    for latent in shown["chosen"]:
        peaks = [sae.encode(residuals(model, t, 1))[:, latent] for t in texts if t.kind == "chosen"]
        expected = sorted((2 * float(p.max()) for p in peaks if len(p) and p.max() > 0), reverse=True)[:3]
        assert [context.strength for context in found["chosen"][latent]] == pytest.approx(expected, rel=1e-3)
    assert found["rejected"] == {}


def test_most_changed():
    change = np.array([0.0, 2.0, -1.0, 3.0, -4.0])
    assert measure.most_changed(change) == [3, 1, 4, 2]


def test_features_that_hold_a_share():
    drift = np.array([1.0, 5.0, 0.0, 4.0])
    assert [report.holding(drift, share) for share in (0.5, 0.51, 0.9, 1.0)] == [1, 2, 2, 3]
    assert report.holding(np.zeros(3), 0.5) == 0


def test_pieces_join_to_the_text():
    tokenizer = models.load_tokenizer(REPO / "assets/tiny")
    ids = tokenizer.encode("¡Encantado! ropa, comida\n- leche", add_special_tokens=False)
    pieces = reading.pieces(tokenizer, ids, 0, len(ids))
    assert len(pieces) == len(ids) and "".join(pieces) == "¡Encantado! ropa, comida\n- leche"


def test_unpaired_and_plain_data_are_named_as_they_are():
    def named(rows):
        return [t.kind for t in measure.data_texts(SimpleNamespace(used=lambda: range(len(rows)), values=rows))]

    row: dict = {"prompt_ids": [1], "completion_ids": [[5, 2]]}
    assert named([{**row, "desirable": True}, {**row, "desirable": False}]) == ["desirable", "undesirable"]
    assert named([row]) == ["demonstrated"]
    assert named([{"prompt_ids": [1], "completion_ids": [[5], [6]]}]) == ["chosen", "rejected"]


# -------------------------------------------------------------------------------------------------------------- trust


def test_an_interval_is_that_of_the_mean_over_prompts():
    values = np.array([1.0, 4.0, 2.0, 7.0])
    mean, error = intervals.with_interval(np.stack([values, np.ones(4)], axis=1), lambda s: s[0] / s[1])
    assert mean == 3.5 and error == pytest.approx(3.182 * values.std(ddof=1) / 2)
    assert np.isnan(intervals.with_interval(values[:1, None], lambda s: s)[1]).all()
    groups, count = intervals.groups_of(["a", "b", "a", *map(str, range(20))])
    assert groups[:3] == [0, 1, 0] and count == 16 and max(groups) == 15


def test_what_the_sae_sees_by_hand():
    """Two tokens, an SAE of the two axes with a threshold of 0.5: it misses the 0.4 of the reference's second token."""
    one = torch.eye(2)
    sae = SAE(one, torch.zeros(2), one, torch.zeros(2), torch.full((2,), 0.5))
    compared = trust.Compared(sae, [0], groups=2)
    before, after = torch.tensor([[1.0, 0.0], [0.4, 2.0]]), torch.tensor([[2.0, 0.0], [1.0, 2.0]])
    compared.add(torch.tensor([0, 1]), before, after)
    nothing: Any = SimpleNamespace(words=lambda _: ([], []))
    read: Any = SimpleNamespace(completions={"chosen": 2})
    found = trust.summary(read, "chosen", [0], *compared.over_ranks(), nothing)
    assert found.tokens == 2
    assert [own.value for own in found.fvu] == pytest.approx([0.16 / (5.16 - (1.4**2 + 2**2) / 2), 0.0])
    assert [own.value for own in found.l0] == [1.0, 1.5]
    assert found.outside.value == pytest.approx(0.16 / 1.36)  # the change (1, 0), (0.6, 0); the SAE's (1, 0), (1, 0)
    # f of both models together is 3, then 1; the direction's part of the vectors 1, then 0.4, and 2, then 1
    assert found.scaling[0].value == pytest.approx((3 * 2 + 1 * 1) / (3 * 1 + 1 * 0.4), rel=1e-5)
    assert found.scaling[0].error == pytest.approx(
        12.706 / 2 * abs(2 - 1 / 0.4), rel=1e-4
    )  # of two tokens, without one


@pytest.mark.parametrize(("hook", "first"), [("residual", 0), ("mlp", 0), ("residual", 48)])
@torch.no_grad()
def test_what_goes_away_and_the_words_by_hand(hook, first):
    """Of an SAE at the last layer, which may be the second of two."""
    start, policy = tiny_gemma(), tiny_gemma()
    policy.model.layers[1].load_state_dict(tiny_gemma(seed=1).model.layers[1].state_dict())
    own, latents, places = random_sae(), [3, 7], [(2, hook)]
    sae = JointSAE([random_sae(seed=1), own], [1.0, 1.0]) if first else own
    shown, read = [first + latent for latent in latents], [(0, "residual"), *places] if first else places
    texts = [dataclasses.replace(text, kind="sampled") for text in texts_of(6)]
    readers = [reader(m, sae, texts, read) for m in (start, policy)]
    remembered = trust.remember(readers[0])
    seen = trust.compare(readers[1], remembered, {"sampled": shown})["sampled"][-1]
    found = trust.causes(readers[1], remembered, shown)
    assert list(seen.scaling) == shown

    total, left, changed, tokens = 0.0, np.zeros(2), torch.zeros(32), 0
    for text in texts:
        ids = torch.tensor([[*text.prompt_ids, *text.completion_ids]])
        outputs = [m(ids, output_hidden_states=True) for m in (start, policy)]
        streams, last = [], torch.empty(0)
        for m in (start, policy):
            tap, after = models.make_tap(m, places), models.make_tap(m, [(2, "residual")])
            with tap.reading(), after.reading():
                m(ids)
            streams.append(tap.take()[0])
            last = after.take()[0]
        predict = slice(len(text.prompt_ids) - 1, -1)
        reference = outputs[0].logits[0, predict].log_softmax(1)

        def kl(logits, reference=reference, predict=predict):
            logp = logits[predict].log_softmax(1)
            return float((logp.exp() * (logp - reference)).sum())

        total += kl(outputs[1].logits[0])
        risen = [own.encode(x)[:, latents] for x in streams]
        for place, latent in enumerate(latents):
            h = last - (risen[1] - risen[0])[:, place : place + 1] * own.W_dec[latent]
            logits = 30 * torch.tanh(policy.lm_head(policy.model.norm(h)) / 30)
            left[place] += kl(logits)
        content = torch.tensor(text.completion_ids) != EOS_ID
        changed += (streams[1] - streams[0])[len(text.prompt_ids) :][content].sum(0)
        tokens += int(content.sum())
    assert found.tokens == sum(len(text.completion_ids) for text in texts) and found.completions == len(texts)
    assert found.kl.value == pytest.approx(total / found.tokens, rel=1e-3)
    assert [found.features[latent].value for latent in shown] == pytest.approx((1 - left / total).tolist(), abs=1e-3)
    assert len(found.together) == 3 * len(sae.members) and found.kl.error > 0
    if hook == "residual":  # at the last layer nothing is left of the change
        assert found.together[-1][1].value == pytest.approx(1, abs=1e-4)

    assert seen.tokens == tokens
    scores = policy.lm_head.weight @ policy.model.norm(changed / tokens)
    scores = (scores - scores.mean()) / scores.std()
    for listed, way in ((seen.words_for, 1), (seen.words_against, -1)):
        best = (way * scores).topk(10).indices.tolist()
        assert [word for word, _ in listed] == list(map(str, best))
        assert [score.value for _, score in listed] == pytest.approx(scores[best].tolist(), rel=1e-3)


def test_what_did_not_change_has_no_share():
    texts = [dataclasses.replace(text, kind="sampled") for text in texts_of(3)]
    one = reader(tiny_gemma(), random_sae(), texts, [(1, "residual")], divergence="kl", k=5)
    remembered = trust.remember(one)
    (seen,) = trust.compare(one, remembered, {"sampled": []})["sampled"]
    assert np.isnan(seen.outside.value) and seen.words_for == [] and seen.fvu[0] == seen.fvu[1]
    found = trust.causes(one, remembered, [])
    assert found.kl.value == 0 and all(np.isnan(share.value) for _, share in found.together)


def test_few_completions_are_spread_and_of_pairs_both(monkeypatch):
    monkeypatch.setattr(measure, "COMPARED", 4)
    few = measure.spread([*texts_of(10), Text(measure.SAMPLED_BY_OTHER, [1], [5])])
    chosen, rejected = ([t.prompt_ids for t in few if t.kind == kind] for kind in ("chosen", "rejected"))
    prompts = [text.prompt_ids for text in texts_of(10)[::2]]
    assert chosen == rejected == [prompts[place] for place in (0, 2, 5, 7)] and len(few) == 8


# -------------------------------------------------------------------------------------------------------- neuronpedia


def test_neuronpedia_pages_are_those_of_saelens_index():
    lens = importlib.util.find_spec("sae_lens")  # its import takes long
    assert lens and lens.origin

    text = (Path(lens.origin).parent / "pretrained_saes.yaml").read_text()
    index = yaml.load(text, yaml.CSafeLoader)
    known: dict[str, set] = {}
    for release in index.values():
        for sae in release["saes"]:
            known.setdefault(f"{release['repo_id']}/{sae['path']}", set()).add(sae.get("neuronpedia"))
    found = {path: address for path in known if (address := neuronpedia.neuronpedia_url(path))}
    assert len(found) > 400
    for path, address in found.items():
        assert address.removeprefix("https://www.neuronpedia.org/") in known[path], path
    assert neuronpedia.neuronpedia_url("google/gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_116/params.npz")
    assert not neuronpedia.neuronpedia_url("google/gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55/params.npz")
    assert not neuronpedia.neuronpedia_url("assets/tiny-sae/params.npz")


# --------------------------------------------------------------------------------------------------------------- runs


def train(folder: Path, loss: str, *more: str) -> Path:
    options = [f"loss={loss}", "model=tiny", "n_examples=96", "n_eval_examples=12", "lr=1e-3", "warmup_steps=0"]
    options += ["max_new_tokens=4", "do_first_eval=false"]
    for key, split, count in (("datasets", "train", 96), ("eval_datasets", "test", 24)):
        rows = toy.preferences(split, seed=0, count=count)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options.append(f"{key}=[{folder / split}.jsonl]")
    command("train.py", *options, f"cache_dir={folder}", f"exp_name={loss}", *more)
    return folder / loss


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A short FPO run with checkpoints, a DPO run and its report beside the first one's."""
    folder = tmp_path_factory.mktemp("features")
    fpo = train(folder, "fpo", "++intermediate_checkpoints=true", "save_every=32")
    dpo = train(folder, "dpo")
    for run, more in ((fpo, []), (dpo, [f"++compare_to={fpo}"])):
        command("eval.py", f"--config-path={run}", "++mode=features", *FEW, *more)
    return {"fpo": fpo, "dpo": dpo}


def data_of(run: Path) -> dict:
    text = (run / "features/report.html").read_text()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.slow
def test_a_run_with_checkpoints(runs):
    table = pq.read_table(runs["fpo"] / "features/drift.parquet")
    assert table.num_rows == 3 * 1024
    frame = table.to_pandas()
    assert set(frame.text) == {"chosen", "rejected", "sampled"} and set(frame.run) == {"fpo"}
    assert np.array_equal(frame.change, frame.policy_mean - frame.reference_mean)
    data = data_of(runs["fpo"])
    assert data["examples"] == [0, 32, 64, 96]
    for kind in data["kinds"]:
        total = frame[frame.text == kind["name"]].drift.sum()
        training = [value for value, _ in kind["training"]]
        assert training[0] == 0 < training[1] and training[-1] == pytest.approx(total, rel=1e-3)
    evaluated = json.loads((runs["fpo"] / "metrics.jsonl").read_text().splitlines()[-1])
    for kind in ("chosen", "rejected"):  # the drift that training itself reports on the same 12 records
        assert frame[frame.text == kind].drift.sum() == pytest.approx(evaluated[f"feature_drift_eval/{kind}"], rel=1e-3)
    assert not list(runs["fpo"].glob("*.partial*"))


@pytest.mark.slow
def test_two_runs_side_by_side(runs):
    frame = pq.read_table(runs["dpo"] / "features/drift.parquet").to_pandas()
    assert len(frame) == 2 * 3 * 1024
    alone = pq.read_table(runs["fpo"] / "features/drift.parquet").to_pandas()
    for kind in ("chosen", "rejected", "sampled"):  # of the other run, the same as in its own report
        beside = frame[(frame.run == "fpo") & (frame.text == kind)]
        own = alone[alone.text == kind]
        assert beside.drift.to_numpy() == pytest.approx(own.drift.to_numpy(), rel=1e-3, abs=1e-6)
    data = data_of(runs["dpo"])
    assert data["runs"] == ["dpo", "fpo"]
    assert all(-1 <= kind["correlation"][0] <= 1 and kind["points"] and kind["apart"] for kind in data["kinds"])


@pytest.mark.slow
@pytest.mark.parametrize("run", ["fpo", "dpo"])
def test_the_page_in_a_browser(runs, run, browser, tmp_path):
    for width in (500, 1300):
        dom, console = look_at(browser, runs[run] / "features/report.html", tmp_path / f"profile{width}", width=width)
        assert console == []
    assert dom.count("<article") == len(data_of(runs[run])["kinds"][-1]["shown"]) > 8
    assert "all that the SAE rebuilds" in dom and "of the KL goes away" in dom and "NaN" not in dom
    for title in ["How few features hold the drift", "What rose and what fell"]:
        assert title in dom
    assert ("<h2>Drift over training</h2>" in dom.replace(' class=""', "")) == (run == "fpo")
    assert ("Where the two differ most" in dom.split("<script")[0]) == (run == "dpo")


@pytest.mark.slow
def test_unpaired_and_again_on_two_ranks(tmp_path):
    run = train(tmp_path, "kto")
    arguments = ["eval.py", f"--config-path={run}", "++mode=features", *FEW]
    command(*arguments)
    first = pq.read_table(run / "features/drift.parquet").to_pandas()
    contexts = [kind["shown"] for kind in data_of(run)["kinds"]]
    assert set(first.text) == {"desirable", "undesirable", "sampled"}
    (run / "features/probe-tone.json").touch()  # what the probe wrote there stays
    on_ranks(2, *arguments)
    names = sorted(path.name for path in (run / "features").iterdir())
    assert names == ["drift.parquet", "probe-tone.json", "report.html"]
    second = pq.read_table(run / "features/drift.parquet").to_pandas()
    for column in ("reference_mean", "policy_mean", "policy_rate", "drift"):
        assert second[column].to_numpy() == pytest.approx(first[column].to_numpy(), rel=1e-3, abs=1e-6)
    strongest = [[f["contexts"][0]["tokens"] for f in shown if f["contexts"]] for shown in contexts]
    again = [[f["contexts"][0]["tokens"] for f in kind["shown"] if f["contexts"]] for kind in data_of(run)["kinds"]]
    assert again == strongest


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused(runs, tmp_path):
    def refused(run: Path, *more: str) -> str:
        done = command("eval.py", f"--config-path={run}", "++mode=features", *FEW, *more, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stdout

    assert "reads features through an SAE, and tiny has none" in refused(runs["dpo"], "++sae.path=null")
    assert "no finished run there" in refused(runs["dpo"], f"++compare_to={tmp_path}")
    moved = shutil.copytree(runs["dpo"], tmp_path / "moved", symlinks=True)
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace("load_from: null", f"load_from: {runs['fpo'] / 'LATEST'}"))
    assert "did not start from the same weights" in refused(runs["dpo"], f"++compare_to={moved}")
    (moved / "LATEST").unlink()
    assert "has the run finished?" in refused(moved, f"++cache_dir={tmp_path}", "++exp_name=moved")


# --------------------------------------------------------------------------------------------------------------- page


def small_report(text: str) -> Report:
    """A report on three features in which every text is `text`."""
    context = Context(text, [text, "b"], [0.0, 1.0], [2.0, 0.5], starts=True, ends=False)
    before = Figures(np.array([[[4.0, 4, 0], [4, 4, 4], [2, 2, 0], [0, 0, 0], [1, 1, 1]]]))
    after = Figures(np.array([[[8.0, 2, 0], [4, 4, 4], [2, 2, 0], [0.3, 0.1, 0], [1, 1, 1]]]))
    sure, words = Estimate(0.6, 0.1), [(text, Estimate(3.0, float("nan")))]
    seen = Trust(1, 4, [sure, sure], [sure, sure], sure, {0: sure, 1: sure}, words, words)
    seen = [seen, dataclasses.replace(seen, scaling={})]
    run: Any = TrainedRun(text, text, None)  # type: ignore[arg-type]
    return Report(
        model=text,
        parts=[Part(text, text, text, 2, "https://www.neuronpedia.org/x"), Part("second", "b", "layer 1", 1, None)],
        divergence="kl",
        k=2,
        settings={"temperature": 1.0, "top_p": 0.9, "top_k": 0, "max_new_tokens": 4, "seed": 1},
        completions={"sampled": 1},
        tokens={"sampled": 4},
        runs=[Measured(run, {"sampled": before}, {"sampled": after})],
        checkpoints={},
        contexts={"sampled": {0: [context], 1: [context]}},
        trust={"sampled": seen},
        causes=Causes(1, 4, sure, {0: sure, 1: sure}, [(text, sure)]),
    )


def test_hostile_text_stays_text(tmp_path, browser):
    report.write_feature_report(small_report(HOSTILE), tmp_path / "features")
    text = (tmp_path / "features/report.html").read_text()
    assert "<img" not in text and text.count("</script>") == 2
    dom, console = look_at(browser, tmp_path / "features/report.html", tmp_path / "profile")
    assert console == [] and "<img" not in dom and "<title>taken" not in dom
    assert 'href="https://www.neuronpedia.org/x/0"' in dom and dom.count("<article") == 2


def test_several_saes_count_their_own_features():
    table = report.table(small_report("first"))
    assert table["sae"].to_pylist() == ["first", "first", "second"]
    assert table["feature"].to_pylist() == [0, 1, 0]
    about = json.loads(table.schema.metadata[b"features"])
    assert about["k"] == 2 and about["divergence"] == "kl"
    found = report.finding(small_report("first")).replace("feature ", "")
    assert "first 0 rose most and first 1 fell most" in found
    said = r"Careful: 60% \(± \d+%\) of the change of the residual stream on the policy's own samples is outside"
    assert re.search(said, found)


def test_nothing_on_the_page_comes_from_a_network():
    text = report.feature_page(small_report("text"))
    assert re.findall(r"""(?:src|href)\s*=\s*["']""", text) == []
    assert "@import" not in text and "url(" not in text
