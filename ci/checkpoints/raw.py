"""Safetensors files written by hand: chosen offsets, and headers without data."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}


def header_bytes(entries: Sequence[tuple[str, str, Sequence[int]]]) -> tuple[bytes, int]:
    """Return the length-prefixed header for (name, dtype, shape) in this order, and the data's length."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + _BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8
    return struct.pack("<Q", len(text)) + text, offset


def write_sparse(path: Path, entries: Sequence[tuple[str, str, Sequence[int]]]) -> int:
    """Write a real header and a hole of the full declared length for data; return that length."""
    head, length = header_bytes(entries)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + length)
    return length


def read_raw(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return every tensor of a file as (dtype, shape, bytes)."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + size :]
    return {n: (v["dtype"], v["shape"], bytes(body[slice(*v["data_offsets"])])) for n, v in header.items()}


def write_raw(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> None:
    """Write tensors in the mapping's order, in the header and by offset (the library's own writer sorts)."""
    head, _ = header_bytes([(n, d, s) for n, (d, s, _) in tensors.items()])
    with path.open("wb") as file:
        file.write(head)
        for _, _, data in tensors.values():
            file.write(data)


def write_index(folder: Path, files: Mapping[str, str], total: int) -> None:
    """Write model.safetensors.index.json for {tensor: file}."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
