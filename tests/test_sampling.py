"""Sampling: what is drawn, that it is every prompt's own and complete, and what is left when it is killed."""

import contextlib
import gzip
import json
import signal
import sys
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import pytest
import torch
from conftest import BOS_ID, DATA, EOS_ID, REPO, command, on_ranks, tiny_gemma
from test_training import run as train_run
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from transformers import TopKLogitsWarper as TopK
from transformers import TopPLogitsWarper as TopP

import dataloader
import eval as evaluation
from data import toy
from judging.answers import read_answers
from launch import settings
from launch.policies import read_config
from sampling import samples
from sampling.backends import LocalPrompts, VLLMBackend
from sampling.generate import Decoding, DrawTokens, Request, Sample, finished, sample
from utils import UserError, flat

TINY = REPO / "assets/tiny"
FEW_ROWS = {"toy": {"test": 200}}  # all 2,000 take long to make
FAST = ["template=tulu", "++model.policy_dtype=float32", "++max_new_tokens=8", "++model.max_prompt_length=64"]
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")


def write(folder, *overrides, path=TINY, name="tiny"):
    """Run eval.py's sampling in this process, of a few toy prompts; the content of the file that it writes."""
    overrides = [*FAST, "datasets=[toy]", f"++samples_dir={folder}", f"exp_name={name}", *overrides]
    if not any(own.startswith(("++mode=", "++n_samples=")) for own in overrides):
        overrides.append("++n_samples=24")  # a benchmark is sampled whole
    config = read_config(path, overrides)
    with mock.patch.dict(dataloader.TOY_ROWS, FEW_ROWS):
        evaluation.write_samples(config, path, overrides)
    mode = "" if config.mode == "sample" else f"-{config.mode}"
    return json.loads((folder / f"{name}{mode}.json").read_text())


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(TINY).eval(), AutoTokenizer.from_pretrained(TINY)


def requests(tokenizer, texts, temperature=1.0):
    return [Request(tokenizer(f"\n<|user|>\n{text}\n<|assistant|>\n").input_ids, temperature) for text in texts]


TOY = [row["prompt"] for row in toy.preferences("test", seed=0, count=24)]


def instructions():
    """AlpacaEval's, from a published model's annotations."""
    with gzip.open(DATA / "alpaca_eval/annotations/gemma-7b-it.json.gz") as file:
        return json.load(file)


# ------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.7), (5, 1.0), (6, 0.8)])
def test_tokens_are_drawn_as_often_as_transformers_would(top_k, top_p):
    """8,000 draws of one distribution, against its own probabilities."""
    torch.manual_seed(0)
    scores, count, temperature = torch.randn(1, 20) * 2, 8000, 0.8
    settings = Decoding(max_new_tokens=1, seed=3, top_k=top_k, top_p=top_p)
    rows = [Request([1, 2], temperature, draw) for draw in range(count)]
    drawn = DrawTokens(rows, settings, 2, scores.device)(torch.zeros(count, 2), scores.expand(count, -1))
    warpers = [*([TopK(top_k)] if top_k else []), *([TopP(top_p)] if top_p < 1 else [])]
    expected = LogitsProcessorList(warpers)(None, scores / temperature).softmax(1)[0]
    assert (drawn > -torch.inf).sum(1).eq(1).all()
    frequency = drawn.argmax(1).bincount(minlength=20) / count
    assert frequency[expected == 0].sum() == 0
    assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_rows_have_temperatures_of_their_own():
    scores = torch.tensor([[0.0, 1.0, 0.9]]).expand(400, -1)
    rows = [Request([i], 0.0 if i % 2 else 100.0) for i in range(400)]
    tokens = DrawTokens(rows, Decoding(1, 0), 1, scores.device)(torch.zeros(400, 1), scores).argmax(1)
    assert tokens[1::2].eq(1).all()
    assert tokens[::2].bincount(minlength=3).min() > 40


def test_scores_that_are_no_numbers_are_refused():
    draw = DrawTokens([Request([1], 1.0)], Decoding(1, 0), 1, torch.device("cpu"))
    with pytest.raises(UserError, match="NaN"):
        draw(torch.zeros(1, 1), torch.full((1, 5), torch.nan))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_does_not_depend_on_the_batch(tiny, temperature):
    """Padding, order, other prompts: with and without them, the same tokens."""
    asked = requests(tiny[1], TOY, temperature)
    settings = Decoding(16, seed=1, top_p=0.95)
    whole = sample(*tiny, asked, settings, batch_size=16)
    assert len({len(r.prompt_ids) for r in asked}) > 3
    assert sample(*tiny, asked, settings, batch_size=1) == whole
    assert sample(*tiny, asked[5:9][::-1], settings, batch_size=3) == whole[5:9][::-1]


