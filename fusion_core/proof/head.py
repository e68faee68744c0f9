"""Proof of a quantised head: each row of logits within its rounding, and what the rounding costs in all.

Both take states [num_tokens, K] and the rows that a process holds; what is compared over processes is a few
numbers a state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..quant.int8_groups import LARGEST, ROWS, Int8Rows, in_groups
from .compare import HEAD_DIFFERENCE

# States that each row is compared on, and those that the cost is measured on.
CHECKED, MEASURED = 32, 256
# Standard deviations of rounding that a logit may be off by: more than a sum of so many ever is.
DEVIATIONS = 8.0
# Of all logits of a state, as language models have it.
SPREAD = 3.0
# The least share of states at which both heads choose the same token; beside `HEAD_DIFFERENCE`.
LEAST_AGREEMENT = 0.9


def random_states(count: int, width: int, device: torch.device, seed: int = 11) -> torch.Tensor:
    """Return states of norm sqrt(K) in float32, the same in every process."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw).to(device)


def text_states(rows: torch.Tensor) -> torch.Tensor:
    """Return states at which a head is about to choose the tokens of a text, among the best of the others.

    Args:
        rows: of the head, [num_tokens, K], those of the tokens.
    """
    toward = torch.nn.functional.normalize(rows.float(), dim=1)
    beside = random_states(len(rows), rows.shape[1], rows.device, seed=12)
    # The best of many random logits lies four to five spreads above their mean.
    return beside + 5.0 * toward


@dataclass(frozen=True)
class RowFault:
    """A logit that rounding does not explain, of a row as this process numbers it."""

    row: int
    off: float
    allowed: float

    def __str__(self) -> str:
        return f"row {self.row}: off by {self.off:.3g}, rounding explains {self.allowed:.3g}"


def row_fault(
    states: torch.Tensor, ours: torch.Tensor, stock: torch.Tensor, scales: torch.Tensor
) -> RowFault | None:
    """Return the row that is the farthest outside of what rounding explains, or None.

    A value is off by up to half a scale, evenly spread; a logit by the sum of that over the columns.

    Args:
        states: [num_tokens, K]; ours, stock: [num_tokens, N] of one dtype; scales: [N, K / 32].
    """
    squares = in_groups(states.float().square()).sum(2)
    rounding = 2.0 * torch.finfo(stock.dtype).eps
    worst, found = 1.0, None
    for first in range(0, len(scales), ROWS):
        part = slice(first, first + ROWS)
        noise = (squares @ scales[part].float().square().T / 12.0).sqrt()
        # In the dtype of the logits, sums and results are rounded once more.
        allowed = (
            (DEVIATIONS + LARGEST * math.sqrt(12.0) * rounding) * noise
            + rounding * stock[:, part].float().abs()
            + torch.finfo(torch.float32).tiny
        )
        off = (ours[:, part].float() - stock[:, part].float()).abs()
        beyond = torch.where(torch.isfinite(off), off / allowed, torch.inf)
        most = int(beyond.argmax())
        token, row = divmod(most, beyond.shape[1])
        if beyond[token, row] > worst:
            worst = float(beyond[token, row])
            found = RowFault(first + row, float(off[token, row]), float(allowed[token, row]))
    return found


@dataclass(frozen=True)
class Part:
    """What one process's rows say of each state; all [num_tokens] in float32 but for ids.

    Args:
        best, best_id: stock's largest logit, and its token; ours_there: what ours gives that token.
        ours_best, ours_id: ours' largest logit, and its token.
        total, ours_total: logarithm of the sum of exponentials.
    """

    best: torch.Tensor
    best_id: torch.Tensor
    ours_there: torch.Tensor
    ours_best: torch.Tensor
    ours_id: torch.Tensor
    total: torch.Tensor
    ours_total: torch.Tensor


def spread_of(states: torch.Tensor, weight: torch.Tensor, rows: int) -> tuple[float, int]:
    """Return the sum of squares of all logits of this process's first ``rows`` rows, and their number."""
    total = 0.0
    for first in range(0, rows, ROWS):
        total += float((states @ weight[first : min(first + ROWS, rows)].float().T).square().sum())
    return total, rows * len(states)


def scale_of(parts: Sequence[tuple[float, int]]) -> float:
    """Return what states are multiplied by, so that logits spread as in a language model."""
    total, count = (sum(part[i] for part in parts) for i in range(2))
    return SPREAD / math.sqrt(max(total / max(count, 1), 1e-30))


def part_of(states: torch.Tensor, weight: torch.Tensor, held: Int8Rows, rows: int, first_id: int) -> Part:
    """Compare both heads, in float32, on this process's rows.

    Args:
        rows: of ``weight`` [N, K] that stand for tokens; the others pad. first_id: token of the first row.
    """
    count, device = len(states), states.device
    low = torch.full((count,), -torch.inf, device=device)
    none = torch.zeros(count, dtype=torch.long, device=device)
    best, there, ours_best, total, ours_total = low, low, low, low, low
    best_id, ours_id = none, none
    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        stock = states @ weight[first:last].float().T
        ours = states @ held.rows(first, last).T
        now, place = stock.max(1)
        there = torch.where(now > best, ours.gather(1, place[:, None])[:, 0], there)
        best_id = torch.where(now > best, place + first + first_id, best_id)
        best = torch.maximum(now, best)
        now, place = ours.max(1)
        ours_id = torch.where(now > ours_best, place + first + first_id, ours_id)
        ours_best = torch.maximum(now, ours_best)
        total = torch.logaddexp(total, stock.logsumexp(1))
        ours_total = torch.logaddexp(ours_total, ours.logsumexp(1))
    found = (best, best_id, there, ours_best, ours_id, total, ours_total)
    return Part(*(each.cpu() for each in found))


@dataclass(frozen=True)
class Cost:
    """What quantisation costs on some states.

    Args:
        agreement: share of the states at which both heads choose the same token.
        difference: mean of how much the log-probability of the token moves that stock chooses.
    """

    states: int
    agreement: float
    difference: float

    @property
    def allowed(self) -> bool:
        """Return whether it is within the limits; NaN is not."""
        return self.agreement >= LEAST_AGREEMENT and self.difference <= HEAD_DIFFERENCE

    def __str__(self) -> str:
        return (
            f"same top-1 token {100 * self.agreement:.1f} %, log-probability moves by {self.difference:.2g}"
        )


def cost_of(parts: Sequence[Part]) -> Cost:
    """Return the cost by what all processes found on the same states."""
    best = torch.stack([part.best for part in parts])
    ours_best = torch.stack([part.ours_best for part in parts])
    stock_at, ours_at = best.argmax(0), ours_best.argmax(0)

    def at(place: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(values).gather(0, place[None])[0]

    same = at(stock_at, [part.best_id for part in parts]) == at(ours_at, [part.ours_id for part in parts])
    stock = at(stock_at, [part.best for part in parts]) - torch.stack([p.total for p in parts]).logsumexp(0)
    there = at(stock_at, [part.ours_there for part in parts])
    ours = there - torch.stack([p.ours_total for p in parts]).logsumexp(0)
    return Cost(len(same), float(same.float().mean()), float((ours - stock).abs().mean()))
