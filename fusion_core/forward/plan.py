"""Plans and counts: which mode runs a fused layer for how many tokens, and how often each one ran.

Which mode is the fastest for how many tokens is measured (tuned.py); without a measurement only `split` keeps
stock's speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .mode_registry import MODES, Mode


@dataclass(frozen=True)
class ModePlan:
    """A mode for every number of tokens: a step holds up to its limit, the last mode beyond all of them.

    Args:
        steps: (tokens, mode), in ascending order of tokens.
        otherwise: the mode beyond the last step.
        source: where this was taken from, in words.
        gains: by number of tokens, how many times as fast as stock its mode is at least; empty where that was
            not measured.
    """

    steps: tuple[tuple[int, Mode], ...]
    otherwise: Mode
    source: str
    gains: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = [limit for limit, _ in self.steps]
        if limits != sorted(set(limits)) or any(limit < 1 for limit in limits):
            raise ValueError(f"limits {limits} are not ascending numbers of tokens")
        if unknown := self.modes - set(MODES):
            raise ValueError(f"{sorted(unknown)[0]!r} is no mode; use one of {', '.join(MODES)}")

    def mode_of(self, num_tokens: int) -> Mode:
        """Return the mode for ``num_tokens``. A host number: it is known when a CUDA graph is captured."""
        for limit, mode in self.steps:
            if num_tokens <= limit:
                return mode
        return self.otherwise

    @property
    def modes(self) -> set[Mode]:
        """Return all modes that can run."""
        return {mode for _, mode in self.steps} | {self.otherwise}

    def __str__(self) -> str:
        steps = [f"{mode} up to {limit}" for limit, mode in self.steps]
        return ", ".join([*steps, f"{self.otherwise} {'beyond' if steps else 'always'}"])


def always(mode: Mode, source: str) -> ModePlan:
    """Return the plan of one mode."""
    return ModePlan((), mode, source)


class ModeCounter:
    """Calls of fused layers in this process, by layer and mode.

    A captured graph calls no Python when it runs; so what was called while one was captured is kept apart. Of
    graphs that an engine captures to measure them, and gives up, nothing tells here: they count as well.
    """

    def __init__(self) -> None:
        self._calls: Counter[tuple[int, Mode]] = Counter()
        self._captured: Counter[tuple[int, Mode]] = Counter()

    def add(self, layer: int, mode: Mode, captured: bool = False) -> None:
        """Count one forward call of ``layer``; ``captured``: into a graph."""
        self._calls[layer, mode] += 1
        if captured:
            self._captured[layer, mode] += 1

    def layers(self, mode: Mode | None = None) -> list[int]:
        """List the layers that ran at least once, or are in a captured graph, in order; in ``mode`` alone."""
        ran = (*self._calls, *self._captured)
        return sorted({layer for layer, name in ran if mode in (None, name)})

    def by_mode(self) -> dict[str, int]:
        """Return the calls of all layers, by mode."""
        return _by_mode(self._calls)

    def captured_by_mode(self) -> dict[str, int]:
        """Return the calls of all layers that were captured, by mode: one for each layer and graph."""
        return _by_mode(self._captured)

    def reset(self) -> None:
        """Forget all calls, so that start-up runs of an engine do not count; captured ones run later."""
        self._calls.clear()


def _by_mode(calls: Counter[tuple[int, Mode]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for (_, mode), number in calls.items():
        total[mode] += number
    return dict(total)
