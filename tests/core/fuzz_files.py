"""Random sets of files that a checkpoint's tensors may lie in, and names that they may have.

Works on any values: headers in the fuzzer, real tensors where engines load a sample of the cases.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
INDEX, OTHER_INDEX = "model.safetensors.index.json", "consolidated.safetensors.index.json"
FORMATS = [
    "auto", "auto", "auto", "auto", "safetensors", "hf", "pt", "npcache", "dummy", "fastsafetensors",
    "instanttensor", "runai_streamer", "mistral", "layered", "sharded_state",
]  # fmt: skip
PREFIXES = [
    "model.layers.", "model.language_model.layers.", "language_model.model.layers.", "layers.",
    "model.language_model.language_model.layers.", "model.model.layers.", "mtp.layers.", "mtp.0.layers.",
]  # fmt: skip


@dataclass
class FileSet(Generic[T]):
    """Files of a folder.

    Args:
        tensors: of each safetensors file, by its name.
        others: files of other kinds.
        links: names of links that lead nowhere.
        indexes: what the index files say, by their names.
        load_format: that the engine is started with.
    """

    tensors: dict[str, dict[str, T]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    indexes: dict[str, dict[str, str]] = field(default_factory=dict)
    load_format: str = "auto"


def spread(
    rng: random.Random, tensors: dict[str, T], other: Callable[[T], T], formats: list[str]
) -> FileSet[T]:
    """Lay out tensors in files as they lie about, and now and then worse.

    Args:
        other: another value in a tensor's place, for files that are not meant to be read.
    """
    names = sorted(tensors)
    count = rng.choice([1, 1, 2, 3])
    shards = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    if count == 1:
        shards = [rng.choice(["model.safetensors", "model-00001-of-00001.safetensors", "a.safetensors"])]
    where = {name: rng.choice(shards) for name in names}
    files = FileSet[T](load_format=rng.choice(formats))
    for shard in shards:
        files.tensors[shard] = {name: tensors[name] for name in names if where[name] == shard}
    if rng.random() < 0.6:
        files.indexes[INDEX] = _index(rng, where)
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        _extra(rng, files, tensors, other)
    return files


def _index(rng: random.Random, where: dict[str, str]) -> dict[str, str]:
    how, names = rng.randrange(6), sorted(where)
    if how == 0:  # every tensor in another shard
        shards = sorted(set(where.values()))
        return {name: rng.choice(shards) for name in names}
    if how == 1:  # not every tensor
        return {name: where[name] for name in names if rng.random() < 0.5} or dict(where)
    if how == 2:  # a shard that is not there
        return {**where, names[0]: "model-00009-of-00009.safetensors"}
    return dict(where)


def _extra(rng: random.Random, files: FileSet[T], tensors: dict[str, T], other: Callable[[T], T]) -> None:
    stale = {name: other(value) for name, value in tensors.items()}
    one = rng.choice(sorted(tensors))
    how = rng.randrange(9)
    if how == 0:
        files.tensors["._model.safetensors"] = {}
        files.others.append("._model.safetensors")
    elif how == 1:
        files.tensors[".hidden.safetensors"] = stale
    elif how == 2:
        files.tensors["stale.safetensors"] = stale
    elif how == 3:
        files.tensors["consolidated.safetensors"] = dict(stale)
        if rng.random() < 0.4:
            files.indexes[OTHER_INDEX] = dict.fromkeys(stale, "consolidated.safetensors")
    elif how == 4:
        files.links = [rng.choice(["z.safetensors", ".z.safetensors", "z.bin", "consolidated-2.safetensors"])]
    elif how == 5:
        files.tensors[rng.choice(sorted(files.tensors))][one] = tensors[one]
    elif how == 6:
        files.tensors["more.safetensors"] = {one: tensors[one]}
    else:
        files.others.append(
            rng.choice(["model.pt", "pytorch_model.bin", "optimizer.pt", "README.md", "x.gguf"])
        )


def rename(rng: random.Random, tensors: dict[str, T]) -> dict[str, T]:
    """Put the layers under another prefix: all of them, some, or a second time."""
    prefixes = sorted({p for p in PREFIXES for name in tensors if name.startswith(p)}, key=len)
    if not prefixes:
        return tensors
    old, new = prefixes[-1], rng.choice(PREFIXES)
    how, renamed = rng.randrange(3), {}
    for name, value in tensors.items():
        below = name.removeprefix(old)
        moves = below != name and (how < 2 or rng.random() < 0.1)
        if not moves or how == 1:
            renamed[name] = value
        if moves:
            renamed[new + below] = value
    return renamed


def merge(
    rng: random.Random, tensors: dict[str, T], together: Callable[[T, T], T], owners: list[str]
) -> dict[str, T]:
    """Store gate and up in one tensor: of the shared experts, of the routed ones, or of one layer's."""
    owner, layer = rng.choice(owners), rng.choice(["", "", ".0.", ".1."])
    merged = dict(tensors)
    for name in tensors:
        up = name.replace("gate_proj", "up_proj")
        if owner in name and layer in name and ".gate_proj." in name and up in merged:
            merged[name.replace("gate_proj", "gate_up_proj")] = together(merged.pop(name), merged.pop(up))
    return merged


def write_files(folder: Path, files: FileSet[T], write: Callable[[Path, dict[str, T]], object]) -> None:
    """Write them; ``write`` makes a safetensors file."""
    for name, tensors in files.tensors.items():
        write(folder / name, tensors)
    for name in files.others:
        (folder / name).write_bytes(b"of another kind")
    for name in files.links:
        (folder / name).symlink_to(folder / "nowhere")
    for name, weight_map in files.indexes.items():
        (folder / name).write_text(json.dumps({"weight_map": weight_map}))
