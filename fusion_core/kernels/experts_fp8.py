"""The experts of few tokens over k+S slots with FP8 weights (e4m3), in the two steps of kernels/experts.py.

Hidden and inner states stay as they are: engines' grouped GEMMs round them to FP8, but with few tokens
nothing is gained by it, and the result is nearer to what the checkpoint says. Weights are multiplied in
float32; a thread adds up the products of a chunk, and multiplies by the chunk's scale once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import experts
from .expert_weights import Block, ExpertWeights, Scales, slots_of
from .launch import begin, options

# Most weights that a thread loads at once, 16 bytes: blocks of scales must be whole numbers of them.
CHUNK = 16
# Rows or columns that share a scale where there is one for all.
ALL = 1 << 30
# BLOCK_N, CHUNKS, warps, and CHUNK: weights that a thread multiplies and adds up by itself.
Tile = tuple[int, int, int, int]


def w13_tile(hidden: int) -> Tile:
    """Return the tile for w13 [2 * I, H]: the fastest one on an H200."""
    return (2, 64, 1, 16) if hidden <= 2048 else (1, 128, 2, 16)


def w2_tile(width: int) -> Tile:
    """Return the tile for w2 [H, I]; chunks of 8, because a thread loads so many inner states at once."""
    return (4, 16, 1, 8) if width <= 128 else (1, 64, 1, 8)


def dequantised(weight: torch.Tensor, scale: torch.Tensor, block: Block, halves: int = 1) -> torch.Tensor:
    """Multiply weights [n, out, in] by their scales, in float64.

    Args:
        scale, block: as of `Scales`.
        halves: 2 where the scales of w3 follow those of w1.
    """
    parts = []
    factors = scale.double().expand(-1, halves, -1) if scale.shape[1] < halves else scale.double()
    for part, some in zip(weight.double().chunk(halves, 1), factors.chunk(halves, 1), strict=True):
        out, inner = part.shape[1:]
        tall = some.repeat_interleave(block[0] or out, 1)[:, :out]
        parts.append(part * tall.repeat_interleave(block[1] or inner, 2)[:, :, :inner])
    return torch.cat(parts, 1)


def reference(
    hidden_states: torch.Tensor, routed: ExpertWeights, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """Compute what `small_experts` computes with merged slots, in float64; shapes as there."""
    scales = checked(routed)
    whole = dequantised(routed.w13, scales.w13, scales.block, halves=2)
    return experts.reference(
        hidden_states, whole, dequantised(routed.w2, scales.w2, scales.block), topk_weights, topk_ids
    )


def small_experts(
    hidden_states: torch.Tensor,
    routed: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared: ExpertWeights | None = None,
) -> torch.Tensor:
    """Compute the fused layer's output: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x)).

    Args:
        routed, shared: with scales; blocks of them have a multiple of `CHUNK` columns. All arguments as of
            `experts.small_experts`.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.

    Raises:
        ValueError: scales and sizes do not fit these kernels.
    """
    tokens, hidden = hidden_states.shape
    width, slots = routed.width, topk_ids.shape[1]
    for weights in (routed, shared):
        if weights is not None:
            checked(weights)
    states = hidden_states.contiguous()
    inner = torch.empty(tokens * slots, width, dtype=states.dtype, device=states.device)
    output = torch.empty_like(states)
    launch_w13(states, routed, shared, topk_ids, inner, w13_tile(hidden))
    launch_w2(inner, routed, shared, topk_weights, topk_ids, output, w2_tile(width))
    return output


def checked(weights: ExpertWeights) -> Scales:
    """Return the scales; refuse those of which `small_experts` would read numbers that are not there.

    Raises:
        ValueError: scales and sizes do not fit these kernels.
    """
    scales = weights.scales
    if scales is None:
        raise ValueError("FP8 weights without scales")
    total, hidden, width = weights.w2.shape
    rows, columns = scales.block
    if columns % CHUNK:
        raise ValueError(f"blocks of {columns} columns; the kernel takes multiples of {CHUNK}")
    if hidden % CHUNK or width % CHUNK:
        raise ValueError(f"H {hidden} and I {width} must be multiples of {CHUNK}")
    for name, scale, out, inner, halves in (
        ("w13", scales.w13, width, hidden, 2),
        ("w2", scales.w2, hidden, width, 1),
    ):
        high = halves * -(-out // rows) if rows else halves
        shapes = [(total, high, -(-inner // columns) if columns else 1)]
        if not rows and not columns:
            shapes.append((total, 1, 1))  # one for both halves
        if tuple(scale.shape) not in shapes or scale.dtype != torch.float32:
            raise ValueError(
                f"scales of {name}: {list(scale.shape)} {scale.dtype}, not {list(shapes[0])} float32"
            )
    return scales


def launch_w13(
    states: torch.Tensor,
    routed: ExpertWeights,
    shared: ExpertWeights | None,
    ids: torch.Tensor,
    inner: torch.Tensor,
    tile: Tile,
) -> None:
    """Write SiLU(w1 x) · (w3 x) of every (token, slot) pair into ``inner`` [num_tokens * (k + S), I]."""
    (block_n, chunks, warps, chunk), hidden = tile, states.shape[1]
    chunks = min(chunks, triton.next_power_of_2(hidden // chunk))
    _w13[(inner.shape[0], triton.cdiv(inner.shape[1], block_n))](
        states,
        *_tensors("w13", routed, shared),
        ids,
        inner,
        len(routed.w2),
        **_sizes("w13", routed, shared, ids),
        BLOCK_N=block_n,
        CHUNKS=chunks,
        CHUNK=chunk,
        EVEN=inner.shape[1] % block_n == 0 and hidden % (chunks * chunk) == 0 and _whole(routed, shared),
        num_warps=warps,
        **options(states),
    )


def launch_w2(
    inner: torch.Tensor,
    routed: ExpertWeights,
    shared: ExpertWeights | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
    output: torch.Tensor,
    tile: Tile,
) -> None:
    """Write the weighted sum over a token's slots of w2 · inner into ``output`` [num_tokens, H]."""
    (block_n, chunks, warps, chunk), (hidden, width) = tile, routed.w2.shape[1:]
    chunks = min(chunks, triton.next_power_of_2(width // chunk))
    _w2[(output.shape[0], triton.cdiv(hidden, block_n))](
        inner,
        *_tensors("w2", routed, shared),
        ids,
        weights,
        output,
        len(routed.w2),
        **_sizes("w2", routed, shared, ids),
        BLOCK_N=block_n,
        CHUNKS=chunks,
        CHUNK=chunk,
        EVEN=hidden % block_n == 0 and width % (chunks * chunk) == 0 and _whole(routed, shared),
        num_warps=warps,
        **options(inner),
    )


def _whole(routed: ExpertWeights, shared: ExpertWeights | None) -> bool:
    """Return whether nothing is masked: all experts are here, and the shared one fills its slots."""
    return shared is None or shared.width % routed.width == 0


def _tensors(name: str, routed: ExpertWeights, shared: ExpertWeights | None) -> list[torch.Tensor]:
    """Return weights and scales of the routed experts and of the shared one."""
    return [
        tensor
        for weights in (routed, shared or routed)
        for tensor in (getattr(weights, name), getattr(weights.scales, name))
    ]


def _sizes(
    name: str, routed: ExpertWeights, shared: ExpertWeights | None, ids: torch.Tensor
) -> dict[str, Any]:
    """Return what both kernels are told of the layer."""
    other = shared or routed
    return {
        "SLOTS": ids.shape[1],
        "APART": 0 if shared is None else slots_of(shared, routed.width),
        "HIDDEN": routed.w2.shape[1],
        "WIDTH": routed.width,
        "SHARED_WIDTH": other.width,
        "FORMAT": _format(name, routed),
        "SHARED_FORMAT": _format(name, other),
    }


def _format(name: str, weights: ExpertWeights) -> tuple[int, ...]:
    """Return strides of the weights (expert, row) and of the scales (expert, row, column), and their blocks.

    After those the rows of scales of w1. One scale for all is a block of any size.
    """
    weight: torch.Tensor = getattr(weights, name)
    scales = checked(weights)
    scale: torch.Tensor = getattr(scales, name)
    strides = [step if size > 1 else 0 for step, size in zip(scale.stride(), scale.shape, strict=True)]
    rows, columns = (size or ALL for size in scales.block)
    return (*weight.stride()[:2], *strides, rows, columns, scale.shape[1] // 2)


@triton.jit
def _states(row_ptr, offs_c, K: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """Load chunks ``offs_c`` of a row of K states: [CHUNKS, CHUNK] float32."""
    offs_k = offs_c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if EVEN:
        return tl.load(row_ptr + offs_k).to(tl.float32)
    return tl.load(row_ptr + offs_k, mask=(offs_c * CHUNK < K)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _products(
    w_ptr, scale_ptr, offs_n, offs_c, n, k, row, column, stride_n, scale_n, scale_k, x, GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add up products of a matrix [n, k] with ``x`` within each chunk, and scale: [BLOCK_N, CHUNKS].

    ``row``, ``column``: where the matrix begins in the one that is in memory.
    """
    first_k = offs_c * CHUNK
    offs_k = column + first_k[:, None] + tl.arange(0, CHUNK)[None, :]
    mask = (offs_n < n)[:, None] & (first_k < k)[None, :]
    tile_ptr = w_ptr + (row + offs_n)[:, None, None] * stride_n + offs_k[None, :, :]
    if EVEN:
        w = tl.load(tile_ptr).to(tl.float32)
    else:
        w = tl.load(tile_ptr, mask=mask[:, :, None], other=0.0).to(tl.float32)
    scale_at = scale_ptr + (column + first_k) // GROUP_K * scale_k
    if GROUP_N % BLOCK_N == 0:
        # All rows of the tile lie in one row of blocks.
        scale = tl.load(
            scale_at + (row + tl.min(offs_n, 0)) // GROUP_N * scale_n, mask=first_k < k, other=0.0
        )
        scale = scale[None, :]
    else:
        down = (row + offs_n) // GROUP_N * scale_n
        scale = tl.load(scale_at[None, :] + down[:, None], mask=mask, other=0.0)
    return tl.sum(w * x[None, :, :], 2) * scale


@triton.jit
def _w13(
    x_ptr, w13_ptr, scale_ptr, shared_ptr, shared_scale_ptr, ids_ptr, inner_ptr, E, SLOTS: tl.constexpr,
    APART: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, SHARED_WIDTH: tl.constexpr,
    FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    x_ptr += pair // SLOTS * HIDDEN
    inner_ptr += pair * WIDTH
    if APART:
        if pair % SLOTS < SLOTS - APART:
            if expert < 0:
                offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
                tl.store(inner_ptr + offs_n, 0.0, mask=offs_n < WIDTH)
            else:
                _gate_up(
                    x_ptr, w13_ptr, scale_ptr, inner_ptr, expert, 0, HIDDEN, WIDTH, WIDTH, FORMAT, BLOCK_N,
                    CHUNKS, CHUNK, EVEN,
                )  # fmt: skip
        else:
            # Rows of a slot come after those of the slots before it.
            row = (expert - E).to(tl.int32) * WIDTH
            _gate_up(
                x_ptr, shared_ptr, shared_scale_ptr, inner_ptr, 0, row, HIDDEN, WIDTH, SHARED_WIDTH,
                SHARED_FORMAT, BLOCK_N, CHUNKS, CHUNK, EVEN,
            )  # fmt: skip
    else:
        _gate_up(
            x_ptr, w13_ptr, scale_ptr, inner_ptr, expert, 0, HIDDEN, WIDTH, WIDTH, FORMAT, BLOCK_N, CHUNKS,
            CHUNK, EVEN,
        )  # fmt: skip


@triton.jit
def _gate_up(
    x_ptr, w_ptr, scale_ptr, inner_ptr, expert, row, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write a tile of the inner states of one pair; `WIDE`: rows of w1, and of w3."""
    GROUP_N: tl.constexpr = FORMAT[5]
    GROUP_K: tl.constexpr = FORMAT[6]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.minimum(WIDTH, WIDE - row)
    w1_ptr = w_ptr + expert * FORMAT[0]
    s1_ptr = scale_ptr + expert * FORMAT[2]
    gate = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    up = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    for start in tl.static_range(0, HIDDEN, CHUNKS * CHUNK):
        offs_c = start // CHUNK + tl.arange(0, CHUNKS)
        x = _states(x_ptr, offs_c, HIDDEN, CHUNK, EVEN)
        gate += _products(
            w1_ptr, s1_ptr, offs_n, offs_c, n, HIDDEN, row, 0, FORMAT[1], FORMAT[3], FORMAT[4], x, GROUP_N,
            GROUP_K, BLOCK_N, CHUNK, EVEN,
        )  # fmt: skip
        up += _products(
            w1_ptr + WIDE * FORMAT[1], s1_ptr + FORMAT[7] * FORMAT[3], offs_n, offs_c, n, HIDDEN, row, 0,
            FORMAT[1], FORMAT[3], FORMAT[4], x, GROUP_N, GROUP_K, BLOCK_N, CHUNK, EVEN,
        )  # fmt: skip
    g = tl.sum(gate, 1)
    value = g / (1.0 + tl.exp(-g)) * tl.sum(up, 1)
    tl.store(inner_ptr + offs_n, value.to(inner_ptr.dtype.element_ty), mask=offs_n < WIDTH)


@triton.jit
def _w2(
    inner_ptr, w2_ptr, scale_ptr, shared_ptr, shared_scale_ptr, ids_ptr, weights_ptr, out_ptr, E,
    SLOTS: tl.constexpr, APART: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    # Unrolled: the loads of all slots are under way at once.
    for j in tl.static_range(SLOTS):
        pair = token * SLOTS + j
        expert = tl.load(ids_ptr + pair).to(tl.int64)
        weight = tl.load(weights_ptr + pair)
        for start in tl.static_range(0, WIDTH, CHUNKS * CHUNK):
            offs_c = start // CHUNK + tl.arange(0, CHUNKS)
            x = _states(inner_ptr + pair * WIDTH, offs_c, WIDTH, CHUNK, EVEN)
            if APART and j >= SLOTS - APART:
                # Columns of a slot come after those of the slots before it.
                column = (expert - E).to(tl.int32) * WIDTH
                acc += weight * _products(
                    shared_ptr, shared_scale_ptr, offs_n, offs_c, HIDDEN,
                    tl.minimum(WIDTH, SHARED_WIDTH - column), 0, column, SHARED_FORMAT[1], SHARED_FORMAT[3],
                    SHARED_FORMAT[4], x, SHARED_FORMAT[5], SHARED_FORMAT[6], BLOCK_N, CHUNK, EVEN,
                )  # fmt: skip
            else:
                # An expert that is elsewhere has inner states of zero.
                here = tl.maximum(expert, 0) if APART else expert
                acc += weight * _products(
                    w2_ptr + here * FORMAT[0], scale_ptr + here * FORMAT[2], offs_n, offs_c, HIDDEN, WIDTH, 0,
                    0, FORMAT[1], FORMAT[3], FORMAT[4], x, FORMAT[5], FORMAT[6], BLOCK_N, CHUNK, EVEN,
                )  # fmt: skip
    out_ptrs = out_ptr + token * HIDDEN + offs_n
    tl.store(out_ptrs, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=offs_n < HIDDEN)
