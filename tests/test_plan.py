"""`++mode=plan`, against what is true of the models that it counts, and what of the defaults fits."""

import re
from types import SimpleNamespace

import pytest
import torch
from composition import composed
from conftest import REPO, collate, pairs, tiny_gemma
from omegaconf import OmegaConf

import models
from launch import plan, settings
from utils import UserError

CARD = 72e9  # bytes of an A100's 80 GB that a run may take


def planned(*overrides, ranks=1):
    config, classes = settings.check_config(composed([*overrides, "++mode=plan"]), modes=["plan"])
    return config, plan.make(config, classes, ranks)


def plan_of(*overrides, ranks=1):
    """Of the built-in model, on few records, which are counted faster."""
    few = ["++model.batch_size=2", "++model.max_length=96", "++model.max_prompt_length=32"]
    return planned("model=tiny", "datasets=[toy]", *few, *overrides, ranks=ranks)


def test_weights_gradients_and_optimiser_are_counted():
    model = models.load_model(REPO / "assets/tiny", "eager", torch.device("cpu"))
    size = sum(p.numel() for p in model.parameters())
    for optimiser, slots, temporary in (("RMSprop", 1, 1), ("AdamW", 2, 1), ("SGD", 0, 0)):
        _, found = plan_of("loss=dpo", f"optimizer={optimiser}", ranks=2)
        assert found.parameters == found.trained == size
        assert found.held["weights"] == found.held["gradients"] == 4 * size / 2
        assert found.held["optimiser"] == slots * 4 * size / 2
        assert sum(found.updating.values()) == temporary * 4 * size / 2  # of many tensors at once, as on a GPU
    assert not plan_of("loss=dpo", "++optimizer_options.foreach=false")[1].updating
    assert "live reference" in plan_of("loss=tdpo2")[1].held
    _, lora = plan_of("loss=tdpo2", "++model.use_peft=true", "++model.peft.lora_r=4")
    assert lora.parameters == size and lora.trained < size / 10 and "live reference" not in lora.held


def test_what_is_gathered_is_counted():
    """In bytes: what is computed with in 2 and gradients that are summed in 4."""
    _, found = plan_of("loss=dpo", "model.policy_dtype=bfloat16", ranks=2)
    model = models.skeleton(models.load_config(REPO / "assets/tiny"))
    layer = plan.count(models.decoder_layers(model)[0])
    head = plan.count(model.get_output_embeddings())
    assert found.parameters == 4 * layer + head + 128  # the last norm
    weights, gradients = head + 128 + 3 * layer, head + 128 + layer
    assert found.passing["gathered weights and their gradients"] == 2 * (weights + gradients) + 4 * layer
    assert found.passing["logits, a chunk at a time, and the head's gradient"] > 4 * head
    assert found.peak == sum(found.held.values()) + sum(found.passing.values())


