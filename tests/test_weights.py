"""Weights of other architectures: read as transformers reads them, written as it writes them."""

import random
from pathlib import Path

import pytest
import torch
import transformers
from conftest import fuzzed
from hypothesis import given
from hypothesis import settings as chosen
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

import models
from modeling.weights import PolicyFile, open_weights, write_weights
from utils import UserError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
KINDS = {
    "GPTNeoX": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16},
    "Gemma3": {"head_dim": 16},
    "Phi3": {},
    "Olmo2": {},
    "Qwen3Moe": {"head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 4},
}


def made(kind: str) -> PreTrainedModel:
    """A small model of an architecture, with random weights. Gemma3 is the one that also reads pictures."""
    config_class = getattr(transformers, f"{kind}Config")
    if kind == "Gemma3":
        config = config_class(text_config=SIZES | KINDS[kind], vision_config=VISION, mm_tokens_per_image=1)
    else:
        config = config_class(**SIZES | KINDS[kind])
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("kind", KINDS)
def test_read_and_written_as_transformers_does(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    ours = models.load_model(tmp_path / "theirs", "eager", torch.device("cpu"))
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert torch.equal(ours(input_ids=ids).logits, expected)
        (tmp_path / "ours").mkdir()
        write_weights(ours, tmp_path / "ours", ["hub"])
        assert names_in(tmp_path / "ours") == names_in(tmp_path / "theirs")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        ours_again = models.load_model(tmp_path / "ours", "eager", torch.device("cpu"))
        assert torch.equal(ours_again(input_ids=ids).logits, expected)


@chosen(fuzzed, max_examples=max(1, fuzzed.max_examples // 10))
@given(st.integers(0, 2**40))
def test_a_damaged_policy_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    draw, file = random.Random(seed), tmp_path_factory.getbasetemp() / "policy.pt"
    torch.save({"state": {"a": torch.ones(3, 4), "b": torch.zeros(5)}, "step_idx": 1}, file)
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 3, 30])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content)[: draw.choice([None, None, None, draw.randrange(len(content))])])
    try:
        weights = open_weights(file.parent, str(file))
        for name in weights.shapes:
            weights.read(name, ())
    except UserError as error:
        assert str(error).startswith(f"{file}: not a policy.pt of plain tensors")


@pytest.mark.parametrize(
    "state", [[], {"a": 5}, {1: torch.ones(2)}, {"a": torch.eye(2).to_sparse()}, {"a": torch.ones(2) + 1j}]
)
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, state: object) -> None:
    torch.save({"state": state}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match=r"not a policy\.pt of plain tensors"):
        PolicyFile(tmp_path / "policy.pt")