def test_greedy_samples_are_those_of_generate_on_one_prompt_at_a_time(tiny):
    model, tokenizer = tiny
    asked = requests(tokenizer, TOY[:8], 0.0)
    for request, drawn in zip(asked, sample(model, tokenizer, asked, Decoding(16, 0), batch_size=8)):
        ids = torch.tensor([request.prompt_ids])
        (expected,) = model.generate(ids, max_new_tokens=16, do_sample=False)[:, ids.shape[1] :].tolist()
        assert drawn.ids == expected
        assert drawn.finish_reason == "stop" and drawn.ids[-1] == tokenizer.eos_token_id


@real_data
def test_greedy_samples_of_real_prompts_do_not_depend_on_the_batch(tiny):
    """Lengths from a word to pages, cut at 400 tokens."""
    asked = requests(tiny[1], [row["instruction"] for row in instructions()[::20]], 0.0)
    asked = [Request(request.prompt_ids[:400], 0.0) for request in asked]
    settings = Decoding(8, 0)
    assert sample(*tiny, asked, settings, batch_size=16) == sample(*tiny, asked, settings, batch_size=1)


def test_seeds_and_draws_differ(tiny):
    asked = requests(tiny[1], TOY)
    one, other = (sample(*tiny, asked, Decoding(16, seed), batch_size=24) for seed in (1, 2))
    again = [Request(r.prompt_ids, 1.0, draw=1) for r in asked]
    third = sample(*tiny, again, Decoding(16, 1), batch_size=24)
    for a, b in ((one, other), (one, third)):
        assert sum(x != y for x, y in zip(a, b)) > 3


def test_the_models_own_generation_settings_change_nothing(tiny):
    """What Hub models bring along: temperatures, penalties, a length."""
    model, tokenizer = tiny
    asked = requests(tokenizer, TOY[:8], 1.0)
    plain = sample(model, tokenizer, asked, Decoding(16, 1), batch_size=8)
    own = model.generation_config
    model.generation_config = type(own)(
        eos_token_id=own.eos_token_id, temperature=0.1, top_k=1, do_sample=True, repetition_penalty=5.0, max_length=9
    )
    try:
        assert sample(model, tokenizer, asked, Decoding(16, 1), batch_size=8) == plain
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = own


def test_stop_texts_end_a_completion(tiny):
    model, tokenizer = tiny
    asked = requests(tokenizer, TOY, 0.0)
    free = sample(model, tokenizer, asked, Decoding(16, 0), batch_size=24)
    word = free[0].text.split()[-1]
    stopped = sample(model, tokenizer, asked, Decoding(16, 0, stop=(word,)), batch_size=24)
    assert sum(word in drawn.text for drawn in free) > 0
    for before, after in zip(free, stopped):
        assert after.text == before.text.split(word)[0].strip()
        assert after.finish_reason == "stop"
        assert before.ids[: len(after.ids)] == after.ids and (
            word not in before.text or len(after.ids) < len(before.ids)
        )


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("<s>", "dog cat", 3),
        ("cat<s>", "dog", 3),
        ("<s>!", "dog cat", 4),
        ("at", "dog c", 2),
        ("<s>?", "dog cat!", None),
        ("catx", "dog cat!", None),
    ],
)
def test_stop_texts_with_special_tokens(stop, text, count):
    """Generation ends at them, and so do the tokens; the text does not show them."""

    class Words:
        words = ("", "", "<s>", "dog ", "cat", "!")
        all_special_tokens: ClassVar = ["<s>"]

        def decode(self, ids, skip_special_tokens):
            return "".join(self.words[i] for i in ids if not (skip_special_tokens and i == 2))

    ids = [3, 4, 2, 5]
    drawn = finished([*ids, 0, 0], Words(), [1], Decoding(6, 0, stop=(stop,)))
    assert drawn == Sample(text, [*ids, 0, 0] if count is None else ids[:count], "stop" if count else "length")


def test_a_sample_that_is_cut_says_so(tiny):
    drawn = sample(*tiny, requests(tiny[1], TOY, 0.0), Decoding(3, 0), batch_size=24)
    assert {s.finish_reason for s in drawn} == {"length"} and all(len(s.ids) == 3 for s in drawn)


