"""Time of a CUDA graph, by events on its device: for measuring at start, and for benchmarks."""

from __future__ import annotations

from typing import Any

import torch


def reading(graph: Any, replays: int) -> float:
    """Return the seconds of one replay of ``graph``, of so many in a row."""
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / replays
