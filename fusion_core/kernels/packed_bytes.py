"""Reader of 4-bit weights in plain bytes: uint8 [N, K / 2], the lower half of a byte the even column.

Scales are [N, groups]. Zero points are uint8 [N / 2, groups], the lower half of a byte the even row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .nibbles import number, ones


@triton.jit
def tile(
    w_ptr, first, row, there, limit, STRIDE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Read rows from ``row`` on, columns from ``first`` [WARPS, 1, 1] on: numbers less 8, and ones.

    Returns:
        Three [WARPS, ROWS, DEPTH / 2]. The first has the even columns, the second the odd ones: see `states`.

    Args:
        w_ptr: bytes of an expert; ``there``: which rows there are; ``limit``: its columns.
        STRIDE: bytes of a row.
    """
    # As multiples, which the compiler sees: so it reads more than a byte at once.
    byte = first // DEPTH * (DEPTH // 2) + tl.arange(0, DEPTH // 2)[None, None, :]
    offs = (row + tl.arange(0, ROWS))[None, :, None] * STRIDE + byte
    raw = tl.load(w_ptr + offs, mask=there & (byte < limit // 16 * 8), other=0)
    return number(raw, False, DTYPE, WIDE), number(raw, True, DTYPE, WIDE), ones(raw, DTYPE, WIDE)


@triton.jit
def states(x_ptr, base, first, there, limit, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Read states of 16 bits, of rows at ``base``, for both halves: two [WARPS, DEPTH / 2, tokens]."""
    # Two states are a word.
    at = first // DEPTH * (DEPTH // 2) + tl.arange(0, DEPTH // 2)[None, :, None]
    word_ptr = x_ptr.to(tl.pointer_type(tl.int32)) + base // 16 * 8
    word = tl.load(word_ptr + at, mask=there & (at < limit // 16 * 8), other=0)
    low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
    return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


@triton.jit
def scale(s_ptr, group, row, there, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, ROWS: tl.constexpr):
    """Read scales of rows from ``row`` on: [WARPS, ROWS, 1] float32; ``group``: [WARPS, 1, 1]."""
    n = row + tl.arange(0, ROWS)[None, :, None]
    return tl.load(s_ptr + n * STRIDE_N + group * STRIDE_K, mask=there, other=0.0).to(tl.float32)


@triton.jit
def zero(z_ptr, group, row, there, STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, ROWS: tl.constexpr):
    """Read zero points of rows from ``row`` on, less 8: [WARPS, ROWS, 1] float32."""
    n = row + tl.arange(0, ROWS)[None, :, None]
    byte = tl.load(z_ptr + n // 2 * STRIDE_N + group * STRIDE_K, mask=there, other=0)
    return ((byte.to(tl.int32) >> n % 2 * 4) & 15).to(tl.float32) - 8.0
