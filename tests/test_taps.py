"""Where SAEs read: layers and MLPs of several architectures, several places at once; and which tokens are pooled."""

import pytest
import torch
import transformers
from conftest import BOS_ID, EOS_ID, PAD_ID, collate, pairs, random_sae, tiny_gemma
from test_sae_formats import write
from test_training import assembled, run, settle

import models
from autoencoders.formats import find_sae, make_sae, sae_sections, save_sae
from autoencoders.settings import SAESettings
from data.batch import PAD
from launch import settings
from models import decoder_layers, final_hidden_states, make_tap, score
from sae import SAE, JointSAE, change_output, compute_feature_drift, pooled_features
from utils import UserError

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "attn_implementation": "eager",
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def tiny(kind: str) -> transformers.PreTrainedModel:
    """A random model of an architecture; the multimodal one has as many vision layers as text layers."""
    torch.manual_seed(0)
    name, _, variant = kind.partition("/")
    if name == "Gemma3Multimodal":
        text = {key: value for key, value in TEXT.items() if key != "attn_implementation"}
        config = transformers.Gemma3Config(text_config=text, vision_config=VISION, attn_implementation="eager")
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        options = {"use_parallel_residual": variant != "sequential"} if name == "GPTNeoX" else {}
        config = getattr(transformers, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")(**TEXT, **options)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


KINDS = ("Gemma2", "Gemma3", "Gemma3Multimodal", "Llama", "Qwen2", "Qwen3", "Mistral", "GPTNeoX", "GPTNeoX/sequential")
each_kind = pytest.mark.parametrize("kind", KINDS)


def read(model, layer: int, hook: str, batch) -> torch.Tensor:
    tap = make_tap(model, [(layer, hook)])
    with torch.no_grad(), tap.reading():
        final_hidden_states(model, batch)
    return tap.take()


@each_kind
@pytest.mark.parametrize("layer", [0, 1])
def test_the_residual_stream_after_a_layer(kind, layer):
    model, batch = tiny(kind), collate(pairs())
    mask = batch.document != PAD
    with torch.no_grad():
        states = model(batch.input_ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(read(model, layer, "residual", batch)[mask], states[layer + 1][mask])


@each_kind
@pytest.mark.parametrize("layer", [0, 2])
def test_the_mlp_is_read_as_what_it_adds(kind, layer):
    """A layer's output with its MLP minus the output without it is what the tap reads, after Gemma's second norm."""
    model, batch = tiny(kind), collate(pairs())
    mask = batch.document != PAD
    whole, added = read(model, layer, "residual", batch), read(model, layer, "mlp", batch)
    down = {"down_proj", "dense_4h_to_h"}
    projection = [m for name, m in decoder_layers(model)[layer].named_modules() if name.split(".")[-1] in down]
    assert len(projection) == 1
    for parameter in projection[0].parameters():
        torch.nn.init.zeros_(parameter)
    without = read(model, layer, "residual", batch)
    assert added[mask].abs().max() > 0.01
    torch.testing.assert_close((whole - without)[mask], added[mask], rtol=1e-3, atol=1e-4)


def test_gemmas_mlp_is_not_read_before_its_norm():
    model, batch = tiny("Gemma2"), collate(pairs())
    raw: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _module, _inputs, output: raw.append(output))
    after = read(model, 1, "mlp", batch)
    handle.remove()
    assert not torch.allclose(raw[0], after)
    torch.testing.assert_close(model.model.layers[1].post_feedforward_layernorm(raw[0]), after)


@pytest.mark.parametrize("kind", ["Gemma2", "Gemma4", "GPTNeoX"])
@torch.no_grad()
def test_a_forward_pass_may_begin_with_a_layers_output(kind):
    """With twice that output it ends as where the layer gives twice as much. In Gemma 4 all layers are run, since the
    last ones read what earlier ones have left."""
    if kind == "Gemma4":
        options = {"num_kv_shared_layers": 1, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
        options |= {"layer_types": ["full_attention"] * 3}
        model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**TEXT, **options)).eval()
    else:
        model = tiny(kind)
    batch, tap, run, given = collate(pairs()), make_tap(model, [(1, "residual")]), list[int](), list[torch.Tensor]()
    layers = decoder_layers(model)
    handle = layers[1].register_forward_hook(lambda _module, _inputs, output: given.append(output))
    final_hidden_states(model, batch)
    handle.remove()
    with change_output(layers[1], lambda h: 2 * h):
        expected = final_hidden_states(model, batch)
    for number, layer in enumerate(layers):
        next(layer.children()).register_forward_hook(lambda *_, number=number: run.append(number))
    with tap.beginning_with(2 * given[0]):
        begun = final_hidden_states(model, batch)
    if kind == "Gemma4":
        assert tap.until == () and set(run) == {0, 1, 2}
    else:
        torch.testing.assert_close(begun, expected)
        assert run == [2]
    final_hidden_states(model, batch)
    assert {0, 1, 2} == set(run)