def test_never_is_never_drawn():
    class Tokenizer:
        pad_token_id, bos_token_id, eos_token_id = 0, BOS_ID, EOS_ID

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    asked = [Request([BOS_ID, i % 60 + 3], 1.0) for i in range(64)]
    drawn = sample(tiny_gemma(), Tokenizer(), asked, Decoding(8, 0), batch_size=64, never=[7, 9])
    tokens = {token for s in drawn for token in s.ids}
    assert len(tokens) > 20 and not tokens & {7, 9}


# --------------------------------------------------------------------------------------------------- what is written


def test_the_file_and_its_settings(tmp_path):
    content = write(tmp_path, "++temperature=0.5", "++top_k=7", "++stop=[xyz]", "seed=5")
    assert content.keys() == {"sampled_at", "sampled_from", "config", "sampling", "samples", "digest"}
    assert content["config"]["model"]["name_or_path"] == str(TINY)
    wanted = {"temperature": 0.5, "top_k": 7, "top_p": 0.95, "stop": ["xyz"], "seed": 5, "max_new_tokens": 8}
    assert wanted.items() <= content["sampling"].items()
    assert len(content["samples"]) == 24
    for entry in content["samples"]:
        assert entry["messages"][-1]["content"] in entry["prompt"] and entry["temperature"] == 0.5
    assert not list(tmp_path.glob("*.partial*"))


def test_several_samples_a_prompt(tmp_path):
    """Those of one prompt together; the first is what one alone would be."""
    one, three = (write(tmp_path / str(n), f"++samples={n}")["samples"] for n in (1, 3))
    assert len(three) == 72 and [s["draw"] for s in three[:6]] == [0, 1, 2, 0, 1, 2]
    assert three[::3] == one
    assert sum(a["policy"] != b["policy"] for a, b in zip(three[::3], three[1::3])) > 3


def test_a_finished_file_is_found(tmp_path, capsys):
    first = write(tmp_path)
    assert write(tmp_path, "++model.eval_batch_size=5") == first
    assert "there already" in capsys.readouterr().out
    assert write(tmp_path, "++temperature=0.3")["samples"] != first["samples"]


def test_a_finished_file_that_was_changed_is_named(tmp_path, capsys):
    """It is not taken for what the model wrote, nor written over."""
    content = write(tmp_path)
    content["samples"][3]["policy"] += " by hand"
    (tmp_path / "tiny.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tiny.json is not what eval.py wrote: .* Move it away"):
        write(tmp_path)
    assert json.loads((tmp_path / "tiny.json").read_text()) == content
    assert read_answers(tmp_path / "tiny.json").rows[3].answers["policy"].endswith("by hand")
    assert "was changed after eval.py wrote it" in capsys.readouterr().out
    (tmp_path / "tiny.json").write_text(json.dumps({key: content[key] for key in content if key != "digest"}))
    assert write(tmp_path)["samples"] == content["samples"]  # older files have none


def test_two_models_of_one_name_do_not_share_a_file(tmp_path, monkeypatch):
    """Refused before a weight is loaded; the same samples from a copy of the model are found."""
    ours = {"sampled_at": "now", "sampling": {"policy": "another"}, "samples": []}
    (tmp_path / "tiny.json").write_text(json.dumps(ours | {"sampled_from": str(tmp_path / "a" / "tiny")}))
    monkeypatch.setattr(evaluation, "local_backend", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(
        UserError, match=r"tiny.json holds samples from .*a/tiny, not from .*assets/tiny; \+\+exp_name="
    ):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]
    samples.require_own_file(tmp_path / "tiny.json", ours["sampling"], "b/tiny")
    for earlier in ("no JSON", json.dumps(ours)):
        (tmp_path / "tiny.json").write_text(earlier)
        samples.require_own_file(tmp_path / "tiny.json", {}, "b/tiny")


EVAL = """
import os, signal, sys
import dataloader
dataloader.TOY_ROWS |= {rows}
sys.argv = ["eval.py", *{arguments!r}]
{killer}
import eval
eval.main()
"""
KILLER = """
from sampling import samples
original, calls = samples.SampleLog.add, 0
def dies(log, drawn):
    global calls
    calls += 1
    if calls == 3:
        log.file.write(b'{"key": [3, 0, 0], "te')
        log.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    original(log, drawn)
samples.SampleLog.add = dies
"""


