"""What only memory can tell of a role: a record made once after it was loaded, and after each update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

# pending: not asked yet; off: by the user's setting; not_loaded: no weights came; no_reference: the
# checkpoint does not tell.
ProofState = Literal["pending", "passed", "off", "not_loaded", "no_reference"]


@dataclass(frozen=True)
class Proof:
    """What the canary said of a role.

    Args:
        layers: those that were compared.
        deviation, tolerance: of the layer that came closest to what is allowed.
        detail: why there is no reference.
    """

    state: ProofState = "pending"
    layers: tuple[int, ...] = ()
    deviation: float = 0.0
    tolerance: float = 1.0
    seconds: float | None = None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the proof as plain data."""
        told: dict[str, Any] = {
            "state": self.state,
            "layers": list(self.layers),
            "deviation": self.deviation,
            "tolerance": self.tolerance,
        }
        if self.seconds is not None:
            told["seconds"] = round(self.seconds, 3)
        if self.detail:
            told["detail"] = self.detail
        return told


@dataclass(frozen=True)
class HeldTensor:
    """A parameter of one layer's experts as the engine holds it now."""

    dtype: str
    shape: tuple[int, ...]
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> HeldTensor:
        """Describe ``tensor``, of any shape and dtype; a meta tensor has the address 0."""
        address = 0 if tensor.is_meta else tensor.data_ptr()
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), address)


@dataclass(frozen=True)
class Loaded:
    """A role whose weights are in memory.

    Args:
        loads: loads that passed by now.
        experts: by layer, every parameter of its experts: where it is, and as what.
    """

    proof: Proof
    loads: int
    slots_loaded: int
    experts: Mapping[int, Mapping[str, HeldTensor]]
