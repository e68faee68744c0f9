"""Random weights, for measuring: of a whole model that an engine holds, and of single MoE blocks."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from ..adapters.role import constructed
from ..errors import FsePatchError
from . import decode_arm, model_process
from .shared_sets import SharedSets

# Dummy weights alone send every token to the same experts: what routes, comes in and goes out is drawn anew.
DRAWN = ("gate.weight", "embed_tokens.weight", "lm_head.weight")
STD = 0.05


def spread(model: Any) -> None:
    """Draw those weights, in place and by their names, so that all arms have the same.

    GLM's norms become 1 and its correction of scores 0: those of the other families are centred on zero.
    """
    glm = type(model).__name__.startswith("Glm")
    for name, parameter in model.named_parameters():
        if name.endswith(DRAWN):
            draw = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.data.normal_(0, STD, generator=draw)
        elif name.endswith("e_score_correction_bias"):
            parameter.data.zero_()
        elif glm and name.endswith("norm.weight"):
            parameter.data.fill_(1)
    # Modes read gates from tensors of their own.
    for fused_role in constructed():
        fused_role.refresh_gates()


def draw_model(model: Any, sets: SharedSets) -> dict[str, Any]:
    """Draw the weights of ``model``, in its process, and say what is there, or ``error``."""
    spread(model)
    try:
        return {**model_process.report(), "device": decode_arm.device(), "shared": sets.check()}
    except FsePatchError as error:
        return {"error": str(error)}


GATE_STD, WEIGHT_STD, BIAS_STD = 0.03, 0.02, 0.05
# Of FP8 weights before their scale: the numbers of e4m3 reach 448.
FP8_STD, FP8_MAX = 100.0, 448.0
# Rows that are drawn at once: random numbers in float32 take four times the memory of FP8 weights.
ROWS = 1 << 17


def fill(block: Any, seed: int, device: str = "cuda") -> None:
    """Fill a block with random weights, its router such that it spreads the tokens.

    FP8 weights get scales that differ by block.
    """
    draw = torch.Generator(device).manual_seed(seed)
    for name, parameter in block.named_parameters():
        values = parameter.data
        if values.dtype == torch.float8_e4m3fn:
            for part in values.view(-1, values.shape[-1]).split(ROWS):
                noise = torch.empty(part.shape, device=device).normal_(0, FP8_STD, generator=draw)
                part.copy_(noise.clamp_(-FP8_MAX, FP8_MAX))
        elif "weight_scale" in name:
            values.uniform_(0.5, 1.5, generator=draw).mul_(WEIGHT_STD / FP8_STD)
        else:
            bias = name.endswith("e_score_correction_bias")
            gate = name.endswith("gate.weight")
            std = BIAS_STD if bias else GATE_STD if gate else WEIGHT_STD
            values.normal_(0, std, generator=draw)


def as_slots(values: torch.Tensor, kind: str, slots: int) -> torch.Tensor:
    """Return a dense MLP's matrix, or its blocks' scales, as experts have it: [slots, rows, columns]."""
    if values.ndim == 1:
        # One scale for each matrix, whichever slot its rows are in.
        return values.expand(slots, -1) if kind == "w13" else values.expand(slots)
    if kind == "w2":
        return values.view(len(values), slots, -1).transpose(0, 1)
    gate, up = values.chunk(2)
    return torch.cat([part.view(slots, -1, values.shape[1]) for part in (gate, up)], dim=1)
