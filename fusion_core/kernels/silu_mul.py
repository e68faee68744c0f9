"""SiLU(gate)·up of a dense MLP, times sigmoid(x·w) where the shared expert has a gate; one launch.

The gate's weight is linear in the MLP's output, so it may be applied to the inner states, which are narrower.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Most inner states that one program computes: few tokens need more programs than tokens.
COLUMNS = 512


def reference(
    gate_up: torch.Tensor, hidden_states: torch.Tensor | None = None, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """What `silu_mul` computes, in float64."""
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
    """[num_tokens, I] in the dtype of ``gate_up``.

    Args:
        gate_up: [num_tokens, 2 * I], gate before up, contiguous.
        hidden_states: [num_tokens, H], rows contiguous; gate: H values. Both, or neither.
        factor: multiplies the result.
    """
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    gated = hidden_states is not None and gate is not None
    hidden = hidden_states.shape[1] if gated and hidden_states is not None else 1
    columns = min(COLUMNS, triton.next_power_of_2(width))
    _silu_mul[(tokens, triton.cdiv(width, columns))](
        gate_up,
        hidden_states if gated else gate_up,
        gate if gated else gate_up,
        out,
        hidden_states.stride(0) if gated and hidden_states is not None else 0,
        factor,
        WIDTH=width,
        HIDDEN=hidden,
        GATED=gated,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(hidden),
        num_warps=4,
    )
    return out


@triton.jit
def _silu_mul(
    gate_up,
    x,
    gate,
    out,
    stride,
    factor,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    weight = factor
    if GATED:
        row = tl.arange(0, BLOCK)
        state = tl.load(x + token * stride + row, mask=row < HIDDEN, other=0.0).to(tl.float32)
        scale = tl.load(gate + row, mask=row < HIDDEN, other=0.0).to(tl.float32)
        weight = factor / (1.0 + tl.exp(-tl.sum(state * scale, 0)))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    g = tl.load(gate_up + token * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + token * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value = g / (1.0 + tl.exp(-g)) * u * weight
    tl.store(out + token * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)
