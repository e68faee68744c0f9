"""The experts of 2 to 16 tokens over k+S slots, each chosen expert's weights read once, whatever the routing.

w13: blocks walk (expert, tile of rows) and multiply the tile by all tokens that chose the expert. w2: a block
owns rows of the output for all tokens, and walks the experts in ascending order. Tokens are columns of a
matrix product, and no partial sums are added up in memory.

FP8 weights (e4m3) are multiplied as float16, which holds them exactly, and so are the states: times a power
of two for each token, by which the largest of them fits. Inner states are kept times `INNER`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import begin, options
from .work_list import WorkList, work_list

MOST_TOKENS = 16


@dataclass(frozen=True)
class Tile:
    """Sizes of one of the two kernels.

    Args:
        rows: of weights that a block has at once.
        warps: that share the columns of a row.
        depth: columns that a warp has at once.
        stages: of its pipeline of loads.
        blocks: of w13's kernel, for each multiprocessor.
        experts: that a block of w2's kernel has at once, each with warps of its own.
    """

    rows: int
    warps: int
    depth: int
    stages: int
    blocks: int = 1
    experts: int = 1


def w13_tile() -> Tile:
    """Return the tile for w13 [2 * I, H]: the fastest one on an H200, for all shapes that were tried."""
    return Tile(rows=16, warps=2, depth=128, stages=3, blocks=3)


def w2_tile(hidden: int, width: int) -> Tile:
    """Return the tile for w2 [H, I]: the fastest one on an H200."""
    rows = max(16, hidden // 128)
    if width <= 128:
        return Tile(rows, warps=1, depth=128, stages=7, experts=4)
    if rows == 16:
        return Tile(rows, warps=4, depth=128, stages=7, experts=2)
    return Tile(rows, warps=4, depth=64, stages=10)


# Factor on inner states of FP8 experts: float16 then holds them up to a million, in steps of a millionth.
INNER = 2.0**-4
Block = tuple[int, int]


@dataclass(frozen=True)
class Scales:
    """Scales of FP8 experts, float32 and contiguous.

    Args:
        w13, w2: [E + S, rows of scales, columns of scales]; w3's rows follow w1's.
        block: rows and columns of a weight that share a scale; 0 for all of them.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    block: Block


