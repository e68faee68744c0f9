"""A small check of answers: the log-probability of every token of a few fixed prompts, server by server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import FsePatchError
from ...fusion_core.proof.compare import MEAN_FLOAT32, NOISE_FACTOR, Difference, difference
from .http import ask

# In 16 bit, the mean difference in nats that one more rounding may make where stock shows no noise at all.
LEAST_16_BIT = 0.02
Logprobs = list[list[float]]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of every prompt token but the first, [prompts][tokens], in nats.

    Args:
        together: all prompts in one request.
        alone: a request for each: other batches.
    """

    together: Logprobs
    alone: Logprobs


@dataclass(frozen=True)
class Agreement:
    """Fused against stock, beside stock against itself.

    Args:
        fused: mean and largest absolute difference, in nats.
        noise: the larger of two: both stock servers, and stock in other batches.
        limit: of the mean.
    """

    fused: Difference
    noise: Difference
    limit: float

    @property
    def holds(self) -> bool:
        """Return whether the difference is within the limit. NaN is not."""
        return self.fused.mean <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        agree = "agree" if self.holds else "DO NOT agree"
        return (
            f"answers {agree}: log-probabilities differ by {self.fused.mean:.2g} (mean of "
            f"{self.fused.tokens} tokens, limit {self.limit:.2g}); "
            f"stock differs from itself by {self.noise.mean:.2g}"
        )


def take(
    url: str,
    model: str,
    prompts: Sequence[Sequence[int]],
    key: str,
    check: Callable[[], None] = lambda: None,
) -> Answers:
    """Ask a server for the log-probabilities of prompts.

    Args:
        check: is called between requests; raises where the server has ended.

    Raises:
        FsePatchError: the server does not give them, or does not answer.
    """
    together = _score(url, model, list(prompts), key)
    alone = []
    for prompt in prompts:
        check()
        alone += _score(url, model, [prompt], key)
    return Answers(together, alone)


def _score(url: str, model: str, prompts: Sequence[Sequence[int]], key: str) -> Logprobs:
    # With echo, an answer begins with its prompt: nothing is sampled that is compared.
    how = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    told = ask(url, "/v1/completions", key, {"model": model, "prompt": list(map(list, prompts)), **how})
    try:
        choices = sorted(told["choices"], key=lambda choice: choice["index"])
        scored = [choice["logprobs"]["token_logprobs"] for choice in choices]
        return [
            [float(value) for value in values[1 : len(prompt)]]
            for values, prompt in zip(scored, prompts, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise FsePatchError(f"{url}: gives no log-probabilities of prompts: {error!r}") from None


def agreement(stock: Answers, fused: Answers, again: Answers, float32: bool) -> Agreement:
    """Compare the three servers.

    Args:
        float32: the servers compute in float32; otherwise in 16 bit.

    Raises:
        FsePatchError: they did not score the same tokens.
    """
    try:
        noises = [difference(stock.together, other) for other in (again.together, stock.alone)]
        ours = difference(stock.together, fused.together)
    except ValueError as error:
        raise FsePatchError(str(error)) from None
    noise = max(noises, key=lambda one: one.mean)
    return Agreement(ours, noise, max(NOISE_FACTOR * noise.mean, MEAN_FLOAT32 if float32 else LEAST_16_BIT))