def test_a_plan_says_what_its_columns_are(capsys):
    few = ["++model.batch_size=2", "++model.max_length=96", "++model.max_prompt_length=32", "++mode=plan"]
    for own in ("++nproc=2", "model.policy_dtype=bfloat16"):
        plan.print_plan(*settings.check_config(composed(["loss=dpo", *TINY, *few, own]), modes=["plan"]))
    on_cpu, on_gpu = re.split("^tiny: ", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    assert "on 2 ranks, in float32" in on_cpu and "on 1 rank, a GPU for each, in bfloat16" in on_gpu
    heads = r"memory of each rank, GB +.\s+forward and backward +.\s+optimiser's update"
    sums = re.search(r"together\D+([\d.]+)\D+([\d.]+)", on_gpu).groups()
    assert re.search(heads, on_gpu) and f"Each rank needs {max(sums, key=float)} GB" in on_gpu
    assert "this GPU" not in on_gpu


def test_hybrid_sharding_splits_within_a_node():
    eight, sixteen = (plan_of("loss=dpo", "++model.hybrid_sharding=true", ranks=ranks)[1] for ranks in (8, 16))
    assert eight.held == sixteen.held


def test_a_model_in_4_bits_is_whole_on_every_rank():
    own = ["loss=dpo", "++model.use_peft=true", "++model.load_in_4bit=true"]
    one, two = (plan_of(*own, ranks=ranks)[1] for ranks in (1, 2))
    assert one.held == two.held and one.held["weights"] < 4 * one.parameters
    assert "gathered weights and their gradients" not in two.passing


def test_activations_are_those_that_a_real_pass_keeps():
    """On the meta device as many bytes as on the CPU, where autograd says which tensors it saved."""
    config, found = plan_of("loss=dpo")
    batch = plan.largest_micro_batch(config.model, "shared_prefix", 1, pairs=True)
    real = batch.to("meta")
    for name in ("input_ids", "position_ids", "document", "branch"):
        setattr(real, name, torch.zeros(getattr(batch, name).shape, dtype=torch.long))
    counted = plan.kept_for_backward(models.load_model(REPO / "assets/tiny", "segments", torch.device("cpu")), real)
    assert found.passing["activations"] == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("which", [False, "full", "selective"])
def test_two_layers_of_each_kind_tell_what_all_keep(which):
    config, _ = plan_of("loss=dpo")
    own = config.model.model_copy(update={"activation_checkpointing": which})
    batch, model = collate(pairs()), tiny_gemma(layers=7)  # four of them with a window
    found, _ = plan.activations(model, own, batch)
    layers, products = models.decoder_layers(model), 0
    if which == "selective":
        with plan.Products(lambda: 1) as all_products:
            models.final_hidden_states(model, batch)
        products = all_products.size
    assert products == 0 or which == "selective"
    whole = plan.kept_for_backward(model, batch)  # `activations` has changed the model to recompute
    assert found == whole + products and len(layers) == 7


def test_checkpointing_and_ranks_need_less():
    sizes = {
        which: plan_of("loss=dpo", f"++model.activation_checkpointing={which}")[1].passing["activations"]
        for which in ("false", "selective", "full")
    }
    assert sizes["full"] < sizes["selective"] < sizes["false"]
    few = [plan_of("loss=dpo", "++model.batch_size=8", ranks=ranks)[1].passing["activations"] for ranks in (1, 4)]
    assert few[1] == pytest.approx(few[0] / 4, rel=0.1)


@pytest.mark.parametrize(("max_tokens", "positions"), [("null", 4 * 768), ("1000", 1000), ("2000", 2000), ("99", 768)])
def test_a_micro_batch_is_full(max_tokens, positions):
    """With as many positions as are allowed; but one record, of 768 at most, is never cut."""
    own = composed(["loss=dpo", "model=tiny", "++model.batch_size=8", f"++model.max_tokens={max_tokens}"])
    config = settings.typed(own)
    batch = plan.largest_micro_batch(config.model, "shared_prefix", 2, pairs=True)
    assert batch.input_ids.numel() == pytest.approx(positions, abs=3)


# ----------------------------------------------------------------------------------------- models that are not here


def found_for(*overrides):
    return plan.find(*settings.check_config(composed([*overrides, "++mode=plan"]), modes=["plan"]))


def test_a_directory_comes_before_what_is_known(monkeypatch):
    monkeypatch.setitem(plan.SHAPES["models"], "assets/tiny", {"model_type": "llama"})
    assert found_for("loss=dpo", "model=tiny", "datasets=[toy]")[0].model_type == "gemma2"


def test_an_unknown_model_is_looked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(settings, "fetch", lambda source, *_: asked.append(source) or REPO / "assets/tiny")
    found, _ = found_for("loss=dpo", "model=base", "model.name=x", "model.name_or_path=a/b")
    assert found.model_type == "gemma2" and asked == ["a/b"]


def test_saes_that_are_known_are_found_without_a_file():
    several = [f"+sae@sae.parts.{name.replace('-', '_')}={name}" for name in ("gemma2b", "gemma2b-mlp")]
    architecture, reading = found_for("loss=fpo", *GEMMA, "~sae", *several)
    assert architecture.num_hidden_layers == 26
    assert reading.places == [(25, "residual"), (25, "mlp")]
    assert [(sae.d_in, sae.d_sae, sae.W_enc.is_meta) for sae in reading.sae.members] == [(2304, 16384, True)] * 2
    architecture, _ = found_for("loss=bradley-terry-sae", *GEMMA, "sae=gemma2b-l12")
    assert architecture.num_hidden_layers == 13


GEMMA = ["model=gemma2b", "datasets=[toy]"]
TINY = ["model=tiny", "datasets=[toy]"]
TWO = ["~sae", "+sae@sae.parts.a=tiny", "+sae@sae.parts.b=tiny"]
REFUSED = {  # as a run refuses it
    "layer": ([*TINY, "loss=bradley-terry-sae", "++sae.layer=9"], r"sae\.layer=9: tiny has layers 0 to 3"),
    "layer of a known one": ([*TINY, "loss=fpo", "sae=gemma2b"], r"sae\.layer=25: tiny has layers 0 to 3"),
    "width": (
        ["model=smollm2-135m", "datasets=[toy]", "loss=fpo", "sae=gemma2b"],
        r"params\.npz: reads vectors of 2304 numbers, but smollm2-135m has 576",
    ),
    "two": ([*TINY, "loss=bradley-terry-sae", *TWO], "rewards the features of one SAE .* has 2 SAEs"),
    "hook": ([*GEMMA, "loss=bradley-terry-sae", "sae=gemma2b-mlp"], "has one at hook=mlp"),
    "what its files say": ([*GEMMA, "loss=fpo", "++sae.layer=3"], r"sae\.layer=3, but .*params\.npz says 25"),
    "format": ([*GEMMA, "loss=fpo", "++sae.format=gema_scope"], "did you mean 'gemma_scope'"),
    "no weights": ([*GEMMA, "loss=dpo", "++model.load_from=nowhere"], r"model\.load_from=nowhere: no policy\.pt"),
    "no reward model": ([*TINY, "loss=ppo", "loss.reward=assets/tiny"], r"loss\.reward=assets/tiny: no reward model"),
    "no reward": (
        [*TINY, "loss=ppo", "loss.reward=nowhere"],
        r"loss\.reward=nowhere: no policy\.pt",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_refuses_what_a_run_refuses(name):
    overrides, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        found_for(*overrides)


def test_a_plan_refuses_more_tokens_than_there_are_positions():
    with pytest.raises(UserError, match=r"max_length=4096: more tokens than the model in huggyllama/llama-7b has"):
        planned("loss=dpo", "model=llama7b", "model.max_length=4096")


def test_saes_of_the_config_are_known():
    paths = {name: OmegaConf.load(REPO / f"config/sae/{name}.yaml").path for name in settings.choices_of("sae")}
    assert {name for name, path in paths.items() if path not in plan.SHAPES["saes"]} == {"tiny"}


# ------------------------------------------------------- what fits (test_docs.py has the commands of the docs)

PARAMETERS = {  # in millions, as their makers state them, or count them in the Hub's model cards
    "gemma2b": 2614, "gemma9b": 9242, "gemma3-1b": 1000, "gemma3-270m": 268, "llama7b": 6738, "llama13b": 13016,
    "llama30b": 32529, "llama65b": 65286, "llama3.1-8b": 8030, "mistral7b": 7242, "zephyr-sft-beta": 7242,
    "qwen-2-1.5b": 1544, "qwen3-8b": 8191, "pythia1-4b": 1415, "pythia2-8b": 2775, "pythia6-9b": 6857,
    "pythia12-0b": 11846, "smollm2-135m": 135,
}  # fmt: skip
made = {}


def plan_for_cards(raw, ranks):
    """The plan of a command, made once for all that take the same."""
    config, classes = settings.check_config(OmegaConf.merge(raw, {"mode": "plan"}), modes=["plan"])
    model = config.model.model_copy(update={"load_from": None, "name": ""})
    config = config.model_copy(update={"model": model})
    trainer, needs = classes.trainer, classes.binding.needs & {"sae", "live_reference"}
    kind = (trainer.sides, trainer.is_reward, trainer.has_sae_head)
    same = (repr(model), config.optimizer, kind, needs, repr(config.sae), ranks)
    if same not in made:
        made[same] = plan.make(config, classes, ranks)
    return made[same]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_models_defaults_fit_cards_of_80_gb(name):
    """With DPO; the largest takes two nodes. And its shape makes as many parameters as it has."""
    files = (OmegaConf.load(REPO / f"config/model/{part}.yaml") for part in ("base", name))
    raw = composed(["loss=dpo", "model=tiny"])
    raw.model = {key: value for key, value in OmegaConf.merge(*files).items() if key != "defaults"}
    found = plan_for_cards(raw, 16 if name == "llama65b" else 8)
    assert round(found.parameters / 1e6) == PARAMETERS[name]
    assert found.peak < CARD


def test_shapes_of_all_models_of_the_config_are_known():
    names = settings.choices_of("model")
    of = {name: OmegaConf.load(REPO / f"config/model/{name}.yaml").name_or_path for name in names}
    shapes = {name: plan.SHAPES["models"].get(source) for name, source in of.items()}
    for name, shape in shapes.items():
        stem = re.sub("-it$|-instruct$|_instruct$", "", name)
        windowless = {**shapes[stem], "sliding_window": None} if shapes[stem] else None
        assert name == "tiny" or (stem in PARAMETERS and shape in (shapes[stem], windowless)), name


@pytest.mark.parametrize(("size", "expected"), [(6.7e9, "full"), (2.8e9, False)])
def test_large_models_recompute_their_activations(size, expected):
    model = SimpleNamespace(num_parameters=lambda: size)
    assert settings.typed(composed(["loss=dpo", "model=llama7b"])).model.activation_checkpointing == "auto"
    assert models.checkpointing("auto", model) == expected
    assert models.checkpointing("selective", model) == "selective"
