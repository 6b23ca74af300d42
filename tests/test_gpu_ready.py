"""What would crash, be wrong or take too much memory on a GPU, shown on a CPU."""

import contextlib
import errno
import fcntl
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, collate, pairs, replace_compile, tiny_gemma
from safetensors.torch import load_file
from test_plan import plan_of
from test_training import assembled, run, settle
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import models
from distributed import parallel
from launch import assembly, plan, settings
from modeling import attention
from modeling.attention import block_mask
from modeling.head import add_product, in_fp32, project
from training.checkpoint import Run
from training.loop import BasicTrainer
from training.metrics import MetricAccumulator
from utils import UserError, open_json_lines


def built(tmp_path, *overrides, folder=REPO / "assets/tiny"):
    """The model in a folder, as a run with these overrides has it."""
    raw, _ = settle(tmp_path, "loss=sft", *overrides)
    config, _ = settings.check_config(raw)
    return assembly.build_model(config.model, "segments", 0, folder)


# ------------------------------------------------------------------------------------------------------ checkpointing


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces, and then runs the graph as it is: nothing is translated into machine code."""
    real = torch.compile
    replace_compile(monkeypatch, lambda function, **_: real(function, backend="eager", dynamic=False))
    torch._dynamo.reset()


@pytest.mark.usefixtures("traced")
def test_checkpointing_keeps_as_little_of_compiled_layers_that_fsdp_splits(tmp_path):
    tiny_gemma(layers=1).save_pretrained(tmp_path)
    batch, kept = collate(pairs(), "packed"), []
    for own in ([], ["activation_checkpointing=full"], ["activation_checkpointing=full", "compile=true"]):
        model = built(tmp_path, "model.policy_dtype=bfloat16", *(f"model.{key}" for key in own), folder=tmp_path)
        kept.append(plan.kept_for_backward(model, batch))
    assert kept[2] == kept[1] < kept[0] / 2


def test_selective_checkpointing_of_fused_operations_is_refused(tmp_path):
    with pytest.raises(UserError, match="selective keeps the results of single operations, which"):
        built(tmp_path, "model.compile=true", "model.activation_checkpointing=selective")


# ------------------------------------------------------------------------------------------------------- compiled code


@pytest.mark.parametrize(("hook", "compiled"), [("mlp", [0, 1, 3]), ("residual", [0, 1, 2, 3])])
def test_layers_with_a_tap_inside_are_not_compiled(tmp_path, monkeypatch, hook, compiled):
    """Compiled code calls no hook that was added later."""
    found = []
    replace_compile(monkeypatch, lambda function, **_: found.append(function) or function)
    trainer = assembled(tmp_path, "loss=fpo", f"sae.hook={hook}", "model.compile=true")
    layers = models.decoder_layers(trainer.policy)
    assert [layers.index(own.__self__) for own in found if hasattr(own, "__self__")] == compiled


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs of compiled functions, which run as they are, on a CPU too."""
    counter, real = CompileCounter(), torch.compile
    replace_compile(monkeypatch, lambda function, **options: real(function, backend=counter, **options))
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)  # for its gradients
    compiled_flex = attention.compiled_flex
    compiled_flex.cache_clear()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):  # its own, 8, takes longer to reach
        yield counter
    compiled_flex.cache_clear()


def test_flex_attention_stays_compiled_and_right(graphs):
    """Over rows of any length, both windows, with and without gradients; LoRA on q and v has none of the keys."""
    flex, generator = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flex")), torch.Generator()
    heads, counts = {"q": 4, "k": 2, "v": 2}, []
    for records in (1, 18, 30):
        batch = collate(pairs(records), "shared_prefix")
        padded, width = attention.whole_blocks(flex, batch), batch.input_ids.shape[1]
        masks, blocks = attention.BlockMasks(padded), attention.segment_blocks(batch)
        for window, own in ((None, ""), (4, "qv")):
            options = {"scaling": 0.5, "softcap": 5.0, "sliding_window": window}
            rows = [
                torch.randn(1, count, padded.input_ids.shape[1], 8, generator=generator) for count in heads.values()
            ]
            tensors = [row.requires_grad_(name in own) for row, name in zip(rows, heads)]
            found = attention.flex_attention(None, *tensors, None, block_masks=masks, **options)[0][:, :width]
            cut = [tensor[:, :, :width] for tensor in tensors]
            expected, _ = attention.segment_attention(None, *cut, None, blocks=blocks, **options)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            if trained := [tensor for tensor in tensors if tensor.requires_grad]:
                weights = torch.randn(expected.shape, generator=generator)
                gradients = [torch.autograd.grad((output * weights).sum(), trained) for output in (found, expected)]
                torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        counts.append(graphs.frame_count)
    assert counts == [2, 4, 4]


