"""The PTX that makes numbers of four bits: instruction by instruction, for every byte, without a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from fse_patch.fusion_core.kernels import nibbles

CASES = {
    "bf16 low": (nibbles.BF16_LOW, torch.bfloat16, 0),
    "bf16 high": (nibbles.BF16_HIGH, torch.bfloat16, 4),
    "fp16 low": (nibbles.F16_LOW, torch.float16, 0),
    "fp16 high": (nibbles.F16_HIGH, torch.float16, 4),
}


def words_of(text: str, word: int, dtype: torch.dtype) -> list[int]:
    """Run the PTX with ``word`` as its input: both outputs."""
    held = {"$2": word}

    def halves(name: str) -> torch.Tensor:
        bits = torch.tensor([held[name] & 0xFFFF, held[name] >> 16]).to(torch.uint16)
        return bits.view(dtype).float()

    for line in text.split(";"):
        found = re.fullmatch(r"\s*\{?\s*([a-z]+)[.a-z0-9]* (.+)", line)
        if found is None or ".reg" in line:
            continue
        name, (out, *given) = found[1], found[2].split(", ")
        at = [held[word] if word in held else int(word, 0) for word in given if name != "fma"]
        if name == "shr":
            held[out] = at[0] >> at[1]
        elif name == "and":
            held[out] = at[0] & at[1]
        elif name == "mov":
            held[out] = at[0]
        elif name == "prmt":
            both = at[0] | at[1] << 32
            chosen = [both >> 8 * (at[2] >> 4 * place & 7) & 255 for place in range(4)]
            held[out] = sum(byte << 8 * place for place, byte in enumerate(chosen))
        else:
            assert name == "fma"
            left, right, more = (halves(word) for word in given)
            low, high = (left * right + more).to(dtype).view(torch.uint16).tolist()
            held[out] = low | high << 16
    return [held["$0"], held["$1"]]


def numbers(text: str, word: int, dtype: torch.dtype) -> list[float]:
    """The four numbers that the PTX makes of a word."""
    bits = [half for out in words_of(text, word, dtype) for half in (out & 0xFFFF, out >> 16)]
    made: list[float] = torch.tensor(bits).to(torch.uint16).view(dtype).float().tolist()
    return made


@pytest.mark.parametrize("case", CASES)
def test_every_byte(case: str) -> None:
    text, dtype, shift = CASES[case]
    for byte in range(256):
        word = [byte, 255 - byte, byte ^ 0x5A, byte * 7 & 255]
        wanted = [float((each >> shift & 15) - 8) for each in word]
        assert numbers(text.value, int.from_bytes(bytes(word), "little"), dtype) == wanted


def test_another_order_is_seen() -> None:
    changed = nibbles.BF16_LOW.value.replace("0x4140", "0x4041")
    assert numbers(changed, 0x04030201, torch.bfloat16) != [-7.0, -6.0, -5.0, -4.0]
    assert numbers(nibbles.BF16_LOW.value, 0x04030201, torch.bfloat16) == [-7.0, -6.0, -5.0, -4.0]
