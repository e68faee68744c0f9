"""Reader of 4-bit weights in Marlin's tiles, which Humming has too for activations of 16 bits.

A matrix [N, K] lies as int32 [K / 16, 2 * N]: tiles of 16 columns and 64 rows, 512 bytes each. Of a row
n = 64 * a + 16 * w + 8 * h + j and a column k = 16 * t + 8 * b + 2 * q + p, word (t, a, j, q, w) has the
number in its nibble 4 * p + 2 * h + b. A byte (p, h) has two columns of a row, and 16 rows of a tile, of two
j, are 128 bytes: a line of the cache, and an operand of a matrix product, each byte with its thread.

Scales [groups, N] have row n at 64 * a + 8 * j + 2 * w + h. Those of one group have another order: in Marlin
if the matrix has no more columns, in Humming if scales were declared by channel. Zero points are int32
[groups, N / 8]: word (a, j) has those of w and h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .nibbles import number, ones

# Rows and columns of a tile.
ROWS, COLUMNS = 64, 16


@triton.jit
def rows(row, ROWS: tl.constexpr):
    """Return which rows of the matrix a tile has, in its order: [ROWS]; ``row`` is a multiple of ``ROWS``."""
    at = tl.arange(0, ROWS)
    j = row // 8 + at // 16 * 2 + at // 4 % 2
    return j // 8 * 64 + at % 4 * 16 + at // 8 % 2 * 8 + j % 8


@triton.jit
def tile(
    w_ptr, first, row, there, limit, STRIDE: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Read rows from ``row`` on, columns from ``first`` [WARPS, 1, 1] on: numbers less 8, and ones.

    Returns:
        Three [WARPS, ROWS, DEPTH / 2]. The first has of each 16 columns the lower eight, the second the
        others: see `states`.

    Args:
        w_ptr: bytes of an expert; ``there``: whether there is one; ``limit``: its columns.
        STRIDE: bytes of 16 columns.
    """
    column = first + tl.arange(0, DEPTH // 16)[None, :, None] * 16
    offs = column // 16 * STRIDE + row * 8 + tl.arange(0, ROWS * 8)[None, None, :]
    raw = tl.load(w_ptr + offs, mask=there & (column < limit), other=0)
    # Of t, j, q, w, p, h to rows h, j, w and columns t, q, p: views, which move nothing.
    raw = raw.reshape(WARPS, DEPTH // 16, ROWS // 16, 2, 4, 4, 2, 2).permute(0, 2, 7, 3, 5, 1, 4, 6)
    raw = raw.reshape(WARPS, ROWS, DEPTH // 2)
    return number(raw, False, DTYPE, WIDE), number(raw, True, DTYPE, WIDE), ones(raw, DTYPE, WIDE)


@triton.jit
def states(x_ptr, base, first, there, limit, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Read states of 16 bits, of rows at ``base``, for both halves: two [WARPS, DEPTH / 2, tokens]."""
    at = tl.arange(0, DEPTH // 2)[None, :, None]
    column = first + at // 8 * 16 + at % 8
    low = tl.load(x_ptr + base + column, mask=there & (column < limit), other=0)
    high = tl.load(x_ptr + base + column + 8, mask=there & (column < limit), other=0)
    return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


@triton.jit
def scale(
    s_ptr, group, row, there, SINGLE: tl.constexpr, STRIDE: tl.constexpr, WARPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Read scales of a tile's rows: [WARPS, ROWS, 1] float32.

    Args:
        group: [WARPS, 1, 1].
        SINGLE: whether scales have the order of one group; STRIDE: scales of a group.
    """
    if SINGLE:
        n = rows(row, ROWS)[None, :, None]
        at = n // 32 * 32 + n % 8 // 2 * 8 + n // 8 % 4 * 2 + n % 2
        return tl.load(s_ptr + group * STRIDE + at, mask=there, other=0.0).to(tl.float32)
    DTYPE: tl.constexpr = s_ptr.dtype.element_ty
    if DTYPE.primitive_bitwidth == 16:
        # Loads of less than four bytes are not asked for ahead: two rows, of h, are a word.
        at = row // 16 * 8 + tl.arange(0, ROWS // 2)[None, :, None]
        word = tl.load(s_ptr.to(tl.pointer_type(tl.int32)) + group * (STRIDE // 2) + at, mask=there, other=0)
        low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
        value = tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))
    else:
        at = row + tl.arange(0, ROWS)[None, :, None]
        value = tl.load(s_ptr + group * STRIDE + at, mask=there, other=0.0)
    value = value.reshape(WARPS, ROWS // 16, 2, 4, 2).permute(0, 1, 4, 2, 3)
    return value.reshape(WARPS, ROWS, 1).to(tl.float32)


@triton.jit
def zero(z_ptr, group, row, there, HUMMING: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Read zero points of a tile's rows, less 8: [WARPS, ROWS, 1] float32; STRIDE: words of a group."""
    at = tl.arange(0, ROWS)[None, :, None]
    word = tl.load(z_ptr + group * STRIDE + row // 8 + at // 16 * 2 + at // 4 % 2, mask=there, other=0)
    w, h = at % 4, at // 8 % 2
    nibble = w * 2 + h if HUMMING else h * 4 + w
    return ((word >> nibble * 4) & 15).to(tl.float32) - 8.0
