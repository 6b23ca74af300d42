"""One model over many ranks (FSDP2): how it is split, and how its parts are told, read and put together.

Every rank holds a slice of each parameter, cut along the first dimension. A decoder layer is gathered when it runs
and dropped afterwards; embeddings, final norm and head stay gathered from the forward to the backward pass.
"""

from collections.abc import Iterator, Sequence

import torch
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


def shard(
    model: PreTrainedModel, layers: Sequence[nn.Module], compute: torch.dtype, *, hybrid: bool, offload: bool
) -> None:
    """Split a model on the meta device over all ranks: one unit for each layer, one for all the rest.

    Parameters are gathered in the dtype `compute`, whatever they are kept in; gradients are summed in fp32. `hybrid`:
    split within each node, replicate over nodes. `offload`: keep the slices in host memory. One rank that computes in
    the dtype it keeps needs none of this.
    """
    kept = {parameter.dtype for parameter in model.parameters()}
    if parallel.world_size() == 1 and kept == {compute} and not offload:
        return
    for unit in (*layers, model):
        split(unit, compute, hybrid=hybrid, offload=offload)
    # Scoring needs the hidden states, not the logits, so it enters here and not by the model's own forward.
    model.backbone = model.base_model.__call__  # type: ignore[assignment]
    register_fsdp_forward_method(model, "backbone")


def split(unit: nn.Module, compute: torch.dtype, *, hybrid: bool, offload: bool) -> None:
    """Make one module a unit that is gathered and dropped as a whole."""
    on_host = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    fully_shard(
        unit,
        mesh=mesh(hybrid),
        mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        offload_policy=on_host if offload else OffloadPolicy(),
    )


def mesh(hybrid: bool) -> DeviceMesh:
    """All ranks in a row, or, for hybrid sharding, in a row for each node: split within it, replicated over them."""
    kind, world = parallel.device().type, parallel.world_size()
    if not hybrid:
        return init_device_mesh(kind, (world,))
    per_node = parallel.ranks_per_node()
    if world % per_node:
        raise UserError(f"model.hybrid_sharding: {world} ranks are no whole number of nodes of {per_node} ranks")
    return init_device_mesh(kind, (world // per_node, per_node), mesh_dim_names=("replicate", "shard"))


def units(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def reshard(module: nn.Module) -> None:
    """Let every parameter be its slice again. A forward pass without a backward pass leaves some of them gathered, and
    what looks at the parameters then sees tensors that no optimiser step will change."""
    for unit in units(module):
        unit.reshard()


def materialise(model: nn.Module, device: torch.device, *, offload: bool) -> None:
    """Give the parameters of a meta-device model memory, for their own slices only; move the buffers."""
    place = torch.device("cpu") if offload else device
    model._apply(lambda tensor: torch.empty_like(tensor, device=place) if tensor.is_meta else tensor.to(device))


def local(tensor: Tensor) -> Tensor:
    """This rank's slice, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_ranges(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank's slice is."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank; a quantised one dequantised. All ranks have to ask for the same ones in the same
    order."""
    if hasattr(tensor, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit  # an extra

        return dequantize_4bit(tensor.data, tensor.quant_state)
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
