"""Deliberate faults in a quantised LM head, for both engines: patches to enter or start."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from fse_patch.adapters import head
from fse_patch.fusion_core.proof import head as proof

honest = head.quantised


def doubled(held: Any) -> None:
    """One scale of one row."""
    held.scales[100, 1] *= 2


def swapped(held: Any) -> None:
    """Two rows."""
    for part in (held.values, held.scales):
        part[[5, 100]] = part[[100, 5]]


def rolled(held: Any) -> None:
    """Every row stands where the next belongs."""
    for part in (held.values, held.scales):
        part.copy_(part.roll(1, 0))


def made_with(fault: Callable[[Any], None]) -> Any:
    def quantised(weight: Any) -> Any:
        held = honest(weight)
        fault(held)
        return held

    return patch.object(head, "quantised", quantised)


class Unproved(ExitStack):
    """The fault, and neither proof nor limit: `verify` has to see it."""

    def start(self) -> None:
        self.enter_context(made_with(rolled))
        self.enter_context(patch.object(head.Head, "fault", lambda *_: None))
        self.enter_context(patch.object(proof.Cost, "allowed", True))

    def __enter__(self) -> Unproved:
        self.start()
        return self


HEAD_FAULTS: dict[str, Callable[[], Any]] = {
    "head_scale_doubled": lambda: made_with(doubled),
    "head_rows_swapped": lambda: made_with(swapped),
    "head_rows_rolled": Unproved,
    "head_deaf": lambda: patch.object(head.Head, "updated", lambda _: None),
    # No fault: a limit below what quantisation costs.
    "head_limit_lower": lambda: patch.object(proof, "HEAD_DIFFERENCE", 1e-4),
}
