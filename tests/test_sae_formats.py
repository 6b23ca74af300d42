"""Public SAE formats: SAEs read from files in each layout equal plain formulas, and SAELens."""

import copy
import json
import math
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import fuzzed
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autoencoders import formats
from autoencoders.formats import SAE_FORMATS, SAESource, detect_format, find_sae, load_sae
from autoencoders.settings import SAESettings
from data import hub
from utils import UserError, checked

D, F, K, N = 8, 24, 5, 200


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def parts(seed: int = 0) -> dict[str, Tensor]:
    """Tensors that make about half of the features active; decoder rows of unequal norm."""
    return {
        "W_enc": draw(D, F, seed=seed),
        "b_enc": draw(F, seed=seed + 1),
        "W_dec": draw(F, D, seed=seed + 2) * (1 + torch.arange(F) / F).unsqueeze(1),
        "b_dec": draw(D, seed=seed + 3),
    }


def top_k(features: Tensor, k: int = K) -> Tensor:
    return features * (features >= features.sort(dim=-1).values[..., -k, None])


def jump(pre: Tensor, threshold) -> Tensor:
    return pre * (pre > threshold) * (pre > 0)


def write(folder: Path, weights: str, tensors: dict[str, Tensor], config: str | None, fields: dict | None) -> Path:
    path = folder / weights
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    if config:
        (folder / config).write_text(json.dumps(fields))
    return path


# Each layout: the tensors and the JSON of the format, and the formulas that it stands for.


def gemma_scope(folder):
    p, threshold = parts(), draw(F, seed=9).abs()
    folder = folder / "gemma-scope-2b-pt-mlp/layer_7/width_16k/average_l0_55"
    return (
        folder,
        {**p, "threshold": threshold},
        None,
        lambda x: jump(x @ p["W_enc"] + p["b_enc"], threshold),
        lambda f: f @ p["W_dec"] + p["b_dec"],
        (7, "mlp"),
    )


def gemma_scope_2(folder):
    p, threshold = parts(), draw(F, seed=9).abs()
    fields = {
        "width": F,
        "model_name": "google/gemma-3-4b-pt",
        "architecture": "jump_relu",
        "l0": 150,
        "affine_connection": False,
        "hf_hook_point_in": "model.layers.17.output",
        "hf_hook_point_out": "model.layers.17.output",
        "type": "sae",
    }
    return (
        folder / "resid_post/layer_17_width_16k_l0_medium",
        {**{name.lower(): tensor for name, tensor in p.items()}, "threshold": threshold},
        fields,
        lambda x: jump(x @ p["W_enc"] + p["b_enc"], threshold),
        lambda f: f @ p["W_dec"] + p["b_dec"],
        (17, "residual"),
    )


LLAMA_SCOPE = {
    "d_model": D,
    "d_sae": F,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.4,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 1.7, "out": 2.3},
    "sparsity_include_decoder_norm": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "top_k": 50,
    "hook_point_in": "blocks.8.hook_resid_post",
    "hook_point_out": "blocks.8.hook_resid_post",
}


def llama_tensors(p):
    return {
        "encoder.weight": p["W_enc"].T,
        "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T,
        "decoder.bias": p["b_dec"],
    }


def llama_scope(folder):
    """It encodes s_in * x. Pre-activations are multiplied by the norms that decoder rows have for raw vectors."""
    p, s_in, s_out = parts(), D**0.5 / 1.7, D**0.5 / 2.3
    norm = p["W_dec"].norm(dim=1) * s_in / s_out

    def encode(x):
        return jump((s_in * x @ p["W_enc"] + p["b_enc"]) / s_in * norm, 0.4)

    def decode(f):  # the SAE reconstructs s_out * x
        return (f / norm * s_in @ p["W_dec"] + p["b_dec"]) / s_out

    folder = folder / "Llama3_1-8B-Base-L8R-8x"
    return folder, llama_tensors(p), LLAMA_SCOPE, encode, decode, (8, "residual")


def llama_scope_saelens(folder):
    p, s = parts(), D**0.5 / 1.7
    fields = {**LLAMA_SCOPE, "hook_point_in": "blocks.8.hook_mlp_out", "hook_point_out": "blocks.8.hook_mlp_out"}
    return (
        folder,
        llama_tensors(p),
        fields,
        lambda x: jump(s * x @ p["W_enc"] + p["b_enc"], 0.4 * s),
        lambda f: (f @ p["W_dec"] + p["b_dec"]) / s,
        (8, "mlp"),
    )


