"""The experts of few tokens over k+S slots with FP8 weights (e4m3), in the two steps of kernels/experts.py.

Hidden and inner states stay as they are: engines' grouped GEMMs round them to FP8, but with few tokens
nothing is gained by it, and the result is nearer to what the checkpoint says. Weights are multiplied in
float32; a thread adds up the products of a chunk, and multiplies by the chunk's scale once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import experts
from .launch import begin, options

# Most weights that a thread loads at once, 16 bytes: blocks of scales must be whole numbers of them.
CHUNK = 16
# Rows or columns that share a scale where there is one for all.
ALL = 1 << 30
Block = tuple[int, int]
# BLOCK_N, CHUNKS, warps, and CHUNK: weights that a thread multiplies and adds up by itself.
Tile = tuple[int, int, int, int]


def w13_tile(hidden: int) -> Tile:
    """Return the tile for w13 [2 * I, H]: the fastest one on an H200."""
    return (2, 64, 1, 16) if hidden <= 2048 else (1, 128, 2, 16)


def w2_tile(width: int) -> Tile:
    """Return the tile for w2 [H, I]; chunks of 8, because a thread loads so many inner states at once."""
    return (4, 16, 1, 8) if width <= 128 else (1, 64, 1, 8)


def dequantised(
    weight: torch.Tensor, scale: torch.Tensor, block: Block | None, halves: int = 1
) -> torch.Tensor:
    """Multiply weights [n, out, in] by their scales, in float64.

    Args:
        scale, block: as of `small_experts`.
        halves: 2 where the scales of w3 follow those of w1.
    """
    wide = weight.double()
    if block is None:
        return wide * scale.double().reshape(-1, 1, 1)
    parts = []
    for part, factors in zip(wide.chunk(halves, 1), scale.double().chunk(halves, 1), strict=True):
        out, inner = part.shape[1:]
        tall = factors.repeat_interleave(min(block[0], out), 1)[:, :out]
        parts.append(part * tall.repeat_interleave(min(block[1], inner), 2)[:, :, :inner])
    return torch.cat(parts, 1)


def reference(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    block: Block | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Compute what `small_experts` computes, in float64; shapes as there."""
    whole = dequantised(w13, w13_scale, block, halves=2), dequantised(w2, w2_scale, block)
    return experts.reference(hidden_states, *whole, topk_weights, topk_ids)


