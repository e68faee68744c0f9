"""Experts as an engine has left them in memory, for a pass by pointer; what cannot be read is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..fusion_core.kernels.expert_weights import Block, ExpertWeights, Scales
from ..fusion_core.reasons import Code

PLAIN = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
# Compute capability of NVIDIA devices that convert it.
LEAST_FP8 = (8, 9)


# Names of FP8 scales behind "w13_" and "w2_" on experts, and alone on linear layers.
SCALES = ("weight_scale_inv", "weight_scale")


class Unreadable(Exception):
    """Weights lie in a layout that the pass does not read; the text says which, and where.

    Args:
        code: of the refusal that this is.
    """

    def __init__(self, detail: str, code: Code = "backend.layout") -> None:
        super().__init__(detail)
        self.code: Code = code


def routed_of(experts: Any, block: Block | None) -> ExpertWeights:
    """Describe the routed experts of an engine's module; both engines name its parameters alike.

    Args:
        block: as of `experts_of`.

    Raises:
        Unreadable: as `experts_of`.
    """
    scales = tuple(_first(experts, [f"{part}_{name}" for name in SCALES]) for part in ("w13", "w2"))
    return experts_of(experts.w13_weight, experts.w2_weight, (scales[0], scales[1]), block)


def dense_weights(*layers: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of a shared expert's two linear layers.

    Raises:
        Unreadable: they have none of that name: packed ones have another.
    """
    first, second = (getattr(layer, "weight", None) for layer in layers)
    if first is None or second is None:
        raise Unreadable("the shared expert is packed; the kernels read it in 16 bits or in FP8")
    return first, second


def dense_scales(*layers: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the scales of a shared expert's two linear layers, None where they have none."""
    first, second = (_first(layer, SCALES) for layer in layers)
    return first, second


def _first(module: Any, names: Iterable[str]) -> torch.Tensor | None:
    found = (getattr(module, name, None) for name in names)
    return next((scale for scale in found if scale is not None), None)


def experts_of(
    w13: torch.Tensor,
    w2: torch.Tensor,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    block: Block | None = None,
) -> ExpertWeights:
    """Describe routed experts, w13 [E, 2 * I, H] and w2 [E, H, I], or a shared one, without E: as E = 1.

    Args:
        scales: those of w13 and of w2, as the engine has them.
        block: rows and columns that share a scale where there are several of each; None for others.

    Raises:
        Unreadable: a shape, dtype or stride is not what the pass takes.
    """
    if w13.ndim == w2.ndim == 2:
        w13, w2 = w13[None], w2[None]
    if w13.ndim != 3 or w2.ndim != 3:
        raise Unreadable(f"w13 {list(w13.shape)} and w2 {list(w2.shape)} are no matrices of experts")
    count, hidden, width = w2.shape
    if w13.shape != (count, 2 * width, hidden):
        raise Unreadable(f"w13 {list(w13.shape)} and w2 {list(w2.shape)} are not [2 * I, H] and [H, I]")
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.is_meta or not weight.numel():
            raise Unreadable(f"{name} is empty: the engine has packed it")
        if weight.stride(-1) != 1:
            raise Unreadable(f"{name} has rows of stride {weight.stride(-1)}")
    if w13.dtype != w2.dtype or w13.dtype not in (*PLAIN, FP8):
        raise Unreadable(f"weights are {w13.dtype} and {w2.dtype}")
    first, second = scales
    if w13.dtype in PLAIN:
        if first is not None or second is not None:
            raise Unreadable(f"{w13.dtype} weights have scales")
        return ExpertWeights(w13, w2)
    if w13.is_cuda and torch.version.cuda and torch.cuda.get_device_capability(w13.device) < LEAST_FP8:
        raise Unreadable("FP8 weights on a device without a conversion of e4m3")
    if first is None or second is None:
        raise Unreadable("FP8 weights have no scales under a name that is known")
    size = block or ((1, 0) if first.numel() == count * 2 * width else (0, 0))
    return ExpertWeights(w13, w2, Scales(_scale(first, w13, size, 2), _scale(second, w2, size, 1), size))


def _scale(scale: torch.Tensor, weight: torch.Tensor, block: Block, parts: int) -> torch.Tensor:
    """Return scales as [E, rows, columns]; where all rows share one, it is for both parts of w13."""
    rows, columns = block
    count, height, length = weight.shape
    lines = parts * -(-(height // parts) // rows) if rows else 1
    shape = (count, lines, -(-length // columns) if columns else 1)
    if scale.dtype != torch.float32:
        raise Unreadable(f"scales are {scale.dtype}")
    # Of a shared expert they come without E.
    scale = scale[None] if scale.ndim == 2 and count == 1 else scale
    if tuple(scale.shape) == shape:
        return scale
    if not columns and scale.numel() == count * lines:
        return scale.reshape(shape)
    if not rows and scale.numel() == count * parts:  # one for each of w1 and w3
        return scale.reshape(count, parts, 1)
    raise Unreadable(f"scales {list(scale.shape)} of a weight {list(weight.shape)} in blocks of {block}")
