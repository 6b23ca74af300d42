"""Samples labelled by a reward model: by hand, against transformers, after a kill, on two ranks."""

import json
import shutil
from unittest import mock

import pytest
import safetensors.torch
import torch
from conftest import REPO, on_ranks
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import dataloader
import eval as evaluation
from data import toy
from judging import answers, labels, rewards
from launch.policies import read_config
from utils import UserError

TINY = REPO / "assets/tiny"


def asked(text):
    return [{"role": "user", "content": text}]


# Five prompts: a clear best and worst, with a tie for the best; one answer; equal rewards; refusals; a refusal and two
BY_HAND = [
    ("ranked", [("good", 2.0), ("middling", 0.5), ("bad", -1.0), ("good too", 2.0)]),
    ("one answer", [("alone", 1.0)]),
    ("equal", [("this", 0.1), ("that", 0.1), ("those", 0.1)]),
    ("refused", [(None, None), ("  ", None)]),
    ("one refusal", [(None, None), ("first", 0.25), ("second", 0.5)]),
]


def write_samples(path, prompts, failed="it withheld the text"):
    """A file as eval.py writes it."""
    samples = [
        {"prompt": "-", "messages": asked(prompt), "policy": text, "draw": draw}
        | ({"failed": failed} if text is None else {})
        for prompt, answers in prompts
        for draw, text in enumerate(answers)
    ]
    path.write_text(json.dumps({"sampled_at": "now", "config": {"exp_name": "policy"}, "samples": samples}))
    return path


def write(run, samples, target, *overrides):
    """Run ++mode=label in this process; the rows, and what is beside them."""
    given = ["++mode=label", f"++files=[{samples}]", f"++labels={target}", *overrides]
    evaluation.write_labels(read_config(run, given), run, given)
    return rows_of(target), json.loads(target.with_name(f"{target.stem}.made.json").read_text())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def by_hand(tmp_path):
    """Labels the five prompts, with the rewards that they have above; gives the rows and the figures."""
    known = {text: reward for _, answers in BY_HAND for text, reward in answers}
    samples = write_samples(tmp_path / "x.json", [(prompt, [text for text, _ in own]) for prompt, own in BY_HAND])
    texts = labels.texts_of([answers.read_answers(samples)])

    def label(kind="pairs", **options):
        prompts = labels.by_prompt(texts, [known[text.answer] if text.answer else None for text in texts])
        found = labels.label(prompts, labels.Recipe(kind, **options))
        labels.publish(tmp_path / "labels.jsonl", found, {})
        return rows_of(tmp_path / "labels.jsonl"), found.figures()

    return label


def test_pairs_by_hand(by_hand, capsys):
    rows, figures = by_hand()
    assert rows == [
        {"prompt": asked("ranked"), "chosen": "good", "rejected": "bad", "score_chosen": 2.0, "score_rejected": -1.0},
        {
            "prompt": asked("one refusal"),
            "chosen": "second",
            "rejected": "first",
            "score_chosen": 0.5,
            "score_rejected": 0.25,
        },
    ]
    assert figures == {
        "prompts": 5,
        "rows": 2,
        "rewards": {"mean": pytest.approx(0.555), "deviation": pytest.approx(0.8667, abs=1e-4)},
        "margins": {"mean": 1.625, "deviation": 1.375},
        "without": {"one answer": 1, "equal rewards": 1, "no answer": 1},
        "left_out": {},
    }
    assert (
        "labels.jsonl: 2 rows (pairs) from 5 prompts; rewards mean 0.555, deviation 0.8667; margins mean 1.625, "
        "deviation 1.375; without a row: 1 (one answer), 1 (equal rewards), 1 (no answer)"
    ) in capsys.readouterr().out


def test_pairs_of_a_least_margin(by_hand):
    rows, figures = by_hand(min_margin=0.3)
    assert [row["chosen"] for row in rows] == ["good"]
    assert figures["without"]["a margin below min_margin"] == 1
    assert by_hand(min_margin=0.25)[0] == by_hand()[0]


def test_pairs_against_a_random_answer(by_hand):
    """That has less: never the best, nor the other one of the same reward; the seed decides."""
    found = {by_hand(rejected="random", seed=seed)[0][0]["rejected"] for seed in range(12)}
    assert found == {"middling", "bad"}
    assert by_hand(rejected="random")[0] == by_hand(rejected="random")[0]
    assert by_hand(rejected="random", min_margin=2)[0][0]["rejected"] == "bad"


