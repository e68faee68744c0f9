"""Safetensors headers: every way a download goes wrong is one clear error."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint import weight_files
from fse_patch.fusion_core.checkpoint.headers import CheckpointHeaders, TensorHeader
from fse_patch.fusion_core.checkpoint.sources import FolderSource

from .checkpoints import Tensors, write_checkpoint, write_shard

INDEX_NAME = "model.safetensors.index.json"
TENSORS: Tensors = {"scale": ("F32", ())}
TENSORS |= {f"t{n}": ("BF16", (2, 3)) for n in range(5)}


def read_headers(folder: Path) -> CheckpointHeaders:
    """The headers of what SGLang loads from a folder; it knows no preference for single files."""
    source = FolderSource(folder)
    return weight_files.read_headers(source, weight_files.weight_files(source, "sglang"))


def raw_shard(path: Path, header: object, data: int = 0) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))


@pytest.mark.parametrize(("shards", "index"), [(1, False), (3, False), (3, True)])
def test_reads_every_tensor_of_every_shard(tmp_path: Path, shards: int, index: bool) -> None:
    headers = read_headers(write_checkpoint(tmp_path, {}, TENSORS, shards, index))
    assert headers.tensors == {name: TensorHeader(*header) for name, header in TENSORS.items()}
    assert len(headers.files) == shards


def test_a_folder_without_weights_is_empty(tmp_path: Path) -> None:
    assert read_headers(tmp_path).files == ()


def test_the_index_decides_which_shards_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, TENSORS, shards=2, index=True)
    write_shard(tmp_path / "consolidated.safetensors", TENSORS)
    assert read_headers(tmp_path).tensors.keys() == TENSORS.keys()
    # Control: without the index the same file repeats every name.
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(FsePatchError, match="is also in"):
        read_headers(tmp_path)


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_a_sound_entry_passes(tmp_path: Path) -> None:
    raw_shard(tmp_path / "a.safetensors", entry(), data=8)
    assert read_headers(tmp_path).tensors == {"a": TensorHeader("F32", (2,))}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (entry(), 7, "truncated: 'a' ends at byte 8"),
        (entry(offsets=(0, 4)), 8, "'a' is malformed"),
        (entry(offsets=(8, 0)), 8, "'a' is malformed"),
        (entry(offsets=(-8, 0)), 8, "'a' is malformed"),
        (entry(offsets=(0.0, 8.0)), 8, "'a' is malformed"),
        (entry(offsets=(False, 8)), 8, "'a' is malformed"),
        (entry(offsets=(0,)), 8, "'a' is malformed"),
        (entry(shape=(-2,)), 8, "'a' is malformed"),
        (entry(shape=(True, 2)), 8, "'a' is malformed"),
        (entry(shape=([2],)), 8, "'a' is malformed"),
        (entry(shape=2), 8, "'a' is malformed"),
        (entry(dtype=32), 8, "'a' is malformed"),
        ({"a": {"dtype": "F32"}}, 8, "'a' is malformed"),
        ({"a": [1]}, 8, "'a' is malformed"),
        ([1, 2], 0, "no JSON object"),
        (b"{not json}", 0, "not valid JSON"),
        (b'{"\xff": 1}', 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            4,
            "'a' twice",
        ),
    ],
)
def test_broken_headers_are_named(tmp_path: Path, header: object, data: int, message: str) -> None:
    path = tmp_path / "model.safetensors"
    raw_shard(path, header, data)
    with pytest.raises(FsePatchError) as caught:
        read_headers(tmp_path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 8, 40, -1])
def test_a_file_cut_anywhere_is_truncated(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, TENSORS)
    os.truncate(path, kept % path.stat().st_size)
    with pytest.raises(FsePatchError, match=r"model\.safetensors: truncated.*download it again"):
        read_headers(tmp_path)


def test_foreign_files_are_told_from_truncated_ones(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(FsePatchError, match="git lfs pull"):
        read_headers(tmp_path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(FsePatchError, match="no safetensors file"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../b.safetensors"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": 3}}, "no safetensors file beside it"),
        ({"weight_map": []}, "has no 'weight_map'"),
        ({}, "has no 'weight_map'"),
        ([], "not an object"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: missing"),
    ],
)
def test_broken_indexes_are_named(tmp_path: Path, index: object, message: str) -> None:
    write_shard(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(FsePatchError, match=message):
        read_headers(tmp_path)


def test_what_an_index_says_of_tensors_does_not_count(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"elsewhere": "model.safetensors"}}))
    headers = read_headers(tmp_path)
    assert headers.tensors.keys() == TENSORS.keys()
    assert set(headers.places.values()) == {"model.safetensors"}


def test_one_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", TENSORS)
    write_shard(tmp_path / "b.safetensors", {"other": ("F32", (1,))})
    assert len(read_headers(tmp_path).tensors) == 7
    write_shard(tmp_path / "c.safetensors", {"t3": ("BF16", (2, 3))})
    with pytest.raises(FsePatchError, match=r"c\.safetensors: tensor 't3' is also in a\.safetensors"):
        read_headers(tmp_path)
