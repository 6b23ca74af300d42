"""Memory and time on many ranks, shown on one or two of a CPU."""

import json
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import REPO, on_ranks, tiny_gemma
from safetensors.torch import load_file
from test_training import assembled, settle

import dataloader
import models
import utils
from data.batch import batches_within, count_positions
from distributed import parallel, sharding
from launch import assembly, settings, startup
from modeling.weights import dtype_of, write_weights
from sampling.generate import Decoding, Request, sample
from training import checkpoint, loop, reference
from training.metrics import MetricAccumulator
from utils import DIGESTS, file_digest, seal

# ------------------------------------------------------------------------------------------------------- micro-batches


def test_the_graph_of_a_micro_batch_ends_with_it(tmp_path, monkeypatch):
    trainer = assembled(tmp_path, "loss=dpo", "model.gradient_accumulation_steps=4")
    graphs, compute_loss = [], trainer.compute_loss

    def watched(*arguments):
        assert [graph() for graph in graphs] == [None] * len(graphs)  # of those before
        losses = compute_loss(*arguments)
        graphs.append(weakref.ref(losses))
        return losses

    monkeypatch.setattr(trainer, "compute_loss", watched)
    batches = next(trainer.steps("train"))
    trainer.update(0, batches, MetricAccumulator())
    assert len(graphs) == len(batches) == 4


@pytest.fixture
def one_node(monkeypatch):
    """Hybrid sharding of one rank, whose node is itself."""
    monkeypatch.setattr(parallel, "ranks_per_node", lambda: 1)
    sharding.node_mesh.cache_clear()
    yield
    sharding.node_mesh.cache_clear()


@pytest.mark.usefixtures("one_node")
def test_hybrid_sharding_has_one_mesh_for_all_units_and_models(monkeypatch):
    made, real = [], sharding.init_device_mesh
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *args, **named: made.append(args) or real(*args, **named))
    for model in (tiny_gemma(layers=2), tiny_gemma(layers=2)):
        sharding.shard(model, models.decoder_layers(model), torch.bfloat16, hybrid=True, offload=False)
    assert len(made) == 1


@pytest.mark.usefixtures("one_node")
def test_gradients_go_over_the_nodes_once_a_step(tmp_path, monkeypatch):
    """And are those of a model that is not replicated."""
    own, norms, sums = ["loss=dpo", "model.policy_dtype=bfloat16", "model.gradient_accumulation_steps=4"], [], []
    all_reduce, groups = dist.all_reduce, []

    def counted(tensor, *options, **named):
        groups.append(named.get("group"))
        return all_reduce(tensor, *options, **named)

    for hybrid in ("false", "true"):
        trainer = assembled(tmp_path, *own, f"model.hybrid_sharding={hybrid}", f"exp_name=hybrid-{hybrid}")
        batches = next(trainer.steps("train"))
        with monkeypatch.context() as patch:
            patch.setattr(dist, "all_reduce", counted)
            trainer.update(0, batches, MetricAccumulator())
        sums.append(sum(group is not None for group in groups))
        norms.append(trainer.check_updates())
    assert len(batches) == 4 and sums == [0, len(list(sharding.fsdp_units(trainer.module)))]
    assert norms[0] == norms[1]


def test_gradients_that_ranks_hold_whole_are_averaged_at_once(monkeypatch):
    tensors = [torch.full((2, 3), 2.0), torch.full((4,), 6.0), torch.full((5,), 2.0, dtype=torch.bfloat16)]
    calls = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: calls.append(tensor.numel()) or tensor.mul_(3))
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    loop.average_over_ranks(tensors)
    assert sorted(calls) == [5, 10]
    assert [tensor.unique().tolist() for tensor in tensors] == [[3.0], [9.0], [3.0]]


# -------------------------------------------------------------------------------------------------- tokens, reference