def test_structures_that_cannot_be_told_apart():
    config = transformers.MixtralConfig(**TEXT, num_local_experts=2)
    experts = models.skeleton(config)
    assert next(experts.parameters()).is_meta
    with pytest.raises(UserError, match=r"sae\.hook=mlp: cannot tell the MLP of MixtralForCausalLM's layers"):
        make_tap(experts, [(0, "mlp")])
    make_tap(experts, [(0, "residual")])
    stacks = tiny("Llama")
    stacks.model.other = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    with pytest.raises(UserError, match=r"cannot tell the decoder layers apart \(candidates: \['layers', 'other'\]\)"):
        make_tap(stacks, [(0, "residual")])


def test_an_mlp_that_cannot_be_found_is_told_before_a_weight_is_read(tmp_path, monkeypatch):
    def load_model(*_args, **_options):
        raise AssertionError("weights were read before the error")

    experts = models.skeleton(transformers.MixtralConfig(**TEXT))
    monkeypatch.setattr(models, "load_model", load_model)
    monkeypatch.setattr(models, "skeleton", lambda _: experts)
    with pytest.raises(UserError, match=r"sae\.hook=mlp: cannot tell the MLP"):
        run(tmp_path, "loss=fpo", "++sae.hook=mlp")


# ------------------------------------------------------------------------------------------------ which tokens count

CENTRED = make_sae(*(torch.randn(*s) for s in ((32, 48), (48,), (48, 32), (32,))), k=6, centred=True)


@pytest.mark.parametrize("sae", [random_sae(), CENTRED], ids=["JumpReLU", "centred TopK"])
@pytest.mark.parametrize("hook", ["residual", "mlp"])
def test_only_text_of_completions_is_pooled(sae, hook):
    """Features do not depend on the vectors at BOS, in the prompt, at the end of sequence or in the padding."""
    model, batch = tiny_gemma(), collate(pairs())
    text = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    text[batch.position[batch.content]] = True
    text = text.view(batch.input_ids.shape)
    assert not torch.isin(batch.input_ids[text], torch.tensor([BOS_ID, EOS_ID, PAD_ID])).any()
    outliers = torch.where(text.unsqueeze(2), 0.0, 1e4)
    layer = model.model.layers[2]
    site = layer if hook == "residual" else layer.post_feedforward_layernorm

    def pooled():
        with torch.no_grad():
            residual = score(model, batch, make_tap(model, [(2, hook)])).residual
        return pooled_features(sae, residual, batch.content_lengths)

    plain = pooled()
    site.register_forward_hook(lambda _module, _inputs, output: output + outliers)
    torch.testing.assert_close(pooled(), plain)
    assert plain.any()


# -------------------------------------------------------------------------------------------------- several at once


def test_several_places_in_one_pass():
    model, batch = tiny_gemma(), collate(pairs())
    places = [(0, "residual"), (2, "mlp"), (2, "residual")]
    tap = make_tap(model, places)
    with torch.no_grad(), tap.reading():
        final_hidden_states(model, batch)
    own = [read(model, layer, hook, batch) for layer, hook in places]
    assert torch.equal(tap.take(), torch.cat(own, dim=-1))


