"""The experts of 2 to 16 tokens over k+S slots, each chosen expert's weights read once, whatever the routing.

w13: blocks walk (expert, tile of rows) and multiply the tile by all tokens that chose the expert. w2: a block
owns rows of the output for all tokens, and walks the experts in ascending order. Tokens are columns of a
matrix product, and no partial sums are added up in memory.

FP8 weights (e4m3) are multiplied as float16, which holds them exactly, and so are the states: times a power
of two for each token, by which the largest of them fits. Inner states are kept times `INNER`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import gcd
from typing import Any

import torch
import triton

from .experts_once_kernels import w2_kernel, w13_kernel
from .launch import options
from .work_list import COLUMNS, MOST_PAIRS, WorkList, work_list


def most_tokens(slots: int) -> int:
    """Return the most tokens that `experts_once` takes, of so many slots each."""
    return min(COLUMNS[-1], MOST_PAIRS // slots)


@dataclass(frozen=True)
class Tile:
    """Sizes of one of the two kernels.

    Args:
        rows: of weights that a block has at once.
        warps: that share the columns of a row.
        depth: columns of a tile of one warp.
        parts: tiles that a warp has at once.
        tokens: that a block of w2's kernel has; 0: all.
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
    parts: int = 1
    tokens: int = 0


def w13_tile(tokens: int, fp8: bool) -> Tile:
    """Return the tile for w13 [2 * I, H]: the fastest one on an H200, for all shapes that were tried."""
    if not fp8:
        return Tile(rows=16, warps=2, depth=128, stages=3, blocks=3)
    # In FP8 the states in shared memory are the limit: fewer warps load them less often.
    if tokens <= 8:
        return Tile(rows=16, warps=2, depth=128, stages=3, blocks=6)
    return Tile(rows=16, warps=1, depth=128, stages=3, blocks=8)


def w2_tile(tokens: int, hidden: int, width: int, fp8: bool) -> Tile:
    """Return the tile for w2 [H, I]: the fastest one on an H200."""
    rows = max(16, hidden // 128)
    part = COLUMNS[0] if fp8 else 0
    if width <= 128:
        return Tile(rows, warps=1, depth=128, stages=7, experts=4, tokens=part)
    if fp8:
        several = 4 if tokens <= part and width <= 512 else 2
        return Tile(16, warps=1, depth=128, parts=4, stages=7, experts=several, tokens=part)
    if rows > 16:
        return Tile(rows, warps=4, depth=64, stages=10, tokens=part)
    return Tile(rows, warps=4, depth=128, stages=7, experts=2)


Block = tuple[int, int]
# Rows and columns of the smallest tile.
SMALLEST = 16


def takes(block: Block) -> bool:
    """Return whether `experts_once` takes scales in blocks of so many rows and columns; 0: one for all."""
    rows, columns = block
    return columns % SMALLEST == 0 and (rows <= 1 or rows % SMALLEST == 0)


def within(tile: Tile, block: Block) -> Tile:
    """Return a tile that lies in one block of scales."""
    rows, columns = block
    return replace(
        tile,
        rows=gcd(tile.rows, rows) if rows > 1 else tile.rows,
        depth=gcd(tile.depth, columns) if columns else tile.depth,
    )


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
        hidden_states: [num_tokens, H], bfloat16 or float16; at most `most_tokens` rows.
        w13: [E + S, 2 * I, H], rows of w1 before those of w3; w2: [E + S, H, I]. Both contiguous, of the
            states' dtype, or float8_e4m3fn with ``scales``.
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32, the ids of a token differ.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.
    """
    width, fp8 = w2.shape[2], scales is not None
    states = hidden_states.contiguous()
    first, second = tiles or (w13_tile(len(states), fp8), w2_tile(len(states), states.shape[1], width, fp8))
    if scales is not None:
        first, second = (within(tile, scales.block) for tile in (first, second))
    work = work_list(topk_ids, second.tokens, states if fp8 else None)
    dtype = torch.float16 if fp8 else states.dtype
    inner = torch.empty(topk_ids.numel(), width, dtype=dtype, device=states.device)
    output = torch.empty_like(states)
    launch_w13(states, work.factors, w13, scales, work.whole, topk_weights, inner, first)
    launch_w2(inner, w2, scales, work.parts, output, second)
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
    w13_kernel[(_processors(states.device) * tile.blocks,)](
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
        PARTS=tile.parts,
        SPAN=triton.cdiv(hidden, tile.warps * tile.depth * tile.parts) * tile.depth * tile.parts,
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
    w2_kernel[(triton.cdiv(hidden, tile.rows), len(listed.count))](
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
        PARTS=tile.parts,
        CHUNKS=triton.cdiv(width, tile.warps * tile.depth * tile.parts),
        EXPERTS=tile.experts,
        PLACES=listed.experts.shape[1],
        TOKENS=listed.tokens,
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


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
