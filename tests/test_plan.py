"""`++mode=plan`, against what is true of the models that it counts."""

import pytest
import torch
from conftest import REPO
from hydra import compose, initialize_config_dir

import models
from launch import plan, settings


def plan_of(*overrides, ranks=1):
    overrides = ["model=tiny", "datasets=[toy]", "++mode=plan", *overrides]
    with initialize_config_dir(str(REPO / "config"), version_base=None):
        config, classes = settings.check_config(compose("config", overrides=overrides), modes=["plan"])
        paths = settings.find_paths(config, classes.binding.needs)
    return config, plan.make(config, classes, paths, ranks)


def test_weights_gradients_and_optimiser_are_counted():
    model = models.load_model(REPO / "assets/tiny", "eager", torch.device("cpu"))
    size = sum(p.numel() for p in model.parameters())
    for optimiser, slots in (("RMSprop", 1), ("AdamW", 2), ("SGD", 0)):
        _, found = plan_of("loss=dpo", f"optimizer={optimiser}", ranks=2)
        assert found.parameters == found.trained == size
        assert found.memory["weights"] == found.memory["gradients"] == 4 * size / 2
        assert found.memory["optimiser"] == slots * 4 * size / 2
    assert "live reference" in plan_of("loss=tdpo2")[1].memory
    _, lora = plan_of("loss=tdpo2", "++model.use_peft=true", "++model.peft.lora_r=4")
    assert lora.parameters == size and lora.trained < size / 10 and "live reference" not in lora.memory


def test_activations_are_those_that_a_real_pass_keeps():
    """On the meta device as many bytes as on the CPU, where autograd says which tensors it saved."""
    config, _ = plan_of("loss=dpo", "++model.batch_size=2", "++model.max_length=96", "++model.max_prompt_length=32")
    batch = plan.longest_micro_batch(config.model, "shared_prefix", 1, pairs=True)
    real = batch.to("meta")
    for name in ("input_ids", "position_ids", "document", "branch"):
        setattr(real, name, torch.zeros(getattr(batch, name).shape, dtype=torch.long))
    counted = plan.kept_for_backward(models.load_model(REPO / "assets/tiny", "segments", torch.device("cpu")), real)
    planned = plan_of("loss=dpo", "++model.batch_size=2", "++model.max_length=96", "++model.max_prompt_length=32")[1]
    assert planned.memory["activations"] == pytest.approx(counted, rel=0.02)


def test_checkpointing_and_ranks_need_less():
    sizes = {
        which: plan_of("loss=dpo", f"++model.activation_checkpointing={which}")[1].memory["activations"]
        for which in ("false", "selective", "full")
    }
    assert sizes["full"] < sizes["selective"] < sizes["false"]
    one, four = (plan_of("loss=dpo", ranks=ranks)[1].memory["activations"] for ranks in (1, 4))
    assert four == pytest.approx(one / 4, rel=0.1)
