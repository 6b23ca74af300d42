"""Downloads, from a server on this machine that speaks the Hub's protocol."""

import errno
import shutil

import pytest
from conftest import HH_100, REPO
from hub_server import HubServer
from huggingface_hub import constants

import dataloader
import models
from autoencoders.formats import fetch_sae
from data import hub, rows
from utils import UserError


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub with the built-in model and SAE, and a slice of HH; and an empty cache."""
    root = tmp_path / "hub"
    shutil.copytree(REPO / "assets/tiny", root / "models/org/tiny")
    (root / "models/org/tiny/pytorch_model.bin").write_bytes(b"pickle")
    shutil.copytree(REPO / "assets/tiny-sae", root / "models/org/sae/layer_2/width_1k")
    (root / "models/org/sae/layer_2/width_1k/other.safetensors").touch()
    shutil.copytree(HH_100, root / "datasets/Anthropic/hh-rlhf")
    served = HubServer(root)
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield served
    served.shutdown()


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