def test_labels_by_hand(by_hand):
    """Of the prompt's mean 0.875, and of 0.375; equal ones have none."""
    rows, figures = by_hand("binary")
    assert [(row["completion"], row["label"], row["score"]) for row in rows] == [
        ("good", True, 2.0),
        ("middling", False, 0.5),
        ("bad", False, -1.0),
        ("good too", True, 2.0),
        ("first", False, 0.25),
        ("second", True, 0.5),
    ]
    assert figures["without"] == {"one answer": 1, "equal rewards": 1, "no answer": 1}


def test_labels_by_a_threshold(by_hand):
    """One answer is enough; what is neither above nor below has no label."""
    rows, figures = by_hand("binary", threshold=0.5)
    assert [(row["completion"], row["label"]) for row in rows] == [
        ("good", True),
        ("bad", False),
        ("good too", True),
        ("alone", True),
        ("this", False),
        ("that", False),
        ("those", False),
        ("first", False),
    ]
    assert figures["left_out"] == {"neither above nor below": 2}
    assert figures["without"] == {"no answer": 1}


def test_the_best_by_hand(by_hand):
    rows, _ = by_hand("best")
    assert [row["messages"][-1]["content"] for row in rows] == ["good", "alone", "this", "second"]
    assert rows[0]["messages"] == [*asked("ranked"), {"role": "assistant", "content": "good"}]


def test_advantages_by_hand(by_hand):
    """Means 0.875 and 0.375; deviations sqrt(6.1875 / 3) and sqrt(0.03125)."""
    rows, _ = by_hand("advantages")
    assert [row["score"] for row in rows] == pytest.approx(
        [0.7833, -0.2611, -1.3056, 0.7833, -0.7071, 0.7071], abs=1e-4
    )
    assert [row["label"] for row in rows] == [True, False, False, True, False, True]
    assert [row["reward"] for row in rows] == [2.0, 0.5, -1.0, 2.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("kind", "loader", "count"),
    [
        ("pairs", "PairedPreference", 2),
        ("binary", "UnpairedPreference", 6),
        ("best", "SFT", 4),
        ("advantages", "UnpairedPreference", 6),
    ],
)
def test_training_reads_what_is_written(by_hand, tmp_path, kind, loader, count):
    by_hand(kind)
    data = dataloader.read_file(tmp_path / "labels.jsonl")
    records = getattr(dataloader, f"{loader}DataLoader").records(data)
    assert not data.bad.counts and len(records) == count
    if kind in ("binary", "advantages"):
        assert [record["score"] for record in records] == [row["score"] for row in rows_of(tmp_path / "labels.jsonl")]


# ------------------------------------------------------------------------------------------------------- the rewards

