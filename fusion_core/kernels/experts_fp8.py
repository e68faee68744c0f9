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
# Rows and chunks of a tile, warps, and weights of a chunk, which a thread multiplies and adds up by itself.
Tile = tuple[int, int, int, int]


def w13_tile(hidden: int) -> Tile:
    """For w13 [2 * I, H]."""
    return (2, 64, 1, 16) if hidden <= 2048 else (1, 128, 2, 16)


def w2_tile(width: int) -> Tile:
    """For w2 [H, I]; chunks of 8, because a thread loads so many of the inner states at once."""
    return (4, 16, 1, 8) if width <= 128 else (1, 64, 1, 8)


def dequantised(
    weight: torch.Tensor, scale: torch.Tensor, block: Block | None, halves: int = 1
) -> torch.Tensor:
    """Weights [n, out, in] times their scales, in float64. ``halves``: 2 where scales of w1 and w3 follow."""
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
    """What `small_experts` computes, in float64."""
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
    """The fused layer's output [num_tokens, H] in the dtype of ``hidden_states``.

    Args:
        hidden_states: [num_tokens, H], bfloat16 or float16.
        w13: [E + S, 2 * I, H] float8_e4m3fn, rows of w1 before those of w3; w2: [E + S, H, I]. Contiguous.
        block: (rows, columns) of a weight that share a scale; the columns are a multiple of `CHUNK`.
            None: one scale for all of an expert's w13, one for its w2.
        w13_scale: float32, contiguous, [E + S, 2 * ceil(I / rows), ceil(H / columns)], blocks of w1 before
            those of w3; or [E + S]. w2_scale: [E + S, ceil(H / rows), ceil(I / columns)]; or [E + S].
        topk_weights: [num_tokens, k + S] float32; topk_ids: the same shape, int32.

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
    """Raises ValueError where `small_experts` would read scales that are not there."""
    total, hidden, width = w2.shape
    wanted: tuple[tuple[int, ...], ...] = ((total,), (total,))
    if block is not None:
        rows, columns = block
        across = -(-hidden // columns), -(-width // columns)
        wanted = (total, 2 * -(-width // rows), across[0]), (total, -(-hidden // rows), across[1])
        if columns % CHUNK:
            raise ValueError(f"blocks of {columns} columns; the kernel takes multiples of {CHUNK}")
    if hidden % CHUNK or width % CHUNK:
        raise ValueError(f"H {hidden} and I {width} must be multiples of {CHUNK}")
    if w13.shape != (total, 2 * width, hidden):
        raise ValueError(f"w13 is {list(w13.shape)}, w2 {list(w2.shape)}")
    for name, scale, shape in (("w13", w13_scale, wanted[0]), ("w2", w2_scale, wanted[1])):
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
    """SiLU(w1 x) · (w3 x) of every (token, slot) pair into ``inner`` [num_tokens * (k + S), I]."""
    (rows, chunks, warps, chunk), (hidden, width) = tile, (w13.shape[2], inner.shape[1])
    chunks = min(chunks, triton.next_power_of_2(hidden // chunk))
    _w13[(inner.shape[0], triton.cdiv(width, rows))](
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
        ROWS=rows,
        CHUNKS=chunks,
        CHUNK=chunk,
        EVEN=width % rows == 0 and hidden % (chunks * chunk) == 0,
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
    """The weighted sum over a token's slots of w2 · inner into ``output`` [num_tokens, H]."""
    (rows, chunks, warps, chunk), (hidden, width) = tile, w2.shape[1:]
    chunks = min(chunks, triton.next_power_of_2(width // chunk))
    _w2[(output.shape[0], triton.cdiv(hidden, rows))](
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
        ROWS=rows,
        CHUNKS=chunks,
        CHUNK=chunk,
        EVEN=hidden % rows == 0 and width % (chunks * chunk) == 0,
        num_warps=warps,
        **options(inner),
    )


def _scales(scale: torch.Tensor, block: Block | None) -> dict[str, int]:
    """How the kernels find a scale: one for all is a block of any size, in one row and column of blocks."""
    rows, columns = (1, 1) if block is None else scale.shape[1:]
    block_rows, block_columns = block or (ALL, ALL)
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "SCALE_ROWS": rows,
        "SCALE_COLUMNS": columns,
    }


@triton.jit
def _states(states, chunk, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """[chunks, CHUNK] of a row of states, float32."""
    column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if EVEN:
        return tl.load(states + column).to(tl.float32)
    return tl.load(states + column, mask=(chunk * CHUNK < COLUMNS)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _products(
    weight, scale, row, chunk, state, LAST: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """[rows, chunks]: sums of products, scaled, of a matrix [LAST, COLUMNS] that starts at ``weight``."""
    place = chunk * CHUNK
    column = place[:, None] + tl.arange(0, CHUNK)[None, :]
    there = (row < LAST)[:, None] & (place < COLUMNS)[None, :]
    tile = weight + row[:, None, None] * COLUMNS + column[None, :, :]
    if EVEN:
        found = tl.load(tile).to(tl.float32)
    else:
        found = tl.load(tile, mask=there[:, :, None], other=0.0).to(tl.float32)
    across = place // BLOCK_COLUMNS
    if BLOCK_ROWS % ROWS == 0:
        # All rows of the tile lie in one row of blocks.
        first = tl.min(row, 0) // BLOCK_ROWS * SCALE_COLUMNS
        factor = tl.load(scale + first + across, mask=place < COLUMNS, other=0.0)[None, :]
    else:
        down = row // BLOCK_ROWS * SCALE_COLUMNS
        factor = tl.load(scale + down[:, None] + across[None, :], mask=there, other=0.0)
    return tl.sum(found * state[None, :, :], 2) * factor


@triton.jit
def _w13(
    x, w13, scale, ids, inner, SLOTS: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    SCALE_ROWS: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids + pair).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = w13 + expert * (2 * WIDTH * HIDDEN)
    factors = scale + expert * (SCALE_ROWS * SCALE_COLUMNS)
    gate = tl.zeros([ROWS, CHUNKS], tl.float32)
    up = tl.zeros([ROWS, CHUNKS], tl.float32)
    for start in tl.static_range(0, HIDDEN, CHUNKS * CHUNK):
        chunk = start // CHUNK + tl.arange(0, CHUNKS)
        state = _states(x + pair // SLOTS * HIDDEN, chunk, HIDDEN, CHUNK, EVEN)
        gate += _products(
            first, factors, row, chunk, state, WIDTH, HIDDEN, BLOCK_ROWS, BLOCK_COLUMNS, SCALE_COLUMNS, ROWS,
            CHUNK, EVEN,
        )  # fmt: skip
        up += _products(
            first + WIDTH * HIDDEN, factors + UP * SCALE_COLUMNS, row, chunk, state, WIDTH, HIDDEN,
            BLOCK_ROWS, BLOCK_COLUMNS, SCALE_COLUMNS, ROWS, CHUNK, EVEN,
        )  # fmt: skip
    g = tl.sum(gate, 1)
    value = g / (1.0 + tl.exp(-g)) * tl.sum(up, 1)
    tl.store(inner + pair * WIDTH + row, value.to(inner.dtype.element_ty), mask=row < WIDTH)


@triton.jit
def _w2(
    inner, w2, scale, ids, weights, output, SLOTS: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    SCALE_ROWS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, CHUNKS], tl.float32)
    # Unrolled: the loads of all slots are under way at once.
    for j in tl.static_range(SLOTS):
        pair = token * SLOTS + j
        expert = tl.load(ids + pair).to(tl.int64)
        weight = tl.load(weights + pair)
        for start in tl.static_range(0, WIDTH, CHUNKS * CHUNK):
            chunk = start // CHUNK + tl.arange(0, CHUNKS)
            state = _states(inner + pair * WIDTH, chunk, WIDTH, CHUNK, EVEN)
            total += weight * _products(
                w2 + expert * (HIDDEN * WIDTH), scale + expert * (SCALE_ROWS * SCALE_COLUMNS), row, chunk,
                state, HIDDEN, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, SCALE_COLUMNS, ROWS, CHUNK, EVEN,
            )  # fmt: skip
    tl.store(output + token * HIDDEN + row, tl.sum(total, 1).to(output.dtype.element_ty), mask=row < HIDDEN)
