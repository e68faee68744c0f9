"""Size of roundings in an engine's layer, and what of an error looks like the shared expert's part.

The latter is least squares over all elements of an output: rounding points anywhere and hardly along one
part, a wrong weight of that part points along it and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Half a unit in the last place: 2^-p for a significand of p bits (IEEE 754; bfloat16 has 8 of them).
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# TF32, which GPUs may multiply float32 in, keeps a significand of 11 bits.
TF32_UNIT = 2.0**-11
TINY = torch.finfo(torch.float64).tiny


def unit_of(dtype: torch.dtype, device: str) -> float:
    """Return the relative size of one rounding of ``dtype`` in a product on ``device``."""
    return TF32_UNIT if dtype == torch.float32 and device != "cpu" else UNIT[dtype]


@dataclass(frozen=True)
class Served:
    """Dtypes in which the engine holds a layer: its experts and hidden states, gate, bias and shared gate.

    ``ue8m0``: kernels of the device may take scales of FP8 weights as powers of two.
    """

    dtype: torch.dtype
    gate: torch.dtype
    bias: torch.dtype
    shared_gate: torch.dtype
    device: str = "cpu"
    ue8m0: bool = False

    @property
    def unit(self) -> float:
        """Relative size of one rounding."""
        return unit_of(self.dtype, self.device)

    @property
    def gate_unit(self) -> float:
        """Relative size of one rounding of the router's logits: some gates are wider than the states."""
        return unit_of(torch.promote_types(self.dtype, self.gate), self.device)


def share_error(error: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Fit ``shared`` to ``error``, both [N, H] float64, by least squares: a factor [N] for each token."""
    return (error * shared).sum(dim=-1) / shared.square().sum(dim=-1).clamp_min(TINY)


def share_spread(error: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Estimate the standard deviation [N] of `share_error` if each element of ``error`` has a random sign."""
    size = (error * shared).square().sum(dim=-1).sqrt()
    return size / shared.square().sum(dim=-1).clamp_min(TINY)
