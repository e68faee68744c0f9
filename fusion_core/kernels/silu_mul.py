"""SiLU(gate)·up of a dense MLP, times sigmoid(x·w) where the shared expert has a gate; one launch.

The gate's weight is linear in the MLP's output, so it may be applied to the inner states, which are narrower.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Most inner states that one program computes: few tokens need more programs than tokens.
BLOCK_N = 512


def reference(
    gate_up: torch.Tensor, hidden_states: torch.Tensor | None = None, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute what `silu_mul` computes, in float64; shapes as there."""
    one, up = gate_up.double().chunk(2, dim=-1)
    inner = torch.nn.functional.silu(one) * up
    if hidden_states is None or gate is None:
        return inner
    return inner * (hidden_states.double() @ gate.double().reshape(-1, 1)).sigmoid()


def silu_mul(
    gate_up: torch.Tensor,
    hidden_states: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """Compute the inner states of a dense MLP: SiLU(gate)·up, times sigmoid(x·w) where there is a gate.

    Args:
        gate_up: [num_tokens, 2 * I], gate before up, contiguous, any float dtype; computed in float32.
        hidden_states: [num_tokens, H], rows contiguous; gate: H values. Both, or neither.
        factor: multiplies the result.

    Returns:
        [num_tokens, I] in the dtype of ``gate_up``.
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    gated = hidden_states is not None and gate is not None
    # Without a gate the kernel reads neither of the two.
    states, stride, hidden = gate_up, 0, 1
    if gated and hidden_states is not None:
        states, stride, hidden = hidden_states, hidden_states.stride(0), hidden_states.shape[1]
    block_n = min(BLOCK_N, triton.next_power_of_2(width))
    _silu_mul[(tokens, triton.cdiv(width, block_n))](
        gate_up,
        states,
        gate if gated else gate_up,
        out,
        stride,
        factor,
        WIDTH=width,
        HIDDEN=hidden,
        GATED=gated,
        BLOCK_N=block_n,
        BLOCK_H=triton.next_power_of_2(hidden),
        num_warps=4,
    )
    return out


@triton.jit
def _silu_mul(
    gate_up_ptr,
    x_ptr,
    gate_ptr,
    out_ptr,
    stride_xm,
    factor,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    weight = factor
    if GATED:
        offs_h = tl.arange(0, BLOCK_H)
        mask_h = offs_h < HIDDEN
        x = tl.load(x_ptr + token * stride_xm + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32)
        weight = factor / (1.0 + tl.exp(-tl.sum(x * gate, 0)))
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < WIDTH
    row_ptr = gate_up_ptr + token * 2 * WIDTH + offs_n
    g = tl.load(row_ptr, mask=mask_n, other=0.0).to(tl.float32)
    u = tl.load(row_ptr + WIDTH, mask=mask_n, other=0.0).to(tl.float32)
    value = g / (1.0 + tl.exp(-g)) * u * weight
    tl.store(out_ptr + token * WIDTH + offs_n, value.to(out_ptr.dtype.element_ty), mask=mask_n)