def experts_once(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    scales: Scales | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """Compute the fused layer's output: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x)).

    Args:
        hidden_states: [num_tokens, H], bfloat16 or float16; at most `MOST_TOKENS` rows.
        w13: [E + S, 2 * I, H], rows of w1 before those of w3; w2: [E + S, H, I]. Both contiguous, of the
            states' dtype, or float8_e4m3fn with ``scales``.
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32, the ids of a token differ.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.
    """
    width = w2.shape[2]
    states = hidden_states.contiguous()
    listed = work_list(topk_ids, len(w2))
    factors = None if scales is None else token_factors(states)
    dtype = states.dtype if scales is None else torch.float16
    inner = torch.empty(topk_ids.numel(), width, dtype=dtype, device=states.device)
    output = torch.empty_like(states)
    first, second = tiles or (w13_tile(), w2_tile(states.shape[1], width))
    launch_w13(states, factors, w13, scales, listed, topk_weights, inner, first)
    launch_w2(inner, w2, scales, listed, output, second)
    return output


def launch_w13(
    states: torch.Tensor,
    factors: torch.Tensor | None,
    w13: torch.Tensor,
    scales: Scales | None,
    listed: WorkList,
    weights: torch.Tensor,
    inner: torch.Tensor,
    tile: Tile,
) -> None:
    """Write weight · SiLU(w1 x) · (w3 x) of every (token, slot) pair into ``inner`` [pairs, I]."""
    hidden, width = states.shape[1], inner.shape[1]
    _w13[(_processors(states.device) * tile.blocks,)](
        states,
        states if factors is None else factors,
        w13,
        states if scales is None else scales.w13,
        listed.count,
        listed.experts,
        listed.rows,
        weights,
        inner,
        len(states),
        HIDDEN=hidden,
        WIDTH=width,
        ROWS=tile.rows,
        WARPS=tile.warps,
        DEPTH=tile.depth,
        SPAN=triton.cdiv(hidden, tile.warps * tile.depth) * tile.depth,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **_common(states, listed, None if scales is None else scales.w13, scales, tile),
    )


def launch_w2(
    inner: torch.Tensor,
    w2: torch.Tensor,
    scales: Scales | None,
    listed: WorkList,
    output: torch.Tensor,
    tile: Tile,
) -> None:
    """Write the sum over a token's slots of w2 · inner into ``output`` [num_tokens, H]."""
    hidden, width = w2.shape[1:]
    _w2[(triton.cdiv(hidden, tile.rows),)](
        inner,
        w2,
        inner if scales is None else scales.w2,
        listed.count,
        listed.experts,
        listed.rows,
        output,
        len(output),
        HIDDEN=hidden,
        WIDTH=width,
        ROWS=tile.rows,
        WARPS=tile.warps,
        DEPTH=tile.depth,
        CHUNKS=triton.cdiv(width, tile.warps * tile.depth),
        EXPERTS=tile.experts,
        STAGES=tile.stages,
        num_warps=tile.warps * tile.experts,
        **_common(inner, listed, None if scales is None else scales.w2, scales, tile),
    )


def _common(
    states: torch.Tensor, listed: WorkList, scale: torch.Tensor | None, scales: Scales | None, tile: Tile
) -> dict[str, Any]:
    """Return what both kernels are told.

    Raises:
        ValueError: a tile would lie in two blocks of scales.
    """
    rows, columns = (0, 0) if scales is None else scales.block
    if columns % tile.depth or (rows > 1 and rows % tile.rows):
        raise ValueError(f"scales in blocks of {rows} x {columns} for tiles of {tile.rows} x {tile.depth}")
    scale_n, scale_k = (1, 1) if scale is None else scale.shape[1:]
    return {
        "FP8": scales is not None,
        "GROUP_N": rows,
        "GROUP_K": columns,
        "SCALE_N": scale_n,
        "SCALE_K": scale_k,
        "COLUMNS": listed.columns,
        # Triton's interpreter multiplies bfloat16 as integers.
        "WIDE": not states.is_cuda,
        **options(states),
    }


def token_factors(states: torch.Tensor) -> torch.Tensor:
    """Return for each token a power of two by which its largest state fits float16: [num_tokens] float32."""
    factors = torch.empty(len(states), dtype=torch.float32, device=states.device)
    _factors[(len(states),)](
        states,
        factors,
        HIDDEN=states.shape[1],
        HIDDEN_P2=triton.next_power_of_2(states.shape[1]),
        num_warps=4,
        **options(states),
    )
    return factors


@triton.jit
def _factors(x_ptr, factors_ptr, HIDDEN: tl.constexpr, HIDDEN_P2: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, HIDDEN_P2)
    x = tl.load(x_ptr + token * HIDDEN + offs_k, mask=offs_k < HIDDEN, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    # Of 2^e <= largest < 2^(e + 1) the exponent alone: the product is below 2^14. 1 for 0, infinity and NaN.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    factor = ((254 + 13 - exponent) << 23).to(tl.float32, bitcast=True)
    fine = (exponent > 13) & (exponent < 255)
    tl.store(factors_ptr + token, tl.where(fine, factor, 1.0))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


INNER_FACTOR = tl.constexpr(INNER)


@triton.jit
def _dot(weights, states, acc, WIDE: tl.constexpr):
    if WIDE:
        return tl.dot(weights.to(tl.float32), states.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(weights, states, acc)


@triton.jit
def _w13(
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
        for step in tl.range(0, SPAN, DEPTH, num_stages=STAGES):
            offs_k = start + step + tl.arange(0, DEPTH)[None, None, :]
            mask = mask_n & (offs_k < HIDDEN)
            w1 = tl.load(w1_ptr + offs_k, mask=mask, other=0.0)
            w3 = tl.load(w1_ptr + WIDTH * HIDDEN + offs_k, mask=mask, other=0.0)
            down_k = start + step + tl.arange(0, DEPTH)[None, :, None]
            chosen = (pair >= 0)[None, None, :] & (down_k < HIDDEN)
            x = tl.load(x_ptr + offs_t[None, None, :] * HIDDEN + down_k, mask=chosen, other=0.0)
            if FP8:
                x = (x.to(tl.float32) * factor[None, None, :]).to(tl.float16)
                w1, w3 = w1.to(tl.float16), w3.to(tl.float16)
            if GROUP_K:
                # A tile lies in one block of scales.
                block = s1_ptr + (start + step) // GROUP_K
                nothing = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
                gate += _dot(w1, x, nothing, WIDE) * tl.load(block)
                up += _dot(w3, x, nothing, WIDE) * tl.load(block + SCALE_N // 2 * SCALE_K)
            else:
                gate = _dot(w1, x, gate, WIDE)
                up = _dot(w3, x, up, WIDE)
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
def _w2(
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
    CHUNKS: tl.constexpr,
    EXPERTS: tl.constexpr,
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
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_n = (offs_n < HIDDEN)[None, :, None]
    offs_t = tl.arange(0, COLUMNS)
    # Each warp has an expert and a part of the columns of its rows.
    warp = tl.arange(0, EXPERTS * WARPS)
    start = (warp % WARPS * DEPTH)[:, None, None]
    acc = tl.zeros([EXPERTS * WARPS, ROWS, COLUMNS], tl.float32)
    count = tl.load(count_ptr)
    for task in tl.range(0, tl.cdiv(count, EXPERTS) * CHUNKS, num_stages=STAGES):
        place = task // CHUNKS * EXPERTS + warp // WARPS
        first = task % CHUNKS * (WARPS * DEPTH)
        there = place < count
        expert = tl.load(experts_ptr + place, mask=there, other=0).to(tl.int64)
        at = place[:, None] * COLUMNS + offs_t[None, :]
        pair = tl.load(rows_ptr + at, mask=there[:, None], other=-1)[:, None, :]
        offs_k = first + start + tl.arange(0, DEPTH)[None, None, :]
        w2 = tl.load(
            w2_ptr + expert[:, None, None] * (HIDDEN * WIDTH) + offs_n[None, :, None] * WIDTH + offs_k,
            mask=there[:, None, None] & mask_n & (offs_k < WIDTH),
            other=0.0,
        )
        down_k = first + start + tl.arange(0, DEPTH)[None, :, None]
        h = tl.load(
            inner_ptr + pair.to(tl.int64) * WIDTH + down_k, mask=(pair >= 0) & (down_k < WIDTH), other=0.0
        )
        if FP8:
            w2 = w2.to(tl.float16)
            s_ptr = scale_ptr + expert[:, None, None] * (SCALE_N * SCALE_K)
            if GROUP_K:
                # A warp's tile lies in one block of scales.
                s_ptr += tl.program_id(0) * ROWS // GROUP_N * SCALE_K + (first + start) // GROUP_K
            elif GROUP_N:
                s_ptr += offs_n[None, :, None]
            scale = tl.load(s_ptr, mask=there[:, None, None] & (first + start < WIDTH), other=0.0)
            nothing = tl.zeros([EXPERTS * WARPS, ROWS, COLUMNS], tl.float32)
            added = acc + _dot(w2, h, nothing, WIDE) * (scale * (1.0 / INNER_FACTOR))
        else:
            added = _dot(w2, h, acc, WIDE)
        # What a broken expert gives must not reach tokens that did not choose it: 0 times NaN is NaN.
        acc = tl.where(pair >= 0, added, acc)
    out = out_ptr + offs_t[None, :] * HIDDEN + offs_n[:, None]
    kept = (offs_t < M)[None, :] & (offs_n < HIDDEN)[:, None]
    tl.store(out, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=kept)
