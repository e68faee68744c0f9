"""Weights of experts for the kernels of few tokens: where the engine keeps them, in their format."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .int4 import Int4, checked

# Rows and columns of a weight that share a scale; 0: all of them.
Block = tuple[int, int]


@dataclass(frozen=True)
class Scales:
    """Scales of FP8 experts, float32, with any strides.

    Args:
        w13, w2: [E, rows of scales, columns of scales]; those of w3 follow those of w1. One row for both
            where all rows share a scale.
        block: rows and columns of a weight that share a scale; 0 for all of them.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    block: Block


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of E routed experts, or of the one shared expert (E = 1), which may be wider than those.

    Args:
        w13: [E, 2 * I, H], rows of w1 before those of w3; w2: [E, H, I]. The last dimension is contiguous.
            bfloat16 or float16, or float8_e4m3fn with ``scales``. With ``int4``: int32 [E, H / 16, 4 * I] and
            [E, I / 16, 2 * H] in Marlin's tiles, uint8 [E, 2 * I, H / 2] and [E, H, I / 2] in bytes.
        scales: of FP8 weights; None for others.
        int4: of weights of 4 bits; None for others.

    Raises:
        ValueError: sizes or dtypes do not fit each other.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    scales: Scales | None = None
    int4: Int4 | None = None

    @property
    def count(self) -> int:
        """Return E."""
        return len(self.w2)

    @property
    def hidden(self) -> int:
        """Return H."""
        return self.w2.shape[1] if self.int4 is None else self.int4.shape(self.w2)[0]

    @property
    def width(self) -> int:
        """Return I."""
        return self.w2.shape[2] if self.int4 is None else self.int4.shape(self.w2)[1]

    @property
    def plain(self) -> bool:
        """Return whether the weights are plain numbers."""
        return self.scales is None and self.int4 is None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return all that is read."""
        beside = self.int4 or self.scales
        found = [self.w13, self.w2, *(() if beside is None else (beside.w13, beside.w2))]
        if self.int4 is not None:
            found += [zeros for zeros in (self.int4.w13_zeros, self.int4.w2_zeros) if zeros is not None]
        return tuple(found)

    @property
    def format(self) -> str:
        """Name what is stored: "bfloat16", "float8_e4m3fn 128x128", "int4 g128, packed_bytes"."""
        name = str(self.w13.dtype).removeprefix("torch.")
        if self.int4 is not None:
            return self.int4.name
        return name if self.scales is None else "{} {}x{}".format(name, *self.scales.block)

    def __post_init__(self) -> None:
        if self.int4 is not None:
            checked(self.int4, self.w13, self.w2)
        elif self.w13.shape != (self.count, 2 * self.width, self.hidden):
            raise ValueError(f"w13 is {list(self.w13.shape)}, w2 {list(self.w2.shape)}")
        if self.w13.stride(2) != 1 or self.w2.stride(2) != 1:
            raise ValueError("the last dimension of w13 and w2 must be contiguous")


def slots_of(shared: ExpertWeights, width: int) -> int:
    """Return S, how many slots of routed width ``width`` the shared expert takes."""
    return -(-shared.width // width)
