"""Experts as an engine has left them in memory, read for a pass by pointer; what cannot be read is refused."""

from __future__ import annotations

import torch

from ..fusion_core.kernels.expert_weights import Block, ExpertWeights, Scales

PLAIN = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn


class Unreadable(Exception):
    """Weights lie in a layout that the pass does not read; the text says which, and where."""


def experts_of(
    w13: torch.Tensor,
    w2: torch.Tensor,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    block: Block | None = None,
) -> ExpertWeights:
    """Describe routed experts, w13 [E, 2 * I, H] and w2 [E, H, I], or a shared one, without E.

    Args:
        scales: those of w13 and of w2, as the engine has them.
        block: rows and columns that share a scale where there are several of each; None for others.

    Raises:
        Unreadable: a shape, dtype or stride is not what the pass takes.
    """
    width, hidden = w2.shape[-1], w2.shape[-2]
    if w13.ndim not in (2, 3) or w13.shape != (*w2.shape[:-2], 2 * width, hidden):
        raise Unreadable(f"w13 {list(w13.shape)} and w2 {list(w2.shape)} are not [2 * I, H] and [H, I]")
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.is_meta or not weight.numel():
            raise Unreadable(f"{name} is empty: the engine has packed it")
        if weight.stride(-1) != 1:
            raise Unreadable(f"{name} has rows of stride {weight.stride(-1)}")
    if w13.dtype != w2.dtype or w13.dtype not in (*PLAIN, FP8):
        raise Unreadable(f"weights are {w13.dtype} and {w2.dtype}")
    if w13.dtype in PLAIN:
        if any(scale is not None for scale in scales):
            raise Unreadable(f"{w13.dtype} weights have scales")
        return ExpertWeights(w13, w2)
    first, second = scales
    if first is None or second is None:
        raise Unreadable("FP8 weights have no scales under a name that is known")
    size = _block(first, w13, block)
    return ExpertWeights(w13, w2, Scales(_scale(first, w13, size, 2), _scale(second, w2, size, 1), size))


def _block(scale: torch.Tensor, weight: torch.Tensor, block: Block | None) -> Block:
    """Return rows and columns that share a scale, as the shape of ``scale`` shows."""
    if block is not None:
        return block
    experts = weight.shape[0] if weight.ndim == 3 else 1
    return (1, 0) if scale.numel() == experts * weight.shape[-2] else (0, 0)


def _scale(scale: torch.Tensor, weight: torch.Tensor, block: Block, parts: int) -> torch.Tensor:
    """Return scales as [E, rows, columns] or [rows, columns]; one for both parts of w13 stands for each."""
    rows, columns = block
    lead, height, length = tuple(weight.shape[:-2]), weight.shape[-2], weight.shape[-1]
    expected = (parts * -(-(height // parts) // rows) if rows else parts, -(-length // columns) if columns else 1)
    if scale.dtype != torch.float32:
        raise Unreadable(f"scales are {scale.dtype}")
    if tuple(scale.shape) == (*lead, *expected):
        return scale
    if scale.numel() == (lead or (1,))[0] * expected[0] * expected[1]:
        return scale.reshape(*lead, *expected)
    if not rows and scale.numel() == (lead or (1,))[0]:
        return scale.reshape(*lead, 1, 1).expand(*lead, *expected)
    raise Unreadable(f"scales {list(scale.shape)} of a weight {list(weight.shape)} in blocks of {block}")
