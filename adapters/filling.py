"""Random weights of an engine's MoE block, for measuring."""

from __future__ import annotations

from typing import Any

import torch

GATE_STD, WEIGHT_STD, BIAS_STD = 0.03, 0.02, 0.05


def fill(block: Any, seed: int, device: str = "cuda") -> None:
    """Random weights, and a router that spreads the tokens."""
    draw = torch.Generator(device).manual_seed(seed)
    for name, parameter in block.named_parameters():
        bias = name.endswith("e_score_correction_bias")
        gate = name.endswith("gate.weight")
        std = BIAS_STD if bias else GATE_STD if gate else WEIGHT_STD
        parameter.data.normal_(0, std, generator=draw)
