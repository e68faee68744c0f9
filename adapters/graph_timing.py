"""Time of a CUDA graph, by events on its device: for measuring at start, and for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

ROUNDS = 7
# Seconds of one reading.
READING = 0.004


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


def capture(function: Callable[[], object]) -> Any:
    """Return a CUDA graph of what ``function`` launches."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def in_turn(graphs: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return seconds of each graph in each round; rounds alternate, none always follows the other."""
    for graph in graphs.values():
        reading(graph, 2)
    return in_rounds(graphs, max(3, min(200, int(READING / reading(graphs["stock"], 3)))), ROUNDS)


def in_rounds(graphs: Mapping[str, Any], replays: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds of a replay of each graph in each round, of ``replays`` in a row."""
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds):
        for name in list(graphs) if number % 2 == 0 else list(graphs)[::-1]:
            seconds[name].append(reading(graphs[name], replays))
    return seconds
