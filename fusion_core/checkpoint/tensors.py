"""Tensors of a checkpoint, read one by one where they lie in the safetensors files that an engine loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ...errors import FsePatchError
from .headers import merge_headers
from .sources import Source, folder_source

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


class CheckpointTensors:
    """Tensors of the files that were loaded, by name; the headers say where each lies.

    Args:
        files: names of the files.

    Raises:
        FsePatchError: a file is not on this machine, or its header is malformed.
    """

    def __init__(self, checkpoint: Source | Path, files: Iterable[str]) -> None:
        self.source = folder_source(checkpoint)
        self._headers = dict(self.source.headers(files))
        merged = merge_headers(self._headers, self.source.where)
        self._places, self.digest = merged.places, merged.digest

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """List the names of all tensors."""
        return list(self._places)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Read a tensor, or row ``row`` of its first dimension, into the host's memory; dtype as stored.

        Raises:
            FsePatchError: it cannot be read, or is of a dtype that torch does not have.
        """
        file = self._places[name]
        where, path, header = self.source.where(file), self.source.local(file), self._headers[file]
        entry = header.entries[name]
        dtype, shape = _DTYPES.get(entry["dtype"]), list(entry["shape"])
        if dtype is None:
            raise FsePatchError(f"{where}: {name!r} is {entry['dtype']}, which is not read here")
        if path is None:
            raise FsePatchError(f"{where}: is not on this machine")
        begin, end = (header.start + offset for offset in entry["data_offsets"])
        if row is not None:
            size = (end - begin) // shape.pop(0)
            begin, end = begin + row * size, begin + (row + 1) * size
        with path.open("rb") as data_file:
            data_file.seek(begin)
            data = bytearray(data_file.read(end - begin))
        if len(data) != end - begin or not data:
            raise FsePatchError(f"{where}: {name!r} cannot be read; download it again")
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)
