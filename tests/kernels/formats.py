"""Experts in any format that a paired layer reads."""

from __future__ import annotations

import torch

from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights

from .test_int4_readers import HELD, made
from .test_shared_apart import weights_in


def experts_in(how: str, count: int, hidden: int, width: int) -> ExpertWeights:
    """Draw routed experts: in a layout of 4 bits as of `HELD`, or in a format as of `weights_in`."""
    if how in HELD:
        return made(how, count, hidden, width, torch.bfloat16)[0]
    return weights_in(how, count, hidden, width, 5)[0]
