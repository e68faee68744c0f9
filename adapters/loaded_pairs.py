"""What only memory can tell of a paired role: a record made after it was loaded, and after each update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import words
from ..fusion_core.reasons import Code, Reason
from .expert_reading import Unreadable

PairProofState = Literal["passed", "off", "failed"]


@dataclass(frozen=True)
class PairProof:
    """What the proof said: ours against the engine's own forward.

    Args:
        layers: those that were compared.
        between: the most that both arms were apart; ours, stock: from float32.
        detail: what failed, in words; code: of the refusal that this is.
        canary: what the checkpoint says of both arms: "passed", or why it says nothing, or that stock is off.
    """

    state: PairProofState
    layers: tuple[int, ...] = ()
    between: float = 0.0
    ours: float = 0.0
    stock: float = 0.0
    seconds: float = 0.0
    detail: str = ""
    code: Code = "proof.failed"
    canary: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the proof as plain data."""
        told = {**vars(self), "layers": list(self.layers), "seconds": round(self.seconds, 3)}
        if self.state != "failed":
            del told["code"]
        return told


def failed(error: Exception) -> PairProof:
    """Return the proof of a role in which something went wrong."""
    if isinstance(error, Unreadable):
        return PairProof("failed", detail=str(error), code=error.code)
    return PairProof("failed", detail=words(error))


@dataclass(frozen=True)
class HeldLayer:
    """One layer: where its tensors begin, and how routed and shared experts are stored."""

    addresses: tuple[int, ...]
    formats: tuple[str, str]


@dataclass(frozen=True)
class LoadedPairs:
    """A paired role whose weights are in memory.

    Args:
        threshold: up to so many tokens run paired; 0: the engine runs all.
        source: where the threshold is from: "measured", "cache", or a setting.
        reason: why nothing runs paired, or None.
        loads: loads and updates by now.
        bounds: of the measurement: lower bound of stock over ours, by "tokens routing".
    """

    layers: Mapping[int, HeldLayer]
    proof: PairProof
    threshold: int
    source: str = ""
    reason: Reason | None = None
    loads: int = 0
    seconds: float = 0.0
    bounds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data."""
        formats = sorted({" + ".join(filter(None, layer.formats)) for layer in self.layers.values()})
        return {
            "threshold": self.threshold,
            "threshold_from": self.source,
            "reason": "" if self.reason is None else self.reason.code,
            "detail": "" if self.reason is None else self.reason.detail,
            "formats": formats,
            "proof": self.proof.to_dict(),
            "loads": self.loads,
            "measure_seconds": round(self.seconds, 3),
            "bounds": dict(self.bounds),
        }
