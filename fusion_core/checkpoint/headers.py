"""Names, dtypes and shapes of a checkpoint's tensors, from safetensors headers alone.

Standard library only: no tensor data is read and neither torch nor numpy is loaded.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FsePatchError

INDEX_NAME = "model.safetensors.index.json"
# The limit that safetensors sets for a header; a larger length is a broken or foreign file.
MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs"

_DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip


class TensorHeader(NamedTuple):
    """Header of one tensor: dtype as safetensors names it ("BF16", "F8_E4M3", ...), and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointHeaders:
    """Headers of all tensors of a checkpoint folder, by name; ``files`` are the shards they came from.

    Both are empty where the folder holds no safetensors file.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, TensorHeader]


# (dtype, shape) as stored -> its checked form and its size in bytes (None: dtype unknown).
_Known = dict[tuple[str, tuple[int, ...]], tuple[TensorHeader, int | None]]


def read_headers(folder: Path) -> CheckpointHeaders:
    """Read the headers of every shard that engines would load from ``folder``.

    Shards are those of the index where there is one, otherwise all ``*.safetensors`` files.

    Raises:
        FsePatchError: a shard is missing, truncated or malformed, or two shards hold one name.
    """
    index = folder / INDEX_NAME
    weight_map = _read_index(index) if index.is_file() else None
    if weight_map is None:
        shards = sorted(p.name for p in folder.glob("*.safetensors"))
    else:
        shards = sorted(set(weight_map.values()))
    tensors: dict[str, TensorHeader] = {}
    owner: list[tuple[str, dict[str, TensorHeader]]] = []
    known: _Known = {}
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise FsePatchError(f"{path}: missing, but {INDEX_NAME} names it; download the whole checkpoint")
        headers = _read_shard(path, known)
        if twice := tensors.keys() & headers.keys():
            name = min(twice)
            first = next(s for s, names in owner if name in names)
            raise FsePatchError(
                f"{path}: tensor {name!r} is also in {first}; keep one of the two files or add an index"
            )
        tensors.update(headers)
        owner.append((shard, headers))
    if weight_map is not None and (lost := weight_map.keys() - tensors.keys()):
        raise FsePatchError(
            f"{index}: tensor {min(lost)!r} is in none of its shards; index and shards do not belong together"
        )
    return CheckpointHeaders(tuple(shards), tensors)


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Raises:
        FsePatchError: the file cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise FsePatchError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FsePatchError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise FsePatchError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FsePatchError(f"{path}: has no 'weight_map' of tensor names to files; download it again")
    for file in set(map(str, weight_map.values())):
        # Engines look for shards beside the index only; anything else would leave the folder.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise FsePatchError(f"{path}: 'weight_map' names {file!r}, no safetensors file beside it")
    return weight_map


def _read_shard(path: Path, known: _Known) -> dict[str, TensorHeader]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            if (_LFS_POINTER).startswith(start) and start:
                raise FsePatchError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
            if len(start) < 8:
                raise FsePatchError(f"{path}: truncated: {size} bytes hold no header; download it again")
            (length,) = struct.unpack("<Q", start)
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise FsePatchError(f"{path}: no safetensors file: header length {length}; download it again")
            if length > size - 8:
                raise FsePatchError(
                    f"{path}: truncated: header of {length} bytes, {size - 8} are there; download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise FsePatchError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FsePatchError(f"{path}: the header is not valid JSON ({error}); download it again") from None
    if not isinstance(header, dict):
        raise FsePatchError(f"{path}: the header is no JSON object; download it again")
    # json keeps the last of two equal keys; counting is cheap, the slow look comes only on a difference.
    if raw.count(b'"data_offsets"') > len(header) - ("__metadata__" in header):
        _refuse_repeated_names(path, raw)
    return _check_entries(path, header, size - 8 - length, known)


def _check_entries(
    path: Path, header: dict[str, Any], data_size: int, known: _Known
) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            key = (entry["dtype"], tuple(entry["shape"]))
            begin, end = entry["data_offsets"]
            pair = known.get(key)
            if pair is None:
                pair = known[key] = _check_shape(*key)
            tensor, nbytes = pair
            whole = type(begin) is int and type(end) is int and 0 <= begin <= end
        except (KeyError, TypeError, ValueError, OverflowError):
            whole, nbytes = False, None
        if not whole or (nbytes is not None and end - begin != nbytes):
            raise FsePatchError(f"{path}: the header entry of {name!r} is malformed; download it again")
        if end > data_size:
            raise FsePatchError(
                f"{path}: truncated: {name!r} ends at byte {end} of the data, "
                f"{data_size} are there; download it again"
            )
        tensors[name] = tensor
    return tensors


def _check_shape(dtype: str, shape: tuple[int, ...]) -> tuple[TensorHeader, int | None]:
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError
    bits = _DTYPE_BITS.get(dtype)
    return TensorHeader(dtype, shape), None if bits is None else -(-math.prod(shape) * bits // 8)


def _refuse_repeated_names(path: Path, raw: bytes) -> None:
    def check(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise FsePatchError(f"{path}: the header names {name!r} twice; the file is broken")
            seen[name] = value
        return seen

    json.loads(raw, object_pairs_hook=check)
