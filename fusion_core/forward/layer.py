"""One fused layer of a model in this process: its block, its experts, what routes and what runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .mode_registry import MODES, Mode
from .router import SlotAppender

if TYPE_CHECKING:
    from .execution import Execution  # needs Triton


@dataclass(eq=False)
class FusedLayer:
    """A layer that was built fused.

    Args:
        number: of the checkpoint.
        experts: the module that holds w13 [E + S, 2 * I, H] and w2 [E + S, H, I], and what belongs to them.
        execution: what runs it in one of several modes; None where the engine runs it, in `fused` alone.
    """

    number: int
    router: SlotAppender
    experts: torch.nn.Module
    block: torch.nn.Module
    execution: Execution | None = None

    @property
    def modes(self) -> list[Mode]:
        """Return the modes that it runs in, by its plan."""
        return ["fused"] if self.execution is None else sorted(self.execution.plan.modes)

    @contextmanager
    def forced(self, mode: Mode) -> Iterator[None]:
        """Run in ``mode`` for any number of tokens; beyond the modes of its plan too.

        Raises:
            ValueError: the layer has no such mode.
        """
        known = ["fused"] if self.execution is None else list(MODES)
        if mode not in known:
            raise ValueError(f"layer {self.number} has no mode {mode!r}; it has {', '.join(known)}")
        if self.execution is None:
            yield
            return
        before, self.execution.forced = self.execution.forced, mode
        try:
            yield
        finally:
            self.execution.forced = before

    @contextmanager
    def weighted(self, factor: float) -> Iterator[None]:
        """Run with the weight of the first shared slot times ``factor``: the fault that a proof must see."""
        before, self.router.control_factor = self.router.control_factor, factor
        try:
            yield
        finally:
            self.router.control_factor = before
