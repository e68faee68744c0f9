"""The threshold of paired layers: the most tokens for which they are as fast as the engine's own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .plan import ModePlan

SIZES = (1, 2, 4, 8, 16, 32, 64)
# How tokens choose experts while it is measured: unrelated ones, and all the same.
ROUTINGS = ("even", "alike")
# Of times stock over ours: below this a size counts as slower.
LEAST = 0.985
# What merged weights must gain beyond those sizes: paired ones are easier to load, to update and to prove.
WORTH = 1.02
# Standard errors between a mean and its lower bound.
_ERRORS = 2.0

# (tokens, routing) -> ratios stock over ours, a number for each round.
Ratios = Mapping[tuple[int, str], Sequence[float]]


@dataclass(frozen=True)
class Threshold:
    """What a measurement says.

    Args:
        tokens: the largest number that runs paired; 0: none, the engine's own is faster.
        bounds: lower bound of stock over ours, by size and routing.
    """

    tokens: int
    bounds: Mapping[tuple[int, str], float]


def merged_gains(plan: ModePlan) -> bool:
    """Tell whether merged weights gain where a pass for few tokens does not reach: the plan fuses there.

    Where it was not measured by how much, that it fuses is enough.
    """
    if plan.gains:
        beyond = {size: gain for size, gain in plan.gains.items() if size > SIZES[-1]}
        return any(plan.mode_of(size) == "fused" and gain >= WORTH for size, gain in beyond.items())
    return "fused" in (*(mode for limit, mode in plan.steps if limit > SIZES[-1]), plan.otherwise)


def lower_bound(ratios: Sequence[float]) -> float:
    """Return what the mean of such ratios is at least; of a single one, nothing is known."""
    if len(ratios) < 2:
        return 0.0
    return statistics.fmean(ratios) - _ERRORS * statistics.stdev(ratios) / math.sqrt(len(ratios))


def threshold_of(ratios: Ratios, routings: Sequence[str] = ROUTINGS) -> Threshold:
    """Return the largest size up to which every size is as fast under every routing, and some size gains."""
    bounds = {case: lower_bound(found) for case, found in ratios.items()}
    tokens = 0
    for size in sorted({size for size, _ in bounds}):
        if any(bounds.get((size, routing), 0.0) < LEAST for routing in routings):
            break
        tokens = size
    gains = any(bound > 1.0 for (size, _), bound in bounds.items() if size <= tokens)
    return Threshold(tokens if gains else 0, bounds)
