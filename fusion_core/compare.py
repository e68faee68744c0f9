"""Whether two runs of one model agree: teacher-forced log-probabilities, with a control that must not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

# float32 limits on the absolute log-probability difference to stock, in nats. Fusing only reorders
# a float32 sum: 1e-6 is normal, a wrong weight moves the mean by 1e-3 and more.
MEAN_FLOAT32, MAX_FLOAT32 = 5e-6, 1e-4
# In 16 bit: the mean at most twice the noise of stock against itself (in other batches, or with one
# more rounding, whichever is more), and a control at least ten times that.
NOISE_FACTOR, CONTROL_FACTOR = 2.0, 10.0


@dataclass(frozen=True)
class Difference:
    """Absolute differences of log-probabilities, in nats, over ``tokens`` tokens."""

    mean: float
    max: float
    tokens: int


def difference(one: list[list[float]], other: list[list[float]]) -> Difference:
    """Compare two runs, prompt by prompt and token by token.

    Raises:
        ValueError: the runs are not of the same tokens, or are of none.
    """
    if [len(p) for p in one] != [len(p) for p in other] or not any(one):
        raise ValueError("the two runs did not score the same tokens")
    values = [abs(a - b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)]
    # max() would let a NaN that is not in front pass for agreement.
    if any(v != v for v in values):
        return Difference(float("nan"), float("nan"), len(values))
    return Difference(sum(values) / len(values), max(values), len(values))


def steps(one: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
    """Compare the decode steps of two runs' greedy answers, as far as both had the same context.

    Where the tokens part, each has the largest log-probability of one distribution: that step is the last
    that counts. The first token comes of the prompt, and does not.

    Args:
        one, other: ``greedy``, token ids [prompts][tokens], and ``greedy_logprobs`` of them.
    """
    ends = [
        next((n + 1 for n, (a, b) in enumerate(zip(*both, strict=True)) if a != b), len(both[0]))
        for both in zip(one["greedy"], other["greedy"], strict=True)
    ]
    values = [
        [found[1:end] for found, end in zip(run["greedy_logprobs"], ends, strict=True)]
        for run in (one, other)
    ]
    return difference(*values) if any(values[0]) else Difference(0.0, 0.0, 0)


def largest(found: Iterable[Difference]) -> Difference:
    """The one with the largest mean; one that is no number, if there is one."""
    return max(found, key=lambda one: math.inf if math.isnan(one.mean) else one.mean)


@dataclass(frozen=True)
class Tolerance:
    """Limits for a fused run: on the mean, on the maximum (None: no limit), and below the control."""

    mean: float
    max: float | None
    control: float

    @classmethod
    def for_dtype(cls, dtype: str, noise: Difference) -> Tolerance:
        """Limits for a run in ``dtype``; ``noise`` is stock against stock."""
        if dtype == "float32":
            return cls(MEAN_FLOAT32, MAX_FLOAT32, MEAN_FLOAT32)
        return cls(NOISE_FACTOR * noise.mean, None, CONTROL_FACTOR * noise.mean)

    def holds(self, found: Difference) -> bool:
        """Whether a difference lies within the limits. NaN does not."""
        return found.mean <= self.mean and (self.max is None or found.max <= self.max)

    def caught(self, control: Difference) -> bool:
        """Whether the deliberate fault was seen."""
        return control.mean >= self.control and not self.holds(control)

    def to_dict(self) -> dict[str, Any]:
        """The limits as plain data."""
        return asdict(self)
