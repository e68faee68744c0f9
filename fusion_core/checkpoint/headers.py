"""Names, dtypes and shapes of a checkpoint's tensors, from safetensors headers alone.

Standard library only: no tensor data is read and neither torch nor numpy is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FsePatchError

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
class FileHeader:
    """Header of one safetensors file.

    Args:
        entries: dtype, shape and data_offsets by tensor, as stored.
        data_size: bytes behind the header, None where nobody has counted them.
        start: where the data begins.
    """

    entries: Mapping[str, Any]
    data_size: int | None = None
    start: int = 0


@dataclass(frozen=True)
class CheckpointHeaders:
    """Headers of all tensors that an engine loads, by name.

    Args:
        files: those that they came from; empty where there are none.
        places: file of each tensor. What an index says of it does not count: engines do not ask it.
        digest: of names, dtypes, shapes and places: two checkpoints with one digest have the same headers.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, TensorHeader]
    places: Mapping[str, str]
    digest: str


# (dtype, shape) as stored -> its checked form and its size in bytes (None: dtype unknown).
_Known = dict[tuple[str, tuple[int, ...]], tuple[TensorHeader, int | None]]


def merge_headers(files: Mapping[str, FileHeader], where: Callable[[str], str]) -> CheckpointHeaders:
    """Check the headers of all files that are loaded, and put them together.

    Args:
        where: how messages call a file.

    Raises:
        FsePatchError: an entry is malformed, a file is truncated, or two files hold one tensor.
    """
    tensors: dict[str, TensorHeader] = {}
    places: dict[str, str] = {}
    known: _Known = {}
    digest = hashlib.sha256()
    for file, header in sorted(files.items()):
        checked = _check_entries(where(file), header, known)
        if twice := tensors.keys() & checked.keys():
            name = min(twice)
            raise FsePatchError(
                f"{where(file)}: tensor {name!r} is also in {places[name]}, and an engine loads both; which "
                "of the two it keeps, nobody can say here; remove one of them"
            )
        tensors.update(checked)
        places.update(dict.fromkeys(checked, file))
        digest.update(repr((file, sorted(_offsets(header).items()))).encode())
    return CheckpointHeaders(tuple(sorted(files)), tensors, places, digest.hexdigest()[:16])


def _offsets(header: FileHeader) -> dict[str, tuple[Any, ...]]:
    return {
        name: (entry["dtype"], *entry["shape"], *entry["data_offsets"])
        for name, entry in header.entries.items()
    }


def read_file_header(path: Path) -> FileHeader:
    """Read the header of a safetensors file.

    Raises:
        FsePatchError: the file is missing, truncated or malformed.
    """
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
    except FileNotFoundError:
        raise FsePatchError(f"{path}: missing, or a link that leads nowhere; download it again") from None
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
    header.pop("__metadata__", None)
    return FileHeader(header, size - 8 - length, 8 + length)


def _check_entries(where: str, header: FileHeader, known: _Known) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    data_size = math.inf if header.data_size is None else header.data_size
    for name, entry in header.entries.items():
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
            raise FsePatchError(f"{where}: the header entry of {name!r} is malformed; download it again")
        if end > data_size:
            raise FsePatchError(
                f"{where}: truncated: {name!r} ends at byte {end} of the data, "
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
