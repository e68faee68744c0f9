"""The experts of few tokens over k+S slots: w13·x with SiLU·mul, then w2 with the weighted sum. No sorting.

Every (token, slot) pair reads its expert's weights itself: with few tokens nearly all pairs are of different
experts, and the weights of the shared slots come from the cache from the second token on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import begin, options

# Rows and columns of a tile, and warps, by measurements on an H200.


def w13_tile(hidden: int, width: int) -> tuple[int, int, int]:
    """For w13 [2 * I, H]."""
    if hidden <= 2048:
        return (4, 1024, 2)
    return (8, 2048, 8) if width > 512 else (4, 2048, 4)


def w2_tile(width: int) -> tuple[int, int, int, bool]:
    """For w2 [H, I]; and whether to unroll the slots, which pays only where a slot takes few tiles."""
    return (2, 128 if width <= 128 else 256, 1, width <= 512)


def reference(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """What `small_experts` computes, in float64: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x))."""
    x, ids = hidden_states.double(), topk_ids.long()
    both = torch.einsum("tjnh,th->tjn", w13.double()[ids], x)
    gate, up = both.chunk(2, dim=-1)
    parts = torch.einsum("tjhi,tji->tjh", w2.double()[ids], torch.nn.functional.silu(gate) * up)
    return (parts * topk_weights.double()[..., None]).sum(1)


def small_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """The fused layer's output [num_tokens, H] in the dtype of ``hidden_states``.

    Args:
        hidden_states: [num_tokens, H], bfloat16 or float16.
        w13: [E + S, 2 * I, H], rows of w1 before those of w3; w2: [E + S, H, I]. Both contiguous.
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32.
    """
    tokens, hidden = hidden_states.shape
    width, slots = w2.shape[2], topk_ids.shape[1]
    states = hidden_states.contiguous()
    inner = torch.empty(tokens * slots, width, dtype=states.dtype, device=states.device)
    output = torch.empty_like(states)
    rows, columns, warps = w13_tile(hidden, width)
    _w13[(tokens * slots, triton.cdiv(width, rows))](
        states,
        w13,
        topk_ids,
        inner,
        SLOTS=slots,
        HIDDEN=hidden,
        WIDTH=width,
        ROWS=rows,
        BLOCK=min(columns, triton.next_power_of_2(hidden)),
        num_warps=warps,
        **options(states),
    )
    rows, columns, warps, unroll = w2_tile(width)
    _w2[(tokens, triton.cdiv(hidden, rows))](
        inner,
        w2,
        topk_ids,
        topk_weights,
        output,
        SLOTS=slots,
        HIDDEN=hidden,
        WIDTH=width,
        ROWS=rows,
        BLOCK=min(columns, triton.next_power_of_2(width)),
        UNROLL=unroll,
        num_warps=warps,
        **options(states),
    )
    return output


@triton.jit
def _w13(
    x,
    w13,
    ids,
    inner,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids + pair).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    first = w13 + expert * (2 * WIDTH * HIDDEN) + row[:, None] * HIDDEN + column[None, :]
    gate = tl.zeros([ROWS, BLOCK], tl.float32)
    up = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, HIDDEN, BLOCK):
        inside = start + column < HIDDEN
        state = tl.load(x + pair // SLOTS * HIDDEN + start + column, mask=inside, other=0.0).to(tl.float32)
        both = (row < WIDTH)[:, None] & inside[None, :]
        w1 = tl.load(first + start, mask=both, other=0.0).to(tl.float32)
        w3 = tl.load(first + WIDTH * HIDDEN + start, mask=both, other=0.0).to(tl.float32)
        gate += w1 * state[None, :]
        up += w3 * state[None, :]
    g = tl.sum(gate, 1)
    value = g / (1.0 + tl.exp(-g)) * tl.sum(up, 1)
    tl.store(inner + pair * WIDTH + row, value.to(inner.dtype.element_ty), mask=row < WIDTH)


@triton.jit
def _w2(
    inner,
    w2,
    ids,
    weights,
    output,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if UNROLL:
        for j in tl.static_range(SLOTS):
            total = _add_slot(total, inner, w2, ids, weights, token * SLOTS + j, row, HIDDEN, WIDTH, BLOCK)
    else:
        for j in range(SLOTS):
            total = _add_slot(total, inner, w2, ids, weights, token * SLOTS + j, row, HIDDEN, WIDTH, BLOCK)
    tl.store(output + token * HIDDEN + row, tl.sum(total, 1).to(output.dtype.element_ty), mask=row < HIDDEN)


@triton.jit
def _add_slot(
    total,
    inner,
    w2,
    ids,
    weights,
    pair,
    row,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``total`` with the weighted output of one slot, still spread over the columns."""
    column = tl.arange(0, BLOCK)
    expert = tl.load(ids + pair).to(tl.int64)
    weight = tl.load(weights + pair)
    for start in tl.static_range(0, WIDTH, BLOCK):
        inside = start + column < WIDTH
        state = tl.load(inner + pair * WIDTH + start + column, mask=inside, other=0.0).to(tl.float32)
        both = (row < HIDDEN)[:, None] & inside[None, :]
        tile = w2 + expert * (HIDDEN * WIDTH) + row[:, None] * WIDTH + start + column[None, :]
        total += tl.load(tile, mask=both, other=0.0).to(tl.float32) * (state * weight)[None, :]
    return total
