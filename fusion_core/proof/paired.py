"""Proof of a paired layer: ours against the engine's own forward on the same states, and against float32.

Routing is the same in both arms: logits are given, with choices that no rounding changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..decision.layout import ExpertLayout

# Chosen experts' logits lie above CHOSEN, all others below LEFT: far apart in any dtype.
CHOSEN, LEFT = 1.0, -2.0
# Errors beside stock's own: rounding of an output alone is not worth a refusal.
_FLOOR = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
# What the pass itself may be off, whatever the engine is: a fault of one block must not hide behind FP8.
_OWN = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
# Between the two arms; FP8 activations are the engine's, and coarse.
_BETWEEN = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 4e-2}
_BETWEEN_FP8 = 0.2
# Times the engine's own error that ours may have.
_NO_FURTHER = 1.1


@dataclass(frozen=True)
class Inputs:
    """States [num_tokens, H] and router logits [num_tokens, E]; the first n rows are inputs of n tokens."""

    hidden_states: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Errors:
    """How far arms are apart, relative to the reference, at the token where it is most.

    Args:
        ours, stock: of each arm from the reference.
        between: of one arm from the other.
    """

    ours: float
    stock: float
    between: float


def inputs_of(
    layout: ExpertLayout,
    num_tokens: int,
    routing: str,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    device: torch.device,
) -> Inputs:
    """Draw inputs; ``routing`` "alike": all tokens choose the same experts, "even": all others."""
    draw = torch.Generator("cpu").manual_seed(layout.num_routed)
    hidden = torch.randn(num_tokens, layout.hidden_size, generator=draw)
    order = torch.randperm(layout.num_routed, generator=draw)
    tokens = torch.zeros(num_tokens, 1) if routing == "alike" else torch.arange(num_tokens)[:, None]
    places = (tokens * layout.top_k + torch.arange(layout.top_k)) % layout.num_routed
    chosen = order[places.long()]
    logits = LEFT - torch.rand(num_tokens, layout.num_routed, generator=draw)
    logits.scatter_(1, chosen, CHOSEN + torch.rand(num_tokens, layout.top_k, generator=draw))
    return Inputs(hidden.to(device, dtype), logits.to(device, logits_dtype))


def errors_of(ours: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor) -> Errors:
    """Compare outputs [num_tokens, H]; whatever is not finite is infinitely far off."""
    size = reference.double().norm(dim=1)

    def off(a: torch.Tensor, b: torch.Tensor) -> float:
        apart = (a.double() - b.double()).norm(dim=1) / size
        return float(apart.nan_to_num(torch.inf).max())

    return Errors(off(ours, reference), off(stock, reference), off(ours, stock))


def fault(errors: Errors, dtype: torch.dtype, quantised: bool) -> str:
    """Say what of an arm may not be served, or "".

    Args:
        dtype: of states and outputs.
        quantised: the engine rounds activations as well.
    """
    between = _BETWEEN_FP8 if quantised else _BETWEEN[dtype]
    if not errors.between <= between:
        return f"{errors.between:.2g} off the engine's own output, {between:.2g} is allowed"
    if not errors.ours <= _OWN[dtype]:
        return f"{errors.ours:.2g} off float32, {_OWN[dtype]:.2g} is allowed"
    allowed = max(_NO_FURTHER * errors.stock, _FLOOR[dtype])
    if not errors.ours <= allowed:
        return f"{errors.ours:.2g} off float32, the engine's own is {errors.stock:.2g} off"
    return ""


def gate_fault(ours: torch.Tensor, stock: torch.Tensor) -> str:
    """Say whether logits of a gate [num_tokens, columns] are not those of the engine's gate, or ""."""
    apart = float(((ours.double() - stock.double()).norm() / stock.double().norm()).nan_to_num(torch.inf))
    allowed = _BETWEEN.get(stock.dtype, _BETWEEN[torch.bfloat16])
    return "" if apart <= allowed else f"logits are {apart:.2g} off those of the engine's gate"
