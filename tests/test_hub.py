"""Downloads, from a server on this machine that speaks the Hub's protocol."""

import errno
import importlib.util
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml
from composition import composed
from conftest import HH_100, REPO, metrics
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import save_file

import dataloader
import models
import train
from autoencoders import formats
from autoencoders.formats import fetch_sae
from data import hub, rows, toy
from utils import UserError


@pytest.fixture
def empty_server(tmp_path, monkeypatch):
    """A Hub with nothing on it, and an empty cache."""
    (tmp_path / "hub").mkdir()
    served = HubServer(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield served
    served.shutdown()


@pytest.fixture
def server(empty_server):
    """A Hub with the built-in model and SAE, and a slice of HH."""
    root = empty_server.root
    shutil.copytree(REPO / "assets/tiny", root / "models/org/tiny")
    (root / "models/org/tiny/pytorch_model.bin").write_bytes(b"pickle")
    shutil.copytree(REPO / "assets/tiny-sae", root / "models/org/sae/layer_2/width_1k")
    (root / "models/org/sae/layer_2/width_1k/other.safetensors").touch()
    shutil.copytree(HH_100, root / "datasets/Anthropic/hh-rlhf")
    return empty_server


def test_a_model_comes_without_what_is_not_needed(server):
    folder = models.fetch("org/tiny", models.CONFIG_FILES, "model.name_or_path")
    assert (folder / "config.json").is_file() and not list(folder.glob("*.safetensors"))
    folder = models.fetch("org/tiny", models.WEIGHT_FILES, "model.name_or_path")
    assert (folder / "model.safetensors").read_bytes() == (REPO / "assets/tiny/model.safetensors").read_bytes()
    assert not (folder / "pytorch_model.bin").exists()
    files = sum(" org/tiny/resolve" in line for line in server.asked)
    models.fetch("org/tiny", models.WEIGHT_FILES, "model.name_or_path")
    assert sum(" org/tiny/resolve" in line for line in server.asked) == files  # nothing is fetched twice


@pytest.mark.usefixtures("server")
def test_an_sae_comes_by_its_path_alone():
    found = fetch_sae("org/sae/layer_2/width_1k", "sae.path")
    assert sorted(path.name for path in found.iterdir()) == ["params.npz"]
    with pytest.raises(UserError, match="org/sae has no layer_9/width_1k"):
        fetch_sae("org/sae/layer_9/width_1k", "sae.path")


@pytest.mark.usefixtures("server")
def test_a_data_set_comes_by_its_split():
    (file,) = rows.hub_files("Anthropic/hh-rlhf", ["harmless-base/{split}.jsonl.gz"], "test", None)
    assert file.read_bytes() == (HH_100 / "harmless-base/test.jsonl.gz").read_bytes()
    assert not (file.parent / "train.jsonl.gz").exists()
    assert len(dataloader.get_hh("test")) > 10


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        (
            "org/gated",
            r"model\.name_or_path: .*it is gated\. Accept its terms at http.*/org/gated and run `hf auth",
        ),
        ("org/nothing", "there is no model of this name, or it is private"),
        ("no name", "no name of a model there, which is ORG/NAME"),
    ],
)
def test_what_the_hub_refuses_is_told(server, repository, message):
    shutil.copytree(server.root / "models/org/tiny", server.root / "models/org/gated")
    server.gated.add("org/gated")
    with pytest.raises(UserError, match=message):
        models.fetch(repository, models.CONFIG_FILES, "model.name_or_path")


@pytest.mark.usefixtures("server")
def test_no_hub(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"it is not here yet, and http://127\.0\.0\.1:9 cannot be reached"):
        models.fetch("org/tiny", models.CONFIG_FILES, "model.name_or_path")


def test_a_dropped_connection_goes_on_or_is_told(server):
    server.broken = {"model.safetensors": 1}
    folder = models.fetch("org/tiny", models.WEIGHT_FILES, "model.name_or_path")
    assert (folder / "model.safetensors").read_bytes() == (REPO / "assets/tiny/model.safetensors").read_bytes()


