"""The experts of few tokens over k+S slots: w13·x with SiLU·mul, then w2 with the weighted sum. No sorting.

Every (token, slot) pair reads its expert's weights itself: with few tokens nearly all pairs are of different
experts, and the weights of the shared slots come from the cache from the second token on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .expert_weights import ExpertWeights, slots_of
from .launch import begin, options

# More slots than a layer has.
MANY = 1 << 10


def w13_tile(hidden: int, width: int) -> tuple[int, int, int]:
    """Return BLOCK_N, BLOCK_K and warps for w13 [2 * I, H]: the fastest ones on an H200.

    Where H is over 2048 and I over 1024 it was not timed: it is that of half the width.
    """
    if width <= 512:
        return (2, 1024, 2)
    return (4, 1024, 2) if hidden <= 2048 and width > 1024 else (1, 2048, 2)


def w2_tile(width: int) -> tuple[int, int, int, bool]:
    """Return BLOCK_N, BLOCK_K and warps for w2 [H, I], and whether to unroll the slots.

    Unrolling pays only where a slot takes few tiles.
    """
    if width <= 128:
        return (4, 128, 1, True)
    if width <= 512:
        return (2, 256, 1, True)
    return (1, 256, 1, True) if width <= 1024 else (2, 256, 1, False)


def early_slots(tokens: int, width: int) -> int:
    """Return of how many slots w2 is loaded before the wait for w13: the fastest number on an H200."""
    if tokens == 1:
        return MANY if width <= 128 else 8 if width <= 512 else 3
    return 0 if 128 < width <= 512 else 3


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
    routed: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared: ExpertWeights | None = None,
) -> torch.Tensor:
    """Compute the fused layer's output: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x)).

    Args:
        hidden_states: [num_tokens, H], bfloat16 or float16.
        routed: of E experts, in plain numbers; with the shared slots after them where ``shared`` is None.
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32. Below 0 there is no
            expert. Ids from E on are slots of the shared expert.
        shared: the shared expert by itself, E = 1; each token's last columns are its slots, I of its columns
            each.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.

    Raises:
        ValueError: weights are not plain numbers.
    """
    if any(weights is not None and not weights.plain for weights in (routed, shared)):
        raise ValueError("quantised weights; this kernel reads plain ones")
    tokens, hidden = hidden_states.shape
    width, slots = routed.width, topk_ids.shape[1]
    other = routed if shared is None else shared
    apart = 0 if shared is None else slots_of(shared, width)
    states = hidden_states.contiguous()
    inner = torch.empty(tokens * slots, width, dtype=states.dtype, device=states.device)
    output = torch.empty_like(states)
    block_n, block_k, warps = w13_tile(hidden, width)
    _w13[(tokens * slots, triton.cdiv(width, block_n))](
        states,
        routed.w13,
        other.w13,
        topk_ids,
        inner,
        len(routed.w2),
        SLOTS=slots,
        APART=apart,
        HIDDEN=hidden,
        WIDTH=width,
        SHARED_WIDTH=other.width,
        STRIDES=(*routed.w13.stride()[:2], other.w13.stride(1)),
        BLOCK_N=block_n,
        BLOCK_K=min(block_k, triton.next_power_of_2(hidden)),
        num_warps=warps,
        **options(states),
    )
    block_n, block_k, warps, unroll = w2_tile(width)
    _w2[(tokens, triton.cdiv(hidden, block_n))](
        inner,
        routed.w2,
        other.w2,
        topk_ids,
        topk_weights,
        output,
        len(routed.w2),
        SLOTS=slots,
        APART=apart,
        HIDDEN=hidden,
        WIDTH=width,
        SHARED_WIDTH=other.width,
        STRIDES=(*routed.w2.stride()[:2], other.w2.stride(1)),
        BLOCK_N=block_n,
        BLOCK_K=min(block_k, triton.next_power_of_2(width)),
        UNROLL=unroll,
        EARLY=min(early_slots(tokens, width), slots - apart) if unroll else 0,
        num_warps=warps,
        **options(states),
    )
    return output


@triton.jit
def _w13(
    x_ptr,
    w13_ptr,
    shared_ptr,
    ids_ptr,
    inner_ptr,
    E,
    SLOTS: tl.constexpr,
    APART: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr,
    STRIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    row_ptr, stride, before, wide = w13_ptr + expert * STRIDES[0], STRIDES[1], 0, WIDTH
    if APART:
        # Rows of a slot come after those of the slots before it.
        slot = pair % SLOTS >= SLOTS - APART
        row_ptr = tl.where(slot, shared_ptr, row_ptr)
        stride = tl.where(slot, STRIDES[2], stride)
        before = tl.where(slot, (expert - E).to(tl.int32) * WIDTH, 0)
        wide = tl.where(slot, SHARED_WIDTH, WIDTH)
    mask_n = (offs_n < tl.minimum(WIDTH, wide - before)) & (expert >= 0)
    tile_ptr = row_ptr + (before + offs_n)[:, None] * stride + offs_k[None, :]
    acc_gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, HIDDEN, BLOCK_K):
        mask_k = start + offs_k < HIDDEN
        x = tl.load(x_ptr + pair // SLOTS * HIDDEN + start + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        mask = mask_n[:, None] & mask_k[None, :]
        w1 = tl.load(tile_ptr + start, mask=mask, other=0.0).to(tl.float32)
        w3 = tl.load(tile_ptr + wide * stride + start, mask=mask, other=0.0).to(tl.float32)
        acc_gate += w1 * x[None, :]
        acc_up += w3 * x[None, :]
    gate = tl.sum(acc_gate, 1)
    value = gate / (1.0 + tl.exp(-gate)) * tl.sum(acc_up, 1)
    tl.store(inner_ptr + pair * WIDTH + offs_n, value.to(inner_ptr.dtype.element_ty), mask=offs_n < WIDTH)


@triton.jit
def _w2(
    inner_ptr,
    w2_ptr,
    shared_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    E,
    SLOTS: tl.constexpr,
    APART: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr,
    STRIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    pair = token * SLOTS
    early = ()
    # Weights of the first slots, while w13's kernel runs. The ids are there: it has waited for them.
    for j in tl.static_range(EARLY):
        for start in tl.static_range(0, WIDTH, BLOCK_K):
            expert = tl.load(ids_ptr + pair + j).to(tl.int64)
            tile = _slot_tile(w2_ptr, expert, offs_n, start, STRIDES[0], STRIDES[1], HIDDEN, WIDTH, BLOCK_K)
            early = early + (tile,)  # type: ignore[assignment]  # noqa: RUF005 - Triton cannot unpack
    begin(PDL)
    if UNROLL:
        for j in tl.static_range(SLOTS - APART):
            acc = _add_slot(
                acc, early, j, inner_ptr, w2_ptr, ids_ptr, weights_ptr, pair + j, offs_n, 0, STRIDES[0],
                STRIDES[1], HIDDEN, WIDTH, WIDTH, BLOCK_K, EARLY,
            )  # fmt: skip
    else:
        for j in range(SLOTS - APART):
            acc = _add_slot(
                acc, early, 0, inner_ptr, w2_ptr, ids_ptr, weights_ptr, pair + j, offs_n, 0, STRIDES[0],
                STRIDES[1], HIDDEN, WIDTH, WIDTH, BLOCK_K, 0,
            )  # fmt: skip
    for j in tl.static_range(SLOTS - APART, SLOTS):
        # Columns of a slot come after those of the slots before it.
        acc = _add_slot(
            acc, early, 0, inner_ptr, shared_ptr, ids_ptr, weights_ptr, pair + j, offs_n, E, WIDTH,
            STRIDES[2], HIDDEN, WIDTH, SHARED_WIDTH, BLOCK_K, 0,
        )  # fmt: skip
    out_ptrs = out_ptr + token * HIDDEN + offs_n
    tl.store(out_ptrs, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=offs_n < HIDDEN)


@triton.jit
def _slot_tile(
    w2_ptr, expert, offs_n, start, STRIDE: tl.constexpr, STRIDE_N: tl.constexpr, HIDDEN: tl.constexpr, limit,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load columns from ``start`` on, up to ``limit``, of rows ``offs_n`` of an expert's w2."""
    offs_k = start + tl.arange(0, BLOCK_K)
    mask = (offs_n < HIDDEN)[:, None] & ((offs_k < limit) & (expert >= 0))[None, :]
    tile_ptr = w2_ptr + expert * STRIDE + offs_n[:, None] * STRIDE_N + offs_k[None, :]
    return tl.load(tile_ptr, mask=mask, other=0.0)


