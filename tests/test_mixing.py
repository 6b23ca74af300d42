"""Data sets with weights in an epoch, rows with weights in the loss, conversations whose every turn is trained on."""

import json
from collections import Counter

import pytest
import torch
from test_data import load_tokens, make_config, make_tokenizer
from test_training import assembled, run

import dataloader
from data import toy
from dataloader import PairedPreferenceDataLoader, SFTDataLoader, UnpairedPreferenceDataLoader
from training.metrics import MetricAccumulator
from utils import UserError

SIZES = {"a": 20, "b": 10, "c": 7}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs_of(name, count):
    return [{"prompt": f"{name} {i}", "chosen": "good", "rejected": "bad"} for i in range(count)]


@pytest.fixture
def mixed(tmp_path, tokenizer, capsys):  # noqa: ARG001 (it prints into the test's own output)
    """Gives a loader over three files, with the weights 0.3, 1 and 2.5."""
    files = {name: write(tmp_path / f"{name}.jsonl", pairs_of(name, count)) for name, count in SIZES.items()}
    entries = [{"name": files["a"], "weight": 0.3}, files["b"], {"name": files["c"], "weight": 2.5}]
    config = make_config(tmp_path, datasets=entries, eval_datasets=["toy"])
    tokens = load_tokens(config, "train", tokenizer, PairedPreferenceDataLoader)

    def make(**options):
        options = {"batch_size": 5, "pad_id": 0, "eos_id": 2, "seed": 1, **options}
        return PairedPreferenceDataLoader(tokens, **options)

    return make


def prompts(loader, start=0):
    """Of each step, on this rank."""
    return [
        [loader.rows[i]["messages"].split('"')[-2] for batch in step for i in batch.index]
        for step in loader.steps(start)
    ]


def test_an_epoch_holds_each_data_set_by_its_weight(mixed, capsys):
    """6 of 20, all 10, and 18 of 7: each twice, and 4 of them a third time."""
    assert "An epoch holds 6 of a's 20 records, 10 of b's 10 records, 18 of c's 7 records" in capsys.readouterr().out
    loader = mixed(n_epochs=1)
    seen = Counter(prompt for step in prompts(loader) for prompt in step)
    counts = Counter({name: sum(n for prompt, n in seen.items() if prompt.startswith(name)) for name in SIZES})
    assert counts == {"a": 6, "b": 10, "c": 18}
    assert sorted(n for prompt, n in seen.items() if prompt.startswith("c")) == [2, 2, 2, 3, 3, 3, 3]
    assert (len(loader), loader.total, loader.examples_before(7)) == (7, 34, 34)


def test_epochs_go_on_where_the_one_before_stopped(mixed):
    """All records are seen before one is seen again: in 10 epochs each of the 20 three times."""
    steps = prompts(mixed(n_epochs=10))
    epochs = [steps[start : start + 7] for start in range(0, 70, 7)]
    own = [[prompt for step in epoch for prompt in step if prompt.startswith("a")] for epoch in epochs]
    assert [len(epoch) for epoch in own] == [6] * 10
    assert len(set(own[0] + own[1] + own[2])) == 18
    assert set(Counter(prompt for epoch in own for prompt in epoch).values()) == {3}
    assert epochs[0] != epochs[1]


