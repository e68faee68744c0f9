"""Expands the rows of tests/core/golden/ into checkpoint folders.

The shapes here are written down a second time on purpose: a fault in a layout of fusion_core/quant/ must
not write the tensors that it then reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .checkpoints import MOE_LAYERS, PREFIX, SHARED, Shape, Tensors, config_of, write_checkpoint

FOLDER = Path(__file__).with_name("golden")
MODELS: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "models.yaml").read_text())
ROWS: list[dict[str, Any]] = [
    row
    for file in sorted(FOLDER.glob("*.yaml"))
    if file.name != "models.yaml"
    for row in yaml.safe_load(file.read_text())
]
EXPERTS, TOP_K = 4, 2
_DRAFT = {"qwen3_next": "num_nextn_predict_layers", "glm4_moe": "num_nextn_predict_layers"}
Parts = dict[str, tuple[str, Shape]]


def _fp8(scale: str, dtype: str, shape: Callable[[int, int, int], Shape], static: bool = False) -> Any:
    def parts(out: int, inner: int, group: int) -> Parts:
        extra: Parts = {"input_scale": ("F32", ())} if static else {}
        return {"weight": ("F8_E4M3", (out, inner)), scale: (dtype, shape(out, inner, group)), **extra}

    return parts


def _blocks(out: int, inner: int, group: int) -> Shape:
    return (-(-out // group), -(-inner // group))


def _plain(dtype: str) -> Any:
    return lambda out, inner, group: {"weight": (dtype, (out, inner))}


def _gptq(bits: int) -> Any:
    pack = 32 // bits
    return lambda out, inner, group: {
        "qweight": ("I32", (inner // pack, out)),
        "qzeros": ("I32", (inner // group, out // pack)),
        "scales": ("F16", (inner // group, out)),
        "g_idx": ("I32", (inner,)),
    }


def _awq(bits: int) -> Any:
    pack = 32 // bits
    return lambda out, inner, group: {
        "qweight": ("I32", (inner, out // pack)),
        "qzeros": ("I32", (inner // group, out // pack)),
        "scales": ("F16", (inner // group, out)),
    }


def _packed(zero: bool, bits: int = 4) -> Any:
    pack = 32 // bits

    def parts(out: int, inner: int, group: int) -> Parts:
        extra: Parts = {"weight_zero_point": ("I32", (out // pack, inner // group))} if zero else {}
        return {
            "weight_packed": ("I32", (out, inner // pack)),
            "weight_scale": ("BF16", (out, inner // group)),
            "weight_shape": ("I64", (2,)),
            **extra,
        }

    return parts


def _halves(weight: str, scale: str, dtype: str, group: int, *scalars: str) -> Any:
    return lambda out, inner, _: {
        weight: ("U8", (out, inner // 2)),
        scale: (dtype, (out, inner // group)),
        **{name: ("F32", ()) for name in scalars},
    }


# kind -> (out, in, group) -> suffix -> (dtype, shape)
KINDS: dict[str, Callable[[int, int, int], Parts]] = {
    "bf16": _plain("BF16"),
    "f16": _plain("F16"),
    "f32": _plain("F32"),
    "fp8-block": _fp8("weight_scale_inv", "F32", _blocks),
    "fp8-block-bf16": _fp8("weight_scale_inv", "BF16", _blocks),
    "fp8-block-ct": _fp8("weight_scale", "BF16", _blocks),
    "fp8-channel": _fp8("weight_scale", "BF16", lambda out, inner, group: (out, 1)),
    "fp8-tensor": _fp8("weight_scale", "F32", lambda out, inner, group: ()),
    "fp8-tensor-static": _fp8("weight_scale", "F32", lambda out, inner, group: (), static=True),
    "int8-channel": lambda out, inner, _: {
        "weight": ("I8", (out, inner)),
        "weight_scale": ("BF16", (out, 1)),
    },
    "int4-gptq": _gptq(4),
    "int8-gptq": _gptq(8),
    "int4-awq": _awq(4),
    "int8-awq": _awq(8),
    "int4-packed": _packed(False),
    "int8-packed": _packed(False, 8),
    "int4-packed-zero": _packed(True),
    "nvfp4": _halves("weight", "weight_scale", "F8_E4M3", 16, "weight_scale_2", "input_scale"),
    "nvfp4-weights": _halves("weight", "weight_scale", "F8_E4M3", 16, "weight_scale_2"),
    "nvfp4-packed": _halves(
        "weight_packed", "weight_scale", "F8_E4M3", 16, "weight_global_scale", "input_global_scale"
    ),
    "mxfp4-packed": _halves("weight_packed", "weight_scale", "U8", 32),
    "quark-mxfp4": _halves("weight", "weight_scale", "U8", 32),
    "bitsandbytes": lambda out, inner, _: {
        "weight": ("U8", (out * inner // 2, 1)),
        "weight.absmax": ("U8", (out * inner // 64,)),
        "weight.quant_map": ("F32", (16,)),
    },
}


def projections(owner: str, width: int, hidden: int, kind: str, gate: str | None = None) -> Tensors:
    """Tensors of one expert; ``gate`` stores its gate_proj in another way."""
    tensors: Tensors = {}
    for name, out, inner in (
        ("gate_proj", width, hidden),
        ("up_proj", width, hidden),
        ("down_proj", hidden, width),
    ):
        way, _, group = ((gate if name == "gate_proj" else None) or kind).partition(":")
        for suffix, part in KINDS[way](out, inner, int(group or 0)).items():
            tensors[f"{owner}{name}.{suffix}"] = part
    return tensors


def layer_tensors(row: Mapping[str, Any], prefix: str, stored: Mapping[str, str]) -> Tensors:
    """MoE tensors of one layer of ``row``; ``prefix`` ends before "mlp."."""
    model = MODELS[row["model"]]
    hidden, width = model["hidden"], model["width"]
    mlp = f"{prefix}mlp."
    tensors: Tensors = {f"{mlp}gate.weight": ("BF16", (EXPERTS, hidden))}
    if stored["routed"] == "stacked-fp8":
        for name, out, inner in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            tensors[f"{mlp}experts.{name}"] = ("F8_E4M3", (EXPERTS, out, inner))
            tensors[f"{mlp}experts.{name}_scale_inv"] = ("F32", (EXPERTS, out // 128, inner // 128))
    elif stored["routed"] == "stacked":
        tensors[f"{mlp}experts.gate_up_proj"] = ("BF16", (EXPERTS, 2 * width, hidden))
        tensors[f"{mlp}experts.down_proj"] = ("BF16", (EXPERTS, hidden, width))
    else:
        for expert in range(EXPERTS):
            owner = f"{mlp}experts.{expert}."
            tensors |= projections(owner, width, hidden, stored["routed"], stored.get("gate_proj"))
    owner = f"{mlp}{SHARED[model['family']]}."
    return tensors | projections(
        owner, shared_width(model), hidden, stored["shared"], stored.get("gate_proj")
    )


def shared_width(model: Mapping[str, Any]) -> int:
    """Width of a model's shared expert."""
    wide: int = model["shared"] * (model["width"] if model["family"] == "glm4_moe" else 1)
    return wide


