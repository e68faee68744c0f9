"""Writes checkpoint folders for tests: config.json and safetensors files of full declared length, sparse."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]

H, I, E, K, LAYERS = 64, 32, 4, 2, 2  # noqa: E741
_BITS = {"F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "I64": 64, "I32": 32, "I8": 8, "U8": 8, "F8_E8M0": 8}

_QWEN = {
    "hidden_size": H,
    "moe_intermediate_size": I,
    "shared_expert_intermediate_size": I,
    "num_experts": E,
    "num_experts_per_tok": K,
    "num_hidden_layers": LAYERS,
    "hidden_act": "silu",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"model_type": "qwen2_moe", "decoder_sparse_step": 1, "mlp_only_layers": [], **_QWEN},
    "qwen3_next": {"model_type": "qwen3_next", "decoder_sparse_step": 1, "mlp_only_layers": [], **_QWEN},
    "qwen3_5_moe_text": {"model_type": "qwen3_5_moe_text", **_QWEN},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text", **_QWEN}},
    "glm4_moe": {
        "model_type": "glm4_moe",
        "hidden_size": H,
        "moe_intermediate_size": I,
        "n_shared_experts": 1,
        "n_routed_experts": E,
        "num_experts_per_tok": K,
        "num_hidden_layers": LAYERS + 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
}
MOE_LAYERS = {name: [1, 2] if name == "glm4_moe" else [0, 1] for name in CONFIGS}
PREFIX = {name: "model.layers." for name in CONFIGS} | {"qwen3_5_moe": "model.language_model.layers."}
SHARED = {name: "shared_expert" for name in CONFIGS} | {"glm4_moe": "shared_experts"}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A config of ``family`` with ``changes`` to its text values; a change to None drops the key."""
    config: dict[str, Any] = json.loads(json.dumps(CONFIGS[family]))
    text = config.get("text_config", config)
    for key, value in changes.items():
        if value is None:
            text.pop(key, None)
        else:
            text[key] = value
    return config


def mlp_tensors(
    prefix: str,
    *,
    shared: str = "shared_expert",
    dtype: str = "BF16",
    experts: int = E,
    width: int = I,
    slots: int = 1,
    stacked: bool = False,
) -> Tensors:
    """The MoE tensors of one layer, ``prefix`` ending before "mlp."; ``stacked`` makes 3-D routed tensors."""
    mlp = f"{prefix}mlp."
    tensors: Tensors = {f"{mlp}gate.weight": (dtype, (experts, H))}
    if shared == "shared_expert":
        tensors[f"{mlp}shared_expert_gate.weight"] = (dtype, (1, H))
    owners = [(f"{mlp}{shared}.", slots * width)]
    if stacked:
        tensors[f"{mlp}experts.gate_up_proj"] = (dtype, (experts, 2 * width, H))
        tensors[f"{mlp}experts.down_proj"] = (dtype, (experts, H, width))
    else:
        owners += [(f"{mlp}experts.{e}.", width) for e in range(experts)]
    for owner, size in owners:
        tensors[f"{owner}gate_proj.weight"] = (dtype, (size, H))
        tensors[f"{owner}up_proj.weight"] = (dtype, (size, H))
        tensors[f"{owner}down_proj.weight"] = (dtype, (H, size))
    return tensors


def model_tensors(family: str, layers: Sequence[int] | None = None, **options: Any) -> Tensors:
    """Tensors of the family's sparse layers, with names as published checkpoints have them."""
    tensors: Tensors = {"lm_head.weight": ("BF16", (16, H))}
    for layer in MOE_LAYERS[family] if layers is None else layers:
        tensors |= mlp_tensors(f"{PREFIX[family]}{layer}.", shared=SHARED[family], **options)
    return tensors


def with_scales(tensors: Tensors, block: int | None) -> Tensors:
    """``tensors`` in FP8: expert projections get a scale, per block or (None) per tensor, 0-d."""
    result: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        if "_proj" not in name:
            result[name] = (dtype, shape)
            continue
        result[name] = ("F8_E4M3", shape)
        if block is None:
            result[f"{name}_scale"] = ("F32", ())
        else:
            result[f"{name}_scale_inv"] = ("F32", (-(-shape[0] // block), -(-shape[1] // block)))
    return result


def write_shard(path: Path, tensors: Mapping[str, tuple[str, Shape]]) -> None:
    """One safetensors file: a true header, and the data as a hole of the declared length."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = _BITS[dtype] // 8
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + offset)


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Tensors | None, shards: int = 1, index: bool = False
) -> Path:
    """A checkpoint folder; ``tensors`` None writes config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors or {})
    size = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for number in range(shards if tensors is not None else 0):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * size : (number + 1) * size]
        write_shard(folder / file, {name: (tensors or {})[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def tensors_of(folder: Path) -> Any:
    """The tensors of the files that vLLM loads from a folder: a `CheckpointTensors`."""
    from fse_patch.fusion_core.checkpoint.sources import FolderSource
    from fse_patch.fusion_core.checkpoint.tensors import CheckpointTensors
    from fse_patch.fusion_core.checkpoint.weight_files import weight_files

    return CheckpointTensors(folder, weight_files(FolderSource(folder), "vllm").names)