def script(*arguments, killer=""):
    """Arguments for Python to do what `write` does in a process of its own."""
    arguments = [f"--config-path={TINY}", *FAST, "datasets=[toy]", "++n_samples=24", "exp_name=tiny", *arguments]
    return ["-c", EVAL.format(rows=FEW_ROWS, arguments=arguments, killer=killer)]


def test_killed_and_run_again_equals_uninterrupted(tmp_path, monkeypatch):
    """kill -9 in the middle of a line; what is whole is kept, the rest is drawn, nothing twice."""
    arguments = ["++model.eval_batch_size=5", f"++samples_dir={tmp_path}"]
    done = command(*script(*arguments, killer=KILLER), check=False)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    partial = tmp_path / "tiny.json.partial.jsonl"
    kept = partial.read_text()
    assert kept.count("\n") == 11 and not kept.endswith("\n") and not (tmp_path / "tiny.json").exists()

    with pytest.raises(UserError, match=r"temperature: 1.0 there, 0.5 now"):
        write(tmp_path, "++temperature=0.5")
    assert partial.read_text() == kept + "\n"  # half a line is ended, nothing else

    drawn = []
    original = samples.SampleLog.add
    monkeypatch.setattr(samples.SampleLog, "add", lambda log, some: (drawn.extend(some), original(log, some)))
    resumed = write(tmp_path, "++model.eval_batch_size=5")
    assert len(drawn) == 14 and not partial.exists()
    assert resumed["sampled_at"] == json.loads(kept.splitlines()[0])["sampled_at"]
    assert resumed["samples"] == write(tmp_path / "whole", "++model.eval_batch_size=7")["samples"]


ONE = {(0, 0, 0): samples.Sample("text", [1], "stop")}


def opened(target, identity):
    """The log as a command finds it that stops at once."""
    found = []
    with contextlib.suppress(KeyboardInterrupt), samples.sample_log(target, identity) as log:
        found.append(log)
        raise KeyboardInterrupt
    return found[0]


@pytest.mark.parametrize("content", [{"figure": 1}, {"sampling": {"a": 1}, "sampled_at": "now", "samples": []}])
def test_killed_between_the_file_and_its_log(tmp_path, monkeypatch, content):
    """The file is there, whole: what is left of the log is in nobody's way, whatever the next command draws."""
    target, partial = tmp_path / "a.json", tmp_path / "a.json.partial.jsonl"
    with samples.sample_log(target, {"a": 1}) as log:
        log.add(ONE)
        with monkeypatch.context() as killed:
            killed.setattr(type(partial), "unlink", lambda _: None)
            log.publish(content)
        left = partial.read_bytes()
    assert json.loads(target.read_text()) == content
    for identity in ({"a": 1}, {"a": 2}):
        partial.write_bytes(left)
        log = opened(target, identity)
        assert not log.samples and log.finished == (content.get("sampling") == identity)
        assert not partial.exists()


def test_killed_before_the_file(tmp_path, monkeypatch):
    """All samples are in the log; an older file stands where the new one was to be."""
    target = tmp_path / "a.json"
    target.write_text('{"sampling": {"a": 0}}')
    monkeypatch.setattr(samples, "write_text", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit), samples.sample_log(target, {"a": 1}) as log:
        log.add(ONE)
        log.publish({})
    assert opened(target, {"a": 1}).samples == ONE
    with pytest.raises(UserError, match="a: 1 there, 2 now"):
        opened(target, {"a": 2})
    assert opened(target, {"a": 0} | {"a": 1}).samples == ONE  # the refusal changed nothing


def test_damaged_lines_are_named_and_drawn_again(tmp_path, capsys):
    """Without the line that says what they depend on, none of the samples is used."""
    target, partial = tmp_path / "a.json", tmp_path / "a.json.partial.jsonl"

    def begin():
        with contextlib.suppress(KeyboardInterrupt), samples.sample_log(target, {"a": 1}) as log:
            log.add(ONE | {(1, 0, 0): samples.Sample("word", [2], "stop")})
            raise KeyboardInterrupt

    for old, new, left in (("word", "wort", ONE), ('"a": 1', '"a": 2', {})):
        begin()
        assert partial.read_text().count(old) == 1
        partial.write_text(partial.read_text().replace(old, new))
        assert opened(target, {"a": 1}).samples == left
        assert "1 damaged or incomplete line(s), drawn again" in capsys.readouterr().out
        partial.unlink(missing_ok=True)


