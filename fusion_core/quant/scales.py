"""Weights times their scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import NoReference

if TYPE_CHECKING:
    # Headers are read without torch.
    import torch


def multiply(weight: torch.Tensor, scale: torch.Tensor | None, group: tuple[int, int]) -> torch.Tensor:
    """Multiply ``weight`` [out, in] float64 by its scales, in place; without scales it stays as it is.

    Args:
        scale: [ceil(out / rows), ceil(in / columns)] float64, one for every group; the last group of either
            may be a partial one.
        group: rows and columns that share a scale; 0 for all.

    Raises:
        NoReference: the scales are not as many as the groups.
    """
    if scale is None:
        return weight
    (out, inner), (rows, columns) = weight.shape, group
    rows, columns = rows or out, columns or inner
    if list(scale.shape) != [-(-out // rows), -(-inner // columns)]:
        raise NoReference(f"{list(scale.shape)} scales for {out} x {inner} in groups of {rows} x {columns}")
    wide = scale if scale.shape[1] == 1 else scale.repeat_interleave(columns, dim=1)[:, :inner]
    if rows == 1:
        return weight.mul_(wide)
    for number, factors in enumerate(wide):
        weight[number * rows : (number + 1) * rows].mul_(factors)
    return weight
