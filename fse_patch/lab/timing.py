"""Timing of what is captured in CUDA graphs, one against the other, and what may be said of the ratios."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..adapters.graph_timing import in_rounds, reading
from ..fusion_core.decision.layout import ExpertLayout

# Seconds of GPU time that one reading of one graph takes, about: long against a clock's resolution.
READING = 0.01
# Device-to-device copies of large tensors on an H200, bytes read and written.
H200_BYTES_PER_SECOND = 4.3e12
# How far stock may be off itself in a row that counts.
STOCK_NOISE = 0.005
RESAMPLES = 2000


def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture what ``function`` launches in a graph, after it was run for kernels to be compiled."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def in_turn(arms: Mapping[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each arm in each round. Rounds alternate: none always follows the same one."""
    first = next(iter(arms.values()))
    reading(first, 3)
    replays = max(5, min(400, int(READING / reading(first, 3))))
    for graph in arms.values():
        reading(graph, replays)
    return in_rounds(arms, replays, rounds)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: the median over the rounds, and the lower end of its 95 % interval."""

    median: float
    lower: float


def ratio(stock: Sequence[float], other: Sequence[float], seed: int = 0) -> Ratio:
    """Return stock over other, round by round.

    Raises:
        ValueError: the arms do not have the same number of rounds.
    """
    ratios = [a / b for a, b in zip(stock, other, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return Ratio(statistics.median(ratios), medians[int(0.025 * RESAMPLES)])


def is_quiet(again: Ratio) -> bool:
    """Return whether stock against itself came out even: otherwise a row says nothing."""
    return abs(again.median - 1) <= STOCK_NOISE


def floor_seconds(
    layout: ExpertLayout, parts: int, experts: float, gate_rows: int, itemsize: int = 2
) -> float:
    """Return in how many seconds the weights of so many routed experts and of the shared slots are read."""
    width = layout.moe_intermediate_size // parts
    weights = (experts + layout.num_shared_slots) * 3 * layout.hidden_size * width
    return (weights + gate_rows * layout.hidden_size) * itemsize / H200_BYTES_PER_SECOND