def test_other_ranks_open_what_rank_zero_has_read(tmp_path, monkeypatch):
    raw, _ = settle(tmp_path, "loss=dpo")
    config, classes = settings.check_config(raw)
    tokenizer = models.load_tokenizer(REPO / "assets/tiny")
    own = assembly.tokenise_split(config, classes, tokenizer, "train")
    monkeypatch.setattr(parallel, "from_rank_zero", lambda _: (own.fingerprint, own.path, own.weights))
    monkeypatch.setattr(dataloader, "load_tokens", lambda *_args, **_options: pytest.fail("it reads the data again"))
    other = assembly.tokenise_split(config, classes, tokenizer, "train")
    assert other.rows.to_list() == own.rows.to_list() and (other.path, other.weights) == (own.path, own.weights)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_records_are_put_together_up_to_a_number_of_positions(layout):
    shapes = [(10 + 7 * i % 30, [5 + 3 * i % 20, 9]) for i in range(40)] + [(150, [60, 70])]
    batches = batches_within(shapes, layout, 200)
    assert sorted(i for batch in batches for i in batch) == list(range(41)) and batches[0] == [40]
    sizes = [count_positions([shapes[i] for i in batch], layout) for batch in batches]
    assert max(sizes[1:]) <= 200 and min(sizes[1:-1]) > 100


