"""The router's gate and the shared expert's gate as one matrix, so that one product gives all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

# A product with a number of columns that is no multiple of this falls back to slow kernels.
ALIGNMENT = 8


class GateRows:
    """A matrix [E + G, H] (and zero rows up to the alignment), of which both modules' weights become views.

    So what is loaded into either module is in the matrix too; and its address, which CUDA graphs hold, stays.

    Args:
        modules: the router's gate, weight [E, H], then perhaps the shared expert's, [1, H]; of one dtype.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.modules = tuple(modules)
        self.count = sum(len(weight) for weight in self.weights)
        first = self.weights[0]
        if any(w.dtype != first.dtype or w.device != first.device for w in self.weights):
            raise ValueError("the gates differ in dtype or device")
        aligned = -(-self.count // ALIGNMENT) * ALIGNMENT
        self.padded = torch.zeros(aligned, first.shape[1], dtype=first.dtype, device=first.device)
        self.refresh()

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """Return the modules' weights. Asked for anew: an engine may put other parameters in their place."""
        return [cast(torch.nn.Parameter, module.weight) for module in self.modules]

    @property
    def rows(self) -> torch.Tensor:
        """Return [E + G, H], without the rows of zeros."""
        return self.padded[: self.count]

    def refresh(self) -> bool:
        """Take over weights that were given other memory since; return whether there were any."""
        start, moved = 0, False
        for weight in self.weights:
            view = self.padded[start : start + len(weight)]
            if weight.data_ptr() != view.data_ptr() or weight.stride() != view.stride():
                view.copy_(weight.data)
                weight.data = view
                moved = True
            start += len(weight)
        return moved
