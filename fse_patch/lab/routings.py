"""Routings of one measured block: hidden states that its own router sends to chosen experts.

What a mode costs depends on how many tokens share an expert. So every number of tokens is measured under
several routings, by states alone: weights and router of the block stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FsePatchError
from ..fusion_core.decision.outcome import MoeSpec, RoutingSpec
from ..fusion_core.kernels.routing_reference import route

EVEN, ZIPF, ALIKE = "even", "zipf", "alike"
# Tokens in a row that have one state.
GROUP = 4
# Of how often an expert is drawn: 1 / rank to this power.
EXPONENT = 1.0
# Distance between experts that are chosen and others, in units of the largest value that chooses: more than
# rounding of states and of logits to bfloat16 moves them.
GAP = 0.02


@dataclass(frozen=True)
class Router:
    """The router of one block.

    Args:
        gate: its weight, [E, H], float64.
        bias: the correction bias, [E], float64; None where it has none.
        top_k: experts of each token.
    """

    gate: torch.Tensor
    bias: torch.Tensor | None
    top_k: int
    spec: RoutingSpec

    @classmethod
    def of(cls, block: Any, moe: MoeSpec) -> Router:
        """Make it of an engine's block."""
        bias = getattr(block.gate, "e_score_correction_bias", None)
        return cls(
            block.gate.weight.data.double(),
            None if bias is None else bias.data.double(),
            moe.layout.top_k,
            moe.routing,
        )

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits [num_tokens, E] of states [num_tokens, H], in float64."""
        return states.double() @ self.gate.T

    def choice(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the values whose k largest are chosen."""
        if self.spec.scoring == "softmax":
            return logits
        return logits.sigmoid() if self.bias is None else logits.sigmoid() + self.bias

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and ids of the chosen experts, both [num_tokens, k]."""
        return route(logits, self.top_k, self.spec, self.bias)

    def distinct(self, states: torch.Tensor) -> int:
        """Return how many routed experts the tokens choose, each counted once."""
        return int(self.route(self.logits(states))[1].flatten().bincount().count_nonzero())

    def steered(self, states: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Change states as little as needed for them to choose the given experts, [num_tokens, k].

        The given experts get the states' own k largest logits, and the others stay ``GAP`` below them. Only
        the part of a state that the gate sees is changed, so states keep about their size.

        Raises:
            FsePatchError: no states found that choose so.
        """
        logits = self.logits(states)
        wanted = logits.scatter(1, experts, logits.topk(self.top_k).values)
        choice = self.choice(wanted)
        highest = choice.gather(1, experts).amin(1, keepdim=True) - GAP * choice.abs().amax(1, keepdim=True)
        held = wanted.minimum(self._logits_of(highest)).scatter(1, experts, wanted.gather(1, experts))
        # The pseudo-inverse of the gate: its square is small, and quick to invert.
        inverse = self.gate.T @ torch.linalg.pinv(self.gate @ self.gate.T, hermitian=True)
        steered: torch.Tensor = (states.double() + (held - logits) @ inverse.T).to(states.dtype)
        chosen = self.route(self.logits(steered))[1]
        if not torch.equal(chosen.sort(1).values, experts.to(chosen.dtype).sort(1).values):
            raise FsePatchError("no states found whose router chooses the experts that were drawn")
        return steered

    def _logits_of(self, choice: torch.Tensor) -> torch.Tensor:
        """Return the logits that choose with such a value, [num_tokens, 1]; [num_tokens, E] with a bias."""
        if self.spec.scoring == "softmax":
            return choice
        return (choice if self.bias is None else choice - self.bias).logit(eps=1e-4)


# Router, number of tokens, source of random numbers -> states [num_tokens, H] in bfloat16, on its device.
States = Callable[[Router, int, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Routing:
    """A routing.

    Args:
        fewest: tokens from which it is measured; below, it is no other than `EVEN`.
    """

    name: str
    states: States
    fewest: int = 2


def _even(router: Router, num_tokens: int, draw: torch.Generator) -> torch.Tensor:
    shape = num_tokens, router.gate.shape[1]
    return torch.randn(shape, device=draw.device, dtype=torch.bfloat16, generator=draw)


def _zipf(router: Router, num_tokens: int, draw: torch.Generator) -> torch.Tensor:
    ranks = torch.randperm(len(router.gate), device=draw.device, generator=draw) + 1
    often = ranks.double().pow(-EXPONENT).expand(num_tokens, -1)
    experts = torch.multinomial(often, router.top_k, generator=draw)
    return router.steered(_even(router, num_tokens, draw), experts)


def _groups(router: Router, num_tokens: int, draw: torch.Generator) -> torch.Tensor:
    drawn = _even(router, -(-num_tokens // GROUP), draw)
    return drawn.repeat_interleave(GROUP, 0)[:num_tokens]


def _alike(router: Router, num_tokens: int, draw: torch.Generator) -> torch.Tensor:
    return _even(router, 1, draw).repeat(num_tokens, 1)


ROUTINGS = {
    routing.name: routing
    for routing in (
        Routing(EVEN, _even, fewest=1),
        # Some experts are chosen often and most seldom, as in trained models.
        Routing(ZIPF, _zipf),
        # As streams of one prompt, or tokens that a draft proposes.
        Routing("groups", _groups),
        Routing(ALIKE, _alike),
    )
}


def named(text: str) -> list[str]:
    """Return the routings that a text names, with commas, in the order of `ROUTINGS`.

    Raises:
        FsePatchError: there is no such routing.
    """
    asked = [part.strip() for part in text.split(",")]
    if unknown := [name for name in asked if name not in ROUTINGS]:
        raise FsePatchError(f"--routings: unknown routing {unknown[0]!r}; use some of {', '.join(ROUTINGS)}")
    return [name for name in ROUTINGS if name in asked]


def for_tokens(names: Sequence[str], tokens: int) -> list[str]:
    """Return those of some routings that are measured with so many tokens: with one, `EVEN` alone."""
    return [name for name in names if tokens >= ROUTINGS[name].fewest] or [EVEN]
