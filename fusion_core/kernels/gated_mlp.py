"""sigmoid(x·w)·y (+ residual) in one launch: the gate of a shared expert that stays unfused."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import begin, options


def reference(
    hidden_states: torch.Tensor, gate: torch.Tensor, mlp: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """What `gated_mlp` computes, in float64."""
    out = (hidden_states.double() @ gate.double().reshape(-1, 1)).sigmoid() * mlp.double()
    return out if residual is None else out + residual.double()


def gated_mlp(
    hidden_states: torch.Tensor, gate: torch.Tensor, mlp: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """[num_tokens, H] in the dtype of ``mlp``.

    Args:
        hidden_states: [num_tokens, H]; gate: [1, H]; mlp and residual: [num_tokens, H]. Rows contiguous.
    """
    tokens, hidden = mlp.shape
    out = torch.empty_like(mlp)
    _gated_mlp[(tokens,)](
        hidden_states,
        gate,
        mlp,
        mlp if residual is None else residual,
        out,
        HIDDEN=hidden,
        ADD=residual is not None,
        BLOCK=triton.next_power_of_2(hidden),
        num_warps=8 if hidden > 2048 else 4,
        **options(mlp),
    )
    return out


@triton.jit
def _gated_mlp(
    x,
    gate,
    mlp,
    residual,
    out,
    HIDDEN: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    state = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(gate + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(mlp + start + column, mask=inside, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-tl.sum(state * weight, 0)))
    if ADD:
        value += tl.load(residual + start + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + column, value.to(out.dtype.element_ty), mask=inside)