def small_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    block: Block | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Compute the fused layer's output: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x)).

    Args:
        hidden_states: [num_tokens, H], bfloat16 or float16.
        w13: [E + S, 2 * I, H] float8_e4m3fn, rows of w1 before those of w3; w2: [E + S, H, I]. Contiguous.
        block: (rows, columns) of a weight that share a scale; the columns are a multiple of `CHUNK`.
            None: one scale for all of an expert's w13, one for its w2.
        w13_scale: float32, contiguous, [E + S, 2 * ceil(I / rows), ceil(H / columns)], blocks of w1 before
            those of w3; or [E + S]. w2_scale: [E + S, ceil(H / rows), ceil(I / columns)]; or [E + S].
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.

    Raises:
        ValueError: scales and sizes do not fit these kernels.
    """
    tokens, hidden = hidden_states.shape
    width, slots = w2.shape[2], topk_ids.shape[1]
    check(w13, w13_scale, w2, w2_scale, block)
    states = hidden_states.contiguous()
    inner = torch.empty(tokens * slots, width, dtype=states.dtype, device=states.device)
    output = torch.empty_like(states)
    launch_w13(states, w13, w13_scale, block, topk_ids, inner, w13_tile(hidden))
    launch_w2(inner, w2, w2_scale, block, topk_weights, topk_ids, output, w2_tile(width))
    return output


def check(
    w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor, block: Block | None
) -> None:
    """Refuse tensors of which `small_experts` would read scales that are not there.

    Raises:
        ValueError: scales and sizes do not fit these kernels.
    """
    total, hidden, width = w2.shape
    w13_shape: tuple[int, ...] = (total,)
    w2_shape: tuple[int, ...] = (total,)
    if block is not None:
        rows, columns = block
        w13_shape = (total, 2 * -(-width // rows), -(-hidden // columns))
        w2_shape = (total, -(-hidden // rows), -(-width // columns))
        if columns % CHUNK:
            raise ValueError(f"blocks of {columns} columns; the kernel takes multiples of {CHUNK}")
    if hidden % CHUNK or width % CHUNK:
        raise ValueError(f"H {hidden} and I {width} must be multiples of {CHUNK}")
    if w13.shape != (total, 2 * width, hidden):
        raise ValueError(f"w13 is {list(w13.shape)}, w2 {list(w2.shape)}")
    for name, scale, shape in (("w13", w13_scale, w13_shape), ("w2", w2_scale, w2_shape)):
        if tuple(scale.shape) != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(
                f"scales of {name}: {list(scale.shape)} {scale.dtype}, not {list(shape)} float32"
            )


def launch_w13(
    states: torch.Tensor,
    w13: torch.Tensor,
    scale: torch.Tensor,
    block: Block | None,
    ids: torch.Tensor,
    inner: torch.Tensor,
    tile: Tile,
) -> None:
    """Write SiLU(w1 x) · (w3 x) of every (token, slot) pair into ``inner`` [num_tokens * (k + S), I]."""
    (block_n, chunks, warps, chunk), (hidden, width) = tile, (w13.shape[2], inner.shape[1])
    chunks = min(chunks, triton.next_power_of_2(hidden // chunk))
    _w13[(inner.shape[0], triton.cdiv(width, block_n))](
        states,
        w13,
        scale,
        ids,
        inner,
        SLOTS=ids.shape[1],
        HIDDEN=hidden,
        WIDTH=width,
        **_scales(scale, block),
        UP=0 if block is None else scale.shape[1] // 2,
        BLOCK_N=block_n,
        CHUNKS=chunks,
        CHUNK=chunk,
        EVEN=width % block_n == 0 and hidden % (chunks * chunk) == 0,
        num_warps=warps,
        **options(states),
    )


def launch_w2(
    inner: torch.Tensor,
    w2: torch.Tensor,
    scale: torch.Tensor,
    block: Block | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
    output: torch.Tensor,
    tile: Tile,
) -> None:
    """Write the weighted sum over a token's slots of w2 · inner into ``output`` [num_tokens, H]."""
    (block_n, chunks, warps, chunk), (hidden, width) = tile, w2.shape[1:]
    chunks = min(chunks, triton.next_power_of_2(width // chunk))
    _w2[(output.shape[0], triton.cdiv(hidden, block_n))](
        inner,
        w2,
        scale,
        ids,
        weights,
        output,
        SLOTS=ids.shape[1],
        HIDDEN=hidden,
        WIDTH=width,
        **_scales(scale, block),
        BLOCK_N=block_n,
        CHUNKS=chunks,
        CHUNK=chunk,
        EVEN=hidden % block_n == 0 and width % (chunks * chunk) == 0,
        num_warps=warps,
        **options(inner),
    )


def _scales(scale: torch.Tensor, block: Block | None) -> dict[str, int]:
    """Say where the kernels find a scale: one for all is a block of any size, alone in its matrix."""
    scale_n, scale_k = (1, 1) if block is None else scale.shape[1:]
    group_n, group_k = block or (ALL, ALL)
    return {"GROUP_N": group_n, "GROUP_K": group_k, "SCALE_N": scale_n, "SCALE_K": scale_k}


@triton.jit
def _states(row_ptr, offs_c, K: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """Load chunks ``offs_c`` of a row of K states: [CHUNKS, CHUNK] float32."""
    offs_k = offs_c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if EVEN:
        return tl.load(row_ptr + offs_k).to(tl.float32)
    return tl.load(row_ptr + offs_k, mask=(offs_c * CHUNK < K)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _products(
    w_ptr, scale_ptr, offs_n, offs_c, x, N: tl.constexpr, K: tl.constexpr, GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Add up products of a matrix [N, K] with ``x`` within each chunk, and scale: [BLOCK_N, CHUNKS]."""
    first_k = offs_c * CHUNK
    offs_k = first_k[:, None] + tl.arange(0, CHUNK)[None, :]
    mask = (offs_n < N)[:, None] & (first_k < K)[None, :]
    tile_ptr = w_ptr + offs_n[:, None, None] * K + offs_k[None, :, :]
    if EVEN:
        w = tl.load(tile_ptr).to(tl.float32)
    else:
        w = tl.load(tile_ptr, mask=mask[:, :, None], other=0.0).to(tl.float32)
    scale_k = first_k // GROUP_K
    if GROUP_N % BLOCK_N == 0:
        # All rows of the tile lie in one row of blocks.
        row = tl.min(offs_n, 0) // GROUP_N * SCALE_K
        scale = tl.load(scale_ptr + row + scale_k, mask=first_k < K, other=0.0)[None, :]
    else:
        row = offs_n // GROUP_N * SCALE_K
        scale = tl.load(scale_ptr + row[:, None] + scale_k[None, :], mask=mask, other=0.0)
    return tl.sum(w * x[None, :, :], 2) * scale


@triton.jit
def _w13(
    x_ptr, w13_ptr, scale_ptr, ids_ptr, inner_ptr, SLOTS: tl.constexpr, HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr, UP: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    w1_ptr = w13_ptr + expert * (2 * WIDTH * HIDDEN)
    w1_scale_ptr = scale_ptr + expert * (SCALE_N * SCALE_K)
    acc_gate = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    acc_up = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    for start in tl.static_range(0, HIDDEN, CHUNKS * CHUNK):
        offs_c = start // CHUNK + tl.arange(0, CHUNKS)
        x = _states(x_ptr + pair // SLOTS * HIDDEN, offs_c, HIDDEN, CHUNK, EVEN)
        acc_gate += _products(
            w1_ptr, w1_scale_ptr, offs_n, offs_c, x, WIDTH, HIDDEN, GROUP_N, GROUP_K, SCALE_K, BLOCK_N, CHUNK,
            EVEN,
        )  # fmt: skip
        acc_up += _products(
            w1_ptr + WIDTH * HIDDEN, w1_scale_ptr + UP * SCALE_K, offs_n, offs_c, x, WIDTH, HIDDEN, GROUP_N,
            GROUP_K, SCALE_K, BLOCK_N, CHUNK, EVEN,
        )  # fmt: skip
    gate = tl.sum(acc_gate, 1)
    value = gate / (1.0 + tl.exp(-gate)) * tl.sum(acc_up, 1)
    tl.store(inner_ptr + pair * WIDTH + offs_n, value.to(inner_ptr.dtype.element_ty), mask=offs_n < WIDTH)


@triton.jit
def _w2(
    inner_ptr, w2_ptr, scale_ptr, ids_ptr, weights_ptr, out_ptr, SLOTS: tl.constexpr, HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
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
            acc += weight * _products(
                w2_ptr + expert * (HIDDEN * WIDTH), scale_ptr + expert * (SCALE_N * SCALE_K), offs_n, offs_c,
                x, HIDDEN, WIDTH, GROUP_N, GROUP_K, SCALE_K, BLOCK_N, CHUNK, EVEN,
            )  # fmt: skip
    out_ptrs = out_ptr + token * HIDDEN + offs_n
    tl.store(out_ptrs, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=offs_n < HIDDEN)