def test_the_reference_and_evaluation_fill_max_tokens(tmp_path, monkeypatch):
    """Whatever `eval_batch_size` is; the numbers are the same."""
    rows, sizes, real = [], [], reference.reference_rows
    monkeypatch.setattr(
        reference, "reference_rows", lambda batch, *rest: sizes.append(batch.input_ids.numel()) or real(batch, *rest)
    )
    for number, own in enumerate([["model.max_tokens=400", "model.eval_batch_size=2"], ["model.max_tokens=null"]]):
        trainer = assembled(tmp_path, "loss=dpo", *own, f"cache_dir={tmp_path / str(number)}")
        rows.append(trainer.references["train"].rows)
        if len(rows) == 1:
            assert max(sizes) <= 400 and len(sizes) < (24 + 8) / 2 and sum(sizes) / len(sizes) > 200
            sizes.clear()
            trainer.loaders["eval"].batch_size = 8
            parts = [batch.input_ids.numel() for step in trainer.loaders["eval"].steps() for batch in step]
            assert len(parts) > 1 and max(parts) <= 400
    for column in ("logps", "token_logps"):
        for one, other in zip(*(own[:][column] for own in rows), strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- sampling

PROMPTS = [[1, *range(10, 10 + length)] for length in (3, 5, 7, 9, 11)]
REQUESTS = [Request(ids, temperature=1.0, draw=number) for number, ids in enumerate(PROMPTS)]
DECODING = Decoding(max_new_tokens=6, seed=1, stop=("a",))  # so that some end early

DRAW = """
import json, sys
sys.path[:0] = [{repo!r}, {repo!r} + "/tests"]
import torch
from distributed import parallel, sharding
import models
from sampling import generate
from test_scale import DECODING, REPO, REQUESTS

def work():
    def split(model):
        sharding.shard(model, models.decoder_layers(model), torch.float32, hybrid=False, offload=False)
    model = models.load_model(REPO / "assets/tiny", "eager", parallel.device(), shape=split)
    models.require_own_scores(model, REPO, reward=False)
    tokenizer, count, draw_batch = models.load_tokenizer(REPO / "assets/tiny"), [], generate.draw_batch
    generate.draw_batch = lambda *args, **named: count.append(named) or draw_batch(*args, **named)
    for free in (1 << 40, 1):
        parallel.free_memory = lambda: free
        count.clear()
        found = generate.sample(model, tokenizer, REQUESTS, DECODING, batch_size=1)
        if free == 1:  # a pass without a gradient leaves some of it gathered
            sharding.reshard(model)
        kept = sum(sharding.local_slice(p).numel() for p in model.parameters())
        synced = sum(named["synced_gpus"] for named in count)
        if parallel.rank() == 1:
            parallel.console.quiet = False
            print(json.dumps([[one.text for one in found], len(count), synced, kept]))
        models.require_own_scores(model, REPO, reward=False)

parallel.run(work)
"""


def test_the_ranks_of_a_split_model_share_the_prompts(tmp_path):
    """Where it fits each draws on its own; else together, though some completions end before others."""
    script = tmp_path / "draw.py"
    script.write_text(DRAW.format(repo=str(REPO)))
    lines = [json.loads(line) for line in on_ranks(2, script).splitlines() if line.startswith("[[")]
    model = models.load_model(REPO / "assets/tiny", "eager", torch.device("cpu"))
    expected = sample(model, models.load_tokenizer(REPO / "assets/tiny"), REQUESTS, DECODING, batch_size=5)
    lengths = [len(one.ids) for one in expected]
    half = sum(p.numel() for p in model.parameters()) / 2
    assert min(lengths) < max(lengths)
    assert [texts for texts, *_ in lines] == [[one.text for one in expected]] * 2
    assert [(drawn, synced) for _, drawn, synced, _ in lines] == [(2, 0), (3, 3)]  # of five, by rank 1
    assert [kept for *_, kept in lines] == pytest.approx([half, half], rel=0.01)  # split again


# ------------------------------------------------------------------------------------------------------------- saving


def test_rank_zero_hashes_no_file_of_other_ranks(tmp_path, monkeypatch):
    (tmp_path / "rank-00001.safetensors").write_bytes(b"one")
    (tmp_path / "rank-00002.safetensors").write_bytes(b"two")
    (tmp_path / "trainer.json").write_bytes(b"{}")
    writer, said = checkpoint.StateWriter(str(tmp_path), save_distributed=True), {"rank-00002.safetensors": "by rank 1"}
    writer.file = tmp_path / "rank-00001.safetensors"

    def gather_object(own, found, **_):
        found[:] = [own, said]

    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_object", gather_object)
    known = writer.digests_of_all(None)
    hashed = []
    monkeypatch.setattr(utils, "file_digest", lambda path: hashed.append(path.name) or file_digest(path))
    seal(tmp_path, known)
    assert hashed == ["trainer.json"]
    sealed = json.loads((tmp_path / DIGESTS).read_text())
    assert sealed["rank-00001.safetensors"] == file_digest(writer.file)
    assert sealed["rank-00002.safetensors"] == "by rank 1"
    said = "rank-00002.safetensors: Input/output error"
    with pytest.raises(OSError, match="Input/output error"):
        writer.digests_of_all(None)
    writer.file.unlink()  # what this rank cannot read, it says to the others before it fails
    with pytest.raises(OSError, match="No such file"):
        writer.digests_of_all(None)


def test_an_export_has_the_dtype_that_is_asked_for(tmp_path):
    trainer = assembled(tmp_path, "loss=sft", "export_dtype=bfloat16")
    for name in ("half", "whole"):
        (tmp_path / name).mkdir()
    trainer.write_export(tmp_path / "half", 0)
    write_weights(trainer.policy, tmp_path / "whole", ["hub"])
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert whole.keys() == half.keys()
    for name, value in whole.items():
        assert value.dtype == torch.float32 and torch.equal(half[name], value.bfloat16())
    state = torch.load(tmp_path / "half/policy.pt", weights_only=True)["state"]
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert (dtype_of(tmp_path / "half"), trainer.is_export_as_wanted(tmp_path / "half")) == ("bfloat16", True)
    (tmp_path / "half/config.json").write_bytes((tmp_path / "whole/config.json").read_bytes())
    assert not trainer.is_export_as_wanted(tmp_path / "half")
    again = models.load_model(tmp_path / "half", "eager", torch.device("cpu"), dtype=torch.bfloat16)
    assert torch.equal(again.state_dict()["model.norm.weight"], half["model.norm.weight"])


# -------------------------------------------------------------------------------------------------------- CUDA's memory


@pytest.mark.parametrize("own", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "x"}])
def test_cudas_allocator_gets_segments_that_grow_unless_it_is_told_otherwise(monkeypatch, own):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(startup, "collect_garbage_rarely", lambda: None)
    startup.begin("", [])
    expected = {} if own else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")} == own | expected
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert Path(startup.__file__).read_text().count("import torch") == 0  # which may start CUDA
