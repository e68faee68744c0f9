"""Experts of 4 bits: their layout, and what lies beside their weights."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

# Rows, and columns, come in so many at once in every layout.
MULTIPLE = 64
SMALLEST_GROUP = 32


class Layout(Enum):
    """How 4-bit weights lie in memory; each has a reader, in the file of that name."""

    MARLIN_TILE = "marlin_tile"
    PACKED_BYTES = "packed_bytes"


@dataclass(frozen=True)
class Int4:
    """Scales and zero points of 4-bit experts, in the order of their layout.

    Args:
        w13, w2: scales, of any float dtype: [E, groups, N] beside tiles, [E, N, groups] beside bytes.
        group: columns that share a scale; a matrix of fewer has one group. 0: all of them.
        w13_zeros, w2_zeros: int32 [E, groups, N / 8] beside tiles, uint8 [E, N / 2, groups] beside bytes;
            None: they are all 8.
        humming: whether Humming packed tiles, and not Marlin: they differ in zero points, and in scales
            of a matrix that is as wide as a group.
    """

    layout: Layout
    w13: torch.Tensor
    w2: torch.Tensor
    group: int
    w13_zeros: torch.Tensor | None = None
    w2_zeros: torch.Tensor | None = None
    humming: bool = False

    @property
    def tiles(self) -> bool:
        """Return whether weights lie in Marlin's tiles."""
        return self.layout is Layout.MARLIN_TILE

    @property
    def name(self) -> str:
        """Name the format: "int4 g128, marlin_tile"."""
        size = f"g{self.group}" if self.group else "channel"
        zeros = "" if self.w13_zeros is None else " zero points"
        packed = f" by {'humming' if self.humming else 'marlin'}" if self.tiles else ""
        return f"int4 {size}{zeros}, {self.layout.value}{packed}"

    def shape(self, weight: torch.Tensor) -> tuple[int, int]:
        """Return N and K of an expert's matrix."""
        _, first, second = weight.shape
        return (second // 2, first * 16) if self.tiles else (first, second * 2)

    def groups(self, columns: int) -> int:
        """Return how many groups a matrix of so many columns has."""
        return -(-columns // self.group) if self.group else 1

    def single(self, columns: int) -> bool:
        """Return whether scales are in the order that tiles have for a matrix of one group."""
        if self.humming:
            return self.group == 0
        return self.tiles and self.groups(columns) == 1


def checked(int4: Int4, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Refuse tensors of which the readers would read numbers that are not there.

    Args:
        w13, w2: weights; see `ExpertWeights`.

    Raises:
        ValueError: sizes, dtypes or strides do not fit each other.
    """
    hidden, width = int4.shape(w2)
    if hidden % MULTIPLE or width % MULTIPLE:
        raise ValueError(f"H {hidden} and I {width} of 4-bit weights must be multiples of {MULTIPLE}")
    for name, weight, n, k in (("w13", w13, 2 * width, hidden), ("w2", w2, hidden, width)):
        groups = int4.groups(k)
        if groups > 1 and (int4.group % SMALLEST_GROUP or k % int4.group):
            raise ValueError(f"groups of {int4.group} for {k} columns of {name}")
        held = int4.layout.value, torch.int32 if int4.tiles else torch.uint8
        shapes = {
            "": [k // 16, 2 * n] if int4.tiles else [n, k // 2],
            "scales": [groups, n] if int4.tiles else [n, groups],
            "zeros": [groups, n // 8] if int4.tiles else [n // 2, groups],
        }
        tensors = {"": weight, "scales": getattr(int4, name), "zeros": getattr(int4, f"{name}_zeros")}
        for what, tensor in tensors.items():
            if tensor is None:
                continue
            right = tensor.dtype.is_floating_point if what == "scales" else tensor.dtype == held[1]
            if list(tensor.shape) != [len(w2), *shapes[what]] or not right or tensor.stride(2) != 1:
                raise ValueError(
                    f"{name} {what}: {list(tensor.shape)} {tensor.dtype}, strides {tensor.stride()}; "
                    f"{held[0]} has {[len(w2), *shapes[what]]}"
                )