def test_a_mixture_is_a_function_of_the_seed(mixed):
    """From any step on, and over any number of ranks; another seed gives another one."""
    whole = prompts(mixed(n_epochs=2))
    assert prompts(mixed(n_epochs=2)) == whole != prompts(mixed(n_epochs=2, seed=2))
    assert prompts(mixed(n_epochs=2), start=9) == whole[9:]
    ranks = [prompts(mixed(n_epochs=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [sorted(one + other) for one, other in zip(*ranks)] == [sorted(step) for step in whole]


@pytest.mark.parametrize("n_examples", [3, 34, 50, 135, 136, 200])
def test_what_a_mixed_run_uses_is_what_its_steps_give(mixed, n_examples):
    loader = mixed(n_epochs=None, n_examples=n_examples)
    assert loader.used() == sorted({i for step in loader.steps() for batch in step for i in batch.index})


def test_evaluation_reads_all_rows_whatever_their_weight(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", pairs_of("a", 20))
    config = make_config(tmp_path, datasets=[{"name": file, "weight": 0.1}], held_out=0.5)
    assert [
        len(load_tokens(config, split, tokenizer, PairedPreferenceDataLoader).weights) for split in ("train", "test")
    ] == [*(1, 0)]
    loader = load_tokens(config, "test", tokenizer, PairedPreferenceDataLoader)
    assert len(loader.rows) == 10 and loader.weights == {}


def test_weights_that_make_no_mixture_are_named(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", pairs_of("a", 4))
    for entry in ({"weight": 0}, {"weight": "much"}, {"weigth": 1}, {}):
        with pytest.raises(UserError, match=r"a name, a file or \{name: hh, weight: 0\.3\}, the weight above 0"):
            make_config(tmp_path, datasets=[{"name": file, **entry}])
    (tmp_path / "link.jsonl").symlink_to(file)
    for other, message in (
        (file, r"datasets names .*a\.jsonl twice; \{name: .*, weight: 2\} gives its rows twice as often"),
        (f"{tmp_path}/./a.jsonl", r"datasets names one file twice: .*a\.jsonl, .*a\.jsonl"),
        (f"{tmp_path}/link.jsonl", r"datasets names one file twice: .*a\.jsonl, .*link\.jsonl"),
    ):
        twice = make_config(tmp_path, datasets=[{"name": file, "weight": 0.5}, other], eval_datasets=["toy"])
        with pytest.raises(UserError, match=message):
            load_tokens(twice, "train", tokenizer, PairedPreferenceDataLoader)


def test_a_mixed_run_is_stopped_and_goes_on(tmp_path):
    """The numbers are those of a run that nothing stopped; the weights are part of the run."""
    other = write(tmp_path / "other.jsonl", toy.preferences("train", seed=5, count=10))
    own = [f"datasets=[{{name: {tmp_path}/train.jsonl, weight: 0.5}},{{name: {other}, weight: 1.5}}]", "loss=dpo"]
    own += ["++model.batch_size=9", "n_epochs=2", "save_every=9", "++do_first_eval=false", "++export=[hub]"]
    whole = run(tmp_path, *own, "exp_name=whole")
    run(tmp_path, *own, "exp_name=cut", "n_examples=18")
    assert run(tmp_path, *own, "exp_name=cut")[-1] == whole[-1]
    changed = [own[0].replace("0.5", "0.75"), *own[1:]]
    with pytest.raises(UserError, match="another configuration:\n  datasets"):
        run(tmp_path, *changed, "exp_name=cut", "n_epochs=3")


# ------------------------------------------------------------------------------------------------------------ weights


def weights(tmp_path, loader, *overrides):
    trainer = assembled(tmp_path, *overrides)
    assert isinstance(trainer.loaders["train"], loader)
    return [
        (trainer.loaders["train"].rows[index]["source"].rpartition(":")[2], weight)
        for step in trainer.loaders["train"].steps()
        for batch in step
        for index, weight in zip(batch.index, batch.weights, strict=True)
    ]


def test_a_rows_weight_is_in_the_batch(tmp_path):
    """Of pairs, of both sides of a pair as single completions, of the chosen one as a demonstration; 1 without one."""
    rows = [row | ({"weight": i / 4} if i else {}) for i, row in enumerate(toy.preferences("train", seed=5, count=4))]
    data = f"datasets=[{write(tmp_path / 'weighted.jsonl', rows)}]"
    known = {"1": 1.0, "2": 0.25, "3": 0.5, "4": 0.75}
    for loss, loader, times in (
        ("dpo", PairedPreferenceDataLoader, 1),
        ("kto-zero", UnpairedPreferenceDataLoader, 2),
        ("sft", SFTDataLoader, 1),
    ):
        found = weights(tmp_path, loader, data, f"loss={loss}", f"exp_name={loss}")
        assert sorted(found) == sorted([*known.items()] * times)


@pytest.mark.parametrize("loss", ["simpo", "sft", "ppo"])
def test_a_rows_weight_counts_in_the_loss(tmp_path, loss):
    """The weighted mean of what the records have by themselves: over records, or over their tokens."""
    rows = [row | {"weight": i / 2} for i, row in enumerate(toy.preferences("train", seed=5, count=5))]
    data = f"datasets=[{write(tmp_path / 'weighted.jsonl', rows)}]"
    trainer = assembled(tmp_path, data, f"loss={loss}")
    assert len(trainer.loaders["train"].rows) == 4 * (2 if loss == "ppo" else 1)  # without the row of weight 0
    (batch,) = next(trainer.loaders["train"].steps())
    batch = next(iter(trainer.prepare_step("train", 0, [batch])))
    trainer.before_step("train", 0, [batch])
    whole = trainer.compute_loss(batch, "train", MetricAccumulator()).sum() / trainer.weight(batch)
    weights, batch.weights = batch.weights, None
    alone = trainer.compute_loss(batch, "train", MetricAccumulator())
    by_token = loss == "ppo"
    of_each = torch.stack([part.sum() for part in alone.split(batch.lengths if by_token else 1)])
    counts = torch.tensor([1.0] * len(weights) if loss == "simpo" else [float(length) for length in batch.lengths])
    expected = sum(w * x for w, x in zip(weights, of_each)) / sum(w * n for w, n in zip(weights, counts))
    assert whole.item() == pytest.approx(expected.item(), rel=1e-5)
    assert whole.item() != pytest.approx((of_each.sum() / counts.sum()).item(), rel=1e-3)


def test_nothing_but_rows_of_weight_0(tmp_path):
    rows = [row | {"weight": 0} for row in toy.preferences("train", seed=5, count=3)]
    with pytest.raises(UserError, match=r"weighted\.jsonl \(train\): every row has weight 0"):
        assembled(tmp_path, f"datasets=[{write(tmp_path / 'weighted.jsonl', rows)}]", "loss=dpo")


def test_weights_of_labelled_completions_and_conversations(tmp_path):
    talk = [{"role": "user", "content": "Repeat: salt"}, {"role": "assistant", "content": "Sure! salt"}]
    rows = [
        {"prompt": "p", "completion": "a", "label": True, "weight": 2},
        {"prompt": "p", "completion": "b", "label": False, "weight": "0.5"},
        {"prompt": "p", "completion": "c", "label": False, "weight": ""},
        {"messages": talk, "weight": 0},
        {"prompt": "p", "completion": "d", "label": False, "weight": -1},
        {"prompt": "p", "completion": "e", "label": False, "weight": "heavy"},
        {"prompt": "p", "completion": "f", "label": False, "weight": 1e300},
        {"prompt": "p", "completion": "g", "label": False, "weight": 1e-320},
        {"prompt": "p", "completion": "h", "label": False, "score": -1e300},
    ]
    data = dataloader.read_file(tmp_path / write(tmp_path / "x.jsonl", rows))
    assert [record.get("weight") for record in UnpairedPreferenceDataLoader.records(data)] == [2, 0.5, None]
    assert [record.get("weight") for record in SFTDataLoader.records(data)] == [2, 0]
    assert data.bad.counts == {
        "'weight' is neither 0 nor from 1e-06 to 1e+06": 3,
        "'weight' is not a number": 1,
        "'score' is beyond 1e+09": 1,
    }


def test_data_without_weights_has_none_in_its_batches(tmp_path):
    """And the same records, and so tokens, as before there were weights."""
    assert next(assembled(tmp_path, "loss=dpo").loaders["train"].steps())[0].weights is None
    data = dataloader.read_file(tmp_path / "train.jsonl")
    assert all("weight" not in record for record in PairedPreferenceDataLoader.records(data))


# -------------------------------------------------------------------------------------------------------------- turns


def said(role, text):
    return {"role": role, "content": text}


TALK = [said("system", "Be brief."), said("user", "one"), said("assistant", "1"), said("user", "two")]


def test_every_turn_of_the_assistant_is_trained_on(tmp_path):
    """Each once, after what came before it; `targets` takes the last ones alone."""
    talks = [
        [*TALK, said("assistant", "2")],
        [*TALK, said("assistant", "II")],
        [said("user", "u"), said("assistant", "a")],
    ]
    file = write(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    data = dataloader.read_file(tmp_path / file)
    every = SFTDataLoader.records(data, train_on="turns")
    assert [(record["prompt"], record["completions"]) for record in every] == [
        (TALK[:2], ["1"]),
        (TALK, ["2"]),
        (TALK, ["II"]),
        (talks[2][:1], ["a"]),
    ]
    assert SFTDataLoader.records(data) == every[1:]


def test_a_turn_is_the_span_that_the_chat_template_gives_it(tmp_path):
    """With the token that ends it, and all that comes before: the tokens of all turns are the whole conversation's."""
    talk = [said("user", "Repeat: salt"), said("assistant", "Sure! salt"), said("user", "Repeat: hat")]
    talk += [said("assistant", "Bah. hat"), said("user", "Repeat: cat"), said("assistant", "Sure! cat")]
    file = write(tmp_path / "talk.jsonl", [{"messages": talk}])
    own = [f"datasets=[{file}]", "loss=sft", "template=chat", "++train_on=turns"]
    trainer = assembled(tmp_path, *own)
    loader, tokenizer = trainer.loaders["train"], trainer.tokenizer
    assert len(loader.rows) == 3
    whole = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
    for row, turn in zip(loader.rows, (1, 3, 5)):
        ids = row["prompt_ids"] + row["completion_ids"][0]
        assert ids == whole[: len(ids)] and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row["completion_ids"][0][:-1]) == talk[turn]["content"]
    assert len(ids) == len(whole)


def test_turns_are_for_single_completions(tmp_path):
    with pytest.raises(UserError, match="train_on=turns: loss=dpo does not read single completions"):
        assembled(tmp_path, "loss=dpo", "++train_on=turns")
