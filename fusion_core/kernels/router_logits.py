"""Router logits of few tokens: x·W over the gate's [E + G, H] rows, in float32, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import begin, options

# Rows of the gate, and most columns, of a tile.
BLOCK_N = 2
BLOCK_K = 1024


def reference(hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute what `router_logits` computes, in float64; shapes as there."""
    return hidden_states.double() @ gate.double().T


def router_logits(hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Compute the router's logits: hidden_states @ gate.T in float32.

    Meant for up to about 16 tokens: every token reads the gate anew, from the cache.

    Args:
        hidden_states: [num_tokens, H]; gate: [E + G, H], contiguous. Any float dtype.

    Returns:
        [num_tokens, E + G] float32.
    """
    tokens, hidden = hidden_states.shape
    logits = torch.empty(tokens, gate.shape[0], dtype=torch.float32, device=hidden_states.device)
    _router_logits[(triton.cdiv(gate.shape[0], BLOCK_N), tokens)](
        hidden_states,
        gate,
        logits,
        gate.shape[0],
        hidden_states.stride(0),
        HIDDEN=hidden,
        BLOCK_K=min(BLOCK_K, triton.next_power_of_2(hidden)),
        BLOCK_N=BLOCK_N,
        num_warps=4,
        **options(hidden_states),
    )
    return logits


@triton.jit
def _router_logits(
    x_ptr,
    gate_ptr,
    logits_ptr,
    N,
    stride_xm,
    HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    token = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.static_range(0, HIDDEN, BLOCK_K):
        mask_k = start + offs_k < HIDDEN
        x = tl.load(x_ptr + token * stride_xm + start + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        tile_ptr = gate_ptr + offs_n[:, None] * HIDDEN + start + offs_k[None, :]
        gate = tl.load(tile_ptr, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        acc += gate.to(tl.float32) * x[None, :]
    tl.store(logits_ptr + token * N + offs_n, tl.sum(acc, 1), mask=mask_n)
