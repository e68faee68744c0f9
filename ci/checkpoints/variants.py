"""Checkpoints as they lie about: those of a recipe, with other files, names or declarations.

Where a variant holds other values too, they are those of another seed: whoever reads the wrong file shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import int4
from .raw import write_index

Tensors = dict[str, torch.Tensor]
MODEL = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# How macOS begins a file of its own beside one that it copies.
APPLE_DOUBLE = bytes([0, 5, 0x16, 7, 0, 2, 0, 0]) + b"Mac OS X        " + bytes(64)


@dataclass(frozen=True)
class Variant:
    """A change to the checkpoint of ``recipe``.

    Args:
        change: of the folder, and of one with the same names and other values.
    """

    recipe: str
    change: Callable[[Path, Path], None]


def _save(folder: Path, tensors: Tensors, name: str = MODEL) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name, {"format": "pt"})


def _shards(folder: Path) -> dict[str, str]:
    """Spread the tensors over two shards, and return which is where."""
    tensors = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, part in zip(SHARDS, parts, strict=True):
        _save(folder, {name: tensors[name] for name in part}, shard)
    where = {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}
    write_index(folder, where, sum(t.nbytes for t in tensors.values()))
    return where


def hidden_file(folder: Path, _: Path) -> None:
    """Put a file of macOS beside the weights; globs do not match it."""
    (folder / f"._{MODEL}").write_bytes(APPLE_DOUBLE)


def stale_file(folder: Path, other: Path) -> None:
    """Put a file with other values beside an index that does not name it."""
    _shards(folder)
    _save(folder, load_file(other / MODEL), "pytorch_old.safetensors")


def wrong_index(folder: Path, _: Path) -> None:
    """Let the index name the wrong one of two shards for every tensor."""
    where = _shards(folder)
    first, second = SHARDS
    write_index(folder, {n: second if shard == first else first for n, shard in where.items()}, 1)


def short_index(folder: Path, _: Path) -> None:
    """Let the index name one tensor of each shard."""
    where = _shards(folder)
    write_index(folder, {n: s for s in SHARDS for n in [min(k for k in where if where[k] == s)]}, 1)


def consolidated(folder: Path, other: Path) -> None:
    """Put other values beside the shards, in the file that vLLM prefers."""
    _shards(folder)
    _save(folder, load_file(other / MODEL), "consolidated.safetensors")


def consolidated_mixed(folder: Path, other: Path) -> None:
    """Let those have their shared experts in another dtype."""
    _shards(folder)
    held = load_file(other / MODEL)
    narrow = {n: t.to(torch.bfloat16) if ".shared_expert." in n else t for n, t in held.items()}
    _save(folder, narrow, "consolidated.safetensors")


def pickled(name: str) -> Callable[[Path, Path], None]:
    """Put other values beside the weights, in a file of torch's own format."""

    def change(folder: Path, other: Path) -> None:
        torch.save(load_file(other / MODEL), folder / name)

    return change


def tensor_twice(folder: Path, _: Path) -> None:
    """Let both shards of an index hold one tensor of a shared expert."""
    where = _shards(folder)
    name = next(n for n in sorted(where) if ".shared_expert." in n)
    first, second = (load_file(folder / shard) for shard in SHARDS)
    value = {**first, **second}[name]
    for shard, held in zip(SHARDS, (first, second), strict=True):
        _save(folder, held | {name: value}, shard)


def merged(owner: str) -> Callable[[Path, Path], None]:
    """Store gate and up in one tensor, of the modules whose names have ``owner``."""

    def change(folder: Path, _: Path) -> None:
        tensors = load_file(folder / MODEL)
        for name in [n for n in tensors if owner in n and ".gate_proj." in n]:
            up = tensors.pop(name.replace("gate_proj", "up_proj"))
            tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensors.pop(name), up])
        _save(folder, tensors)

    return change


def engine_names(folder: Path, _: Path) -> None:
    """Call the text tower as the engines' own modules are called."""
    old, new = "model.language_model.", "language_model.model."
    _save(folder, {n.replace(old, new, 1): t for n, t in load_file(folder / MODEL).items()})


def tower_twice(folder: Path, _: Path) -> None:
    """Store the text tower once more below itself, as one tool did (intel/auto-round#2349)."""
    tensors, tower = load_file(folder / MODEL), "model.language_model."
    below = f"{tower}language_model."
    again = {n.replace(tower, below, 1): t.clone() for n, t in tensors.items() if tower in n}
    _save(folder, tensors | again)


def kv_cache_only(folder: Path, _: Path) -> None:
    """Declare a quantisation of the KV cache alone, as llm-compressor does."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme,
    }
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def four_bits(kind: str) -> Callable[[Path, Path], None]:
    """Store the routed experts in 4 bits, and the shared one as it is."""
    return lambda folder, _: int4.to_int4(folder, kind)


VARIANTS: dict[str, Variant] = {
    "files_hidden": Variant("qwen2_moe", hidden_file),
    "files_stale": Variant("qwen2_moe", stale_file),
    "files_wrong_index": Variant("qwen2_moe", wrong_index),
    "files_short_index": Variant("qwen2_moe", short_index),
    "files_consolidated": Variant("qwen2_moe", consolidated),
    "files_consolidated_mixed": Variant("qwen2_moe", consolidated_mixed),
    "files_pt": Variant("qwen2_moe", pickled("model.pt")),
    "files_bin": Variant("qwen2_moe", pickled("pytorch_model.bin")),
    "files_tensor_twice": Variant("qwen2_moe", tensor_twice),
    "names_shared_merged": Variant("qwen2_moe_wide4", merged(".shared_expert.")),
    "names_shared_merged_glm": Variant("glm4_moe_shared2_scale", merged(".shared_experts.")),
    "names_experts_merged": Variant("qwen2_moe", merged(".experts.")),
    "names_of_the_engine": Variant("qwen3_5_vl_3d", engine_names),
    "names_twice": Variant("qwen3_5_vl_3d", tower_twice),
    "declared_kv_cache": Variant("qwen2_moe", kv_cache_only),
    **{f"int4_{kind}": Variant("qwen3_next", four_bits(kind)) for kind in int4.KINDS},
}
