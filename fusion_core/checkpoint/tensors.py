"""Tensors of a checkpoint, read one by one where they lie in its safetensors files."""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...errors import FsePatchError
from .headers import INDEX_NAME, MAX_HEADER_BYTES, read_json

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


class CheckpointTensors:
    """Tensors of a folder whose headers `read_headers` has accepted, by name.

    Args:
        folder: the checkpoint; its index, or else all its safetensors files, say where a tensor is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX_NAME
        self._files: dict[str, str] = {}
        if index.is_file():
            self._files = dict(read_json(index)["weight_map"])
        else:
            for path in sorted(folder.glob("*.safetensors")):
                self._files |= dict.fromkeys(_header(path)[1], path.name)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """List the names of all tensors."""
        return list(self._files)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Read a tensor, or row ``row`` of its first dimension, into the host's memory; dtype as stored.

        Raises:
            FsePatchError: it cannot be read, or is of a dtype that torch does not have.
        """
        path = self.folder / self._files[name]
        start, header = _header(path)
        entry = header[name]
        dtype, shape = _DTYPES.get(entry["dtype"]), list(entry["shape"])
        if dtype is None:
            raise FsePatchError(f"{path}: {name!r} is {entry['dtype']}, which is not read here")
        begin, end = (start + offset for offset in entry["data_offsets"])
        if row is not None:
            size = (end - begin) // shape.pop(0)
            begin, end = begin + row * size, begin + (row + 1) * size
        with path.open("rb") as file:
            file.seek(begin)
            data = bytearray(file.read(end - begin))
        if len(data) != end - begin or not data:
            raise FsePatchError(f"{path}: {name!r} cannot be read; download it again")
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


@lru_cache(maxsize=8)
def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Read where the data of a file starts, and its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise FsePatchError(f"{path}: no safetensors file: header length {length}; download it again")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header