def test_a_connection_that_always_drops(server):
    server.broken = {"params.npz": 10**6}
    with pytest.raises(UserError, match=r"sae\.path: .*; the same command goes on with it"):
        fetch_sae("org/sae/layer_2/width_1k", "sae.path")
    server.broken = {}
    assert (fetch_sae("org/sae/layer_2/width_1k", "sae.path") / "params.npz").is_file()


def test_a_full_disk_is_told(monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(UserError, match=r"no space is left for .* \(HF_HOME= names another place\)"):
        models.fetch("org/tiny", models.CONFIG_FILES, "model.name_or_path")


# ---------------------------------------------------------------------------------------------------- the quickstart

WIDTH, LATENTS = 32, 64
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE |= {"head_dim": 16, "vocab_size": 823, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def gemma_scope_2(folder):
    folder = folder / "google/gemma-scope-2-270m-it/resid_post/layer_15_width_16k_l0_medium"
    folder.mkdir(parents=True)
    tensors = {"w_enc": draw(WIDTH, LATENTS), "w_dec": draw(LATENTS, WIDTH), "b_enc": draw(LATENTS)}
    save_file({**tensors, "b_dec": draw(WIDTH), "threshold": draw(LATENTS).abs()}, folder / "params.safetensors")
    hook = "model.layers.15.output"
    fields = {"width": LATENTS, "model_name": "google/gemma-3-270m-it", "architecture": "jump_relu", "l0": 60}
    fields |= {"affine_connection": False, "hf_hook_point_in": hook, "hf_hook_point_out": hook, "type": "sae"}
    (folder / "config.json").write_text(json.dumps(fields))


def sparsify(folder):
    folder = folder / "EleutherAI/sae-SmolLM2-135M-64x/layers.27.mlp"
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": draw(LATENTS, WIDTH), "encoder.bias": draw(LATENTS)}
    save_file({**tensors, "W_dec": draw(LATENTS, WIDTH), "b_dec": draw(WIDTH)}, folder / "sae.safetensors")
    # the real file says 32 too, of 36,864 latents, which are 64 times the width
    fields = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": LATENTS, "k": 32}
    (folder / "cfg.json").write_text(
        json.dumps({**fields, "multi_topk": False, "skip_connection": False, "d_in": WIDTH})
    )


@pytest.mark.parametrize(
    ("model", "hub_id", "architecture", "layers", "write_sae", "reads"),
    [
        ("gemma3-270m-it", "google/gemma-3-270m-it", "Gemma3Text", 18, gemma_scope_2, "layer 15, residual"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "Llama", 30, sparsify, "layer 27, mlp"),
    ],
)
def test_a_name_alone_gives_model_sae_and_data(
    model, hub_id, architecture, layers, write_sae, reads, empty_server, tmp_path, capsys
):
    """`train.py loss=fpo model=NAME`: everything is where the Hub has it, but small."""
    root = empty_server.root
    config = getattr(transformers, f"{architecture}Config")(**SHAPE, num_hidden_layers=layers)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / "models" / hub_id)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(REPO / "assets/tiny" / name, root / "models" / hub_id)
    write_sae(root / "models")
    data = root / "datasets/HuggingFaceH4/ultrafeedback_binarized/data"
    data.mkdir(parents=True)
    for split, count in (("train", 8), ("test", 4)):
        sides = ("chosen", "rejected")
        pairs = [
            {"prompt": row["prompt"]}
            | {
                side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
                for side in sides
            }
            for row in toy.preferences(split, seed=0, count=count)
        ]
        datasets.Dataset.from_list(pairs).to_parquet(data / f"{split}_prefs-00000-of-00001.parquet")
    given = ["loss=fpo", f"model={model}", "++model.batch_size=4", "++model.policy_dtype=float32", "++max_new_tokens=4"]
    train.train(composed([*given, f"cache_dir={tmp_path}"]))
    first, *_, last = metrics(tmp_path / f"fpo_{model}")
    assert first["loss/eval"] == pytest.approx(0.6931, abs=1e-4)
    assert last["feature_drift_eval/chosen"] > first["feature_drift_eval/chosen"]
    assert reads in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- the real Hub

KNOWN = json.loads((REPO / "tests/data/hub_paths.json").read_text())


class Asked(Exception):
    """What a download asked for: repository, patterns."""


def asked(*arguments, **_):
    raise Asked(*arguments)


def requested(function, *arguments):
    with pytest.raises(Asked) as caught:
        function(*arguments)
    return caught.value.args


def settings_of(folder):
    return {file.stem: yaml.safe_load(file.read_text()) for file in sorted((REPO / "config" / folder).glob("*.yaml"))}


def test_each_model_of_the_config_has_safetensors_on_the_hub():
    sources = {
        settings["name_or_path"] for name, settings in settings_of("model").items() if name not in ("base", "tiny")
    }
    assert sources == {*KNOWN["models"], *KNOWN["models without a record of their files"]}
    for name, record in KNOWN["models"].items():
        for patterns in (models.CONFIG_FILES, models.WEIGHT_FILES):
            assert any(fnmatch(file, pattern) for file in record["files"] for pattern in patterns), name


def test_each_sae_of_the_config_is_on_the_hub(monkeypatch):
    monkeypatch.setattr(formats, "fetch", asked)
    paths = {settings["path"] for name, settings in settings_of("sae").items() if name != "tiny"}
    repositories = set()
    for path in paths:
        repository, patterns, _ = requested(fetch_sae, path, "sae.path")
        files = KNOWN["saes"][repository]["files"]
        own = [file for file in files if f"{repository}/{file}".startswith(path) or file == "config.json"]
        assert {file for file in files if any(fnmatch(file, pattern) for pattern in patterns)} == set(own), path
        form = next(form for form in formats.SAE_FORMATS.values() if any(fnmatch(f, f"*{form.weights}") for f in own))
        assert form.config is None or form.config_optional or any(fnmatch(f, f"*{form.config}") for f in own), path
        repositories.add(repository)
    assert repositories == KNOWN["saes"].keys()


def test_each_named_data_set_is_on_the_hub(monkeypatch):
    monkeypatch.setattr(dataloader, "hub_files", asked)
    repositories = set()
    for name, loader in dataloader.named_loaders().items():
        if name in ("toy", "toy_sft"):
            continue
        for split in ("test",) if name in ("alpacaeval", "arenahard", "mtbench") else ("train", "test"):
            repository, patterns, split, *_ = requested(loader, split)
            files = KNOWN["data sets"][repository]["files"]
            found = [any(fnmatch(file, pattern.format(split=split)) for file in files) for pattern in patterns]
            # arenahard and mtbench also have the pattern of the authors' own repositories
            assert all(found) if name not in ("arenahard", "mtbench") else found == [True, False], (name, split)
            repositories.add(repository)
    assert repositories == KNOWN["data sets"].keys()


def test_the_record_of_saes_is_saelens_index():
    spec = importlib.util.find_spec("sae_lens")  # its import takes long
    if not spec or not spec.origin:
        pytest.skip("sae-lens is not installed")
    index = yaml.load((Path(spec.origin).parent / "pretrained_saes.yaml").read_text(), yaml.CSafeLoader)
    listed = {(release["repo_id"], sae["path"]) for release in index.values() for sae in release["saes"]}
    for repository, record in KNOWN["saes"].items():
        if record["from"] == "SAELens's index":
            for file in record["files"]:
                folders = [str(parent) for parent in (Path(file), *Path(file).parents)]
                assert file == "config.json" or any((repository, folder) in listed for folder in folders), file
