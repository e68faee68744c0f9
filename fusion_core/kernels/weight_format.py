"""What the kernels of experts_once.py are told of a matrix and of the way through it, as constants."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from .expert_weights import ExpertWeights
from .int4 import MULTIPLE, SMALLEST_GROUP, Int4

# Kinds of weights, and of zero points.
PLAIN, FP8, MARLIN_TILE, PACKED_BYTES = (tl.constexpr(number) for number in range(4))
NO_ZEROS, ZEROS, HUMMING_ZEROS = (tl.constexpr(number) for number in range(3))


class Format(NamedTuple):
    """A matrix of all experts. Strides are in elements, those of 4-bit weights in bytes.

    Args:
        kind: of weights.
        rows, columns: that share a scale; 0: all of them.
        scale_expert, scale_row, scale_column: strides of scales.
        expert, row: strides of weights; in Marlin's tiles ``row`` is that of 16 columns.
        half: rows of scales of w1, after which those of w3 are.
        single: whether scales beside Marlin's tiles have the order of one group.
        zeros: kind of zero points; zero_expert, zero_row, zero_column: their strides.
    """

    kind: int
    rows: int = 0
    columns: int = 0
    scale_expert: int = 0
    scale_row: int = 0
    scale_column: int = 0
    expert: int = 0
    row: int = 0
    half: int = 0
    single: bool = False
    zeros: int = NO_ZEROS.value
    zero_expert: int = 0
    zero_row: int = 0
    zero_column: int = 0

    @property
    def in_tiles(self) -> bool:
        """Return whether rows come in the order of Marlin's tiles."""
        return bool(self.kind == MARLIN_TILE.value)


class Steps(NamedTuple):
    """How the warps of a block go through the columns of a matrix.

    Args:
        warps: that share the columns of a row.
        depth: columns of a tile of one warp.
        parts: tiles that a warp has at once.
        rounds: until all columns were read, of all warps.
        stages: of the pipeline of loads.
        experts: that a block has at once, each with warps of its own.
    """

    warps: int
    depth: int
    parts: int
    rounds: int
    stages: int
    experts: int


def format_of(weights: ExpertWeights, name: str) -> Format:
    """Return the format of ``w13`` or ``w2``."""
    weight: torch.Tensor = getattr(weights, name)
    if weights.int4 is not None:
        return _int4(weights.int4, name, weight)
    held = Format(PLAIN.value, expert=weight.stride(0), row=weight.stride(1))
    if weights.scales is None:
        return held
    scale: torch.Tensor = getattr(weights.scales, name)
    expert, row, column = (
        step if size > 1 else 0 for step, size in zip(scale.stride(), scale.shape, strict=True)
    )
    rows, columns = weights.scales.block
    return held._replace(
        kind=FP8.value,
        rows=rows,
        columns=columns,
        scale_expert=expert,
        scale_row=row,
        scale_column=column,
        half=scale.shape[1] // 2,
    )


def fits(form: Format, rows: int, depth: int, in_tiles: bool) -> None:
    """Refuse a tile that cannot read the format; ``in_tiles``: rows come in the order of Marlin's tiles.

    Raises:
        ValueError: the tile would lie in two blocks of scales, or in parts of what is read at once.
    """
    # Rows of a tile in Marlin's order are spread over so many.
    spread = MULTIPLE if in_tiles else rows
    if form.columns % depth or (form.rows > 1 and form.rows % spread) or (form.columns and not form.rows):
        raise ValueError(f"scales in blocks of {form.rows} x {form.columns} for tiles of {rows} x {depth}")
    if (in_tiles or form.kind == PACKED_BYTES.value) and (MULTIPLE % rows or rows % 16):
        raise ValueError(f"tiles of {rows} rows for 4-bit weights")
    if form.kind >= MARLIN_TILE.value and depth % SMALLEST_GROUP:
        raise ValueError(f"tiles of {depth} columns for 4-bit weights")


def _int4(int4: Int4, name: str, weight: torch.Tensor) -> Format:
    _, k = int4.shape(weight)
    scale: torch.Tensor = getattr(int4, name)
    zero: torch.Tensor | None = getattr(int4, f"{name}_zeros")
    # Beside tiles rows of scales are contiguous, else columns.
    expert, outer, inner = scale.stride()
    row, column = (inner, outer) if int4.tiles else (outer, inner)
    zero_expert, outer, inner = (0, 0, 0) if zero is None else zero.stride()
    zero_row, zero_column = (inner, outer) if int4.tiles else (outer, inner)
    zeros = NO_ZEROS if zero is None else HUMMING_ZEROS if int4.humming else ZEROS
    return Format(
        (MARLIN_TILE if int4.tiles else PACKED_BYTES).value,
        rows=1,
        columns=int4.group if int4.groups(k) > 1 else 0,
        scale_expert=expert,
        scale_row=row,
        scale_column=column,
        expert=weight.stride(0) * weight.element_size(),
        row=weight.stride(1) * weight.element_size(),
        single=int4.single(k),
        zeros=zeros.value,
        zero_expert=zero_expert,
        zero_row=zero_row,
        zero_column=zero_column,
    )
