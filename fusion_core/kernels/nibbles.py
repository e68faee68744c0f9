"""From four bits to a number that a matrix product takes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def number(raw, HIGH: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Return half of each byte, less 8, which ``DTYPE`` holds exactly; ``WIDE``: as float32, see `launch.dot`.

    Bits of a number set below those of a power of two are that power plus the number: no conversion.
    """
    half = (raw >> 4) & 15 if HIGH else raw & 15
    if DTYPE == tl.bfloat16:
        value = (half.to(tl.int16) | 0x4300).to(DTYPE, bitcast=True)
        above: tl.constexpr = 128.0
    else:
        value = (half.to(tl.int16) | 0x6400).to(DTYPE, bitcast=True)
        above: tl.constexpr = 1024.0
    if WIDE:
        value = value.to(tl.float32)
    return value - (above + 8.0)
