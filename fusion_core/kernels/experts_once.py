"""The experts of few tokens over k+S slots, each chosen expert's weights read once, whatever the routing.

w13: blocks walk (expert, tile of rows) and multiply the tile by all tokens that chose the expert. w2: a block
owns rows of the output for all tokens, and walks the experts in ascending order. Tokens are columns of a
matrix product, and no partial sums are added up in memory.

The shared expert is in the tensors of the routed ones, or lies where it is, in a format of its own.

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

from .expert_weights import Block, ExpertWeights, slots_of
from .experts_once_kernels import ALIKE, MERGED, OTHER, w2_kernel, w13_kernel
from .launch import options
from .work_list import COLUMNS, Work, WorkList, work_list


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
    if tokens <= COLUMNS[0]:
        return Tile(rows=16, warps=1, depth=128, stages=3, blocks=10)
    return Tile(rows=16, warps=1, depth=128, stages=4, blocks=6)


def w2_tile(tokens: int, hidden: int, width: int, fp8: bool) -> Tile:
    """Return the tile for w2 [H, I]: the fastest one on an H200."""
    rows = max(16, hidden // 128)
    part = COLUMNS[0] if fp8 else 0
    if width <= 128:
        several = 8 if fp8 and tokens <= part else 4
        return Tile(rows, warps=1, depth=128, stages=7, experts=several, tokens=part)
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
    return columns % SMALLEST == 0 and (rows <= 1 or rows % SMALLEST == 0)


def within(tile: Tile, block: Block) -> Tile:
    """Return a tile that lies in one block of scales."""
    rows, columns = block
    return replace(
        tile,
        rows=gcd(tile.rows, rows) if rows > 1 else tile.rows,
        depth=gcd(tile.depth, columns) if columns else tile.depth,
    )


def experts_once(
    hidden_states: torch.Tensor,
    routed: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared: ExpertWeights | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """Compute the fused layer's output: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x)).

    Args:
        hidden_states: [num_tokens, H], bfloat16 or float16; at most `MOST_TOKENS` rows. Weights that are not
            FP8 have this dtype.
        routed: of E experts; with the shared slots after them where ``shared`` is None.
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32. The ids of a token differ;
            below 0 there is no expert. Ids from E on are slots of the shared expert.
        shared: the shared expert by itself, E = 1, in a format of its own; each token has all its slots,
            I of its columns each: `slots_of`.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.

    Raises:
        ValueError: the weights do not fit each other.
    """
    states = hidden_states.contiguous()
    passed = _Pass(routed, shared, topk_weights)
    first, second = tiles or passed.tiles(len(states))
    work = work_list(topk_ids, passed.experts, second.tokens, states if passed.fp8 else None)
    inner = torch.empty(topk_ids.numel(), routed.width, dtype=torch.int16, device=states.device)
    output = torch.empty_like(states)
    passed.launch_w13(states, work, inner, first)
    passed.launch_w2(inner, work.parts, output, second)
    return output


class _Pass:
    """The weights of one pass, and what its two kernels are told of them."""

    def __init__(
        self, routed: ExpertWeights, shared: ExpertWeights | None, topk_weights: torch.Tensor
    ) -> None:
        if shared is not None and shared.w2.shape[:2] != (1, routed.w2.shape[1]):
            raise ValueError(f"w2 of the shared expert is {list(shared.w2.shape)}")
        self.routed, self.shared, self.topk_weights = routed, shared, topk_weights
        self.width, self.hidden = routed.width, routed.w2.shape[1]
        self.slots = 0 if shared is None else slots_of(shared, self.width)
        self.experts = len(routed.w2) + self.slots
        self.fp8 = any(weights is not None and weights.scales is not None for weights in (routed, shared))
        # What stands in the place of weights that are not there.
        self.other = routed if shared is None else shared

    def tiles(self, tokens: int) -> tuple[Tile, Tile]:
        """Return the tiles of both kernels."""
        fp8 = self.routed.scales is not None
        found = w13_tile(tokens, fp8), w2_tile(tokens, self.hidden, self.width, fp8)
        for weights in (self.routed, self.other):
            if weights.scales is not None:
                found = within(found[0], weights.scales.block), within(found[1], weights.scales.block)
        if self.slots > 1 and self.other.scales is not None:
            # Blocks of scales go on from slot to slot.
            found = within(found[0], (self.width, 0)), within(found[1], (0, self.width))
        return found

    def launch_w13(self, states: torch.Tensor, work: Work, inner: torch.Tensor, tile: Tile) -> None:
        """Write weight · SiLU(w1 x) · (w3 x) of every (token, slot) pair into ``inner`` [pairs, I]."""
        listed, fitted = work.whole, work.fitted
        w13_kernel[(_processors(states.device) * tile.blocks,)](
            states,
            *((states, states) if fitted is None else (fitted.states, fitted.factors)),
            *self._tensors("w13"),
            listed.count,
            listed.experts,
            listed.rows,
            self.topk_weights,
            inner,
            len(states),
            len(self.routed.w2),
            PARTS=tile.parts,
            SPAN=triton.cdiv(self.hidden, tile.warps * tile.depth * tile.parts) * tile.depth * tile.parts,
            num_warps=tile.warps,
            **self._common("w13", states, listed, tile),
        )

    def launch_w2(self, inner: torch.Tensor, listed: WorkList, output: torch.Tensor, tile: Tile) -> None:
        """Write the sum over a token's slots of w2 · inner into ``output`` [num_tokens, H]."""
        w2_kernel[(triton.cdiv(self.hidden, tile.rows), len(listed.count))](
            inner,
            *self._tensors("w2"),
            listed.count,
            listed.experts,
            listed.rows,
            output,
            len(output),
            len(self.routed.w2),
            PARTS=tile.parts,
            CHUNKS=triton.cdiv(self.width, tile.warps * tile.depth * tile.parts),
            EXPERTS=tile.experts,
            PLACES=listed.experts.shape[1],
            TOKENS=listed.tokens,
            num_warps=tile.warps * tile.experts,
            **self._common("w2", output, listed, tile),
        )

    def _tensors(self, name: str) -> list[torch.Tensor]:
        """Return weights and scales of the routed experts and of the shared one."""
        tensors = []
        for weights in (self.routed, self.other):
            weight: torch.Tensor = getattr(weights, name)
            tensors += [weight, weight if weights.scales is None else getattr(weights.scales, name)]
        return tensors

    def _common(self, name: str, states: torch.Tensor, listed: WorkList, tile: Tile) -> dict[str, Any]:
        """Return what both kernels are told."""
        formats = [_format(weights, name, tile) for weights in (self.routed, self.other)]
        alike = formats[0][:3] == formats[1][:3]
        where = MERGED if self.shared is None else ALIKE if alike else OTHER
        return {
            "HIDDEN": self.hidden,
            "WIDTH": self.width,
            "SHARED_WIDTH": self.other.width,
            "ROWS": tile.rows,
            "WARPS": tile.warps,
            "DEPTH": tile.depth,
            "STAGES": tile.stages,
            "SHARED": where.value,
            "FORMAT": formats[0],
            "SHARED_FORMAT": formats[1],
            "COLUMNS": listed.columns,
            # Triton's interpreter multiplies bfloat16 as integers.
            "WIDE": not states.is_cuda,
            **options(states),
        }


def _format(weights: ExpertWeights, name: str, tile: Tile) -> tuple[int, ...]:
    """Return what the kernels are told of a matrix: `_gate_up` has the list.

    Raises:
        ValueError: a tile would lie in two blocks of scales.
    """
    weight: torch.Tensor = getattr(weights, name)
    if weights.scales is None:
        return (0, 0, 0, 0, 0, 0, weight.stride(0), weight.stride(1), 0)
    rows, columns = weights.scales.block
    if columns % tile.depth or (rows > 1 and rows % tile.rows):
        raise ValueError(f"scales in blocks of {rows} x {columns} for tiles of {tile.rows} x {tile.depth}")
    scale: torch.Tensor = getattr(weights.scales, name)
    strides = [step if size > 1 else 0 for step, size in zip(scale.stride(), scale.shape, strict=True)]
    return (1, rows, columns, *strides, weight.stride(0), weight.stride(1), scale.shape[1] // 2)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
