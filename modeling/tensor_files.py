"""Files of tensors that are written one tensor at a time, so that no two have to be in memory: safetensors, and what
`torch.save` writes.

A file begins with room for all that it will hold; `TensorFile.write` puts each tensor into its place, in any order.
"""

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LOCAL_HEADER, CENTRAL_HEADER = 30, 46  # bytes of a zip archive's headers, without the name and what follows it
CRC_IN_CENTRAL_HEADER = 16


class TensorFile:
    """A file with a place, in bytes from its beginning, for each of some tensors."""

    def __init__(self, path: Path, places: Mapping[str, int]) -> None:
        self.places = places
        self.file = path.open("r+b")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, of any device, to its place."""
        self.file.seek(self.places[name])
        self.file.write(content_of(tensor))

    def close(self) -> None:
        self.file.close()


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory, as files have them. Not a copy, if they lie there in this order already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def safetensors_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> TensorFile:
    """A safetensors file with room for `tensors`, of which only the shapes and dtypes are read. It is the file that
    `safetensors.torch.save_file` would write."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # so that each is aligned
        tensor, start = tensors[name], end
        end += math.prod(tensor.shape) * tensor.itemsize
        named = {"dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = named
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return TensorFile(path, {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors})


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole safetensors file."""
    file = safetensors_file(path, tensors, metadata)
    try:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    finally:
        file.close()


class TorchFile(TensorFile):
    """The zip archive of `torch.save({**rest, "state": {name: tensor, ...}})`, with room for `tensors`, of which only
    the shapes and dtypes are read. `aliases` are more names of them in the state: {name: the one in `tensors`}.

    Raises OSError where it cannot be written.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], rest: Mapping[str, Any]
    ) -> None:
        with FakeTensorMode():
            fakes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
        state = fakes | {name: fakes[own] for name, own in aliases.items()}
        try:
            with skip_data(materialize_fake_tensors=True):
                torch.save({**rest, "state": state}, path)
        except RuntimeError as error:  # so torch tells a full disk
            raise OSError(str(error)) from error
        with zipfile.ZipFile(path) as archive:
            records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
            entry = archive.start_dir
        own = {f"data/{number}": name for number, name in enumerate(tensors)}  # as torch.save numbers them
        places: dict[str, int] = {}
        self.checksums: dict[str, int] = {}  # where each tensor's is in the archive's directory
        with path.open("rb") as file:
            for key, record in records.items():
                if key in own:
                    file.seek(record.header_offset)
                    lengths = struct.unpack("<HH", file.read(LOCAL_HEADER)[-4:])  # of the name, of what follows it
                    places[own[key]] = record.header_offset + LOCAL_HEADER + sum(lengths)
                    self.checksums[own[key]] = entry + CRC_IN_CENTRAL_HEADER
                entry += CENTRAL_HEADER + len(record.filename.encode()) + len(record.extra) + len(record.comment)
        super().__init__(path, places)

    def write(self, name: str, tensor: Tensor) -> None:
        super().write(name, tensor)
        self.file.seek(self.checksums[name])
        self.file.write(struct.pack("<I", zlib.crc32(content_of(tensor))))