def test_a_finished_file_does_not_touch_the_log_of_another_setting(tmp_path):
    target = tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt), samples.sample_log(target, {"a": 2}) as log:
        log.add(ONE)
        raise KeyboardInterrupt
    target.write_text(json.dumps({"sampling": {"a": 1, "samples": 1}, "sampled_at": "now", "samples": []}))
    assert opened(target, {"a": 1, "samples": 1}).finished
    assert opened(target, {"a": 2}).samples == ONE


def test_a_command_that_draws_nothing_leaves_nothing(tmp_path):
    opened(tmp_path / "folder" / "a.json", {})
    with samples.sample_log(tmp_path / "b", {}) as log:  # of which no file is made
        log.add(ONE)
    with pytest.raises(UserError, match="vLLM is not installed"):
        write(tmp_path / "new" / "folder", "++backend=vllm")
    assert not list(tmp_path.iterdir())


def test_the_place_of_the_benchmarks_file_is_tried_first(tmp_path):
    (tmp_path / "alpaca_eval").write_text("")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/alpaca_eval.json").write_text('[{"instruction": "Hi", "output": "Ho"}]')
    with pytest.raises(UserError, match=r"cannot write .*alpaca_eval/tiny/model_outputs.json"):
        write(tmp_path, "++mode=alpacaeval", f"data_dir={tmp_path}/mirror")


def test_the_home_directory_in_every_key_that_is_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["cache_dir", "data_dir", "samples_dir", "compare_to", "model.name_or_path", "model.load_from"]
    paths += ["model.tokenizer_name_or_path", "model.reference_path", "sae.path", "probe"]
    overrides = ["++mode=features", *(f'++{key}="~/x"' for key in paths)]
    overrides += ['datasets=["~/a.jsonl"]', 'eval_datasets="~/b.jsonl"']
    values = flat(settings.typed(read_config(TINY, overrides)).model_dump())
    assert {values[key] for key in paths} == {"/home/me/x"}
    assert (values["datasets"], values["eval_datasets"]) == (["/home/me/a.jsonl"], "/home/me/b.jsonl")
    (data,) = dataloader.sources(settings.typed(read_config(TINY, overrides)), "test")
    with pytest.raises(UserError, match=r"The data set /home/me/b.jsonl is no file here"):
        data.check()


def test_two_processes_do_not_share_a_file(tmp_path):
    identity = {"temperature": 1}
    with samples.sample_log(tmp_path / "a.json", identity), pytest.raises(UserError, match="another process"):
        samples.SampleLog(tmp_path / "a.json", identity)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["++mode=dream"], "mode=dream: not one of sample, eval, features, label, rewards, alpacaeval"),
        (["++top_p=0"], "top_p=0: has to be above 0"),
        (["++samples=0", "++temperature=-1"], "temperature=-1: .*\nsamples=0: "),
        (["++temperature=null"], "temperature=null: only mode=mtbench"),
        (["++backend=vlm"], "backend=vlm: not one of transformers, vllm, openai"),
        (["++backend=vllm"], "vLLM is not installed"),
        (["++backend=openai"], "base_url=http://HOST:PORT/v1"),
        (["++backend=openai", "++base_url=http://me:secret@host/v1"], "without a key or a password"),
        (["++tensor_parallel=true"], "torchrun"),
        (["++seeds=3"], "seeds is read by nothing .did you mean 'seed'"),
        (["++mode=eval"], "mode=eval measures the policy of a run"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        if overrides == ["++mode=eval"]:
            evaluation.write_metrics(read_config(TINY, overrides), TINY, overrides)
        write(tmp_path, *overrides)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (["loss=sae", "++loss.d_sae=32", "++loss.k=4", "warmup_steps=0"], "loss=sae trained no language model"),
        (["loss=bradley-terry"], "loss=bradley-terry trained no language model"),
    ],
)
def test_what_writes_no_text_is_refused(tmp_path, loss, message):
    train_run(tmp_path, *loss, "exp_name=run")
    with pytest.raises(UserError, match=message):
        write(tmp_path, path=tmp_path / "run", name="run")
    assert not list(tmp_path.glob("*.json"))


