"""Weights of experts as an engine keeps them: what a pass by pointer reads. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Rows and columns of a weight that share a scale; 0 for all of them.
Block = tuple[int, int]


@dataclass(frozen=True)
class Scales:
    """Scales of FP8 weights, float32, of any strides.

    Args:
        w13, w2: [E, rows of scales, columns of scales], or without E for a shared expert; w3's rows follow w1's.
        block: rows and columns of a weight that share a scale; 0 for all of them.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    block: Block


@dataclass(frozen=True)
class ExpertWeights:
    """Routed experts, or one shared expert, where they lie; rows may have any stride.

    Args:
        w13: [E, 2 * I, H], rows of gate before those of up; [2 * I_s, H] of a shared expert.
        w2: [E, H, I]; [H, I_s] of a shared expert.
        scales: None where the weights are plain.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    scales: Scales | None = None

    @property
    def width(self) -> int:
        """Return I, or I_s."""
        return int(self.w2.shape[-1])

    @property
    def addresses(self) -> tuple[int, ...]:
        """Return where the tensors begin: what a captured graph holds."""
        scales = () if self.scales is None else (self.scales.w13, self.scales.w2)
        return tuple(tensor.data_ptr() for tensor in (self.w13, self.w2, *scales))

    @property
    def format(self) -> str:
        """Name dtype and scales: "bfloat16", "float8_e4m3fn 128x128"."""
        name = str(self.w13.dtype).removeprefix("torch.")
        return name if self.scales is None else "{} {}x{}".format(name, *self.scales.block)


def slots_of(routed: ExpertWeights, shared: ExpertWeights | None) -> int:
    """Return S, how many routed widths cover the shared expert: slots E..E+S-1 stand for its parts."""
    return 0 if shared is None else -(-shared.width // routed.width)
