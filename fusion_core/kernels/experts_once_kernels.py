"""The two kernels of experts_once.py: w13 by (expert, tile of rows), w2 by rows of the output.

`SHARED` says where the slots of the shared expert are, the ids from `E` on: 0 in the tensors of the routed
experts, 1 in tensors of its own in the same format, 2 in tensors of its own in another format.

`FORMAT` and `STEPS`: see weight_format.py; those of the shared expert count where it is in another format.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import marlin_tile
from .experts_once_int4 import down_int4, gate_up_int4
from .experts_once_plain import INNER_FACTOR, down_plain, gate_up_plain
from .launch import begin
from .weight_format import FP8, MARLIN_TILE

MERGED, ALIKE, OTHER = (tl.constexpr(number) for number in range(3))


@triton.jit(do_not_specialize=["M"])
def w13_kernel(
    x_ptr, fitted_ptr, factors_ptr, w13_ptr, scale_ptr, zero_ptr, shared_ptr, shared_scale_ptr,
    shared_zero_ptr, count_ptr, experts_ptr, rows_ptr, weights_ptr, inner_ptr, M, E, HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr, SHARED_WIDTH: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr,
    STEPS: tl.constexpr, SHARED_STEPS: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    TILES: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    IN_TILES: tl.constexpr = FORMAT.kind == MARLIN_TILE or SHARED_FORMAT.kind == MARLIN_TILE
    offs_t = tl.arange(0, COLUMNS)
    count = tl.load(count_ptr)
    factor = tl.full([COLUMNS], 1.0, tl.float32)
    if FORMAT.kind == FP8 or SHARED_FORMAT.kind == FP8:
        factor = tl.load(factors_ptr + offs_t, mask=offs_t < M, other=1.0)
    for task in range(tl.program_id(0), count * TILES, tl.num_programs(0)):
        place = task // TILES
        expert = tl.load(experts_ptr + place).to(tl.int64)
        pair = tl.load(rows_ptr + place * COLUMNS + offs_t)
        first = task % TILES * ROWS
        if SHARED == MERGED:
            g, u = _gate_up(
                x_ptr, fitted_ptr, w13_ptr, scale_ptr, zero_ptr, factor, pair, expert, first, HIDDEN, WIDTH,
                ROWS, STEPS, FORMAT, COLUMNS, IN_TILES, WIDE,
            )  # fmt: skip
        else:
            if expert < E:
                g, u = _gate_up(
                    x_ptr, fitted_ptr, w13_ptr, scale_ptr, zero_ptr, factor, pair, expert, first, HIDDEN,
                    WIDTH, ROWS, STEPS, FORMAT, COLUMNS, IN_TILES, WIDE,
                )  # fmt: skip
            else:
                g, u = _gate_up(
                    x_ptr, fitted_ptr, shared_ptr, shared_scale_ptr, shared_zero_ptr, factor, pair, 0,
                    (expert - E).to(tl.int32) * WIDTH + first, HIDDEN, SHARED_WIDTH, ROWS, SHARED_STEPS,
                    SHARED_FORMAT, COLUMNS, IN_TILES, WIDE,
                )  # fmt: skip
        offs_n = rows_of(first, ROWS, IN_TILES)
        weight = tl.load(weights_ptr + pair, mask=pair >= 0, other=0.0)
        value = g / (1.0 + tl.exp(-g)) * u * weight[None, :]
        offs = pair.to(tl.int64)[None, :] * WIDTH + offs_n[:, None]
        kept = (pair >= 0)[None, :] & (offs_n < WIDTH)[:, None]
        if SHARED == OTHER:
            if expert < E:
                _store_inner(inner_ptr, offs, value, kept, FORMAT.kind == FP8, x_ptr.dtype.element_ty)
            else:
                _store_inner(inner_ptr, offs, value, kept, SHARED_FORMAT.kind == FP8, x_ptr.dtype.element_ty)
        else:
            _store_inner(inner_ptr, offs, value, kept, FORMAT.kind == FP8, x_ptr.dtype.element_ty)


@triton.jit
def rows_of(first, ROWS: tl.constexpr, IN_TILES: tl.constexpr):
    """Return the rows of a tile, [ROWS]: in the order of Marlin's tiles where some weights are in these."""
    if IN_TILES:
        return marlin_tile.rows(first, ROWS)
    return first + tl.arange(0, ROWS)


