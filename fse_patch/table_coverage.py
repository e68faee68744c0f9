"""Tuned tables of grouped GEMMs that an installed engine ships, found by their file names alone.

Engines look a table up by the number of experts, the width of one in a process, device and dtype. Fused
layers have E+S experts: a table for E is not found for them, unless a patch looks for it too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapters.patching.source import source_file
from .adapters.patching.spec import PatchSpec
from .errors import FsePatchError
from .fusion_core.engines import facts_of
from .fusion_core.evidence.gather import read_evidence
from .fusion_core.quant.methods import TABLE_DTYPES
from .patches import ENGINES

# What looks a table up, in both engines.
LOOK_UP = "get_moe_configs"
# Blocks are written as [128, 128] or [128,128]. Names that end with "_down" are of the second GEMM alone.
_NAME = re.compile(
    r"E=(\d+),N=(\d+),device_name=([^,]+?)(?:,dtype=(\w+))?(?:,block_shape=\[(\d+), ?(\d+)\])?"
    r"(,per_channel_quant=True)?\.json"
)
# Tensor-parallel sizes that a width is looked up for.
PARTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Shape:
    """What tables are looked up for: E, S, width of a slot, format, and its block."""

    name: str
    num_routed: int
    num_shared_slots: int
    width: int
    format: str = "plain"
    block: tuple[int, int] | None = None


# As published: Qwen1.5-MoE-A2.7B, Qwen3-Next-80B-A3B, Qwen3.5-35B-A3B, GLM-4.5.
KNOWN = (
    Shape("Qwen1.5-MoE-A2.7B", 60, 4, 1408),
    Shape("Qwen3-Next-80B-A3B", 512, 1, 512),
    Shape("Qwen3.5-35B-A3B", 256, 1, 512),
    Shape("GLM-4.5", 160, 1, 1536),
)
# Experts, width, dtype, block, one scale a channel.
Key = tuple[int, int, str, tuple[int, int] | None, bool]


def shape_of(checkpoint: Path) -> Shape:
    """Return the shape of a checkpoint's main model.

    Raises:
        FsePatchError: it cannot be read, or has no shared expert that fills whole slots.
    """
    evidence = read_evidence(checkpoint, ENGINES[0])
    moe = evidence.moe
    if moe is None or not moe.num_shared_slots or not moe.num_routed:
        raise FsePatchError(f"{checkpoint}: has no shared expert that could be fused; leave the argument out")
    layers = evidence.roles["main"].layers
    agreed = layers[0].config if layers else None
    claim = agreed.routed.gate_up if agreed and agreed.routed else None
    form, block = (claim.format, claim.group) if claim else ("plain", (0, 0))
    width = moe.moe_intermediate_size
    blocks = block if form == "fp8-block" else None
    return Shape(checkpoint.resolve().name, moe.num_routed, moe.num_shared_slots, width, form, blocks)


def shipped(engine: str, site_packages: list[str] | None = None) -> dict[Key, set[str]]:
    """Return devices by number of experts, width, dtype and block; empty without the engine."""
    facts = facts_of(engine)
    package = source_file(facts.import_name, site_packages)
    folders = [package.parent / facts.tuned_tables.folder] if package is not None else []
    if extra := os.environ.get(facts.tuned_tables.variable):
        folders.append(Path(extra))
    devices: dict[Key, set[str]] = {}
    for folder in folders:
        for path in folder.rglob("E=*.json"):
            match = _NAME.fullmatch(path.name)
            if match is not None and not path.stem.endswith("_down"):
                experts, width, device, dtype, rows, columns, channel = match.groups()
                block = (int(rows), int(columns)) if rows else None
                key = int(experts), int(width), dtype or "", block, bool(channel)
                devices.setdefault(key, set()).add(device)
    return devices


def coverage(
    engine: str, tables: Mapping[Key, set[str]], shapes: Iterable[Shape], patches: Iterable[PatchSpec]
) -> list[dict[str, Any]]:
    """Return of each shape, and each part of it in a process, the devices with a table for E and E+S.

    Rows have ``shape``, ``experts``, ``fused_experts``, ``width``, ``format``, ``devices`` (a table for E+S),
    ``only_unfused`` (one for E alone), and of the latter in ``table``: "kept" where a patch looks for it,
    otherwise "lost"; "own" where none is missing, "none" where there is none at all.
    """
    kept = any(patch.qualname == LOOK_UP for patch in patches)
    channels = facts_of(engine).tuned_tables.channel_scales
    rows = []
    for shape in shapes:
        dtype, channel = TABLE_DTYPES.get(shape.format), channels and shape.format == "fp8-channel"
        for parts in PARTS:
            if dtype is None or shape.width % parts:
                continue
            width, fused = shape.width // parts, shape.num_routed + shape.num_shared_slots
            with_own = tables.get((fused, width, dtype, shape.block, channel), set())
            left = tables.get((shape.num_routed, width, dtype, shape.block, channel), set()) - with_own
            state = ("kept" if kept else "lost") if left else "own" if with_own else "none"
            rows.append(
                {
                    "shape": shape.name,
                    "experts": shape.num_routed,
                    "fused_experts": fused,
                    "width": width,
                    "format": shape.format,
                    "devices": sorted(with_own),
                    "only_unfused": sorted(left),
                    "table": state,
                }
            )
    return rows
