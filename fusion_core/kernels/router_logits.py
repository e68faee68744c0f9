"""Router logits of few tokens: x·W over the gate's [E + G, H] rows, in float32, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import begin, options

ROWS = 2
COLUMNS = 1024


def reference(hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """What `router_logits` computes, in float64."""
    return hidden_states.double() @ gate.double().T


def router_logits(hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Logits float32 [num_tokens, E + G] of ``hidden_states`` [num_tokens, H] by ``gate`` [E + G, H].

    Meant for up to about 16 tokens: every token reads the gate anew, from the cache.
    """
    tokens, hidden = hidden_states.shape
    logits = torch.empty(tokens, gate.shape[0], dtype=torch.float32, device=hidden_states.device)
    _router_logits[(triton.cdiv(gate.shape[0], ROWS), tokens)](
        hidden_states,
        gate,
        logits,
        gate.shape[0],
        hidden_states.stride(0),
        HIDDEN=hidden,
        BLOCK=min(COLUMNS, triton.next_power_of_2(hidden)),
        ROWS=ROWS,
        num_warps=4,
        **options(hidden_states),
    )
    return logits


@triton.jit
def _router_logits(
    x,
    gate,
    logits,
    rows,
    stride,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, HIDDEN, BLOCK):
        inside = start + column < HIDDEN
        state = tl.load(x + token * stride + start + column, mask=inside, other=0.0).to(tl.float32)
        both = (row < rows)[:, None] & inside[None, :]
        weight = tl.load(gate + row[:, None] * HIDDEN + start + column[None, :], mask=both, other=0.0)
        total += weight.to(tl.float32) * state[None, :]
    tl.store(logits + token * rows + row, tl.sum(total, 1), mask=row < rows)
