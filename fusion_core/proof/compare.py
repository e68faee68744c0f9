"""Comparison of two runs of one model: log-probabilities of prompts and answers agree, a control's do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import stdev
from typing import Any

# float32 limits on the absolute log-probability difference to stock, in nats. Fusing only reorders
# a float32 sum: 1e-6 is normal, a wrong weight moves the mean by 1e-3 and more.
MEAN_FLOAT32, MAX_FLOAT32 = 5e-6, 1e-4
# In 16 bit: the mean at most twice the noise of stock against itself, and a control at least ten times that.
NOISE_FACTOR, CONTROL_FACTOR = 2.0, 10.0
# The noise is the larger of two: stock in other batches, and half of what one more rounding of its embedding
# does. Small models hardly show the first; a fused model rounds elsewhere, and stays within the whole second.
NOISES = {"rebatched": 1.0, "jittered": 0.5}
# The most that an LM head in 8 bits may move the log-probability of stock's token, in the mean. Normally
# distributed weights move it by 0.01 to 0.013; where one value of each group outweighs the others, by more
# than twice that.
HEAD_DIFFERENCE = 0.02

Tokens = Sequence[int]
Best = Sequence[Sequence[tuple[int, float]]]


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
    return summary([abs(a - b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)])


def summary(values: Sequence[float]) -> Difference:
    """Sum up absolute differences; without any, those of 0 tokens."""
    # max() would let a NaN that is not in front pass for agreement.
    if any(v != v for v in values):
        return Difference(float("nan"), float("nan"), len(values))
    return Difference(sum(values) / max(1, len(values)), max(values, default=0.0), len(values))


def answer_steps(stock: Mapping[str, Any], fused: Mapping[str, Any]) -> list[list[float]]:
    """List how far apart the decode steps of two greedy answers are, as far as both had the same context.

    A step is compared by the token that stock took, in nats. Where that is none of fused's best, by the least
    that it is off. The step in which the tokens part is the last; the first token is the prompt's, and does
    not count: where those differ already there is no step.

    Args:
        stock, fused: ``greedy``, token ids [prompts][tokens], and ``greedy_best``, for each of them the best
            token ids of its step with their log-probabilities, the one that was taken among them.

    Raises:
        ValueError: an arm says more of one answer than of another.
    """
    return [
        list(_steps(ours, theirs, best, other_best))
        for ours, theirs, best, other_best in zip(
            stock["greedy"], fused["greedy"], stock["greedy_best"], fused["greedy_best"], strict=True
        )
    ]


def _steps(tokens: Tokens, others: Tokens, best: Best, other_best: Best) -> Iterator[float]:
    same = True
    for n, (token, other, held, other_held) in enumerate(zip(tokens, others, best, other_best, strict=True)):
        if not same:
            return
        same = token == other
        if n:
            logprob, other_logprobs = dict(held)[token], dict(other_held)
            if token in other_logprobs or any(map(math.isnan, other_logprobs.values())):
                yield abs(logprob - other_logprobs.get(token, math.nan))
            else:
                yield max(0.0, logprob - min(other_logprobs.values()))


def noise_of(stock: Mapping[str, Any]) -> tuple[Difference, dict[str, float]]:
    """Compare stock with itself: the noise that counts, by `NOISES`, and the mean of each kind.

    Args:
        stock: ``logprobs`` of prompts, and of the same in the ways that `NOISES` names, where they were run.
    """
    measured = {name: difference(stock["logprobs"], stock[name]) for name in NOISES if name in stock}
    scaled = [Difference(NOISES[name] * one.mean, one.max, one.tokens) for name, one in measured.items()]
    noise = max(scaled, key=lambda one: math.inf if math.isnan(one.mean) else one.mean)
    return noise, {name: one.mean for name, one in measured.items()}


@dataclass(frozen=True)
class Tolerance:
    """Limits for a fused run: on the mean, on the maximum (None: no limit), and below the control."""

    mean: float
    max: float | None
    control: float

    @classmethod
    def for_dtype(cls, dtype: str, noise: Difference) -> Tolerance:
        """Set the limits for a run in ``dtype``; ``noise`` is stock against stock."""
        if dtype == "float32":
            return cls(MEAN_FLOAT32, MAX_FLOAT32, MEAN_FLOAT32)
        return cls(NOISE_FACTOR * noise.mean, None, CONTROL_FACTOR * noise.mean)

    def holds(self, fused: Difference) -> bool:
        """Tell whether a difference lies within the limits. NaN does not."""
        return fused.mean <= self.mean and (self.max is None or fused.max <= self.max)

    def holds_few(self, values: Sequence[float]) -> bool:
        """Tell the same of single differences; in 16 bit of what they surely show, as few are off by chance.

        That is their mean less two standard errors, at least its half: a step that is far off is no chance.
        In float32 the limits are wide enough.
        """
        seen = summary(values)
        if self.max is None and len(values) > 1 and not math.isnan(seen.mean):
            error = stdev(values) / math.sqrt(len(values))
            seen = replace(seen, mean=max(seen.mean - 2 * error, seen.mean / 2))
        return self.holds(seen)

    def caught(self, control: Difference) -> bool:
        """Tell whether the deliberate fault was seen."""
        return control.mean >= self.control and not self.holds(control)

    def to_dict(self) -> dict[str, Any]:
        """Return the limits as plain data."""
        return asdict(self)