def members() -> list[SAE]:
    return [random_sae(), random_sae(d_sae=80, seed=3, k=12)]


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_joint_drift_is_the_weighted_mean_of_the_members(divergence):
    own, lengths = members(), [4, 7, 2]
    joint = JointSAE(own, [1.0, 3.0])
    assert (joint.d_in, joint.d_sae) == (64, 128)
    residual, before = torch.randn(13, 64, requires_grad=True), torch.randn(13, 64)
    reference = pooled_features(joint, before, lengths)
    weights = torch.rand(128) * 2
    halves, expected = [slice(0, 32), slice(32, 64)], 0
    for member, half, part, share in zip(own, halves, weights.split([48, 80]), (0.25, 0.75)):
        pooled = pooled_features(member, before[:, half], lengths)
        drift = compute_feature_drift(
            member, residual[:, half], lengths, pooled, divergence=divergence, k=10, feature_weights=part
        )
        expected = expected + share * drift
    options = {"divergence": divergence, "k": 10, "feature_weights": weights}
    drift = compute_feature_drift(joint, residual, lengths, reference, **options)
    torch.testing.assert_close(drift, expected)
    gradients = [torch.autograd.grad(value.sum(), residual)[0] for value in (drift, expected)]
    torch.testing.assert_close(*gradients)
    assert (drift > 0).all()


def test_joint_encoding_is_the_members_side_by_side():
    own, x = members(), torch.randn(5, 64)
    joint = JointSAE(own, [1.0, 1.0])
    features = joint.encode(x)
    assert torch.equal(features, torch.cat([own[0].encode(x[:, :32]), own[1].encode(x[:, 32:])], dim=1))
    assert torch.equal(joint.encode_latents(x, torch.tensor([2, 100])), features[:, [2, 100]])
    decoded = joint.decode(features)
    assert torch.equal(decoded[:, 32:], own[1].decode(features[:, 48:]))


def test_a_list_of_saes_on_the_command_line(tmp_path):
    config, overrides = settle(tmp_path, "loss=fpo", *settings.translate_argument("sae=[tiny, gemma-2-2b]"))
    settings.check_overrides(overrides)
    found = sae_sections(settings.typed(config).sae)
    assert {where: part.layer for where, part in found.items()} == {"sae.parts.tiny": 2, "sae.parts.gemma2b": 25}
    assert settings.translate_argument("++config.seed=2") == ["++seed=2"]
    assert settings.translate_argument("sae=tiny") == ["sae=tiny"]
    assert settings.translate_argument("model=gemma-2-9b") == ["model=gemma9b"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["++sae.parts.a.path=x"], r"sae\.path and sae\.parts: one SAE or several\? ~sae takes"),
        (["~sae", "++sae.parts.a.layer=1"], r"sae\.parts\.a\.path is missing"),
        (["~sae", "++sae.parts.a.pth=x"], r"sae\.parts\.a\.pth is read by nothing \(did you mean 'path'\?\)"),
        (["~sae", "++sae.parts.a.path=/no/such"], r"sae\.parts\.a\.path=/no/such: no such file"),
        (
            ["~sae", "++sae.parts.a={path: assets/tiny-sae, layer: 9}"],
            r"sae\.parts\.a\.layer=9: tiny has layers 0 to 3",
        ),
        (["~sae", "++sae.parts.a={path: assets/tiny-sae}"], r"sae\.parts\.a\.layer=None: set it to the layer"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, "loss=fpo", *overrides)


def test_a_path_alone_is_enough(tmp_path):
    """No YAML: the file says what it is and where it reads."""
    save_sae(random_sae(d_in=128), tmp_path / "layer_1/width_48/average_l0_9/params.npz")
    path = f"++sae.path={tmp_path}/layer_1/width_48/average_l0_9"
    trainer = assembled(tmp_path, "loss=fpo", "~sae", path, "++sae.format=auto", "++loss.k=5")
    assert trainer.tap.layer is models.decoder_layers(trainer.policy)[1]


def trained(folder, layers):
    """A run of loss=sae as far as its SAEs go; gives their files."""
    (folder / "step-9").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    (folder / "LATEST").symlink_to("step-9")
    files = {n: folder / f"LATEST/layer_{n}/width_48/average_l0_9/params.npz" for n in layers}
    for file in files.values():
        save_sae(random_sae(d_in=128), file)
    return files


def found(path, **keys):
    return find_sae(SAESettings(path=str(path), **keys), "sae")


