"""4-bit routed experts as an engine has left them in memory; what the kernels do not read is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..fusion_core.kernels.expert_weights import ExpertWeights
from ..fusion_core.kernels.int4 import Int4, Layout
from ..fusion_core.quant.built_int4 import BuiltInt4, refusal
from .expert_reading import Unreadable

# How `EngineLayer.backend` names who runs 4-bit experts.
BACKEND = "int4 {}"
READABLE = frozenset(BACKEND.format(packing) for packing in ("marlin", "humming", "bytes"))
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class KeptInt4:
    """What an engine keeps of one layer's 4-bit experts; of w13 first, then of w2.

    Args:
        built: what the engine says of them.
        hidden: H of the states.
        zeros: zero points; None where the engine takes 8 for all.
    """

    built: BuiltInt4
    hidden: int
    weights: Pair
    scales: Pair
    zeros: Pair | None = None


def int4_of(kept: KeptInt4) -> ExpertWeights:
    """Describe 4-bit experts to the kernels, where they lie.

    Raises:
        Unreadable: a setting, or the checkpoint, has the engine keep them otherwise than the kernels read.
    """
    built, (w13, w2) = kept.built, kept.weights
    tiles = built.packing != "bytes"
    w13_zeros, w2_zeros = kept.zeros or (None, None)
    beside = Int4(
        Layout.MARLIN_TILE if tiles else Layout.PACKED_BYTES,
        *kept.scales,
        built.group,
        w13_zeros,
        w2_zeros,
        built.packing == "humming",
    )
    # In two steps: what the engine says names the reason better than a shape that follows from it.
    _, held = beside.shape(w2) if w2.ndim == 3 else (0, 0)
    if (reason := refusal(replace(built, held=held))) is not None:
        raise Unreadable(reason.detail, reason.code)
    try:
        weights = ExpertWeights(w13, w2, int4=beside)
    except (ValueError, IndexError) as error:
        raise Unreadable(f"4-bit experts: {error}", "quant.layout") from error
    if weights.hidden != kept.hidden:
        why = f"4-bit experts of {weights.hidden} hidden columns, states have {kept.hidden}"
        raise Unreadable(why, "quant.layout")
    return weights


def word(dtype: object) -> str:
    """Name a dtype, torch's or another one's."""
    return str(dtype).removeprefix("torch.")


def pair(first: torch.Tensor | None, second: torch.Tensor | None) -> Pair | None:
    """Return both tensors; None where there are none, or empty ones."""
    if first is None or second is None or not first.numel() or not second.numel():
        return None
    return first, second


def group_of(size: int | None) -> int:
    """Return columns of a group: engines say -1, or nothing, for all of them."""
    return max(size or 0, 0)
