"""From four bits to a number that a matrix product takes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(raw, HIGH: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Return half of each byte, less 8, exactly, in ``DTYPE``; ``WIDE``: in float32, see `launch.dot`.

    A power of two with the bits of a number below its own is their sum: nothing is converted.
    """
    half = (raw >> 4) & 15 if HIGH else raw & 15
    POWER: tl.constexpr = 0x4300 if DTYPE.is_bf16() else 0x6400  # 128 and 1024
    value = (half.to(tl.int16) | POWER).to(DTYPE, bitcast=True)
    if WIDE:
        value = value.to(tl.float32)
    return value - (136.0 if DTYPE.is_bf16() else 1032.0)


@triton.jit
def ones(raw, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Return 1 for each byte. Not as a constant: from bytes it gets the threads that halves of them have."""
    ONE: tl.constexpr = 0x3F80 if DTYPE.is_bf16() else 0x3C00
    value = (((raw & 15) >> 4).to(tl.int16) | ONE).to(DTYPE, bitcast=True)
    return value.to(tl.float32) if WIDE else value
