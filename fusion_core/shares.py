"""By how much of itself one part of a layer's output seems to be off, whatever else is.

Least squares over all elements of an output: rounding points anywhere and hardly along one part, a wrong
weight of that part points along it and nowhere else.
"""

from __future__ import annotations

import torch

TINY = torch.finfo(torch.float64).tiny


def share_error(error: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Of each token, the factor of ``shared`` in ``error`` by least squares."""
    return (error * shared).sum(dim=-1) / shared.square().sum(dim=-1).clamp_min(TINY)


def share_spread(error: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """The standard deviation of `share_error` where every element of ``error`` has its sign by chance."""
    size = (error * shared).square().sum(dim=-1).sqrt()
    return size / shared.square().sum(dim=-1).clamp_min(TINY)
