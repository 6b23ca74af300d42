"""All layouts give the same numbers as each other, and as a model's own forward pass over one sequence at a time."""

import pytest
import torch
from conftest import EOS_ID, collate, metrics, pairs, random_sae, tiny_gemma
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import LOSSES, assembled, run
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from data.batch import BATCH_LAYOUTS, count_positions, micro_batches
from modeling import attention
from modeling.attention import choose, mask_rule
from models import decoder_layers, recompute_activations, score, score_rewards
from sae import ResidualTap, pooled_features
from training.metrics import MetricAccumulator
from utils import UserError, prefetch

PACKED = ("packed", "shared_prefix")
ARCHITECTURES = {
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0, "head_dim": 8},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
    "gpt_neox": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "head_dim": 8},
}
WINDOWED = [name for name, options in ARCHITECTURES.items() if "sliding_window" in options]


def random_model(kind, implementation, **options):
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **ARCHITECTURES[kind], **options},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def separate_logps(model, record, completion):
    """Log-probabilities by the model's own forward pass over one sequence."""
    prompt, ids = record["prompt_ids"], record["completion_ids"][completion]
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)


def gradients(model, logps):
    """The gradients of a loss that gives each sequence another weight."""
    model.zero_grad()
    (logps * torch.linspace(-1, 1.5, len(logps))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close_gradients(found, expected):
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * max(1.0, scale), msg=name)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_equals_separate_forward_passes(kind):
    records = pairs(4)
    records[2]["prompt_ids"] = list(records[0]["prompt_ids"])
    own, ours = random_model(kind, "eager"), random_model(kind, "segments")
    sequences = [separate_logps(own, record, c) for c in (0, 1) for record in records]
    expected = gradients(own, torch.stack([logps.sum() for logps in sequences]))
    for layout in BATCH_LAYOUTS:
        scores = score(ours, collate(records, layout))
        torch.testing.assert_close(scores.token_logps, torch.cat(sequences), rtol=1e-5, atol=1e-5)
        assert_close_gradients(gradients(ours, scores.logps), expected)


def test_those_architectures_are_what_is_chosen_for():
    assert sorted(ARCHITECTURES) == sorted(attention.TESTED)


@torch.no_grad()
@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_matter_here(kind):
    """Without the sliding window, the numbers that the test above compares would differ."""
    records = pairs(4)
    wide = random_model(kind, "segments", sliding_window=64)
    close = torch.isclose(
        score(random_model(kind, "segments"), collate(records, "packed")).token_logps,
        score(wide, collate(records, "packed")).token_logps,
        rtol=1e-3,
    )
    assert not close.all()


tokens = st.integers(3, 63)
prompt = st.lists(tokens, min_size=0, max_size=9)
completion = st.lists(tokens, min_size=0, max_size=9)  # an EOS is added, so it has at least one token


@st.composite
def some_records(draw):
    prompts = draw(st.lists(prompt, min_size=1, max_size=2))
    count, sides = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return [
        {
            "prompt_ids": [1, *draw(st.sampled_from(prompts))],  # often the same prompt; the empty one is [BOS]
            "completion_ids": [[*draw(completion), EOS_ID] for _ in range(sides)],
            "index": i,
        }
        for i in range(count)
    ]


OWN, OURS = random_model("gemma2", "eager"), random_model("gemma2", "segments")


@settings(max_examples=15, deadline=None)
@given(some_records())
def test_layouts_are_equal_over_random_shapes(records):
    sae, tap = random_sae(), ResidualTap(decoder_layers(OURS)[0])
    sequences = [separate_logps(OWN, r, c) for c in range(len(records[0]["completion_ids"])) for r in records]
    expected = gradients(OWN, torch.stack([logps.sum() for logps in sequences]))
    features = []
    for layout in BATCH_LAYOUTS:
        batch = collate(records, layout)
        scores = score(OURS, batch, tap)
        torch.testing.assert_close(scores.token_logps, torch.cat(sequences), rtol=1e-5, atol=1e-5)
        features.append(pooled_features(sae, scores.residual, batch.read_lengths))
        torch.testing.assert_close(features[-1], features[0], rtol=1e-5, atol=1e-5)
        assert_close_gradients(gradients(OURS, scores.logps), expected)
        assert (batch.input_ids.flatten()[batch.position] == batch.target).all()
        if layout in PACKED:
            shapes = [(len(r["prompt_ids"]), [len(ids) for ids in r["completion_ids"]]) for r in records]
            assert batch.input_ids.numel() <= count_positions(shapes, layout)
            assert (batch.document >= 0).all(), "no padding"


