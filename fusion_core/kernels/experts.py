"""The experts of few tokens over k+S slots: w13·x with SiLU·mul, then w2 with the weighted sum. No sorting.

Every (token, slot) pair reads its expert's weights itself: with few tokens nearly all pairs are of different
experts, and the weights of the shared slots come from the cache from the second token on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import begin, options


def w13_tile(hidden: int, width: int) -> tuple[int, int, int]:
    """Return BLOCK_N, BLOCK_K and warps for w13 [2 * I, H]: the fastest ones on an H200."""
    if hidden <= 2048:
        return (4, 1024, 2)
    return (8, 2048, 8) if width > 512 else (4, 2048, 4)


def w2_tile(width: int) -> tuple[int, int, int, bool]:
    """Return BLOCK_N, BLOCK_K and warps for w2 [H, I], and whether to unroll the slots.

    Unrolling pays only where a slot takes few tiles.
    """
    return (2, 128 if width <= 128 else 256, 1, width <= 512)


def reference(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Compute what `small_experts` computes, in float64; shapes as there."""
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
    """Compute the fused layer's output: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x)).

    Args:
        hidden_states: [num_tokens, H], bfloat16 or float16.
        w13: [E + S, 2 * I, H], rows of w1 before those of w3; w2: [E + S, H, I]. Both contiguous.
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.
    """
    tokens, hidden = hidden_states.shape
    width, slots = w2.shape[2], topk_ids.shape[1]
    states = hidden_states.contiguous()
    inner = torch.empty(tokens * slots, width, dtype=states.dtype, device=states.device)
    output = torch.empty_like(states)
    block_n, block_k, warps = w13_tile(hidden, width)
    _w13[(tokens * slots, triton.cdiv(width, block_n))](
        states,
        w13,
        topk_ids,
        inner,
        SLOTS=slots,
        HIDDEN=hidden,
        WIDTH=width,
        BLOCK_N=block_n,
        BLOCK_K=min(block_k, triton.next_power_of_2(hidden)),
        num_warps=warps,
        **options(states),
    )
    block_n, block_k, warps, unroll = w2_tile(width)
    _w2[(tokens, triton.cdiv(hidden, block_n))](
        inner,
        w2,
        topk_ids,
        topk_weights,
        output,
        SLOTS=slots,
        HIDDEN=hidden,
        WIDTH=width,
        BLOCK_N=block_n,
        BLOCK_K=min(block_k, triton.next_power_of_2(width)),
        UNROLL=unroll,
        num_warps=warps,
        **options(states),
    )
    return output


@triton.jit
def _w13(
    x_ptr,
    w13_ptr,
    ids_ptr,
    inner_ptr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < WIDTH
    tile_ptr = w13_ptr + expert * (2 * WIDTH * HIDDEN) + offs_n[:, None] * HIDDEN + offs_k[None, :]
    acc_gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, HIDDEN, BLOCK_K):
        mask_k = start + offs_k < HIDDEN
        x = tl.load(x_ptr + pair // SLOTS * HIDDEN + start + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        mask = mask_n[:, None] & mask_k[None, :]
        w1 = tl.load(tile_ptr + start, mask=mask, other=0.0).to(tl.float32)
        w3 = tl.load(tile_ptr + WIDTH * HIDDEN + start, mask=mask, other=0.0).to(tl.float32)
        acc_gate += w1 * x[None, :]
        acc_up += w3 * x[None, :]
    gate = tl.sum(acc_gate, 1)
    value = gate / (1.0 + tl.exp(-gate)) * tl.sum(acc_up, 1)
    tl.store(inner_ptr + pair * WIDTH + offs_n, value.to(inner_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _w2(
    inner_ptr,
    w2_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    pair = token * SLOTS
    if UNROLL:
        for j in tl.static_range(SLOTS):
            acc = _add_slot(
                acc, inner_ptr, w2_ptr, ids_ptr, weights_ptr, pair + j, offs_n, HIDDEN, WIDTH, BLOCK_K
            )
    else:
        for j in range(SLOTS):
            acc = _add_slot(
                acc, inner_ptr, w2_ptr, ids_ptr, weights_ptr, pair + j, offs_n, HIDDEN, WIDTH, BLOCK_K
            )
    out_ptrs = out_ptr + token * HIDDEN + offs_n
    tl.store(out_ptrs, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=offs_n < HIDDEN)


@triton.jit
def _add_slot(
    acc,
    inner_ptr,
    w2_ptr,
    ids_ptr,
    weights_ptr,
    pair,
    offs_n,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the weighted output of one slot to ``acc``, still spread over the columns."""
    offs_k = tl.arange(0, BLOCK_K)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    weight = tl.load(weights_ptr + pair)
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        mask_k = start + offs_k < WIDTH
        x = tl.load(inner_ptr + pair * WIDTH + start + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        mask = (offs_n < HIDDEN)[:, None] & mask_k[None, :]
        tile_ptr = w2_ptr + expert * (HIDDEN * WIDTH) + offs_n[:, None] * WIDTH + start + offs_k[None, :]
        acc += tl.load(tile_ptr, mask=mask, other=0.0).to(tl.float32) * (x * weight)[None, :]
    return acc
