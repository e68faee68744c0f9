"""Gate of a shared expert that stays unfused, sigmoid(x·w)·y (+ residual), in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import begin, options


def reference(
    hidden_states: torch.Tensor, gate: torch.Tensor, mlp: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute what `gated_mlp` computes, in float64; shapes as there."""
    out = (hidden_states.double() @ gate.double().reshape(-1, 1)).sigmoid() * mlp.double()
    return out if residual is None else out + residual.double()


def gated_mlp(
    hidden_states: torch.Tensor, gate: torch.Tensor, mlp: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Weigh the shared expert's output by its gate, and add ``residual``: sigmoid(x·w)·y (+ residual).

    Args:
        hidden_states: [num_tokens, H]; gate: [1, H]; mlp and residual: [num_tokens, H]. Rows contiguous, any
            float dtype; computed in float32.

    Returns:
        [num_tokens, H] in the dtype of ``mlp``.
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
        BLOCK_H=triton.next_power_of_2(hidden),
        num_warps=8 if hidden > 2048 else 4,
        **options(mlp),
    )
    return out


@triton.jit
def _gated_mlp(
    x_ptr,
    gate_ptr,
    mlp_ptr,
    residual_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    offs_h = tl.arange(0, BLOCK_H)
    mask = offs_h < HIDDEN
    x = tl.load(x_ptr + row + offs_h, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offs_h, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(mlp_ptr + row + offs_h, mask=mask, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-tl.sum(x * gate, 0)))
    if ADD:
        value += tl.load(residual_ptr + row + offs_h, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + offs_h, value.to(out_ptr.dtype.element_ty), mask=mask)
