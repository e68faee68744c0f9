"""Router logits of few tokens: x·W over the gate's [E + G, H] rows, in float32, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import begin, dot, options

# Rows of the gate, and most columns, of a tile.
BLOCK_N = 2
# Tokens from which on they are columns of a matrix product: so many at once, by rows of the gate.
PRODUCT_FROM = 8
TOKENS, ROWS, WARPS, DEPTH = 16, 8, 8, 64


def tile(tokens: int, hidden: int) -> tuple[int, int]:
    """Return the most columns, and the warps, of a tile: the fastest ones on an H200."""
    return (2048, 8) if tokens <= 2 and hidden > 2048 else (1024, 4)


def reference(
    hidden_states: torch.Tensor, gate: torch.Tensor, further: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute what `router_logits` computes, in float64; shapes as there."""
    rows = gate if further is None else torch.cat([gate, further])
    return hidden_states.double() @ rows.double().T


def router_logits(
    hidden_states: torch.Tensor, gate: torch.Tensor, further: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the router's logits: hidden_states @ gate.T in float32.

    Meant for few tokens: each, or each 16 of them, reads the gate anew, from the cache.

    Args:
        hidden_states: [num_tokens, H]; gate: [E + G, H], contiguous. Any float dtype.
        further: [F, H], contiguous: rows that follow those of ``gate``, in memory of their own.

    Returns:
        [num_tokens, E + G + F] float32.
    """
    tokens, hidden = hidden_states.shape
    first, rows = gate.shape[0], gate.shape[0] + (0 if further is None else further.shape[0])
    logits = torch.empty(tokens, rows, dtype=torch.float32, device=hidden_states.device)
    apart = gate if further is None else further
    alike = gate.dtype == hidden_states.dtype == apart.dtype
    # Most AMD GPUs have 64 KiB of shared memory: too little for its stages of loads.
    if tokens >= PRODUCT_FROM and alike and gate.itemsize == 2 and torch.version.hip is None:
        _product[(triton.cdiv(rows, ROWS), triton.cdiv(tokens, TOKENS))](
            hidden_states,
            gate,
            apart,
            logits,
            tokens,
            rows,
            first,
            hidden_states.stride(0),
            APART=further is not None,
            HIDDEN=hidden,
            SPAN=triton.cdiv(hidden, WARPS * DEPTH) * DEPTH,
            TOKENS=TOKENS,
            ROWS=ROWS,
            WARPS=WARPS,
            DEPTH=DEPTH,
            WIDE=not logits.is_cuda,
            num_warps=WARPS,
            **options(hidden_states),
        )
        return logits
    block_k, warps = tile(tokens, hidden)
    _router_logits[(triton.cdiv(rows, BLOCK_N), tokens)](
        hidden_states,
        gate,
        apart,
        logits,
        rows,
        first,
        hidden_states.stride(0),
        APART=further is not None,
        HIDDEN=hidden,
        BLOCK_K=min(block_k, triton.next_power_of_2(hidden)),
        BLOCK_N=BLOCK_N,
        num_warps=warps,
        **options(hidden_states),
    )
    return logits


@triton.jit
def _router_logits(
    x_ptr,
    gate_ptr,
    further_ptr,
    logits_ptr,
    N,
    FIRST,
    stride_xm,
    APART: tl.constexpr,
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
        offs = offs_n[:, None] * HIDDEN + start + offs_k[None, :]
        mask = mask_n[:, None] & mask_k[None, :]
        here = mask & (offs_n < FIRST)[:, None] if APART else mask
        gate = tl.load(gate_ptr + offs, mask=here, other=0.0).to(tl.float32)
        if APART:
            there = mask & (offs_n >= FIRST)[:, None]
            gate += tl.load(further_ptr + offs - FIRST * HIDDEN, mask=there, other=0.0).to(tl.float32)
        acc += gate * x[None, :]
    tl.store(logits_ptr + token * N + offs_n, tl.sum(acc, 1), mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _product(
    x_ptr,
    gate_ptr,
    further_ptr,
    logits_ptr,
    M,
    N,
    FIRST,
    stride_xm,
    APART: tl.constexpr,
    HIDDEN: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    offs_t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Each warp has a part of the columns.
    first = tl.arange(0, WARPS)[:, None, None] * SPAN
    across_k = first + tl.arange(0, DEPTH)[None, None, :]
    down_k = first + tl.arange(0, DEPTH)[None, :, None]
    x_ptrs = x_ptr + offs_t.to(tl.int64)[None, :, None] * stride_xm + across_k
    offs = offs_n[None, None, :] * HIDDEN + down_k
    here = (offs_n < N) & (offs_n < FIRST) if APART else offs_n < N
    further = ((offs_n < N) & (offs_n >= FIRST))[None, None, :]
    acc = tl.zeros([WARPS, TOKENS, ROWS], tl.float32)
    for start in tl.range(0, SPAN, DEPTH, num_stages=4):
        x = tl.load(x_ptrs + start, mask=(offs_t < M)[None, :, None] & (across_k + start < HIDDEN), other=0.0)
        inside = down_k + start < HIDDEN
        gate = tl.load(gate_ptr + offs + start, mask=here[None, None, :] & inside, other=0.0)
        if APART:
            gate += tl.load(further_ptr + offs - FIRST * HIDDEN + start, mask=further & inside, other=0.0)
        acc = dot(x, gate, acc, WIDE)
    there = (offs_t < M)[:, None] & (offs_n < N)[None, :]
    tl.store(logits_ptr + offs_t[:, None] * N + offs_n[None, :], tl.sum(acc, 0), mask=there)