TOY = toy.preferences("test", seed=0, count=12)
ANSWERS = [(row["prompt"], [row["chosen"], row["rejected"], row["chosen"], f"{row['rejected']} Oh."]) for row in TOY]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A sequence classifier with one output, as from the Hub."""
    folder = tmp_path_factory.mktemp("hub") / "classifier"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(TINY, num_labels=1, initializer_range=0.3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def by_transformers(folder, rows, end):
    """What transformers gives for the answers of some rows, each by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talks = [(row["prompt"][0]["content"], row["completion"]) for row in rows]
    texts = [f"\n<|user|>\n{prompt}\n<|assistant|>\n{answer}{end}" for prompt, answer in talks]
    return [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


@pytest.mark.parametrize("kind", ["run", "classifier", "padding", "no padding token"])
def test_rewards_are_those_of_transformers(kind, plain_run, classifier, tmp_path):
    """Also where a model's padding token, which transformers passes over at the end, is the one that ends the text."""
    run = plain_run("bradley-terry") if kind == "run" else shutil.copytree(classifier, tmp_path / "model")
    folder = run / "LATEST" if kind == "run" else run
    if "padding" in kind:
        config = json.loads((folder / "config.json").read_text())
        config["pad_token_id"] = 2 if kind == "padding" else None
        (folder / "config.json").write_text(json.dumps(config))
    options = ["++as=binary", "++threshold=0", "++model.eval_batch_size=5", "++model.policy_dtype=float32"]
    rows, made = write(run, write_samples(tmp_path / "x.json", ANSWERS[:4]), tmp_path / "y.jsonl", *options)
    assert made["made"]["as_trained"] == (kind == "run")
    assert len(rows) == 16 and len({row["score"] for row in rows}) == 12
    expected = by_transformers(folder, rows, "<eos>")
    assert [row["score"] for row in rows] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_classifier_without_a_head_is_refused(classifier, tmp_path):
    """Its weights would be random, and so the rewards."""
    folder = shutil.copytree(classifier, tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["score.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model: its weights have no reward head \(score.weight\)"):
        write(folder, write_samples(tmp_path / "x.json", ANSWERS[:2]), tmp_path / "y.jsonl")
    assert not (tmp_path / "y.jsonl").exists()


def test_what_follows_the_last_turn_is_read(classifier, tmp_path):
    """A template that writes more after the token that ends a turn, as Qwen's does: a classifier was trained on it."""
    folder = shutil.copytree(classifier, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("{{ eos_token }}", "{{ eos_token + '\n' }}"))
    options = ["++as=binary", "++threshold=0", "++model.policy_dtype=float32"]
    rows, _ = write(folder, write_samples(tmp_path / "x.json", ANSWERS[:2]), tmp_path / "y.jsonl", *options)
    assert [row["score"] for row in rows] == pytest.approx(by_transformers(folder, rows, "<eos>\n"), rel=1e-4)


def test_killed_it_goes_on(plain_run, tmp_path):
    """What is scored is not scored again, also for another kind of labels; the file is the same."""
    run, samples = plain_run("bradley-terry"), write_samples(tmp_path / "x.json", ANSWERS)
    whole, _ = write(run, samples, tmp_path / "whole.jsonl")
    plainly, scored = rewards.RewardModel.rewards, []

    def dies(self, model, sequences):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(len(sequences))
        return plainly(self, model, sequences)

    with mock.patch.object(rewards.RewardModel, "rewards", dies):
        with pytest.raises(KeyboardInterrupt):
            write(run, samples, tmp_path / "cut.jsonl")
        assert not (tmp_path / "cut.jsonl").exists()
        with (tmp_path / "cut.rewards.jsonl").open("a") as file:
            file.write('{"key": "half a li')
    with mock.patch.object(rewards.RewardModel, "rewards", autospec=True, side_effect=plainly) as scoring:
        assert write(run, samples, tmp_path / "cut.jsonl")[0] == whole
        assert sum(len(call.args[2]) for call in scoring.call_args_list) == 36 - sum(scored) == 12
        scoring.reset_mock()
        write(run, samples, tmp_path / "cut.jsonl", "++as=best")
        assert scoring.call_count == 0


def test_labels_are_the_same_on_two_ranks(plain_run, tmp_path):
    run, samples = plain_run("bradley-terry"), write_samples(tmp_path / "x.json", ANSWERS)
    write(run, samples, tmp_path / "one.jsonl", "++as=advantages")
    own = ["++mode=label", f"++files=[{samples}]", f"++labels={tmp_path / 'two.jsonl'}", "++as=advantages"]
    on_ranks(2, "eval.py", f"--config-path={run}", *own)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    two, one = (sorted((tmp_path / f"{name}.rewards.jsonl").read_text().splitlines()) for name in ("two", "one"))
    assert two == one


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["++labels=null"], "mode=label: ++files=[samples/x.json] names samples, ++labels=pairs.jsonl the file"),
        (["++labels={folder}/x.json"], "x.json: the name of a file of training data has to end in .jsonl"),
        (["++labels={folder}/mine.jsonl"], "mine.jsonl is there already, and no mine.made.json beside it says"),
        (["++labels={folder}/theirs.jsonl"], "theirs.made.json is there already, and not of this command"),
        (["++files=[{folder}/none.json]"], "files: {folder}/none.json: no file here"),
        (["++files=[{folder}/refused.json]"], "refused.json: no answer to label"),
        (["++as=triples"], "as=triples: not one of pairs, binary, best, advantages"),
        (["++min_margin=1e9"], "nothing to write to {folder}/y.jsonl: 0 rows (pairs) from 12 prompts; rewards mean"),
        (["++model.name_or_path=assets/tiny"], "assets/tiny: no reward model (Gemma2ForCausalLM)"),
        (["++files=[{folder}/x.json,{folder}/x.json]"], "files names one file twice: {folder}/x.json, {folder}/x.json"),
        (["++files=[{folder}/x.json,{folder}/./x.json]"], "files names one file twice"),
        (
            ["++files=[{folder}/x.json,{folder}/link.json]"],
            "names one file twice: {folder}/x.json, {folder}/link",
        ),
        (["++threshold=0.5"], "threshold=0.5 does nothing with as=pairs; it is for as=binary"),
        (["++as=binary", "++min_margin=0.5"], "min_margin=0.5 does nothing with as=binary; it is for as=pairs"),
        (["++as=best", "++rejected=random"], "rejected=random does nothing with as=best; it is for as=pairs"),
        (["++n_examples=4"], "n_examples does nothing with mode=label; it is for train, plan, online, features"),
        (["++files=[{folder}/alone.json]"], "as=pairs compares answers to the same prompt, and each prompt has one"),
        (["++files=[{folder}/alone.json]", "++as=advantages"], "as=advantages compares answers to the same prompt"),
        (["++files=[{folder}/alone.json]", "++as=binary"], "draws four; as=binary ++threshold=NUMBER needs none"),
        (["++labels={folder}/link.jsonl"], "link.jsonl is a link to mine.jsonl; move it, or write to another place"),
        (["++labels={folder}/linked.jsonl"], "linked.rewards.jsonl is a link to mine.jsonl"),
    ],
)
def test_a_wrong_word_is_named(overrides, message, plain_run, tmp_path, monkeypatch):
    """Before a weight is read, if that is not what it takes to know."""
    if not message.startswith("nothing to write"):
        monkeypatch.setattr(rewards.RewardModel, "load", None)
    samples = write_samples(tmp_path / "x.json", ANSWERS)
    write_samples(tmp_path / "alone.json", [(prompt, own[:1]) for prompt, own in ANSWERS])
    for name, target in (("link.json", "x.json"), ("link.jsonl", "mine.jsonl"), ("linked.rewards.jsonl", "mine.jsonl")):
        (tmp_path / name).symlink_to(target)
    write_samples(tmp_path / "refused.json", [("refused", [None, " "])])
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "theirs.made.json").write_text("[]")
    given = [word.format(folder=tmp_path) for word in overrides]
    with pytest.raises(UserError) as error:
        write(plain_run("bradley-terry"), samples, tmp_path / "y.jsonl", *given)
    assert message.format(folder=tmp_path) in str(error.value)
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"