def sparsify(folder):
    p = parts()
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    fields = {"expansion_factor": F // D, "normalize_decoder": True, "k": K, "signed": False, "d_in": D}
    return (
        folder / "layers.10",
        tensors,
        {**fields, "num_latents": 0},
        lambda x: top_k(((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()),
        lambda f: f @ p["W_dec"] + p["b_dec"],
        (10, "residual"),
    )


def saelens_gated(folder):
    p = parts()
    del p["b_enc"]
    gate, mag, r = draw(F, seed=11), draw(F, seed=12), draw(F, seed=13) / 2
    fields = {"architecture": "gated", "d_in": D, "d_sae": F, "dtype": "float32", "apply_b_dec_to_input": True}

    def encode(x):
        x = x - p["b_dec"]
        return (x @ p["W_enc"] + gate > 0) * (x @ (p["W_enc"] * r.exp()) + mag).relu()

    return (
        folder,
        {**p, "b_gate": gate, "b_mag": mag, "r_mag": r},
        {**fields, "normalize_activations": "none", "metadata": {"hook_name": "blocks.3.hook_resid_pre"}},
        encode,
        lambda f: f @ p["W_dec"] + p["b_dec"],
        (2, "residual"),
    )


def saelens_flat_topk(folder):
    """A configuration from before version 6."""
    p = parts()
    fields = {
        "d_in": D,
        "d_sae": F,
        "hook_point": "blocks.4.hook_mlp_out",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "dtype": "float32",
    }
    return (
        folder,
        p,
        fields,
        lambda x: top_k((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu(),
        lambda f: f @ p["W_dec"] + p["b_dec"],
        (4, "mlp"),
    )


def saelens_rescaled_topk(folder):
    p = parts()
    norm = p["W_dec"].norm(dim=1)
    fields = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "rescale_acts_by_decoder_norm": True}
    return (
        folder,
        p,
        {**fields, "apply_b_dec_to_input": False, "metadata": {"hook_name": "blocks.1.hook_resid_post"}},
        lambda x: top_k((x @ p["W_enc"] + p["b_enc"]) * norm).relu(),
        lambda f: f / norm @ p["W_dec"] + p["b_dec"],
        (1, "residual"),
    )


def qwen_scope(folder):
    p = parts()
    tensors = {"W_enc": p["W_enc"].T, "W_dec": p["W_dec"].T, "b_enc": p["b_enc"] + 1, "b_dec": p["b_dec"]}
    fields = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-8B-Base", "d_model": D, "d_sae": F, "k": K}
    return (
        folder,
        tensors,
        {**fields, "num_layers": 36, "hook_point": "resid_post", "dtype": "bfloat16"},
        lambda x: top_k(x @ p["W_enc"] + p["b_enc"] + 1).relu(),
        lambda f: f @ p["W_dec"] + p["b_dec"],
        (18, "residual"),
    )


def dictionary(kind: str, *, of_2025: bool = False):
    """One of dictionary_learning's classes, as it was in 2024 or, with a config of its trainers since, afterwards."""
    p, scalar = parts(), {"k": torch.tensor(K), "threshold": torch.tensor(0.6)}
    linear = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "decoder.weight": p["W_dec"].T}
    norm, threshold = 1 if of_2025 else p["W_dec"].norm(dim=1), draw(F, seed=9)

    def pre(x):
        return x @ p["W_enc"] + p["b_enc"]

    def centred(x):
        return pre(x - p["b_dec"])

    gate, mag, r = draw(F, seed=11), draw(F, seed=12), draw(F, seed=13) / 2

    def open_gate(x):
        u = (x - p["b_dec"]) @ p["W_enc"]
        return (u + gate > 0) * (r.exp() * u + mag).relu() * norm

    gated = {"gate_bias": gate, "mag_bias": mag, "r_mag": r, "decoder_bias": p["b_dec"]}
    gated |= {name: linear[name] for name in ("encoder.weight", "decoder.weight")}
    tensors, encode, rescaled = {
        "AutoEncoder": ({**linear, "bias": p["b_dec"]}, lambda x: centred(x).relu() * norm, True),
        "AutoEncoderNew": ({**linear, "decoder.bias": p["b_dec"]}, lambda x: pre(x).relu(), False),
        "AutoEncoderTopK": ({**linear, "b_dec": p["b_dec"], **scalar}, lambda x: top_k(centred(x).relu()), False),
        "BatchTopKSAE": ({**linear, "b_dec": p["b_dec"], **scalar}, lambda x: jump(centred(x), 0.6), False),
        "MatryoshkaBatchTopKSAE": (
            {**p, **scalar, "group_sizes": torch.tensor([F])},
            lambda x: jump(centred(x), 0.6),
            False,
        ),
        "JumpReluAutoEncoder": ({**p, "threshold": threshold}, lambda x: jump(pre(x), threshold) * norm, True),
        "GatedAutoEncoder": (gated, open_gate, True),
    }[kind]

    def layout(folder):
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": K, "layer": 11}
        trainer |= {"sparsity_warmup_steps": None} if of_2025 else {}
        return (
            folder / "resid_post_layer_11/trainer_0",
            tensors,
            {"trainer": {**trainer, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_11"}},
            encode,
            lambda f: (f / norm if rescaled else f) @ p["W_dec"] + p["b_dec"],
            (11, "residual"),
        )

    return layout


LAYOUTS = {
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "llama_scope": llama_scope,
    "llama_scope_saelens": llama_scope_saelens,
    "sparsify": sparsify,
    "saelens": saelens_gated,
    "saelens/flat-topk": saelens_flat_topk,
    "saelens/rescaled-topk": saelens_rescaled_topk,
    "qwen_scope": qwen_scope,
    "dictionary_learning": dictionary("BatchTopKSAE"),
    **{
        f"dictionary_learning/{kind}": dictionary(kind)
        for kind in (
            "AutoEncoder",
            "AutoEncoderNew",
            "AutoEncoderTopK",
            "GatedAutoEncoder",
            "JumpReluAutoEncoder",
            "MatryoshkaBatchTopKSAE",
        )
    },
    "dictionary_learning/GatedAutoEncoder of 2025": dictionary("GatedAutoEncoder", of_2025=True),
    "dictionary_learning/JumpReluAutoEncoder of 2025": dictionary("JumpReluAutoEncoder", of_2025=True),
}
assert {name.split("/")[0] for name in LAYOUTS} == set(SAE_FORMATS)
TOP_K = (
    "sparsify",
    "saelens/flat-topk",
    "saelens/rescaled-topk",
    "qwen_scope",
    "dictionary_learning/AutoEncoderTopK",
)


def section(values):
    """A section of the configuration that asks for an SAE."""
    return checked(SAESettings, values, "sae")


each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_format = pytest.mark.parametrize("layout", SAE_FORMATS)


def written(layout: str, folder: Path, change=None):
    """The format's name, the file with the weights, and the rest of the layout; `change` edits tensors and JSON."""
    format = layout.split("/")[0]
    folder, tensors, fields, *rest = LAYOUTS[layout](folder)
    tensors = dict(tensors)
    fields = json.loads(json.dumps(fields))
    if change:
        change(tensors, fields)
    weights = SAE_FORMATS[format].weights.replace("*", "18")
    return format, write(folder, weights, tensors, SAE_FORMATS[format].config, fields), *rest


def asked(format: str) -> str:
    return format if SAE_FORMATS[format].by_name_only else "auto"


# -------------------------------------------------------------------------------------------------------- the math


@each_layout
def test_computes_what_the_format_says(layout, tmp_path):
    format, path, encode, decode, _ = written(layout, tmp_path)
    sae, x = load_sae(path, asked(format)), draw(N, D, seed=5) * 2
    features = encode(x)
    assert 0.05 < (features > 0).float().mean() < 0.95
    torch.testing.assert_close(sae.encode(x), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), decode(features), rtol=1e-4, atol=1e-4)
    assert (sae.d_in, sae.d_sae) == (D, F)
    assert not list(sae.parameters())


@each_layout
def test_selected_latents_have_the_dense_formulas_values_and_gradients(layout, tmp_path):
    """As in the format's formula over all features, since all of them decide which are active."""
    format, path, encode, _, _ = written(layout, tmp_path)
    sae, x = load_sae(path, asked(format)), (draw(N, D, seed=5) * 2).requires_grad_()
    latents, weight = torch.tensor([3, 0, 17, 8, 22, 11]), draw(N, 6)
    dense, selected = encode(x)[:, latents], sae.encode_latents(x, latents)
    torch.testing.assert_close(selected, dense, rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad((dense * weight).sum(), x)
    (gradient,) = torch.autograd.grad((selected * weight).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    assert gradient.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------- detection


@each_layout
def test_is_recognised_and_says_so(layout, tmp_path, capsys):
    format, path, _, _, place = written(layout, tmp_path)
    depth = len(Path(SAE_FORMATS[format].weights).parts)
    for named in (path, path.parents[depth - 1]):
        found = find_sae(section({"path": str(named), "format": asked(format)}), "sae")
        assert (found.files.format, found.path, found.layer, found.hook) == (format, path, *place)
    load_sae(path, asked(format))
    said = capsys.readouterr().out
    assert f"{path} is {format}, " in said and f"{D} to {F} features" in said
    assert (f", TopK {K}, " in said) == (layout in TOP_K)


def test_what_is_not_used_is_said(tmp_path, capsys):
    _, path, *_ = written("dictionary_learning/MatryoshkaBatchTopKSAE", tmp_path)
    load_sae(path)
    assert "not used: group_sizes, k" in capsys.readouterr().out


def test_an_unknown_or_ambiguous_directory(tmp_path):
    with pytest.raises(UserError, match=r"no SAE of a known layout \(gemma_scope: params\.npz; .*cfg\.json"):
        detect_format(tmp_path)
    _, path, *_ = written("gemma_scope", tmp_path)
    (path.parent / "ae.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"could be gemma_scope or dictionary_learning: set sae\.format"):
        detect_format(path.parent)
    assert detect_format(path.parent, "gemma_scope").weights == path


def test_one_layer_of_a_directory_of_many_has_to_be_named(tmp_path):
    _, path, *_ = written("qwen_scope", tmp_path)
    path.with_name("layer19.sae.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"has 2 files of qwen_scope: name one, such as .*layer18\.sae\.pt"):
        detect_format(path.parent)


@pytest.mark.parametrize("layout", [name for name in SAE_FORMATS if SAE_FORMATS[name].config])
def test_the_json_beside_the_weights_is_needed(layout, tmp_path):
    form = SAE_FORMATS[layout]
    format, path, *_ = written(layout, tmp_path)
    config = path.parents[len(Path(form.weights).parts) - 1] / form.config
    config.write_text("{")
    with pytest.raises(UserError, match=f"{config}: cannot be read as JSON"):
        load_sae(path, format)
    config.unlink()
    if form.config_optional:
        assert find_sae(section({"path": str(path)}), "sae").layer == 17
    else:
        with pytest.raises(UserError, match=f"{layout} has {form.config} beside it"):
            load_sae(path, format)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "gema_scope"}, r"sae\.format=gema_scope: not one of auto, .*did you mean 'gemma_scope'"),
        ({"hook": "attention"}, r"sae\.hook=attention: not one of residual, mlp"),
        ({"layer": 3}, r"sae\.layer=3, but .*params\.npz says 7; sae\.layer=null"),
        ({"hook": "residual"}, r"sae\.hook=residual, but .*params\.npz says mlp"),
        ({"weight": 0}, r"sae\.weight=0: has to be above 0"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, message):
    _, path, *_ = written("gemma_scope", tmp_path)
    with pytest.raises(UserError, match=message):
        find_sae(section({"path": str(path), **changes}), "sae")


def test_a_file_that_names_no_layer(tmp_path):
    _, path, *_ = written("gemma_scope", tmp_path)
    moved = path.rename(tmp_path / "params.npz")
    with pytest.raises(UserError, match=r"sae\.layer=None: set it to the layer"):
        find_sae(section({"path": str(moved)}), "sae")
    found = find_sae(section({"path": str(moved), "layer": 5}), "sae")
    assert (found.layer, found.hook) == (5, "residual")


@pytest.mark.parametrize("layout", ["gemma_scope", "sparsify", "qwen_scope"])
def test_the_identity_changes_with_all_that_features_depend_on(layout, tmp_path):
    _, path, *_ = written(layout, tmp_path / "a")
    files = detect_format(path)
    source = SAESource("sae", files, 1, "residual", 1.0)
    others = [SAESource("sae", files, 2, "residual", 1.0), SAESource("sae", files, 1, "mlp", 1.0)]

    def other_weights(tensors, _):
        next(iter(tensors.values()))[0] += 1

    _, changed, *_ = written(layout, tmp_path / "b", other_weights)
    others.append(SAESource("sae", detect_format(changed), 1, "residual", 1.0))
    if files.config:
        _, changed, *_ = written(layout, tmp_path / "c", lambda _, fields: fields.update(k=K + 1))
        others.append(SAESource("sae", detect_format(changed), 1, "residual", 1.0))
    identities = [json.dumps(s.identity()) for s in (source, *others)]
    assert len(set(identities)) == len(identities)
    _, copy, *_ = written(layout, tmp_path / "d")
    assert SAESource("sae", detect_format(copy), 1, "residual", 1.0).identity() == source.identity()


def test_the_rule_for_attention_sinks_is_part_of_the_identity(tmp_path, monkeypatch):
    _, path, *_ = written("gemma_scope", tmp_path)
    source = SAESource("sae", detect_format(path), 7, "mlp", 1.0)
    before = source.identity()
    monkeypatch.setattr(formats, "SINK_NORM", 5.0)
    assert source.identity() != before


def test_the_folding_is_part_of_the_identity(tmp_path):
    _, path, *_ = written("llama_scope", tmp_path)
    both = [detect_format(path, format) for format in ("llama_scope", "llama_scope_saelens")]
    assert both[0].weights == both[1].weights
    assert len({json.dumps(SAESource("sae", files, 8, "residual", 1.0).identity()) for files in both}) == 2


# ------------------------------------------------------------------------------------------------------- the Hub


@each_layout
@pytest.mark.parametrize("named", ["file", "folder"])
def test_from_the_hub_only_what_is_needed_is_fetched(layout, named, tmp_path, monkeypatch):
    """A stand-in for `snapshot_download` copies the files that match the patterns."""
    format, path, *_ = written(layout, tmp_path / "org" / "repo")
    root, depth = tmp_path / "org" / "repo", len(Path(SAE_FORMATS[format].weights).parts)
    for other in ("layer_8/width_16k/average_l0_55/params.npz", "layer19.sae.pt", "README.md", "layers.11/cfg.json"):
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_bytes(b"not for us")
    fetched: list[str] = []

    def snapshot_download(repository, allow_patterns, **_):
        assert repository == "org/repo"
        names = [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]
        fetched[:] = filter_repo_objects(names, allow_patterns=allow_patterns)
        for name in fetched:
            target = tmp_path / "snapshot" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / name).read_bytes())
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    inside = (path if named == "file" else path.parents[depth - 1]).relative_to(root)
    asked_for = {"path": f"org/repo/{inside}".removesuffix("/."), "format": asked(format), "layer": None}
    if layout == "qwen_scope" and named == "folder":  # one of many
        with pytest.raises(UserError, match="no SAE of a known layout"):
            find_sae(section(asked_for), "sae")
        return
    asked_for = {**asked_for, "layer": 7} if layout == "gemma_scope" else asked_for
    found = find_sae(section(asked_for), "sae")
    wanted = {path.relative_to(root), *(p for p in [SAE_FORMATS[format].config] if p)}
    assert found.path == tmp_path / "snapshot" / path.relative_to(root)
    assert {Path(name).name for name in fetched} == {Path(name).name for name in wanted}
    load_sae(found.path, asked(format))


def test_what_the_hub_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match=r"sae\.path=org/repo/layers\.9: org/repo has no layers\.9"):
        find_sae(section({"path": "org/repo/layers.9"}), "sae")


# ---------------------------------------------------------------------------------------------------------- damage


@each_layout
@pytest.mark.parametrize("damage", ["missing", "misshapen", "nan"])
def test_a_damaged_array_is_named(layout, damage, tmp_path):
    _, tensors, *_ = LAYOUTS[layout](tmp_path)
    for number, name in enumerate(tensors):
        if name in ({"threshold"} if layout.endswith("AutoEncoderTopK") else {"k", "group_sizes"}):
            continue  # reported as not used

        def change(tensors, _, name=name):
            if damage == "missing":
                del tensors[name]
            elif damage == "misshapen":
                tensors[name] = torch.zeros(*tensors[name].shape, 2)
            else:
                tensors[name] = torch.full_like(tensors[name], float("nan"), dtype=torch.float32)

        format, path, *_ = written(layout, tmp_path / str(number), change)
        problem = {"missing": f"lacks {name}; it has ", "misshapen": f"{name} has shape", "nan": f"{name} has values"}
        with pytest.raises(UserError) as error:
            load_sae(path, asked(format))
        assert str(error.value).startswith(f"{path}: {problem[damage]}")


@each_format
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_half_a_file(layout, kept, tmp_path):
    format, path, *_ = written(layout, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=rf"{path}: not a readable \w+ file of plain arrays"):
        load_sae(path, asked(format))


@pytest.mark.parametrize("layout", ["qwen_scope", "dictionary_learning"])
def test_a_pickle_is_not_run(layout, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    _, path, *_ = written(layout, tmp_path)
    for content in (Payload(), {"W_enc": Payload()}):
        torch.save(content, path)
        with pytest.raises(UserError, match="not a readable pt file of plain arrays"):
            load_sae(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match="it holds a list, not tensors by name"):
        load_sae(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("layout", ["gemma_scope", "qwen_scope"])
def test_a_small_file_that_would_fill_the_memory(layout, tmp_path):
    _, path, *_ = written(layout, tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(100 << 20))
    with pytest.raises(UserError, match=r"unpacks to 104,857,600 bytes"):
        load_sae(path)


NUMBERS = [0, -1, 2, 0.5, float("nan"), 10**30, 10**400, 1e300]
ODD = [None, True, *NUMBERS, "", "relu", "blocks.2.hook_resid_post", [], [1], {}, {"k": 1}]
KINDS = [torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]


def spoilt(draw, tensors, fields):
    """Something of an SAE's files changed at random."""
    for _ in range(draw.choice([0, 1, 1, 2])):
        name = draw.choice([*tensors])
        tensor = tensors[name]
        changes = [tensor[None][..., :0], tensor.reshape(-1), tensor * math.nan, tensor.to(draw.choice(KINDS))]
        tensors[draw.choice([name, name, "W_skip", "scaling_factor", "threshold"])] = draw.choice(changes).clone()
    for _ in range(draw.choice([0, 1, 1, 2]) if fields else 0):
        section = fields
        while isinstance(section[key := draw.choice([*section])], dict) and section[key] and draw.random() < 0.8:
            section = section[key]
        section[key] = copy.deepcopy(draw.choice(ODD))


@fuzzed
@given(st.integers(0, 2**40))
def test_any_files_are_an_sae_or_refused(tmp_path_factory, seed):
    draw = random.Random(seed)
    layout = draw.choice([*LAYOUTS])
    format, path, *_ = written(layout, tmp_path_factory.getbasetemp() / "random", lambda *parts: spoilt(draw, *parts))
    whole = path.read_bytes()
    if draw.random() < 0.5:
        at = draw.randrange(len(whole)) if draw.random() < 0.5 else draw.randrange(min(len(whole), 400))
        path.write_bytes(whole[:at] + draw.randbytes(draw.randrange(4)) + whole[at + draw.randrange(4) :])
    try:
        source = find_sae(section({"path": str(path), "format": format, "layer": draw.choice([None, 1])}), "sae")
        sae = formats.read_files(source.files)
    except UserError as error:
        assert "random/" in str(error) or str(error).startswith("sae.layer=")
    else:
        assert source.layer >= 0 and source.hook in ("residual", "mlp")
        assert all(value.isfinite().all() for value in [*sae.state_dict().values(), sae.W_dec])
        assert sae.encode(torch.zeros(1, sae.d_in)).shape == (1, sae.d_sae)
        sae.encode_latents(torch.zeros(1, sae.d_in), torch.zeros(1, dtype=torch.long))


# --------------------------------------------------------------------------------------------------------- refusal


def put(key, value):
    def change(_, fields):
        *outer, last = key.split(".")
        for name in outer:
            fields = fields[name]
        fields[last] = value

    return change


def add(name, tensor):
    return lambda tensors, _: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("gemma_scope_2", put("type", "transcoder"), "type=transcoder cannot be folded exactly"),
        ("gemma_scope_2", put("affine_connection", True), "affine_connection=True cannot be folded"),
        ("gemma_scope_2", put("architecture", "topk"), "architecture=topk cannot be folded"),
        (
            "gemma_scope_2",
            put("hf_hook_point_in", "model.layers.3.self_attn.o_proj.input"),
            "reads model.layers.3",
        ),
        ("gemma_scope_2", put("width", 7), r"width=7, but .* has 24 features"),
        ("gemma_scope_2", add("affine_skip_connection", torch.zeros(D, D)), "a transcoder, not an autoencoder"),
        ("llama_scope", put("act_fn", "topk"), "act_fn=topk cannot be folded"),
        ("llama_scope", put("norm_activation", "token-wise"), "norm_activation=token-wise cannot be folded"),
        ("llama_scope", put("apply_decoder_bias_to_pre_encoder", True), "apply_decoder_bias_to_pre_encoder=True"),
        ("llama_scope", put("sparsity_include_decoder_norm", False), "sparsity_include_decoder_norm=False"),
        ("llama_scope", put("dataset_average_activation_norm", {"in": 0}), "dataset_average_activation_norm.in=0,"),
        ("llama_scope", put("hook_point_out", "blocks.8.hook_mlp_out"), "a transcoder, not an SAE"),
        ("llama_scope", put("hook_point_in", "blocks.8.attn.hook_z"), "a transcoder, not an SAE"),
        ("sparsify", put("signed", True), "signed=True cannot be folded"),
        ("sparsify", put("activation", "groupmax"), "activation=groupmax cannot be folded"),
        ("sparsify", put("transcode", True), "transcode=True cannot be folded"),
        ("sparsify", add("W_skip", torch.zeros(D, D)), "a transcoder, not an autoencoder"),
        ("sparsify", put("k", F + 1), "k=25 of 24 features"),
        ("llama_scope", put("jump_relu_threshold", 10**400), "jump_relu_threshold=1000.*, where a positive number has"),
        ("sparsify", put("k", None), "k=None, where a positive number has to be"),
        ("saelens", put("architecture", "matching_pursuit"), "architecture=matching_pursuit: not standard"),
        ("saelens", put("architecture", "batchtopk"), "architecture=batchtopk: .*save_inference_model"),
        ("saelens", put("normalize_activations", "layer_norm"), "normalize_activations=layer_norm cannot be folded"),
        ("saelens", put("normalize_activations", "expected_average_only_in"), "fold_activation_norm_scaling_factor"),
        ("saelens", put("reshape_activations", "hook_z"), "reshape_activations=hook_z cannot be folded"),
        ("saelens", put("activation_fn_str", "tanh-relu"), "activation_fn=tanh-relu cannot be folded"),
        ("saelens", put("finetuning_scaling_factor", True), "finetuning_scaling_factor=True cannot be folded"),
        (
            "saelens",
            put("metadata.model_from_pretrained_kwargs", {"center_writing_weights": True}),
            "center_writing_weights=True cannot be folded",
        ),
        ("saelens", put("metadata.hook_name", "blocks.0.hook_resid_pre"), "reads blocks.0.hook_resid_pre; SAEs are"),
        ("saelens", put("metadata.hook_name", "blocks.0.attn.hook_z"), "reads blocks.0.attn.hook_z; SAEs are"),
        ("saelens", add("scaling_factor", torch.full((F,), 2.0)), "scaling_factor that is not 1"),
        ("qwen_scope", put("model_type", "relu_sae"), "model_type=relu_sae cannot be folded"),
        ("qwen_scope", put("hook_point", "mlp_out"), "hook_point=mlp_out cannot be folded"),
        ("dictionary_learning", put("trainer.dict_class", "CrossCoder"), "trainer.dict_class=CrossCoder cannot be"),
        ("dictionary_learning", put("trainer.submodule_name", "attn_out_3"), "reads attn_out_3; SAEs are read after"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(layout, change, message, tmp_path):
    _, path, *_ = written(layout, tmp_path, change)
    with pytest.raises(UserError, match=message):
        find_sae(section({"path": str(path)}), "sae")
        load_sae(path)


@pytest.mark.parametrize(
    ("point", "place"),
    {
        "gpt_neox.layers.3": (3, "residual"),
        "model.language_model.layers.3": (3, "residual"),
        "language_model.model.layers.3.mlp": (3, "mlp"),
        "transformer.h.3": (3, "residual"),
        "transformer.h.3.mlp": (3, "mlp"),
        "model.decoder.layers.0": (0, "residual"),
        "model.layers.12.output": (12, "residual"),
        "layers.12.post_feedforward_layernorm": (12, "mlp"),
        "model.layers.3.self_attn": None,
        "vision_tower.encoder.layers.3": None,
        "model.layers.3.mlp.down_proj": None,
    }.items(),
)
def test_modules_as_transformers_names_them(tmp_path, point, place):
    """In SAELens's hook names, dictionary_learning's submodules, sparsify's folders."""
    _, native, *_ = written("saelens", tmp_path / "native", put("metadata.hook_name", point))
    _, dictionary, *_ = written("dictionary_learning", tmp_path / "dict", put("trainer.submodule_name", point))
    _, path, *_ = written("sparsify", tmp_path / "sparsify")
    sparsify = path.parent.rename(tmp_path / "sparsify" / point) / path.name
    for path in (native, dictionary, sparsify):
        if place is None:
            with pytest.raises(UserError, match=f"reads {point}; SAEs are read after blocks or at their MLP's output"):
                find_sae(section({"path": str(path)}), "sae")
        else:
            found = find_sae(section({"path": str(path)}), "sae")
            assert (found.layer, found.hook) == place


def test_other_places_are_refused(tmp_path):
    _, path, *_ = written("gemma_scope", tmp_path)
    folder = tmp_path / "gemma-scope-2b-pt-att"
    path.parents[3].rename(folder)
    with pytest.raises(UserError, match="reads embeddings or attention heads"):
        find_sae(section({"path": str(folder / "layer_7/width_16k/average_l0_55")}), "sae")
    embedding = (folder / "layer_7").rename(tmp_path / "embedding")
    with pytest.raises(UserError, match="reads embeddings or attention heads"):
        find_sae(section({"path": str(embedding / "width_16k/average_l0_55"), "layer": 0}), "sae")
    _, path, *_ = written("gemma_scope_2", tmp_path, put("hf_hook_point_in", None))
    folder = tmp_path / "attn_out"
    path.parents[1].rename(folder)
    with pytest.raises(UserError, match="a attn_out; SAEs are read at"):
        find_sae(section({"path": str(next(folder.iterdir()))}), "sae")


# --------------------------------------------------------------------------------------------------------- SAELens

lens_missing = "sae-lens is not installed"


def same(ours, theirs) -> None:
    x = draw(N, D, seed=5) * 2
    with torch.no_grad():
        features = theirs.encode(x)
        assert 0.05 < (features > 0).float().mean() < 0.95
        torch.testing.assert_close(ours.encode(x), features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs.decode(features), rtol=1e-4, atol=1e-4)


def randomised(sae):
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sae.named_parameters()):
            parameter.copy_(draw(*parameter.shape, seed=number) / (2 if name == "r_mag" else 1))
    return sae


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("kind", ["Standard", "Gated", "JumpReLU", "TopK", "TopK-rescaled"])
def test_files_that_saelens_saves(kind, apply_b_dec, tmp_path):
    lens = pytest.importorskip("sae_lens", reason=lens_missing)
    kind, _, rescaled = kind.partition("-")
    options = {"k": K, "rescale_acts_by_decoder_norm": bool(rescaled)} if kind == "TopK" else {}
    config = getattr(lens, f"{kind}SAEConfig")(d_in=D, d_sae=F, apply_b_dec_to_input=apply_b_dec, **options)
    config.metadata.hook_name = "blocks.6.hook_resid_post"
    theirs = randomised(getattr(lens, f"{kind}SAE")(config))
    theirs.save_model(tmp_path)
    same(load_sae(tmp_path), theirs)
    assert find_sae(section({"path": str(tmp_path)}), "sae").layer == 6


def test_a_batch_topk_as_saelens_saves_it(tmp_path):
    lens = pytest.importorskip("sae_lens", reason=lens_missing)
    training = randomised(lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)))
    training.topk_threshold.fill_(0.7)
    training.save_inference_model(tmp_path)
    theirs = lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == "jumprelu"
    same(load_sae(tmp_path), theirs)


@pytest.mark.parametrize(
    "flat",
    [
        {},
        {"apply_b_dec_to_input": False, "activation_fn_str": "relu", "normalize_activations": "none"},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        {"architecture": "jumprelu", "activation_fn_str": "relu"},
    ],
)
def test_flat_configurations_as_saelens_reads_them(flat, tmp_path):
    lens = pytest.importorskip("sae_lens", reason=lens_missing)
    tensors = parts() | ({"threshold": draw(F, seed=4)} if flat.get("architecture") == "jumprelu" else {})
    fields = {"d_in": D, "d_sae": F, "dtype": "float32", "hook_point": "blocks.2.hook_resid_pre", **flat}
    write(tmp_path, "sae_weights.safetensors", tensors, "cfg.json", fields)
    same(load_sae(tmp_path), lens.SAE.load_from_disk(tmp_path))


@pytest.mark.parametrize(
    ("layout", "loader", "repository"),
    [
        ("gemma_scope", "gemma_2_sae_huggingface_loader", "google/gemma-scope-2b-pt-res"),
        ("gemma_scope_2", "gemma_3_sae_huggingface_loader", "google/gemma-scope-2-4b-pt"),
        ("llama_scope_saelens", "llama_scope_sae_huggingface_loader", "fnlp/Llama3_1-8B-Base-LXR-8x"),
        ("qwen_scope", "qwen_scope_sae_huggingface_loader", f"Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_{K}"),
        ("dictionary_learning/AutoEncoder", "dictionary_learning_sae_huggingface_loader_1", "org/repo"),
        ("dictionary_learning/AutoEncoderTopK", "dictionary_learning_sae_huggingface_loader_1", "org/repo"),
        ("dictionary_learning", "dictionary_learning_sae_huggingface_loader_1", "org/repo"),
        ("dictionary_learning/GatedAutoEncoder", "dictionary_learning_sae_huggingface_loader_1", "org/repo"),
        ("dictionary_learning/JumpReluAutoEncoder", "dictionary_learning_sae_huggingface_loader_1", "org/repo"),
        ("dictionary_learning/MatryoshkaBatchTopKSAE", "dictionary_learning_sae_huggingface_loader_1", "org/repo"),
    ],
)
def test_other_formats_as_saelens_converts_them(layout, loader, repository, tmp_path, monkeypatch):
    """SAELens's own converter on the same files; a stand-in for the download returns them."""
    pytest.importorskip("sae_lens", reason=lens_missing)
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.registry import get_sae_class

    def units(tensors, fields):
        """Give decoder rows norm 1: dictionary_learning multiplies some classes' features by it, SAELens none."""
        for name, dim in (("decoder.weight", 0), ("W_dec", 1)):
            if name in tensors and "dictionary" in layout:
                tensors[name] = tensors[name] / tensors[name].norm(dim=dim, keepdim=True)
        if "dictionary" in layout:
            fields["buffer"] = {"ctx_len": 128}
        if "Matryoshka" in layout:
            tensors.pop("group_sizes")
        if layout == "llama_scope_saelens":
            fields["dataset_average_activation_norm"]["out"] = 1.7

    format, path, *_ = written(layout, tmp_path, units)

    def local(_repository=None, filename=None, subfolder="", **_):
        return str(tmp_path / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: {"w_enc": [D, F], "w_dec": [F, D]})
    depth = len(Path(SAE_FORMATS[format].weights).parts)
    folder = path.name if layout == "qwen_scope" else str(path.parents[depth - 1].relative_to(tmp_path))
    overrides = {"dtype": "float32", "d_in": D, "d_sae": F, "device": "cpu"}
    fields, state, _ = getattr(loaders, loader)(repository, folder, "cpu", False, overrides)
    fields = loaders.handle_config_defaulting(fields)
    kind, config = get_sae_class(fields["architecture"])
    theirs = kind(config.from_dict(fields))
    theirs.load_state_dict(state)
    if layout == "llama_scope_saelens":
        theirs.fold_activation_norm_scaling_factor(D**0.5 / 1.7)
    same(load_sae(path, asked(format)), theirs)


def test_the_two_foldings_of_llama_scope_agree_where_decoder_rows_have_norm_one(tmp_path):
    def units(tensors, fields):
        tensors["decoder.weight"] /= tensors["decoder.weight"].norm(dim=0)
        fields["dataset_average_activation_norm"]["out"] = 1.7

    _, path, *_ = written("llama_scope", tmp_path, units)
    x, scale = draw(N, D, seed=5) * 2, D**0.5 / 1.7
    official, other = (load_sae(path, name).encode(x) for name in ("llama_scope", "llama_scope_saelens"))
    torch.testing.assert_close(other, official * scale, rtol=1e-4, atol=1e-5)
