"""Products of experts_once_kernels.py with 4-bit weights, in the states' dtype, which holds these exactly.

A tile has two halves of columns, each with its own states: no number of it goes to another thread. What a
group shares, its scale and zero point, comes after the product; the zero point times the sum of the states,
which a matrix of ones gives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import marlin_tile, packed_bytes
from .launch import dot
from .weight_format import HUMMING_ZEROS, MARLIN_TILE


@triton.jit
def gate_up_int4(
    x_ptr, w_ptr, scale_ptr, zero_ptr, pair, expert, row, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Multiply rows of w1 and w3 with the tokens of ``pair``: two [ROWS, COLUMNS] float32."""
    WARPS: tl.constexpr = STEPS.warps
    DEPTH: tl.constexpr = STEPS.depth
    PARTS: tl.constexpr = STEPS.parts
    STAGES: tl.constexpr = STEPS.stages
    SPAN: tl.constexpr = STEPS.rounds * DEPTH * PARTS
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    w_ptr = w_ptr.to(tl.pointer_type(tl.uint8)) + expert * FORMAT.expert
    scale_ptr += expert * FORMAT.scale_expert
    zero_ptr += expert * FORMAT.zero_expert
    start = tl.arange(0, WARPS)[:, None, None] * SPAN
    token = tl.arange(0, COLUMNS)[None, None, :] * HIDDEN
    there = (pair >= 0)[None, None, :]
    held = row < WIDTH  # or none of the tile's rows: they come in multiples of it
    gate = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
    up = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, SPAN, DEPTH * PARTS, num_stages=STAGES):
        for part in tl.static_range(PARTS):
            first = start + step + part * DEPTH
            low, high = _states(x_ptr, token, first, there, HIDDEN, DEPTH, DTYPE, FORMAT)
            gate += _product(
                w_ptr, scale_ptr, zero_ptr, low, high, first, row, held, HIDDEN, ROWS, STEPS, COLUMNS,
                DTYPE, FORMAT, WIDE,
            )  # fmt: skip
            up += _product(
                w_ptr, scale_ptr, zero_ptr, low, high, first, row + WIDTH, held, HIDDEN, ROWS, STEPS,
                COLUMNS, DTYPE, FORMAT, WIDE,
            )  # fmt: skip
    return tl.sum(gate, 0), tl.sum(up, 0)


@triton.jit
def down_int4(
    inner_ptr, w_ptr, scale_ptr, zero_ptr, expert, before, pair, there, chunk, row, limit,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Multiply one chunk of columns of w2 with inner states: [WARPS, ROWS, COLUMNS] float32.

    Args:
        expert, before, limit, there: of each warp [WARPS, 1, 1]; ``before``: columns of earlier slots.
        pair: [WARPS, 1, COLUMNS].
    """
    WARPS: tl.constexpr = STEPS.warps
    DEPTH: tl.constexpr = STEPS.depth
    PARTS: tl.constexpr = STEPS.parts
    ALL: tl.constexpr = WARPS * STEPS.experts
    w_ptr = w_ptr.to(tl.pointer_type(tl.uint8)) + expert * FORMAT.expert
    scale_ptr += expert * FORMAT.scale_expert
    zero_ptr += expert * FORMAT.zero_expert
    acc = tl.zeros([ALL, ROWS, COLUMNS], tl.float32)
    start = (tl.arange(0, ALL) % WARPS * DEPTH)[:, None, None]
    for part in tl.static_range(PARTS):
        first = (chunk * PARTS + part) * (WARPS * DEPTH) + start
        low, high = _states(
            inner_ptr, pair.to(tl.int64) * WIDTH, first, pair >= 0, limit, DEPTH, DTYPE, FORMAT
        )  # fmt: skip
        acc += _product(
            w_ptr, scale_ptr, zero_ptr, low, high, before + first, row, there, before + limit, ROWS, STEPS,
            COLUMNS, DTYPE, FORMAT, WIDE,
        )  # fmt: skip
    return acc


@triton.jit
def _states(
    x_ptr, base, first, there, limit, DEPTH: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    if FORMAT.kind == MARLIN_TILE:
        return marlin_tile.states(x_ptr, base, first, there, limit, DEPTH, DTYPE)
    return packed_bytes.states(x_ptr, base, first, there, limit, DEPTH, DTYPE)


@triton.jit
def _product(
    w_ptr, scale_ptr, zero_ptr, low, high, first, row, there, limit, ROWS: tl.constexpr,
    STEPS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Multiply a tile that lies in one group: [WARPS, ROWS, COLUMNS] float32."""
    ALL: tl.constexpr = STEPS.warps * STEPS.experts
    GROUP: tl.constexpr = FORMAT.columns
    DEPTH: tl.constexpr = STEPS.depth
    group = first // GROUP if GROUP else first * 0
    known = there & (first < limit)
    if FORMAT.kind == MARLIN_TILE:
        left, right, ones = marlin_tile.tile(
            w_ptr, first, row, there, limit, FORMAT.row, ALL, ROWS, DEPTH, DTYPE, WIDE
        )  # fmt: skip
        scale = marlin_tile.scale(
            scale_ptr, group, row, known, FORMAT.single, FORMAT.scale_column, ALL, ROWS
        )  # fmt: skip
    else:
        left, right, ones = packed_bytes.tile(
            w_ptr, first, row, there, limit, FORMAT.row, ROWS, DEPTH, DTYPE, WIDE
        )  # fmt: skip
        scale = packed_bytes.scale(
            scale_ptr, group, row, known, FORMAT.scale_row, FORMAT.scale_column, ROWS
        )  # fmt: skip
    nothing = tl.zeros([ALL, ROWS, COLUMNS], tl.float32)
    product = dot(right, high, dot(left, low, nothing, WIDE), WIDE)
    if FORMAT.zeros:
        if FORMAT.kind == MARLIN_TILE:
            zero = marlin_tile.zero(
                zero_ptr, group, row, known, FORMAT.zeros == HUMMING_ZEROS, FORMAT.zero_column, ROWS
            )  # fmt: skip
        else:
            zero = packed_bytes.zero(zero_ptr, group, row, known, FORMAT.zero_row, FORMAT.zero_column, ROWS)
        product -= dot(ones, high, dot(ones, low, nothing, WIDE), WIDE) * zero
    return product * scale