def test_flex_attention_is_no_part_of_a_layers_graph(monkeypatch, graphs):
    """There the soft-cap would be a variable, and torch would compute all scores."""
    asked = []

    def kernel(query, *_, score_mod, **_options):
        asked.append((score_mod, torch.compiler.is_compiling()))
        return query

    monkeypatch.setattr(attention, "compiled_flex", lambda: kernel)
    masks = attention.BlockMasks(collate(pairs(), "packed"), {None: None})

    def layer(x, softcap):
        return (
            attention.flex_attention(None, x, x, x, None, scaling=0.5, softcap=softcap, block_masks=masks)[0] + x.sum()
        )

    torch.compile(layer, dynamic=True)(torch.randn(1, 2, 4, 8), 5.0)
    assert asked == [(attention.soft_capped(5.0), False)] and graphs.frame_count


@torch.no_grad()
def test_saes_are_trained_on_rows_that_are_padded_to_whole_blocks(tmp_path, monkeypatch):
    trainer = assembled(tmp_path, "loss=sae", "loss.d_sae=64", "loss.k=4", "loss.batch_tokens=106", "n_eval_examples=2")
    expected = trainer.evaluate()
    monkeypatch.setattr(attention, "compiled_flex", lambda: attention.torch_flex_attention)
    trainer.policy.config._attn_implementation = "flex"
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-4)


def test_masks_are_made_for_the_windows_of_the_layers_alone(monkeypatch):
    made = []
    monkeypatch.setattr(attention, "compiled_flex", lambda: attention.torch_flex_attention)
    monkeypatch.setattr(attention, "block_mask", lambda batch, window: made.append(window) or block_mask(batch, window))
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, attn_implementation="flex",
    )  # fmt: skip
    with torch.no_grad():
        models.score(MistralForCausalLM(config).eval(), collate(pairs(), "packed"))
    assert made == [4]


@pytest.mark.parametrize(("kilobytes", "chosen"), [(163, "flex"), (99, "segments")])  # an A100, an L40S
def test_wide_heads_need_shared_memory_for_flex_attention(monkeypatch, kilobytes, chosen):
    properties = SimpleNamespace(shared_memory_per_block_optin=kilobytes << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    wide = AutoConfig.for_model("gemma2", head_dim=256)
    assert attention.choose("auto", "auto", wide, torch.device("cuda"), "bfloat16", pairs=True)[0] == chosen
    assert attention.choose("auto", "auto", LlamaConfig(), torch.device("cuda"), "bfloat16", pairs=True)[0] == "flex"


# ------------------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("implementation", ["flex", "flash_attention_2"])
def test_a_plan_runs_no_kernel_of_a_gpu(monkeypatch, implementation):
    monkeypatch.setattr(models, "choose_attention", lambda *_args, **_options: (implementation, "packed"))
    assert plan_of("loss=dpo")[1].passing["activations"] > 0


def test_a_plan_counts_what_a_fused_kernel_keeps():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    batch, kept = collate([record | {"completion_ids": [[5] * 9]} for record in pairs()]), []
    for name in ("sdpa", "outline"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attn_implementation=name))
        kept.append(plan.kept_for_backward(model, batch))
    assert kept[1] == pytest.approx(kept[0], rel=0.05)


# ----------------------------------------------------------------------------------------------------- kinds of tensors


def test_ppo_takes_steps_of_many_tensors_at_once(tmp_path):
    """Also where FSDP splits the policy and not the value head; a state of these is taken up where nothing is split."""
    own = ["loss=ppo", "++optimizer_options.foreach=true"]
    run(tmp_path, *own, "n_examples=16", "model.cpu_offload=true")
    lines = run(tmp_path, *own, "n_examples=24", "model.cpu_offload=false")
    assert lines[-1]["step"] == 3
    states = [load_state(tmp_path / f"ppo_tiny/state/step-00000000{step}") for step in (2, 3)]
    slots = {name for name in states[0] if name.startswith("optimizer.exp_avg_sq:")}
    assert states[0].keys() == states[1].keys() and len(slots) == sum(name.startswith("model.") for name in states[0])
    for name in slots:  # as large as 0.999 of what it was, so it is the same parameter's
        assert (states[1][name] >= 0.998 * states[0][name]).all()


def load_state(folder):
    """The tensors of a state that one rank wrote."""
    return load_file(folder / "rank-00001.safetensors")


def test_bf16_weights_that_would_not_change_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.weights_dtype=bfloat16, lr=5e-06: a step would change next to no"):
        assembled(tmp_path, "loss=sft", "model.weights_dtype=bfloat16", "lr=5e-6")
    assembled(tmp_path, "loss=sft", "model.weights_dtype=bfloat16", "lr=1e-3")


# ------------------------------------------------------------------------------------------- a model's own logits


