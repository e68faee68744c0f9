"""Tiles of experts_once.py: how much of the weights a block has at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import triton

from .expert_weights import Block, ExpertWeights, slots_of
from .weight_format import Steps
from .work_list import COLUMNS


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
        shared: how a block walks columns of a shared expert in another format, with as many warps in all;
            its rows, blocks and tokens do not count. None: in the same way.
    """

    rows: int
    warps: int
    depth: int
    stages: int
    blocks: int = 1
    experts: int = 1
    parts: int = 1
    tokens: int = 0
    shared: Tile | None = None

    def steps(self, columns: int) -> Steps:
        """Return the way through so many columns."""
        rounds = triton.cdiv(columns, self.warps * self.depth * self.parts)
        return Steps(self.warps, self.depth, self.parts, rounds, self.stages, self.experts)


def w13_tile(tokens: int, hidden: int, fp8: bool) -> Tile:
    """Return the tile for w13 [2 * I, H]: the fastest one on an H200."""
    several = tokens > COLUMNS[0] and hidden <= 2048
    if not fp8:
        return Tile(rows=16, warps=2, depth=128, stages=3, blocks=12 if several else 3)
    # In FP8 the states in shared memory are the limit: fewer warps load them less often.
    if tokens <= COLUMNS[0]:
        return Tile(rows=16, warps=1, depth=128, stages=3, blocks=10)
    return Tile(rows=16, warps=1, depth=128, stages=4, blocks=8 if several else 6)


def w2_tile(tokens: int, hidden: int, width: int, fp8: bool) -> Tile:
    """Return the tile for w2 [H, I]: the fastest one on an H200."""
    rows = max(16, hidden // 128)
    part = COLUMNS[0] if fp8 else 0
    if width <= 128:
        if fp8 and tokens > part:
            return Tile(rows, warps=1, depth=128, stages=9, experts=4, tokens=part)
        return Tile(rows, warps=1, depth=128, stages=7, experts=8 if fp8 else 4, tokens=part)
    if fp8 and tokens <= part and width <= 512:
        return Tile(16, warps=1, depth=128, parts=4, stages=5, experts=4, tokens=part)
    if fp8:
        return Tile(16, warps=1, depth=128, parts=4, stages=7, experts=2, tokens=part)
    if rows > 16:
        return Tile(rows, warps=4, depth=64, stages=10, tokens=part)
    if tokens <= COLUMNS[0]:
        return Tile(rows, warps=4, depth=128, stages=7, experts=2)
    return Tile(rows, warps=2, depth=128, parts=2, stages=7, experts=2)


# Rows and columns of the smallest tile.
SMALLEST = 16


def takes(weights: ExpertWeights) -> bool:
    """Return whether `experts_once` takes their scales: blocks are as large as the smallest tile."""
    if weights.scales is None:
        return True
    rows, columns = weights.scales.block
    if columns and rows <= 1:
        return False
    return columns % SMALLEST == 0 and rows % SMALLEST in (0, 1)


def int4_tiles(hidden: int, width: int, group: int) -> tuple[Tile, Tile]:
    """Return the tiles of both kernels for 4-bit weights; each lies in one group. Not timed yet."""
    depth = gcd(128, group)
    parts = 128 // depth
    # As many blocks as registers have room for where another format is read beside this one.
    first = Tile(rows=16, warps=2, depth=depth, parts=parts, stages=4, blocks=4)
    warps = 4 if width >= 512 else 2 if width >= 256 else 1
    rows = 16 if hidden < 4096 else 32
    return first, Tile(rows, warps, depth, parts=parts, stages=7, experts=16 // warps, tokens=COLUMNS[0])


def tiles_of(routed: ExpertWeights, shared: ExpertWeights | None, tokens: int) -> tuple[Tile, Tile]:
    """Return the tiles of both kernels; arguments as of `experts_once`."""
    first, second = _tiles(routed, tokens)
    if shared is None:
        return first, second
    width = routed.width
    scales = shared.scales
    if routed.int4 is not None or shared.int4 is not None:
        ways = _tiles(shared, tokens)
        first = beside(first, ways[0], routed.hidden)
        second = beside(second, ways[1], min(width, shared.width))
    elif scales is not None:
        first, second = within(first, scales.block), within(second, scales.block)
    if slots_of(shared, width) > 1 and scales is not None:
        # Blocks of scales go on from slot to slot.
        first, second = within(first, (width, 0)), within(second, (0, width))
    return first, second


def _tiles(weights: ExpertWeights, tokens: int) -> tuple[Tile, Tile]:
    """Return the tiles of both kernels for weights of one format."""
    hidden, width, scales = weights.hidden, weights.width, weights.scales
    if weights.int4 is not None:
        return int4_tiles(hidden, width, weights.int4.group)
    fp8 = scales is not None
    first, second = w13_tile(tokens, hidden, fp8), w2_tile(tokens, hidden, width, fp8)
    if scales is not None:
        return within(first, scales.block), within(second, scales.block)
    return first, second


def beside(tile: Tile, shared: Tile, width: int) -> Tile:
    """Return ``tile`` with a way of its own through a shared expert of ``width`` columns."""
    warps = tile.warps * tile.experts
    # Larger tiles take registers and shared memory from those of the routed experts.
    depth = min(1024 // tile.rows, shared.depth, max(32, triton.next_power_of_2(width // warps)))
    return replace(tile, shared=Tile(tile.rows, warps, depth, min(shared.stages, 7)))


def within(tile: Tile, block: Block) -> Tile:
    """Return a tile that lies in one block of scales."""
    rows, columns = block
    return replace(
        tile,
        rows=gcd(tile.rows, rows) if rows > 1 else tile.rows,
        depth=gcd(tile.depth, columns) if columns else tile.depth,
    )
