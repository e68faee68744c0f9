"""The two kernels of experts_fp8.py: w13·x with SiLU·mul of a pair, w2 with the weighted sum of a token."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import begin


@triton.jit
def _states(row_ptr, offs_c, K: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """Load chunks ``offs_c`` of a row of K states: [CHUNKS, CHUNK] float32."""
    offs_k = offs_c[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    if EVEN:
        return tl.load(row_ptr + offs_k).to(tl.float32)
    return tl.load(row_ptr + offs_k, mask=(offs_c * CHUNK < K)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _tile(
    w_ptr, offs_n, offs_c, n, k, row, column, stride_n, CHUNK: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Load a tile of a matrix [n, k]: [BLOCK_N, CHUNKS, CHUNK].

    ``row``, ``column``: where the matrix begins in the one that is in memory.
    """
    first_k = offs_c * CHUNK
    offs_k = column + first_k[:, None] + tl.arange(0, CHUNK)[None, :]
    tile_ptr = w_ptr + (row + offs_n)[:, None, None] * stride_n + offs_k[None, :, :]
    if EVEN:
        return tl.load(tile_ptr)
    mask = (offs_n < n)[:, None] & (first_k < k)[None, :]
    return tl.load(tile_ptr, mask=mask[:, :, None], other=0.0)


@triton.jit
def _multiplied(
    tile, scale_ptr, offs_n, offs_c, n, k, row, column, scale_n, scale_k, x, GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add up products of a tile with ``x`` within each chunk, and scale: [BLOCK_N, CHUNKS]."""
    first_k = offs_c * CHUNK
    scale_at = scale_ptr + (column + first_k) // GROUP_K * scale_k
    if GROUP_N % BLOCK_N == 0:
        # All rows of the tile lie in one row of blocks.
        scale = tl.load(
            scale_at + (row + tl.min(offs_n, 0)) // GROUP_N * scale_n, mask=first_k < k, other=0.0
        )
        scale = scale[None, :]
    else:
        down = (row + offs_n) // GROUP_N * scale_n
        mask = (offs_n < n)[:, None] & (first_k < k)[None, :]
        scale = tl.load(scale_at[None, :] + down[:, None], mask=mask, other=0.0)
    return tl.sum(tile.to(tl.float32) * x[None, :, :], 2) * scale


@triton.jit
def _products(
    w_ptr, scale_ptr, offs_n, offs_c, n, k, row, column, stride_n, scale_n, scale_k, x, GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Load a tile as of `_tile`, and multiply it as of `_multiplied`."""
    tile = _tile(w_ptr, offs_n, offs_c, n, k, row, column, stride_n, CHUNK, EVEN).to(tl.float32)
    return _multiplied(
        tile, scale_ptr, offs_n, offs_c, n, k, row, column, scale_n, scale_k, x, GROUP_N, GROUP_K, BLOCK_N,
        CHUNK,
    )  # fmt: skip


@triton.jit
def w13_kernel(
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
def w2_kernel(
    inner_ptr, w2_ptr, scale_ptr, shared_ptr, shared_scale_ptr, ids_ptr, weights_ptr, out_ptr, E,
    SLOTS: tl.constexpr, APART: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    SHARED_WIDTH: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if not EARLY:
        begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    early = ()
    if EARLY:
        # Weights of the first slots, while w13's kernel runs. The ids are there: it has waited for them.
        for j in tl.static_range(EARLY):
            here = tl.maximum(tl.load(ids_ptr + token * SLOTS + j).to(tl.int64), 0)
            for start in tl.static_range(0, WIDTH, CHUNKS * CHUNK):
                offs_c = start // CHUNK + tl.arange(0, CHUNKS)
                tile = _tile(
                    w2_ptr + here * FORMAT[0], offs_n, offs_c, HIDDEN, WIDTH, 0, 0, FORMAT[1], CHUNK, EVEN
                )
                early = early + (tile,)  # type: ignore[assignment]  # noqa: RUF005 - Triton cannot unpack
    begin(PDL)
    TILES: tl.constexpr = (WIDTH + CHUNKS * CHUNK - 1) // (CHUNKS * CHUNK)
    # Unrolled: the loads of all slots are under way at once.
    for j in tl.static_range(SLOTS):
        pair = token * SLOTS + j
        expert = tl.load(ids_ptr + pair).to(tl.int64)
        weight = tl.load(weights_ptr + pair)
        for start in tl.static_range(0, WIDTH, CHUNKS * CHUNK):
            offs_c = start // CHUNK + tl.arange(0, CHUNKS)
            x = _states(inner_ptr + pair * WIDTH, offs_c, WIDTH, CHUNK, EVEN)
            if j < EARLY:
                here = tl.maximum(expert, 0) if APART else expert
                acc += weight * _multiplied(
                    early[j * TILES + start // (CHUNKS * CHUNK)], scale_ptr + here * FORMAT[2], offs_n,
                    offs_c, HIDDEN, WIDTH, 0, 0, FORMAT[3], FORMAT[4], x, FORMAT[5], FORMAT[6], BLOCK_N,
                    CHUNK,
                )  # fmt: skip
            elif APART and j >= SLOTS - APART:
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
