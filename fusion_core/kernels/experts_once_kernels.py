"""The two kernels of experts_once.py: w13 by (expert, tile of rows), w2 by rows of the output."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import begin, dot

# Factor on inner states of FP8 experts: float16 then holds them up to a million, in steps of a millionth.
INNER = 2.0**-4
INNER_FACTOR = tl.constexpr(INNER)


@triton.jit
def w13_kernel(
    x_ptr,
    factors_ptr,
    w13_ptr,
    scale_ptr,
    count_ptr,
    experts_ptr,
    rows_ptr,
    weights_ptr,
    inner_ptr,
    M,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    FP8: tl.constexpr,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    TILES: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    # Each warp has a part of the columns of every row.
    start = tl.arange(0, WARPS)[:, None, None] * SPAN
    offs_t = tl.arange(0, COLUMNS)
    offs_r = tl.arange(0, ROWS)
    count = tl.load(count_ptr)
    factor = tl.full([COLUMNS], 1.0, tl.float32)
    if FP8:
        factor = tl.load(factors_ptr + offs_t, mask=offs_t < M, other=1.0)
    for task in range(tl.program_id(0), count * TILES, tl.num_programs(0)):
        place = task // TILES
        expert = tl.load(experts_ptr + place).to(tl.int64)
        pair = tl.load(rows_ptr + place * COLUMNS + offs_t)
        offs_n = task % TILES * ROWS + offs_r
        mask_n = (offs_n < WIDTH)[None, :, None]
        w1_ptr = w13_ptr + expert * (2 * WIDTH * HIDDEN) + offs_n[None, :, None] * HIDDEN
        s1_ptr = scale_ptr + expert * (SCALE_N * SCALE_K)
        if GROUP_K:
            s1_ptr += task % TILES * ROWS // GROUP_N * SCALE_K
        gate = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
        up = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
        for step in tl.range(0, SPAN, DEPTH * PARTS, num_stages=STAGES):
            for part in tl.static_range(PARTS):
                first = start + step + part * DEPTH
                offs_k = first + tl.arange(0, DEPTH)[None, None, :]
                mask = mask_n & (offs_k < HIDDEN)
                w1 = tl.load(w1_ptr + offs_k, mask=mask, other=0.0)
                w3 = tl.load(w1_ptr + WIDTH * HIDDEN + offs_k, mask=mask, other=0.0)
                down_k = first + tl.arange(0, DEPTH)[None, :, None]
                chosen = (pair >= 0)[None, None, :] & (down_k < HIDDEN)
                x = tl.load(x_ptr + offs_t[None, None, :] * HIDDEN + down_k, mask=chosen, other=0.0)
                if FP8:
                    x = (x.to(tl.float32) * factor[None, None, :]).to(tl.float16)
                    w1, w3 = w1.to(tl.float16), w3.to(tl.float16)
                if GROUP_K:
                    # A tile lies in one block of scales.
                    block = s1_ptr + first // GROUP_K
                    nothing = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
                    there = first < HIDDEN
                    gate += dot(w1, x, nothing, WIDE) * tl.load(block, mask=there, other=0.0)
                    above = block + SCALE_N // 2 * SCALE_K
                    up += dot(w3, x, nothing, WIDE) * tl.load(above, mask=there, other=0.0)
                else:
                    gate = dot(w1, x, gate, WIDE)
                    up = dot(w3, x, up, WIDE)
        g = tl.sum(gate, 0) / factor[None, :]
        u = tl.sum(up, 0) / factor[None, :]
        if FP8 and not GROUP_K:
            row = tl.where(GROUP_N == 0, 0, offs_n)
            one = tl.load(s1_ptr + row, mask=offs_n < WIDTH, other=0.0)
            other = tl.load(s1_ptr + SCALE_N // 2 + row, mask=offs_n < WIDTH, other=0.0)
            g, u = g * one[:, None], u * other[:, None]
        weight = tl.load(weights_ptr + pair, mask=pair >= 0, other=0.0)
        value = g / (1.0 + tl.exp(-g)) * u * weight[None, :]
        if FP8:
            value *= INNER_FACTOR
        inner = inner_ptr + pair.to(tl.int64)[None, :] * WIDTH + offs_n[:, None]
        kept = (pair >= 0)[None, :] & (offs_n < WIDTH)[:, None]
        tl.store(inner, value.to(inner_ptr.dtype.element_ty), mask=kept)


@triton.jit
def w2_kernel(
    inner_ptr,
    w2_ptr,
    scale_ptr,
    count_ptr,
    experts_ptr,
    rows_ptr,
    out_ptr,
    M,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    STAGES: tl.constexpr,
    FP8: tl.constexpr,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    # Each list of tokens has blocks of its own.
    number = tl.program_id(1)
    experts_ptr += number * PLACES
    rows_ptr += number * PLACES * COLUMNS
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_n = (offs_n < HIDDEN)[None, :, None]
    offs_t = tl.arange(0, COLUMNS)
    # Each warp has an expert and a part of the columns of its rows.
    warp = tl.arange(0, EXPERTS * WARPS)
    start = (warp % WARPS * DEPTH)[:, None, None]
    acc = tl.zeros([EXPERTS * WARPS, ROWS, COLUMNS], tl.float32)
    count = tl.load(count_ptr + number)
    for task in tl.range(0, tl.cdiv(count, EXPERTS) * CHUNKS, num_stages=STAGES):
        place = task // CHUNKS * EXPERTS + warp // WARPS
        there = place < count
        expert = tl.load(experts_ptr + place, mask=there, other=0).to(tl.int64)
        at = place[:, None] * COLUMNS + offs_t[None, :]
        pair = tl.load(rows_ptr + at, mask=there[:, None], other=-1)[:, None, :]
        for part in tl.static_range(PARTS):
            first = (task % CHUNKS * PARTS + part) * (WARPS * DEPTH) + start
            offs_k = first + tl.arange(0, DEPTH)[None, None, :]
            w2 = tl.load(
                w2_ptr + expert[:, None, None] * (HIDDEN * WIDTH) + offs_n[None, :, None] * WIDTH + offs_k,
                mask=there[:, None, None] & mask_n & (offs_k < WIDTH),
                other=0.0,
            )
            down_k = first + tl.arange(0, DEPTH)[None, :, None]
            h = tl.load(
                inner_ptr + pair.to(tl.int64) * WIDTH + down_k,
                mask=(pair >= 0) & (down_k < WIDTH),
                other=0.0,
            )
            if FP8:
                w2 = w2.to(tl.float16)
                s_ptr = scale_ptr + expert[:, None, None] * (SCALE_N * SCALE_K)
                if GROUP_K:
                    # A warp's tile lies in one block of scales.
                    s_ptr += tl.program_id(0) * ROWS // GROUP_N * SCALE_K + first // GROUP_K
                elif GROUP_N:
                    s_ptr += offs_n[None, :, None]
                scale = tl.load(s_ptr, mask=there[:, None, None] & (first < WIDTH), other=0.0)
                nothing = tl.zeros([EXPERTS * WARPS, ROWS, COLUMNS], tl.float32)
                added = acc + dot(w2, h, nothing, WIDE) * (scale * (1.0 / INNER_FACTOR))
            else:
                added = dot(w2, h, acc, WIDE)
            # What a broken expert gives must not reach tokens that did not choose it: 0 times NaN is NaN.
            acc = tl.where(pair >= 0, added, acc)
    token = number * TOKENS + offs_t
    out = out_ptr + token[None, :] * HIDDEN + offs_n[:, None]
    kept = ((offs_t < TOKENS) & (token < M))[None, :] & (offs_n < HIDDEN)[:, None]
    tl.store(out, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=kept)
