"""The experts of 2 to 16 tokens over k+S slots, each chosen expert's weights read once, whatever the routing.

w13: blocks walk (expert, tile of rows) and multiply the tile by all tokens that chose the expert. w2: a block
owns rows of the output for all tokens, and walks the experts in ascending order. Tokens are columns of a
matrix product; no partial sums are added up in memory, so a token's result does not depend on the others.
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


def experts_once(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    tiles: tuple[Tile, Tile] | None = None,
    listed: WorkList | None = None,
) -> torch.Tensor:
    """Compute the fused layer's output: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x)).

    Args:
        hidden_states: [num_tokens, H], bfloat16 or float16; at most `MOST_TOKENS` rows.
        w13: [E + S, 2 * I, H], rows of w1 before those of w3; w2: [E + S, H, I]. Both contiguous.
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32, the ids of a token differ.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.
    """
    (tokens, hidden), (total, _, width) = hidden_states.shape, w2.shape
    states = hidden_states.contiguous()
    listed = listed or work_list(topk_ids, total)
    inner = torch.empty(topk_ids.numel(), width, dtype=states.dtype, device=states.device)
    output = torch.empty_like(states)
    first, second = tiles or (w13_tile(), w2_tile(hidden, width))
    # Triton's interpreter multiplies bfloat16 as integers.
    common: dict[str, Any] = {"COLUMNS": listed.columns, "WIDE": not states.is_cuda, **options(states)}
    span = triton.cdiv(hidden, first.warps * first.depth) * first.depth
    _w13[(_programs(states.device, first.blocks),)](
        states,
        w13,
        listed.count,
        listed.experts,
        listed.rows,
        topk_weights,
        inner,
        tokens,
        HIDDEN=hidden,
        WIDTH=width,
        ROWS=first.rows,
        WARPS=first.warps,
        DEPTH=first.depth,
        SPAN=span,
        STAGES=first.stages,
        num_warps=first.warps,
        **common,
    )
    _w2[(triton.cdiv(hidden, second.rows),)](
        inner,
        w2,
        listed.count,
        listed.experts,
        listed.rows,
        output,
        tokens,
        HIDDEN=hidden,
        WIDTH=width,
        ROWS=second.rows,
        WARPS=second.warps,
        DEPTH=second.depth,
        CHUNKS=triton.cdiv(width, second.warps * second.depth),
        EXPERTS=second.experts,
        STAGES=second.stages,
        num_warps=second.warps * second.experts,
        **common,
    )
    return output


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _programs(device: torch.device, blocks: int) -> int:
    return _processors(device) * blocks


@triton.jit
def _dot(weights, states, acc, WIDE: tl.constexpr):
    if WIDE:
        return tl.dot(weights.to(tl.float32), states.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(weights, states, acc)


@triton.jit
def _w13(
    x_ptr,
    w13_ptr,
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
    for task in range(tl.program_id(0), count * TILES, tl.num_programs(0)):
        place = task // TILES
        expert = tl.load(experts_ptr + place).to(tl.int64)
        pair = tl.load(rows_ptr + place * COLUMNS + offs_t)
        offs_n = task % TILES * ROWS + offs_r
        mask_n = (offs_n < WIDTH)[None, :, None]
        w1_ptr = w13_ptr + expert * (2 * WIDTH * HIDDEN) + offs_n[None, :, None] * HIDDEN
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
            gate = _dot(w1, x, gate, WIDE)
            up = _dot(w3, x, up, WIDE)
        g = tl.sum(gate, 0)
        weight = tl.load(weights_ptr + pair, mask=pair >= 0, other=0.0)
        value = g / (1.0 + tl.exp(-g)) * tl.sum(up, 0) * weight[None, :]
        inner = inner_ptr + pair.to(tl.int64)[None, :] * WIDTH + offs_n[:, None]
        kept = (pair >= 0)[None, :] & (offs_n < WIDTH)[:, None]
        tl.store(inner, value.to(inner_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _w2(
    inner_ptr,
    w2_ptr,
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
        # What a broken expert gives must not reach tokens that did not choose it: 0 times NaN is NaN.
        acc = tl.where(pair >= 0, _dot(w2, h, acc, WIDE), acc)
    out = out_ptr + offs_t[None, :] * HIDDEN + offs_n[:, None]
    kept = (offs_t < M)[None, :] & (offs_n < HIDDEN)[:, None]
    tl.store(out, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=kept)