def test_a_prompt_is_there_once():
    records = pairs(3)
    records[2]["prompt_ids"] = list(records[0]["prompt_ids"])
    own = sum(len(ids) for record in records for ids in record["completion_ids"])
    prompts = sum(len(record["prompt_ids"]) for record in records)
    once = prompts - len(records[2]["prompt_ids"])
    sizes = {layout: collate(records, layout).input_ids.numel() for layout in PACKED}
    assert sizes == {"packed": own + 2 * prompts, "shared_prefix": own + once}


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("layout", PACKED)
def test_segments_see_what_the_rule_says(layout, window):
    """Segment attention equals attention with the full mask of the rule, which flex attention also gets."""
    batch = collate(pairs(4), layout)
    width = batch.input_ids.shape[1]
    places = torch.arange(width)
    mask = mask_rule(batch, window)(torch.tensor(0), torch.tensor(0), places[:, None], places[None])
    query, key, value = (torch.randn(1, heads, width, 8) for heads in (4, 2, 2))
    bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    for softcap in (None, 2.0):
        whole = attention.attend(query, key, value, bias, 0.3, softcap, 0.0).transpose(1, 2)
        options = {"scaling": 0.3, "softcap": softcap, "sliding_window": window}
        parts, _ = attention.segment_attention(
            nn.Module(), query, key, value, None, blocks=attention.segment_blocks(batch), **options
        )
        torch.testing.assert_close(parts, whole)


def test_short_segments_of_like_lengths_go_together():
    sizes = [(300, 400), (20, 40), (22, 41), (20, 20), (310, 800), (19, 39)]
    assert attention.group_by_length(sizes) == [[3, 5, 1, 2], [0], [4]]
    assert attention.group_by_length([(200, 200)] * 3) == [[0, 1, 2]], "no padding"
    assert attention.group_by_length([(2000, 2000)] * 2) == [[0], [1]], "their scores would be too many to hold at once"
    assert attention.group_by_length([]) == []


def test_the_rule_by_hand():
    records = [
        {"prompt_ids": [1, 5], "completion_ids": [[6, 2], [7]], "index": 0},
        {"prompt_ids": [1], "completion_ids": [[8], [9]], "index": 1},
    ]
    batch = collate(records, "shared_prefix")
    places = torch.arange(8)
    seen = mask_rule(batch, None)(torch.tensor(0), torch.tensor(0), places[:, None], places[None]).int().tolist()
    assert batch.input_ids.tolist() == [[1, 5, 6, 2, 7, 1, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1]]
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],  # the rejected completion does not see the chosen one
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1],
    ]
    windowed = mask_rule(batch, 2)(torch.tensor(0), torch.tensor(0), places[:, None], places[None])
    assert windowed[4].int().tolist() == [0, 1, 0, 0, 1, 0, 0, 0], "a window counts positions: 2 and 1, rows 4 and 1"


@torch.no_grad()
def test_flex_attention_forward(monkeypatch):
    """Its forward pass also runs on a CPU. It is not compiled, since that is slow and needs a compiler."""
    monkeypatch.setattr(attention, "compiled_flex", lambda: attention.torch_flex_attention)
    records = pairs(3)
    expected = score(random_model("gemma2", "segments"), collate(records)).token_logps
    flex = random_model("gemma2", "flex")
    for layout in BATCH_LAYOUTS:
        torch.testing.assert_close(score(flex, collate(records, layout)).token_logps, expected, rtol=1e-5, atol=1e-5)


def test_flash_attention_is_told_where_documents_end():
    model = random_model("llama", "eager")
    model.config._attn_implementation = "flash_attention_2"
    batch = collate(pairs(2), "packed")
    told = attention.mask_inputs(model, batch)
    lengths = [length for length, _ in batch.segments]
    assert told["cu_seq_lens_q"].dtype == torch.int32
    assert told["cu_seq_lens_q"].diff().tolist() == lengths and told["cu_seq_lens_q"][-1] == batch.input_ids.shape[1]
    assert told["max_length_q"] == told["max_length_k"] == max(lengths)