@triton.jit
def _store_inner(inner_ptr, offs, value, kept, IS_FP8: tl.constexpr, DTYPE: tl.constexpr):
    """Store inner states in 16 bits: as float16 times `INNER` for FP8 weights, else as the states' dtype."""
    if IS_FP8:
        bits = (value * INNER_FACTOR).to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = value.to(DTYPE).to(tl.int16, bitcast=True)
    tl.store(inner_ptr + offs, bits, mask=kept)


@triton.jit
def _gate_up(
    x_ptr, fitted_ptr, w_ptr, scale_ptr, zero_ptr, factor, pair, expert, row, HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, FORMAT: tl.constexpr, COLUMNS: tl.constexpr,
    IN_TILES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Multiply rows of w1 and w3, ``row`` the first, with the tokens of ``pair``: two [ROWS, COLUMNS]."""
    if FORMAT.kind >= MARLIN_TILE:
        g, u = gate_up_int4(
            x_ptr, w_ptr, scale_ptr, zero_ptr, pair, expert, row, HIDDEN, WIDTH, ROWS, STEPS, FORMAT, COLUMNS,
            WIDE,
        )  # fmt: skip
    else:
        g, u = gate_up_plain(
            x_ptr, fitted_ptr, w_ptr, scale_ptr, factor, pair, expert, row, rows_of(row, ROWS, IN_TILES),
            HIDDEN, WIDTH, ROWS, STEPS, FORMAT, COLUMNS, WIDE,
        )  # fmt: skip
    return g, u


@triton.jit(do_not_specialize=["M"])
def w2_kernel(
    inner_ptr, w2_ptr, scale_ptr, zero_ptr, shared_ptr, shared_scale_ptr, shared_zero_ptr, count_ptr,
    experts_ptr, rows_ptr, out_ptr, M, E, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr, STEPS: tl.constexpr,
    SHARED_STEPS: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, COLUMNS: tl.constexpr,
    PLACES: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    IN_TILES: tl.constexpr = FORMAT.kind == MARLIN_TILE or SHARED_FORMAT.kind == MARLIN_TILE
    # Each list of tokens has blocks of its own.
    number = tl.program_id(1)
    experts_ptr += number * PLACES
    rows_ptr += number * PLACES * COLUMNS
    first_n = tl.program_id(0) * ROWS
    ALL: tl.constexpr = STEPS.experts * STEPS.warps
    acc = tl.zeros([ALL, ROWS, COLUMNS], tl.float32)
    count = tl.load(count_ptr + number)
    dtype = out_ptr.dtype.element_ty
    if SHARED == OTHER:
        # The slots, which all tokens have, are the last of the list: a loop for each format.
        routed = count - (SHARED_WIDTH + WIDTH - 1) // WIDTH
        acc = _down(
            acc, inner_ptr, w2_ptr, scale_ptr, zero_ptr, shared_ptr, shared_scale_ptr, experts_ptr, rows_ptr,
            0, routed, first_n, E, dtype, HIDDEN, WIDTH, SHARED_WIDTH, ROWS, MERGED, STEPS, FORMAT, FORMAT,
            COLUMNS, IN_TILES, WIDE,
        )  # fmt: skip
        acc = _down(
            acc, inner_ptr, shared_ptr, shared_scale_ptr, shared_zero_ptr, shared_ptr, shared_scale_ptr,
            experts_ptr, rows_ptr, routed, count, first_n, E, dtype, HIDDEN, WIDTH, SHARED_WIDTH, ROWS, OTHER,
            SHARED_STEPS, SHARED_FORMAT, SHARED_FORMAT, COLUMNS, IN_TILES, WIDE,
        )  # fmt: skip
    else:
        acc = _down(
            acc, inner_ptr, w2_ptr, scale_ptr, zero_ptr, shared_ptr, shared_scale_ptr, experts_ptr, rows_ptr,
            0, count, first_n, E, dtype, HIDDEN, WIDTH, SHARED_WIDTH, ROWS, SHARED, STEPS, FORMAT,
            SHARED_FORMAT, COLUMNS, IN_TILES, WIDE,
        )  # fmt: skip
    offs_t = tl.arange(0, COLUMNS)
    offs_n = rows_of(first_n, ROWS, IN_TILES)
    token = number * TOKENS + offs_t
    out = out_ptr + token[None, :] * HIDDEN + offs_n[:, None]
    kept = ((offs_t < TOKENS) & (token < M))[None, :] & (offs_n < HIDDEN)[:, None]
    tl.store(out, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _down(
    acc, inner_ptr, w2_ptr, scale_ptr, zero_ptr, shared_ptr, shared_scale_ptr, experts_ptr, rows_ptr, begins,
    ends, first_n, E, DTYPE: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr, ROWS: tl.constexpr, WHERE: tl.constexpr, STEPS: tl.constexpr,
    FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, COLUMNS: tl.constexpr, IN_TILES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Add products of the experts ``begins`` to ``ends`` of a list to ``acc``.

    `WHERE`: MERGED: all of them are experts in w2; OTHER: all are slots, in w2; ALIKE: slots are in shared.
    """
    WARPS: tl.constexpr = STEPS.warps
    ROUNDS: tl.constexpr = STEPS.rounds
    EXPERTS: tl.constexpr = STEPS.experts
    STAGES: tl.constexpr = STEPS.stages
    ALL: tl.constexpr = EXPERTS * WARPS
    row = rows_of(first_n, ROWS, IN_TILES)[None, :, None]
    offs_t = tl.arange(0, COLUMNS)
    # Each warp has an expert and a part of the columns of its rows.
    warp = tl.arange(0, ALL)
    for task in tl.range(0, tl.cdiv(ends - begins, EXPERTS) * ROUNDS, num_stages=STAGES):
        place = begins + task // ROUNDS * EXPERTS + warp // WARPS
        there = place < ends
        expert = tl.load(experts_ptr + place, mask=there, other=0).to(tl.int64)[:, None, None]
        at = place[:, None] * COLUMNS + offs_t[None, :]
        pair = tl.load(rows_ptr + at, mask=there[:, None], other=-1)[:, None, :]
        there = there[:, None, None]
        # Columns of a slot come after those of the slots before it, in one matrix.
        before = 0
        limit = WIDTH
        if WHERE == OTHER:
            before = (expert - E).to(tl.int32) * WIDTH
            limit = tl.minimum(WIDTH, SHARED_WIDTH - before)
            expert = expert * 0
        base = w2_ptr + expert * FORMAT.expert + before + row * FORMAT.row
        s_ptr = scale_ptr + expert * FORMAT.scale_expert
        stride_n = FORMAT.scale_row
        stride_k = FORMAT.scale_column
        if WHERE == ALIKE:
            apart = expert >= E
            before = tl.where(apart, (expert - E).to(tl.int32) * WIDTH, 0)
            limit = tl.where(apart, tl.minimum(WIDTH, SHARED_WIDTH - before), WIDTH)
            base = tl.where(apart, shared_ptr + before + row * SHARED_FORMAT.row, base)
            s_ptr = tl.where(apart, shared_scale_ptr + expert * 0, s_ptr)
            stride_n = tl.where(apart, SHARED_FORMAT.scale_row, FORMAT.scale_row)
            stride_k = tl.where(apart, SHARED_FORMAT.scale_column, FORMAT.scale_column)
        if FORMAT.kind >= MARLIN_TILE:
            added = acc + down_int4(
                inner_ptr, w2_ptr, scale_ptr, zero_ptr, expert, before, pair, there, task % ROUNDS, first_n,
                limit, DTYPE, WIDTH, ROWS, STEPS, FORMAT, COLUMNS, WIDE,
            )  # fmt: skip
        else:
            added = down_plain(
                acc, inner_ptr, base, s_ptr, stride_n, stride_k, before, pair, there, task % ROUNDS, first_n,
                row, limit, DTYPE, HIDDEN, WIDTH, ROWS, STEPS, FORMAT, COLUMNS, WIDE,
            )  # fmt: skip
        # What a broken expert gives must not reach tokens that did not choose it: 0 times NaN is NaN.
        acc = tl.where(pair >= 0, added, acc)
    return acc