@triton.jit
def _add_slot(
    acc, early, j: tl.constexpr, inner_ptr, w2_ptr, ids_ptr, weights_ptr, pair, offs_n, first,
    STRIDE: tl.constexpr, STRIDE_N: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Add the weighted output of one slot to ``acc``, still spread over the columns.

    Its matrix is `STRIDE` times (its id less ``first``) on; where `WIDE` is more than `WIDTH`, that is a part
    of one with `WIDE` columns. The first `EARLY` slots, ``j`` the number of this one, are in ``early``.
    """
    TILES: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    expert = tl.load(ids_ptr + pair).to(tl.int64) - first
    weight = tl.load(weights_ptr + pair)
    limit = WIDTH
    if WIDE % WIDTH:
        limit = tl.minimum(WIDTH, WIDE - expert * WIDTH)
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x_ptr = inner_ptr + pair * WIDTH + offs_k
        x = tl.load(x_ptr, mask=(offs_k < limit) & (expert >= 0), other=0.0).to(tl.float32)
        if j < EARLY:
            tile = early[j * TILES + start // BLOCK_K]
        else:
            tile = _slot_tile(w2_ptr, expert, offs_n, start, STRIDE, STRIDE_N, HIDDEN, limit, BLOCK_K)
        acc += tile.to(tl.float32) * (x * weight)[None, :]
    return acc