def config_and_tensors(row: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors | None]:
    """config.json of a row, and its tensors unless it stands for config.json alone."""
    model = MODELS[row["model"]]
    family: str = model["family"]
    shared_key = "n_shared_experts" if family == "glm4_moe" else "shared_expert_intermediate_size"
    experts_key = "n_routed_experts" if family == "glm4_moe" else "num_experts"
    changes: dict[str, Any] = {
        "hidden_size": model["hidden"],
        "moe_intermediate_size": model["width"],
        shared_key: model["shared"],
        experts_key: EXPERTS,
        "num_experts_per_tok": TOP_K,
        **row.get("config", {}),
    }
    stored = row.get("stored")
    if stored and "draft" in stored:
        changes[_DRAFT.get(family, "mtp_num_hidden_layers")] = 1
    config = config_of(family, **changes)
    if "quantization" in row:
        config["quantization_config"] = row["quantization"]
    if stored is None:
        return config, None
    layers = MOE_LAYERS[family]
    if "num_hidden_layers" in changes:
        layers = list(range(changes.get("first_k_dense_replace", 0), changes["num_hidden_layers"]))
    tensors: Tensors = {}
    for layer in layers:
        ways = row.get("layers", {}).get(layer, stored)
        tensors |= layer_tensors(row, f"{PREFIX[family]}{layer}.", ways)
    if "draft" in stored:
        prefix = f"model.layers.{len(layers) + 1}." if family == "glm4_moe" else "mtp.layers.0."
        tensors |= layer_tensors(row, prefix, {"routed": stored["draft"], "shared": stored["draft"]})
    return config, tensors


def write_row(folder: Path, row: Mapping[str, Any]) -> Path:
    """The checkpoint folder that a row describes."""
    config, tensors = config_and_tensors(row)
    write_checkpoint(folder, config, tensors)
    if "modelopt" in row:
        content = {"producer": {"name": "modelopt"}, "quantization": row["modelopt"]}
        (folder / "hf_quant_config.json").write_text(json.dumps(content))
    for name in row.get("files", ()):
        (folder / name).write_bytes(b"GGUF")
    return folder
