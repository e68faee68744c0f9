"""A window over decode steps: it opens when all streams have decoded for a while, and closes after some.

Engines count any step, prompts among them. Inside the window torch's profiler makes a table of kernels by
time; or the calls that an outer profiler waits for are made. Around each step is a range of NVTX (on ROCm of
roctx).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import FsePatchError

# Who looks: torch's profiler, or one outside of the process that waits for cudaProfilerStart.
Looker = Literal["torch", "outside"]


@dataclass(frozen=True)
class Row:
    """A kernel, or on a CPU an operator: seconds in it, and calls of it, in all steps of the window."""

    name: str
    calls: int
    seconds: float


class DecodeWindow:
    """One window in the process that holds the model.

    Args:
        streams: that decode in each step that counts.
        warm_up: steps in a row that must have been so before it opens.
        steps: after so many it closes.
    """

    def __init__(self, streams: int, warm_up: int, steps: int, looker: Looker) -> None:
        self.streams, self.warm_up, self.steps, self.looker = streams, warm_up, steps, looker
        self.warm = self.seen = 0
        self.state: Literal["waiting", "open", "closed"] = "waiting"
        self.profiler: Any = None
        self.rows: list[Row] = []

    def step(self, decoding: int) -> None:
        """Note that a step begins.

        Args:
            decoding: streams that decode in it; 0 where it also has prompts.

        Raises:
            FsePatchError: a prompt, or the end of a stream, fell into the window.
        """
        right = decoding == self.streams
        if self.state == "open":
            self._end_range()
            if self.seen == self.steps:
                return self.close()
            if not right:
                self.close()
                raise FsePatchError(
                    f"step {self.seen + 1} of the window has {decoding} of {self.streams} streams; "
                    "give fewer --steps or --warm-up"
                )
        if self.state == "waiting":
            if self.warm == self.warm_up and right:
                self._open()
            self.warm = min(self.warm + 1, self.warm_up) if right else 0
        if self.state == "open":
            self.seen += 1
            self._begin_range()

    def close(self) -> None:
        """Close it, if it is open, and make the table."""
        if self.state != "open":
            return
        self.state = "closed"
        _wait()
        if self.looker == "outside":
            _outside("cudaProfilerStop")
            return
        self.profiler.stop()
        self.rows = table(self.profiler.key_averages())
        self.profiler = None

    def _open(self) -> None:
        self.state = "open"
        _wait()
        if self.looker == "outside":
            return _outside("cudaProfilerStart")
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=kinds, acc_events=True)
        self.profiler.start()

    def _begin_range(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(f"fse_patch: decode step {self.seen}")  # type: ignore[no-untyped-call]

    def _end_range(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def table(events: Any) -> list[Row]:
    """Return kernels by time, the longest first; where there is no device, operators of the CPU."""
    kernels = [e for e in events if e.device_type.name == "CUDA"]
    if kernels:
        found = [Row(e.key, e.count, e.self_device_time_total / 1e6) for e in kernels]
    else:
        found = [Row(e.key, e.count, e.self_cpu_time_total / 1e6) for e in events]
    return sorted((row for row in found if row.seconds > 0), key=lambda row: -row.seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _outside(call: str) -> None:
    if torch.cuda.is_available():
        getattr(torch.cuda.cudart(), call)()  # type: ignore[no-untyped-call]