@pytest.mark.parametrize(
    ("kind", "options"), [("cohere", {"logit_scale": 0.0625}), ("granite", {"logits_scaling": 8.0})]
)
def test_a_model_that_scales_its_logits_is_refused(tmp_path, kind, options):
    tokenizer = AutoTokenizer.from_pretrained(REPO / "assets/tiny")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=4, num_key_value_heads=4, **options)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = [f"model.name_or_path={tmp_path}/model", "model.max_length=256", "model.max_prompt_length=128"]
    with pytest.raises(
        UserError, match=rf"{tmp_path}/model: {type(model).__name__} cannot be trained here. .* nats away"
    ):
        assembled(tmp_path, "loss=sft", *folder)


# ------------------------------------------------------------------------------------------------------- file systems


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with Run(tmp_path / "run").writing():
        pass
    open_json_lines(tmp_path / "lines.jsonl").close()
    assert capsys.readouterr().out.count("no locks on this file system (Function not implemented)") == 2


# -------------------------------------------------------------------------------------------------- a GPU's tensors

ELSEWHERE = torch.device("meta")  # of a GPU that is not there, torch can compute no gradients


class Elsewhere(FakeTensorMode):
    """Tensors without values on another device. One that is on the CPU is refused beside them, and so is waiting for a
    value. Counts the operations."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[str(function)] += 1
        return super().__torch_dispatch__(function, types, args, kwargs or {})

    def move(self, tensor):
        return self.from_tensor(tensor.detach()).to(ELSEWHERE)

    def move_all(self, module):
        """All tensors that the module holds."""
        moved = {}  # a tied one stays one
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        if id(tensor) not in moved:
                            own = self.move(tensor)
                            moved[id(tensor)] = torch.nn.Parameter(own) if tensor.requires_grad else own
                        held[name] = moved[id(tensor)]


LOSSES = ["loss=fpo", "loss=ppo"]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_compute_where_the_model_is(tmp_path, monkeypatch, loss):
    trainer = assembled(tmp_path, loss)
    batch = trainer.prepare_batches("train", next(trainer.loaders["train"].steps()))[0]
    trainer.device = ELSEWHERE
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr(parallel, "sum_over_ranks", lambda values: values)
    with Elsewhere() as mode:
        for module in filter(None, (trainer.module, trainer.sae)):
            mode.move_all(module)
        trainer.before_step("train", 0, [batch])
        trainer.compute_loss(batch, "train", MetricAccumulator()).sum().backward()
        assert all(p.grad is not None and p.grad.device == ELSEWHERE for p in trainer.module.parameters())


def test_feature_weights_are_where_the_model_is(tmp_path, monkeypatch):
    raw, _ = settle(tmp_path, "loss=fpo", "+loss.feature_weights=[{index: 3, weight: 2.0}]")
    config, classes = settings.check_config(raw)
    monkeypatch.setattr(assembly, "load_data", lambda *_: SimpleNamespace(loaders={}))
    monkeypatch.setattr(parallel, "device", lambda: ELSEWHERE)
    inputs = assembly.read_inputs(config, classes, settings.find_paths(config, classes.binding.needs))
    assert inputs.binding.options["feature_drift"]["feature_weights"].device == ELSEWHERE


def test_logits_gradients_and_rewards_are_summed_in_fp32_where_a_device_can():
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(64, 8).bfloat16()
    with Elsewhere() as mode:
        logits = project(mode.move(hidden), mode.move(weight), mode.move(weight[:, 0]))
    assert logits.dtype == torch.float32 and mode.operations["aten.mm.dtype"] == 1
    with Elsewhere() as mode:
        gradient, rows = mode.move(hidden.T), mode.move(hidden)
        first = add_product(None, gradient, rows)
        total = add_product(first, gradient, rows)
    assert total is first and total.dtype == torch.float32  # the product is added where it is made
    assert mode.operations["aten.addmm.dtype_out"] == 1
    head = torch.nn.Linear(8, 1, bias=False).bfloat16()
    assert torch.equal(in_fp32(head, hidden), hidden.float() @ head.weight.float().T)


def test_ranks_draw_other_dropout_masks_and_a_resumed_one_the_same(monkeypatch):
    trainer, drawn = SimpleNamespace(config=SimpleNamespace(seed=1)), []
    for rank in (0, 1, 0):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        BasicTrainer.seed_step(trainer, 3)
        drawn.append(torch.rand(8))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "high"), ("float32", "highest")])
def test_adapters_of_a_4_bit_model_multiply_fast(tmp_path, dtype, precision):
    """They are in fp32, and what they multiply comes in `policy_dtype`."""
    own = ["loss=dpo", "++model.use_peft=true", "++model.load_in_4bit=true", f"model.policy_dtype={dtype}"]
    try:
        assembled(tmp_path, *own, "n_examples=8", "n_eval_examples=4")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
