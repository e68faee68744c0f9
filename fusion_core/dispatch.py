"""Which execution mode runs a fused layer, and how often each one ran in this process."""

from __future__ import annotations

from collections import Counter
from typing import Literal

Mode = Literal["small", "fused", "split"]


class ModeCounter:
    """Calls of fused layers in this process, by layer and mode."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[int, Mode]] = Counter()

    def add(self, layer: int, mode: Mode) -> None:
        """Count one forward call of ``layer``."""
        self._calls[layer, mode] += 1

    def layers(self) -> list[int]:
        """Layers that ran fused at least once, in order."""
        return sorted({layer for layer, _ in self._calls})

    def by_mode(self) -> dict[str, int]:
        """Calls of all layers, by mode."""
        total: Counter[str] = Counter()
        for (_, mode), calls in self._calls.items():
            total[mode] += calls
        return dict(total)

    def reset(self) -> None:
        """Forget all calls, so that start-up runs of an engine do not count."""
        self._calls.clear()
