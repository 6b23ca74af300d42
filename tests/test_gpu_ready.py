"""What would crash, be wrong or take too much memory on a GPU, shown on a CPU."""

import pytest
import torch
from conftest import REPO, collate, pairs, tiny_gemma
from test_training import settle

from launch import assembly, plan, settings
from utils import UserError


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
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend="eager", dynamic=False))
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