def test_a_run_is_taken_with_the_layer_it_holds(tmp_path):
    file = trained(tmp_path / "one", [1])[1]
    for place in (tmp_path / "one", tmp_path / "one/LATEST", file.parents[2], file.parents[1], file.parent, file):
        source = found(place)
        assert (source.path.samefile(file), source.layer, source.hook) == (True, 1, "residual")
    with pytest.raises(UserError, match=r"sae\.layer=2, but .*params\.npz says 1; sae\.layer=null uses that"):
        found(tmp_path / "one", layer=2)


def test_of_several_layers_one_has_to_be_named(tmp_path):
    files = trained(tmp_path / "several", [10, 2, *range(20, 31)])
    assert found(tmp_path / "several", layer=10).path == files[10]
    for layer in (None, 7):
        with pytest.raises(UserError) as error:
            found(tmp_path / "several/LATEST", layer=layer)
        first, *listed = str(error.value).splitlines()
        assert first.endswith("/LATEST holds several SAEs; name one, or its layer by sae.layer=:")
        assert listed[:2] == [f"  {files[n].parent}" for n in (2, 10)]
        assert len(listed) == 11 and listed[-1] == "  and 3 more"


def test_a_run_without_saes_says_so(tmp_path):
    trained(tmp_path / "dpo", [])
    with pytest.raises(UserError, match=r"sae\.path=.*/dpo: a run without SAEs: of another loss, or not finished"):
        found(tmp_path / "dpo")


@pytest.mark.parametrize(
    ("given", "layer"),
    [
        (["++sae.path={}"], None),  # so the file says; not the 2 of config/sae/tiny.yaml, which is of another one
        (["sae.path={}", "sae.layer=1"], 1),
        (["++sae.path={}", "sae=tiny"], 2),
    ],
)
def test_a_path_alone_takes_nothing_from_the_models_own_sae(tmp_path, given, layer):
    trained(tmp_path / "one", [1])
    given = settings.translate_arguments([argument.format(tmp_path / "one") for argument in given])
    config, _ = settle(tmp_path, "loss=fpo", *given)
    section = settings.typed(config).sae
    assert (section.layer, section.name) == (layer, "tiny" if layer == 2 else None)
    assert settings.translate_arguments(["~sae", "++sae.path=x"]) == ["~sae", "++sae.path=x"]


def test_fpo_with_a_topk_sae(tmp_path, capsys):
    random = random_sae(d_in=128, d_sae=64)
    tensors = {"encoder.weight": random.W_enc.T, "encoder.bias": random.b_enc}
    tensors |= {"W_dec": random.W_dec, "b_dec": random.b_dec}
    config = {"d_in": 128, "num_latents": 64, "k": 6}
    write(tmp_path / "layers.1", "sae.safetensors", tensors, "cfg.json", config)
    lines = run(tmp_path, "loss=fpo", "~sae", f"++sae.path={tmp_path}/layers.1", "++loss.k=5")
    out = capsys.readouterr().out
    assert "is sparsify, TopK 6, 128 to 64 features" in out and "read at layer 1, residual" in out
    first, last = (line["feature_drift_eval/rejected"] for line in (lines[0], lines[-1]))
    assert first == pytest.approx(0, abs=1e-6) and last > 1e-3


@pytest.mark.slow
def test_fpo_with_one_sae_twice_is_fpo_with_it_once(tmp_path):
    once = run(tmp_path, "loss=fpo", "exp_name=once")
    part = "{path: assets/tiny-sae, layer: 2, weight: %s}"
    twice = ["~sae", f"++sae.parts.a={part % 2}", f"++sae.parts.b={part % 0.5}"]
    lines = run(tmp_path, "loss=fpo", "exp_name=twice", *twice)
    for line, other in zip(once, lines, strict=True):
        for key in (key for key in line if key.startswith(("loss", "feature_drift", "rewards"))):
            assert other[key] == pytest.approx(line[key], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_other_places_give_other_drifts_and_caches(tmp_path, capsys):
    drifts = set()
    for name, change in (("residual", []), ("mlp", ["++sae.hook=mlp"]), ("layer", ["++sae.layer=0"])):
        lines = run(tmp_path, "loss=fpo", f"exp_name={name}", *change)
        assert "reference cache: found" not in capsys.readouterr().out
        drifts.add(round(lines[-1]["feature_drift_eval/chosen"], 6))
    assert len(drifts) == 3