@pytest.mark.parametrize("which", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(which):
    records, model = pairs(3), random_model("gemma2", "segments").train()
    plain = gradients(model, score(model, collate(records, "shared_prefix")).logps)
    recompute_activations(decoder_layers(model), which)
    assert_close_gradients(gradients(model, score(model, collate(records, "shared_prefix")).logps), plain)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_sampling_needs_no_other_attention(kind):
    ids, mask = torch.tensor([[0, 0, 1, 5], [1, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    drawn = [
        random_model(kind, name).generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        for name in ("eager", "segments", "flex")
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@torch.no_grad()
def test_reward_models_read_the_last_token_in_every_layout():
    config = tiny_gemma().config
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="segments").eval()
    rewards = [score_rewards(model, collate(pairs(4), layout)).rewards for layout in BATCH_LAYOUTS]
    for own in rewards[1:]:
        torch.testing.assert_close(own, rewards[0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- micro-batches

shape = st.tuples(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=2, max_size=2))


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(shape, min_size=1, max_size=20),
    layout=st.sampled_from(BATCH_LAYOUTS),
    ranks=st.integers(1, 4),
    least=st.integers(1, 5),
    max_tokens=st.none() | st.integers(1, 200),
)
def test_micro_batches(shapes, layout, ranks, least, max_tokens):
    shares = micro_batches(shapes, layout, ranks=ranks, least=least, max_tokens=max_tokens)
    assert len(shares) == ranks and len({len(own) for own in shares}) == 1, "all ranks run equally often"
    every = [part for own in shares for part in own]
    assert sorted(i for part in every for i in part) == list(range(len(shapes))), "each record once"
    for part in every:
        assert part == sorted(part)
        if max_tokens is not None and len(part) > 1:
            assert count_positions([shapes[i] for i in part], layout) <= max_tokens
    if max_tokens is None:
        assert len(shares[0]) <= least
        assert len(shapes) < ranks or all(every)
    assert shares == micro_batches(shapes, layout, ranks=ranks, least=least, max_tokens=max_tokens)


def test_micro_batches_of_like_work():
    shapes = [(1, [length]) for length in (90, 10, 10, 10, 10, 10, 10, 10, 10, 10)]
    loads = [
        sum(shapes[i][1][0] for i in own)
        for (own,) in micro_batches(shapes, "packed", ranks=2, least=1, max_tokens=None)
    ]
    assert loads == [90, 90]


def test_a_budget_of_tokens_changes_no_numbers(tmp_path, plain_run):
    whole = metrics(plain_run("fpo"))
    trainer = assembled(tmp_path, "loss=fpo", "exp_name=parts", "model.max_tokens=100")
    batches = [[batch.input_ids.numel() for batch in step] for step in trainer.loaders["train"].steps()]
    assert max(map(max, batches)) <= 100 and min(map(len, batches)) > 1
    parts = run(tmp_path, "loss=fpo", "exp_name=parts", "model.max_tokens=100")
    assert [line["loss/train"] for line in parts[1:-1]] == pytest.approx(
        [line["loss/train"] for line in whole[1:-1]], rel=1e-4
    )


def test_a_pair_longer_than_the_budget_goes_alone(tmp_path, plain_run):
    whole = metrics(plain_run("dpo"))
    trainer = assembled(tmp_path, "loss=dpo", "exp_name=alone", "model.max_tokens=1")
    assert {len(batch.index) for step in trainer.loaders["train"].steps() for batch in step} == {1}
    alone = run(tmp_path, "loss=dpo", "exp_name=alone", "model.max_tokens=1")
    losses = [[line["loss/train"] for line in lines if "loss/train" in line] for lines in (whole, alone)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("loss", sorted({*LOSSES} - {"sae"}))
def test_a_rank_without_records_takes_part_and_counts_for_nothing(tmp_path, loss):
    """A step with fewer records than ranks: this rank gets none."""
    trainer = assembled(
        tmp_path, f"loss={loss}", "model.batch_size=8", "n_examples=1" if "kto" not in loss else "seed=1"
    )
    loader = trainer.loaders["train"]
    loader.rank, loader.world_size = 8, 9
    step = next(loader.steps())
    assert [batch.index for batch in step] == [[]] and trainer.weight(step[0]) == 0
    trainer.before_step("train", 0, step)
    means = MetricAccumulator()
    losses = trainer.compute_loss(step[0], "train", means)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert means.read().keys() <= {"kl/train", "mean_reward/train"}
    assert all(p.grad is not None and not p.grad.any() for p in trainer.policy.parameters())


def test_the_next_item_is_made_meanwhile():
    made = []
    items = prefetch(made.append(i) or i for i in range(3))
    assert next(items) == 0
    assert list(items) == [1, 2] and made == [0, 1, 2]

    def breaks():
        yield 1
        raise UserError("a bad row")

    with pytest.raises(UserError, match="a bad row"):
        list(prefetch(breaks()))


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("loss", ["fpo", "kto"])
def test_a_run_is_the_same_in_every_layout(tmp_path, loss):
    runs = {
        layout: run(tmp_path, f"loss={loss}", f"model.layout={layout}", f"exp_name={layout}")
        for layout in BATCH_LAYOUTS
    }
    for layout in PACKED:
        for found, expected in zip(runs[layout], runs["padded"], strict=True):
            tied = abs(expected.get("rewards_train/margins", expected.get("rewards_eval/margins", 1))) < 1e-6
            left_out = [f"rewards_{split}/accuracies" for split in ("train", "eval") if tied]
            compared = {key: value for key, value in expected.items() if key not in left_out}
            assert {key: found[key] for key in compared} == pytest.approx(compared, rel=1e-3, abs=1e-4)


def test_a_reference_cache_serves_every_layout(tmp_path, capsys):
    run(tmp_path, "loss=dpo", "model.layout=padded", "exp_name=padded")
    assert "computing" in capsys.readouterr().out
    first = run(tmp_path, "loss=dpo", "model.layout=shared_prefix", "exp_name=shared")[0]
    said = capsys.readouterr().out
    assert "computing" not in said and said.count("reference cache: found") == 2
    assert first["rewards_eval/chosen"] == pytest.approx(0, abs=1e-5)


def test_a_run_is_the_same_again(tmp_path, plain_run):
    assert run(tmp_path, "loss=fpo") == metrics(plain_run("fpo"))


# ---------------------------------------------------------------------------------------------------- the choice

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "kind", "device", "dtype", "flash", "pairs", "chosen"),
    [
        ("auto/auto", "gemma2", CPU, "float32", False, True, "segments/shared_prefix"),
        ("auto/auto", "gemma2", CPU, "float32", False, False, "segments/packed"),
        ("auto/auto", "llama", GPU, "bfloat16", False, True, "flex/shared_prefix"),
        ("auto/auto", "llama", GPU, "bfloat16", True, True, "flex/shared_prefix"),
        ("auto/auto", "llama", GPU, "bfloat16", True, False, "flash_attention_2/packed"),
        ("auto/auto", "llama", GPU, "float32", True, True, "segments/shared_prefix"),
        ("auto/packed", "llama", GPU, "bfloat16", True, True, "flash_attention_2/packed"),
        ("flash_attention_2/auto", "llama", GPU, "bfloat16", True, True, "flash_attention_2/packed"),
        ("auto/padded", "gemma2", CPU, "float32", False, True, "eager/padded"),
        ("auto/padded", "llama", CPU, "float32", False, True, "sdpa/padded"),
        ("sdpa/auto", "llama", CPU, "float32", False, True, "sdpa/padded"),
        ("auto/auto", "gpt2", CPU, "float32", False, True, "sdpa/padded"),
        ("auto/auto", "gpt2", GPU, "bfloat16", True, True, "flash_attention_2/padded"),
    ],
)
def test_what_is_chosen(monkeypatch, capsys, wanted, kind, device, dtype, flash, pairs, chosen):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name if flash else None)
    config = AutoConfig.for_model(kind)
    found = choose(*wanted.split("/"), config, device, dtype, pairs=pairs)
    assert "/".join(found) == chosen
    assert all(name in capsys.readouterr().out for name in found[:1])


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [("sdpa/packed", "llama"), ("auto/packed", "gpt2"), ("sdpa/padded", "gemma2"), ("flex/auto", "llama")],
)
def test_what_does_not_go_together_is_refused(wanted, kind):
    with pytest.raises(UserError, match=r"go together: .*padded with eager"):
        choose(*wanted.split("/"), AutoConfig.for_model(kind), CPU, "float32", pairs=True)
