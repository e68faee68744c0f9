"""Rows of a matrix in 8 bits, with a scale for each group of 32 columns: w = q * s."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP = 32
LARGEST = 127
# Rows that are converted at once: their float32 copies are all the memory that it takes.
ROWS = 8192


@dataclass(frozen=True)
class Int8Rows:
    """A quantised matrix.

    Args:
        values: int8 [N, K].
        scales: [N, K / 32], of the dtype of the matrix.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Return how many bytes it takes."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Return rows ``first`` to ``last``, without it, in float32 [n, K]."""
        scales = self.scales[first:last].float().unsqueeze(2)
        made: torch.Tensor = (in_groups(self.values[first:last].float()) * scales).flatten(1)
        return made


def in_groups(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [n, K] as [n, K / 32, 32]."""
    return rows.reshape(len(rows), -1, GROUP)


def quantised(weight: torch.Tensor) -> Int8Rows:
    """Return a matrix [N, K] of any float dtype in 8 bits; K is a multiple of 32."""
    count, width = weight.shape
    values = torch.empty(count, width, dtype=torch.int8, device=weight.device)
    scales = torch.empty(count, width // GROUP, dtype=weight.dtype, device=weight.device)
    made = Int8Rows(values, scales)
    renew(made, weight)
    return made


def renew(held: Int8Rows, weight: torch.Tensor) -> None:
    """Quantise ``weight`` again, into the same memory."""
    for first in range(0, len(weight), ROWS):
        part = slice(first, first + ROWS)
        groups = in_groups(weight[part].float())
        held.scales[part] = groups.abs().amax(2) / LARGEST
        # By the scale as it is stored: its own rounding is then no error of the values.
        scales = held.scales[part].float().unsqueeze(2)
        steps = torch.where(scales > 0, groups / scales, 0.0)
        held.values[part] = steps.round().clamp(-LARGEST, LARGEST).to(torch.int8).flatten(1)