def test_a_run_another_model_and_a_yaml(tmp_path):
    """LATEST, unless a model is named; the repo's own configuration with a model in it is one more YAML."""
    train_run(tmp_path, "loss=sft", "exp_name=run", "lr=1e-2")
    run = {"path": tmp_path / "run", "name": "run"}
    trained = write(tmp_path / "a", "eval_datasets=[toy]", **run)
    before = write(tmp_path / "b", "eval_datasets=[toy]", f"++model.name_or_path={TINY}", **run)
    loaded = write(tmp_path / "c", "eval_datasets=[toy]", f"++model.load_from={tmp_path}/run", **run)
    of_config = write(tmp_path / "d", "loss=sft", "model=tiny", path=REPO / "config")
    texts = [[entry["policy"] for entry in content["samples"]] for content in (trained, before, loaded, of_config)]
    assert texts[0] == texts[2] != texts[1] == texts[3]
    assert texts[1] == [entry["policy"] for entry in write(tmp_path / "e")["samples"]]


def test_prompts_that_are_cut_are_counted(tiny, capsys):
    config = settings.typed(read_config(TINY, ["++model.max_prompt_length=5"]))
    record = {"prompt": [{"role": "user", "content": "a b c d e f"}], "truncation_mode": "keep_start", "source": ""}
    (request,) = LocalPrompts(config, tiny[1], ()).requests([record], [1.0], 0)
    assert len(request.prompt_ids) == 5
    assert "1 of 1 prompts are cut to model.max_prompt_length=5" in capsys.readouterr().out


class SamplingParams:
    """Of vLLM's, the arguments that it documents (vllm/sampling_params.py)."""

    def __init__(self, *, temperature, top_p, top_k, max_tokens, stop, skip_special_tokens, seed, logit_bias):
        assert top_k >= -1 and 0 <= seed < 2**63 and logit_bias is None and skip_special_tokens is False
        assert (temperature, top_p, stop) == (0.0, 0.95, [])
        self.max_tokens = max_tokens


class LLM:
    """vLLM's offline engine as its documentation has it, over transformers' greedy decoding."""

    def __init__(self, *, model, dtype, seed, tensor_parallel_size, max_model_len):
        assert (dtype, seed, tensor_parallel_size, max_model_len) == ("float32", 1, 1, 64 + 8)
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert not use_tqdm
        return [self.one(prompt["prompt_token_ids"], own) for prompt, own in zip(prompts, sampling_params, strict=True)]

    def one(self, ids, parameters):
        limits = {"max_new_tokens": parameters.max_tokens, "do_sample": False}
        (drawn,) = self.model.generate(torch.tensor([ids]), **limits)[:, len(ids) :].tolist()
        reason = "stop" if drawn[-1] == self.tokenizer.eos_token_id else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(drawn), finish_reason=reason)])


def test_vllm_is_asked_for_the_same(tmp_path, monkeypatch):
    """What we hand to it and make of what comes back; test_vllm.py asks vLLM itself."""
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    monkeypatch.setattr(VLLMBackend, "CHUNK", 7)
    here, there = (write(tmp_path / name, f"++backend={name}", "++temperature=0") for name in ("transformers", "vllm"))
    assert there["samples"] == here["samples"] and len(there["samples"]) == 24


@pytest.mark.slow
def test_tensor_parallel_gives_the_same_samples(tmp_path):
    """One model over two processes: transformers' tp_plan, here on CPUs."""
    whole = write(tmp_path / "whole")
    out = on_ranks(2, *script(f"++samples_dir={tmp_path}", "++tensor_parallel=true"))
    assert out.count("24 samples in") == 1
    content = json.loads((tmp_path / "tiny.json").read_text())
    assert content["samples"] == whole["samples"] and content["sampling"] == whole["sampling"]


# ------------------------------------------------------------------------------------------------------- benchmarks


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """AlpacaEval's set in the Hub's layout, from the instructions and reference outputs of real annotations."""
    folder = tmp_path_factory.mktemp("mirror")
    rows = [{"instruction": r["instruction"], "output": r["output_1"]} for r in instructions()]
    (folder / "alpaca_eval.json").write_text(json.dumps(rows))
    return folder, rows