def test_a_classifier_of_several_outputs_is_no_reward_model(classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(UserError, match=r"no reward model \(Gemma2ForSequenceClassification with 2 outputs\)"):
        write(folder, write_samples(tmp_path / "x.json", ANSWERS), tmp_path / "y.jsonl")


def test_a_strangers_run_does_not_say_what_is_written(plain_run, tmp_path):
    run = shutil.copytree(plain_run("bradley-terry"), tmp_path / "run", symlinks=True)
    saved = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(saved.replace("labels: null", "labels: /home/me/.bashrc"))
    with pytest.raises(UserError, match=r"its labels=/home/me/\.bashrc is not followed"):
        read_config(run, ["++mode=label"])


@pytest.mark.parametrize("kind", ["run", "classifier"])
def test_an_answer_that_cannot_be_read_is_counted(kind, plain_run, classifier, tmp_path):
    odd = [("Repeat: salt", ["Sure! salt", "salt \ud83d", None]), ("Repeat: \ud83d", ["Sure! ", "salt"])]
    samples = write_samples(tmp_path / "x.json", [*ANSWERS, *odd, ("Repeat: tea", ["tea", "<eos> tea"])])
    rows, made = write(plain_run("bradley-terry") if kind == "run" else classifier, samples, tmp_path / "y.jsonl")
    assert len(rows) == (12 if kind == "run" else 13)
    held = "the completion holds the end-of-sequence token <eos> inside its text"
    told = {"the prompt or the answer is not valid Unicode": 3, "no answer": 1} | ({held: 1} if kind == "run" else {})
    assert made["figures"]["left_out"] == told


def test_rewards_that_are_no_numbers_are_not_taken_from_the_log(plain_run, tmp_path):
    run, samples = plain_run("bradley-terry"), write_samples(tmp_path / "x.json", ANSWERS[:3])
    whole, _ = write(run, samples, tmp_path / "y.jsonl")
    log = tmp_path / "y.rewards.jsonl"
    for value in ("NaN", "1e999", "-Infinity", "null"):
        lines = [json.loads(line) for line in log.read_text().splitlines()][:9]
        log.write_text("".join(f'{{"key": "{line["key"]}", "reward": {value}}}\n' for line in lines))
        assert write(run, samples, tmp_path / "y.jsonl")[0] == whole


def test_figures_of_another_reward_model_are_not_replaced(tmp_path):
    """Its directory may have the same name. One that was moved, or trained further, is the same."""
    file = tmp_path / "model-rewards.json"
    file.write_text(json.dumps({"accuracy": 1, "reward_model": "/a/model", "weights": "1"}))
    with pytest.raises(UserError, match=r"model-rewards.json is of /a/model, not of /b/model; \+\+exp_name=NAME"):
        labels.require_made_here(file, "accuracy", {"reward_model": "/b/model", "weights": "2"})
    for same in ({"reward_model": "/b/model", "weights": "1"}, {"reward_model": "/a/model", "weights": "2"}):
        labels.require_made_here(file, "accuracy", same)
