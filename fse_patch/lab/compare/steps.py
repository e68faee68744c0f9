"""The steps of a comparison, one after the other, and how long they may still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

START, ANSWERS = "starting", "checking answers"


class Display(Protocol):
    """What shows where a comparison is."""

    def begin(self, number: int, total: int, words: str, left: float | None) -> None:
        """Show a step that begins; ``left`` seconds are expected for it and the rest, None: not known yet."""


class Steps:
    """All steps of all arms: each starts, is asked for answers, and is measured at each number of streams.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        arms: Sequence[str],
        streams: Sequence[int],
        display: Display,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        phases = [START, ANSWERS, *map(phase_of, streams)]
        self.steps = [(arm, phase) for arm in arms for phase in phases]
        self.display, self.clock = display, clock
        self.seconds: dict[tuple[str, str], float] = {}

    @contextmanager
    def step(self, arm: str, phase: str) -> Iterator[None]:
        """Show a step, and take its time."""
        number = self.steps.index((arm, phase)) + 1
        self.display.begin(number, len(self.steps), f"{arm}: {phase}", self.left())
        begun = self.clock()
        yield
        self.seconds[arm, phase] = self.clock() - begun

    def left(self) -> float | None:
        """Return seconds that the steps which are not done will take, None where nothing says so yet.

        A step takes as long as the same one of an earlier arm; in the first arm, as long as the last one that
        was measured: more streams have more requests, and take longer together.
        """
        total = 0.0
        for arm, phase in self.steps:
            if (arm, phase) in self.seconds:
                continue
            same = [taken for (_, other), taken in self.seconds.items() if other == phase]
            measured = [taken for (_, other), taken in self.seconds.items() if other not in (START, ANSWERS)]
            if not (same or measured):
                return None
            total += (same or measured)[-1]
        return total


def phase_of(streams: int) -> str:
    """Return the name of the step that measures so many streams."""
    return f"{streams} stream{'s' if streams > 1 else ''}"