@real_data
@pytest.mark.parametrize("size", [32, 805])
def test_805_prompts_give_805_samples(tmp_path, alpaca, size):
    folder, rows = alpaca
    options = ["++mode=alpacaeval", f"data_dir={folder}", "++max_new_tokens=2", f"++model.eval_batch_size={size}"]
    content = write(tmp_path, *options)
    assert [entry["messages"][0]["content"] for entry in content["samples"]] == [row["instruction"] for row in rows]
    assert [entry["chosen"] for entry in content["samples"]] == [row["output"] for row in rows]
    handed = json.loads((tmp_path / "alpaca_eval/tiny/model_outputs.json").read_text())
    assert handed == [
        {"instruction": row["instruction"], "output": entry["policy"], "generator": "tiny"}
        for row, entry in zip(rows, content["samples"], strict=True)
    ]


@real_data
def test_arena_hard(tmp_path, capsys):
    content = write(tmp_path, "++mode=arenahard", f"data_dir={DATA}", "++max_new_tokens=2")
    lines = [json.loads(line) for line in (tmp_path / "arena-hard-v0.1/model_answer/tiny.jsonl").open()]
    questions = [json.loads(line) for line in (DATA / "arena_hard/question.jsonl").open()]
    assert [line["uid"] for line in lines] == [question["uid"] for question in questions]
    for line, question, entry in zip(lines, questions, content["samples"], strict=True):
        assert line.keys() == {"uid", "ans_id", "model", "messages", "tstamp"} and line["model"] == "tiny"
        user, assistant = line["messages"]
        assert user == {"role": "user", "content": question["prompt"]}
        assert assistant == {"role": "assistant", "content": {"answer": entry["policy"]}}
    assert len({line["ans_id"] for line in lines}) == len({entry["policy"] for entry in content["samples"]}) > 1
    assert f"-f {tmp_path}/arena-hard-v0.1/model_answer/tiny.jsonl -p arenahard --against" in capsys.readouterr().out


@real_data
def test_mt_bench_has_two_turns_and_temperatures_by_category(tmp_path):
    options = ["++mode=mtbench", f"data_dir={DATA}", "++samples=2", "++max_new_tokens=3"]
    content = write(tmp_path, *options)
    assert len(content["samples"]) == 160
    lines = [json.loads(line) for line in (tmp_path / "mt_bench/model_answer/tiny.jsonl").open()]
    questions = [json.loads(line) for line in (DATA / "mt_bench/question.jsonl").open()]
    published = json.loads((DATA / "mt_bench/reference_answer_gpt-4.jsonl").read_text().splitlines()[0])
    assert [line["question_id"] for line in lines] == [question["question_id"] for question in questions]
    temperatures = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    for number, (line, question) in enumerate(zip(lines, questions)):
        assert line.keys() == published.keys() and line["choices"][0].keys() == published["choices"][0].keys()
        for draw, choice in enumerate(line["choices"]):
            entry = content["samples"][2 * number + draw]
            assert (choice["index"], choice["turns"]) == (draw, entry["turns"]) and len(entry["turns"]) == 2
            assert entry["temperature"] == temperatures.get(question["category"], 0.0)
            assert (entry["policy"], entry["followups"]) == (entry["turns"][0], question["turns"][1:])
    greedy = [line["choices"] for line, q in zip(lines, questions) if q["category"] == "math"]
    assert all(first["turns"] == second["turns"] for first, second in greedy)
    explicit = write(tmp_path / "explicit", *options, "++samples=1", "++temperature=0.25")
    assert {entry["temperature"] for entry in explicit["samples"]} == {0.25}


def test_a_later_turn_follows_the_earlier_answers(tiny):
    """And is cut at its start, if anywhere: the question that is to be answered stays."""
    _, tokenizer = tiny
    record = {"prompt": [{"role": "user", "content": TOY[0]}], "truncation_mode": "keep_start", "source": ""}
    record |= {"followups": [TOY[1]], "completions": [], "benchmark": {}}
    talk = samples.Conversation(record, 0, 0.0, [], [samples.Sample("An answer.", [], "stop")])
    turn = samples.next_turn(talk)
    config = settings.typed(read_config(TINY, []))
    (request,) = LocalPrompts(config, tokenizer, ()).requests([turn], [0.0], 0)
    expected = f"<bos>\n<|user|>\n{TOY[0]}\n<|assistant|>\nAn answer.<eos>\n<|user|>\n{TOY[1]}\n<|assistant|>\n"
    assert request.prompt == expected
    config = settings.typed(read_config(TINY, ["++model.max_prompt_length=12"]))
    (request,) = LocalPrompts(config, tokenizer, ()).requests([turn], [0.0], 0)
    assert expected.endswith(tokenizer.decode(request.prompt_ids[1:]))
