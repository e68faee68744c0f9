"""From four bits to a number that a matrix product takes."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

# PTX, from a word of four bytes: halves of them less 8, two numbers in each of two words. A power of two with
# the bits of a number below its own is their sum, so the power's upper byte is all that a number needs.
_WORDS = """{{
    .reg .b32 half, low, high, one, less;
    shr.b32 half, $2, {shift};
    and.b32 half, half, 0x0F0F0F0F;
    prmt.b32 low, half, {power}, 0x4140;
    prmt.b32 high, half, {power}, 0x4342;
    mov.b32 one, {one};
    mov.b32 less, {less};
    fma.rn.{dtype}x2 $0, low, one, less;
    fma.rn.{dtype}x2 $1, high, one, less;
}}"""
_BF16 = {"dtype": "bf16", "power": "0x43", "one": "0x3F803F80", "less": "0xC308C308"}
_F16 = {"dtype": "f16", "power": "0x64", "one": "0x3C003C00", "less": "0xE408E408"}
BF16_LOW, BF16_HIGH, F16_LOW, F16_HIGH = (
    tl.constexpr(_WORDS.format(shift=shift, **words)) for words in (_BF16, _F16) for shift in (0, 4)
)


@triton.jit
def number(raw, HIGH: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Return half of each byte, less 8, exactly, in ``DTYPE``; ``WIDE``: in float32, see `launch.dot`."""
    BF16: tl.constexpr = DTYPE.is_bf16()
    if not WIDE and cuda_capability_geq(8):
        LOW: tl.constexpr = BF16_LOW if BF16 else F16_LOW
        UPPER: tl.constexpr = BF16_HIGH if BF16 else F16_HIGH
        WORDS: tl.constexpr = UPPER if HIGH else LOW
        value = tl.inline_asm_elementwise(WORDS, "=r,=r,r", [raw], dtype=tl.int16, is_pure=True, pack=4)
        value = value.to(DTYPE, bitcast=True)
    else:
        half = (raw >> 4) & 15 if HIGH else raw & 15
        POWER: tl.constexpr = 0x4300 if BF16 else 0x6400  # 128 and 1024
        value = (half.to(tl.int16) | POWER).to(DTYPE, bitcast=True)
        if WIDE:
            value = value.to(tl.float32)
        value -= 136.0 if BF16 else 1032.0
    return value


@triton.jit
def ones(raw, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Return 1 for each byte. Not as a constant: from bytes it gets the threads that halves of them have."""
    ONE: tl.constexpr = 0x3F80 if DTYPE.is_bf16() else 0x3C00
    value = (((raw & 15) >> 4).to(tl.int16) | ONE).to(DTYPE, bitcast=True)
    return value.to(tl.float32) if WIDE else value
