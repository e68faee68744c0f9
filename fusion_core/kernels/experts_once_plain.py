"""Products of experts_once_kernels.py with weights of 16 bits and of FP8."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import dot
from .weight_format import FP8

# Factor on inner states of FP8 experts: float16 then holds them up to a million, in steps of a millionth.
INNER = 2.0**-4
INNER_FACTOR = tl.constexpr(INNER)


@triton.jit
def gate_up_plain(
    x_ptr, fitted_ptr, w_ptr, scale_ptr, factor, pair, expert, row, offs_n, HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, FORMAT: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Multiply rows ``offs_n`` of w1 and w3, the first ``row``, with the tokens of ``pair``."""
    IS_FP8: tl.constexpr = FORMAT.kind == FP8
    GROUP_N: tl.constexpr = FORMAT.rows
    GROUP_K: tl.constexpr = FORMAT.columns
    WARPS: tl.constexpr = STEPS.warps
    DEPTH: tl.constexpr = STEPS.depth
    PARTS: tl.constexpr = STEPS.parts
    STAGES: tl.constexpr = STEPS.stages
    SPAN: tl.constexpr = STEPS.rounds * DEPTH * PARTS
    # Each warp has a part of the columns of every row.
    start = tl.arange(0, WARPS)[:, None, None] * SPAN
    offs_t = tl.arange(0, COLUMNS)
    mask_n = (offs_n < WIDTH)[None, :, None]
    w1_ptr = w_ptr + expert * FORMAT.expert + offs_n[None, :, None] * FORMAT.row
    s1_ptr = scale_ptr + expert * FORMAT.scale_expert
    if GROUP_K:
        s1_ptr += row // GROUP_N * FORMAT.scale_row
    if IS_FP8:
        x_ptr = fitted_ptr
    gate = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
    up = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, SPAN, DEPTH * PARTS, num_stages=STAGES):
        for part in tl.static_range(PARTS):
            first = start + step + part * DEPTH
            offs_k = first + tl.arange(0, DEPTH)[None, None, :]
            mask = mask_n & (offs_k < HIDDEN)
            w1 = tl.load(w1_ptr + offs_k, mask=mask, other=0.0)
            w3 = tl.load(w1_ptr + WIDTH * FORMAT.row + offs_k, mask=mask, other=0.0)
            down_k = first + tl.arange(0, DEPTH)[None, :, None]
            chosen = (pair >= 0)[None, None, :] & (down_k < HIDDEN)
            x = tl.load(x_ptr + offs_t[None, None, :] * HIDDEN + down_k, mask=chosen, other=0.0)
            if IS_FP8:
                w1, w3 = w1.to(tl.float16), w3.to(tl.float16)
            if GROUP_K:
                # A tile lies in one block of scales.
                block = s1_ptr + first // GROUP_K * FORMAT.scale_column
                nothing = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
                there = first < HIDDEN
                gate += dot(w1, x, nothing, WIDE) * tl.load(block, mask=there, other=0.0)
                above = block + FORMAT.half * FORMAT.scale_row
                up += dot(w3, x, nothing, WIDE) * tl.load(above, mask=there, other=0.0)
            else:
                gate = dot(w1, x, gate, WIDE)
                up = dot(w3, x, up, WIDE)
    g, u = tl.sum(gate, 0), tl.sum(up, 0)
    if IS_FP8:
        g, u = g / factor[None, :], u / factor[None, :]
        if not GROUP_K:
            at = s1_ptr + tl.where(GROUP_N == 0, 0, offs_n) * FORMAT.scale_row
            one = tl.load(at, mask=offs_n < WIDTH, other=0.0)
            other = tl.load(at + FORMAT.half * FORMAT.scale_row, mask=offs_n < WIDTH, other=0.0)
            g, u = g * one[:, None], u * other[:, None]
    return g, u


@triton.jit
def down_plain(
    acc, inner_ptr, base, s_ptr, stride_n, stride_k, before, pair, there, chunk, first_n, row, limit,
    DTYPE: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    FORMAT: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add products of one chunk of columns of w2 with inner states to ``acc`` [WARPS, ROWS, COLUMNS].

    Args:
        base, s_ptr: rows [WARPS, ROWS, 1] of weights from this slot's columns on, and scales of the expert,
            with their strides; ``before``: columns of the slots before this one.
        pair: [WARPS, 1, COLUMNS]; ``there`` and ``limit``: whether each warp has an expert, and its columns.
        row: [1, ROWS, 1], from ``first_n`` on.
    """
    IS_FP8: tl.constexpr = FORMAT.kind == FP8
    GROUP_N: tl.constexpr = FORMAT.rows
    GROUP_K: tl.constexpr = FORMAT.columns
    WARPS: tl.constexpr = STEPS.warps
    DEPTH: tl.constexpr = STEPS.depth
    PARTS: tl.constexpr = STEPS.parts
    ALL: tl.constexpr = STEPS.experts * WARPS
    start = (tl.arange(0, ALL) % WARPS * DEPTH)[:, None, None]
    for part in tl.static_range(PARTS):
        first = (chunk * PARTS + part) * (WARPS * DEPTH) + start
        offs_k = first + tl.arange(0, DEPTH)[None, None, :]
        w2 = tl.load(base + offs_k, mask=there & (row < HIDDEN) & (offs_k < limit), other=0.0)
        down_k = first + tl.arange(0, DEPTH)[None, :, None]
        mask = (pair >= 0) & (down_k < limit)
        bits = tl.load(inner_ptr + pair.to(tl.int64) * WIDTH + down_k, mask=mask, other=0)
        if IS_FP8:
            h = bits.to(tl.float16, bitcast=True)
            if GROUP_K:
                # A warp's tile lies in one block of scales.
                at = s_ptr + first_n // GROUP_N * stride_n + (before + first) // GROUP_K * stride_k
            elif GROUP_N:
                at = s_ptr + row * stride_n
            else:
                at = s_ptr
            scale = tl.load(at, mask=there & (first < limit), other=0.0)
            nothing = tl.zeros([ALL, ROWS, COLUMNS], tl.float32)
            acc += dot(w2.to(tl.float16), h, nothing, WIDE) * (scale * (1.0 / INNER_FACTOR))
        else:
            acc = dot(w2, bits.to(DTYPE, bitcast=True), acc, WIDE)
    return acc
