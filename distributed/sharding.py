"""One model over many ranks (FSDP2): split it, run it, find each rank's slices and gather full tensors.

Every rank holds a slice of each parameter, cut along the first dimension. A decoder layer is gathered when it runs and
resharded afterwards. Embeddings, final norm and head stay gathered from the forward pass until the backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from distributed import parallel
from utils import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPUTES = "computes_in"  # the attribute that `shard` gives to a split model: its dtype when it is gathered
BACKBONE = "backbone"  # the method that `shard` adds to a split model and `backbone` returns


def shard(
    model: PreTrainedModel, layers: Sequence[nn.Module], compute_dtype: torch.dtype, *, hybrid: bool, offload: bool
) -> None:
    """Split a model on the meta device over all ranks: one FSDP unit for each layer, one for the rest.

    Parameters are gathered and used in `compute_dtype`, whatever dtype they are kept in; gradients are summed in fp32.
    `hybrid`: split within each node, replicate over the nodes. `offload`: keep the slices in host memory. Nothing
    happens on one rank if the model is kept in `compute_dtype` and not offloaded.
    """
    kept_dtypes = {parameter.dtype for parameter in model.parameters()}
    if parallel.world_size() == 1 and kept_dtypes == {compute_dtype} and not offload:
        return
    mesh = device_mesh(hybrid)
    for unit in (*layers, model):
        shard_unit(unit, compute_dtype, mesh, offload=offload)
    setattr(model, COMPUTES, compute_dtype)
    setattr(model, BACKBONE, model.base_model.__call__)
    register_fsdp_forward_method(model, BACKBONE)  # it gathers the root's parameters first, as the model's forward does


def backbone(model: PreTrainedModel) -> Callable[..., Any]:
    """The entry point of a model that returns hidden states. It works for split models and for unsplit ones.

    Scoring calls it instead of the model, which would also compute the logits of every position.
    """
    return getattr(model, BACKBONE) if isinstance(model, FSDPModule) else model.base_model


def shard_unit(unit: nn.Module, compute_dtype: torch.dtype, mesh: DeviceMesh, *, offload: bool) -> None:
    """Make one module a unit whose parameters are gathered and resharded together."""
    on_host = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    fully_shard(
        unit,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        offload_policy=on_host if offload else OffloadPolicy(),
    )


def device_mesh(hybrid: bool) -> DeviceMesh:
    """All ranks in one dimension. With hybrid sharding in two: split within a node, replicated across nodes.

    Raises UserError if the ranks do not fill whole nodes.
    """
    kind, world = parallel.device().type, parallel.world_size()
    if not hybrid:
        return init_device_mesh(kind, (world,))
    return node_mesh(dist.group.WORLD)


@cache  # its groups open connections, which all models can share
def node_mesh(_of: dist.ProcessGroup) -> DeviceMesh:
    """The mesh of hybrid sharding."""
    kind, world = parallel.device().type, parallel.world_size()
    per_node = parallel.ranks_per_node()
    if world % per_node:
        raise UserError(
            f"model.hybrid_sharding: {world} ranks do not fill whole nodes of {per_node} ranks; "
            f"start a multiple of {per_node} ranks"
        )
    return init_device_mesh(kind, (world // per_node, per_node), mesh_dim_names=("replicate", "shard"))


def sum_over_nodes(module: nn.Module, now: bool) -> None:
    """With hybrid sharding: whether the next backward pass sums gradients over the nodes, as the last one of a step has
    to. Those before it sum within each node, and their sums are kept."""
    for unit in fsdp_units(module):
        unit.set_requires_all_reduce(now, recurse=False)


def fsdp_units(module: nn.Module) -> Iterator[FSDPModule]:
    """The modules inside `module`, itself included, that `shard_unit` has split."""
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def reshard(module: nn.Module) -> None:
    """Replace every gathered parameter by this rank's slice. A forward pass without a backward pass leaves some
    parameters gathered, and an optimiser step does not change those gathered copies."""
    for unit in fsdp_units(module):
        unit.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Let every rank hold all of a split model, where that leaves half of its free memory; says whether it does. If so,
    passes without gradients need no other rank. For all ranks to call."""
    units = list(fsdp_units(model))
    size = getattr(model, COMPUTES).itemsize * sum(parameter.numel() for parameter in model.parameters())
    if parallel.max_over_ranks(size / parallel.free_memory()) > 1 / 2:
        yield False
        return
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield True
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)  # as `shard` has left them
        reshard(model)


def allocate_parameters(model: nn.Module, device: torch.device, *, offload: bool) -> None:
    """Allocate memory for a meta-device model's parameters, only for this rank's slices, and move its buffers.

    Buffers go to `device`; so do the parameters, or to host memory with `offload`. Values are not set.
    """
    parameter_device = torch.device("cpu") if offload else device
    model._apply(
        lambda tensor: torch.empty_like(tensor, device=parameter_device) if tensor.is_meta else tensor.to(device)
    )


def local_slice(tensor: Tensor) -> Tensor:
    """This rank's slice of a tensor, in the same memory; the tensor itself if it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_ranges(tensor: Tensor) -> tuple[slice, ...]:
    """The position of this rank's slice in the full tensor, one range for each dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank; a quantised one is dequantised. All ranks must ask for the same tensors in the
    same order."""
    if hasattr(tensor, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit  # an extra

        return dequantize_4bit(tensor.data, tensor.quant_state)
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_layout(tensor: Tensor) -> Tensor:
    """The shape and dtype of `full_tensor`, as a tensor on the meta device."""
    whole = getattr(tensor, "quant_state", tensor)
    return torch.empty(whole.shape, dtype=whole.dtype, device="meta")
