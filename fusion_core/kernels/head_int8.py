"""Logits of few tokens by a head in 8 bits, x·(q*s): each row is read once for all of them, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import begin, dot, options

# Most tokens of a call: columns of one matrix product.
TOKENS = 16
# Rows of the head, and groups of 32 columns, of a tile.
ROWS, GROUPS, GROUP = 64, 4, 32


def reference(hidden_states: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Compute what `head_logits` computes, in float64; shapes as there."""
    weight = values.double() * scales.double().repeat_interleave(GROUP, 1)
    return hidden_states.double() @ weight.T


def head_logits(hidden_states: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Compute hidden_states @ (values * scales).T, summed in float32.

    Products are those of 16-bit states and of 8-bit values, which 16 bits hold; a group's sum is scaled.

    Args:
        hidden_states: [num_tokens, K], up to 16 tokens, bfloat16 or float16, rows contiguous.
        values: int8 [N, K]; scales: [N, K / 32]. Both contiguous.

    Returns:
        [num_tokens, N] in the dtype of ``hidden_states``.
    """
    tokens, hidden = hidden_states.shape
    assert tokens <= TOKENS
    assert hidden % GROUP == 0
    logits = torch.empty(tokens, len(values), dtype=hidden_states.dtype, device=hidden_states.device)
    _head_logits[(triton.cdiv(len(values), ROWS),)](
        hidden_states,
        values,
        scales,
        logits,
        tokens,
        len(values),
        hidden_states.stride(0),
        HIDDEN=hidden,
        TOKENS=TOKENS,
        ROWS=ROWS,
        GROUPS=GROUPS,
        GROUP=GROUP,
        WIDE=not logits.is_cuda,
        num_warps=4,
        **options(hidden_states),
    )
    return logits


@triton.jit(do_not_specialize=["M"])
def _head_logits(
    x_ptr,
    values_ptr,
    scales_ptr,
    logits_ptr,
    M,
    N,
    stride_xm,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_t = tl.arange(0, TOKENS)
    groups = tl.arange(0, GROUPS)
    inside = tl.arange(0, GROUP)
    # A head has more values than 32 bits can count.
    rows = offs_n.to(tl.int64)[None, :, None]
    across = groups[:, None, None] * GROUP + inside[None, None, :]
    down = groups[:, None, None] * GROUP + inside[None, :, None]
    acc = tl.zeros([GROUPS, ROWS, TOKENS], tl.float32)
    for first in tl.range(0, HIDDEN // GROUP, GROUPS, num_stages=4):
        there = (first + groups < HIDDEN // GROUP)[:, None, None]
        row = (offs_n < N)[None, :, None]
        start = first * GROUP
        values = tl.load(values_ptr + rows * HIDDEN + start + across, mask=there & row, other=0)
        x = tl.load(
            x_ptr + offs_t[None, None, :] * stride_xm + start + down,
            mask=there & (offs_t < M)[None, None, :],
            other=0.0,
        )
        scales = tl.load(
            scales_ptr + rows * (HIDDEN // GROUP) + first + groups[:, None, None],
            mask=there & row,
            other=0.0,
        )
        sums = dot(values.to(tl.float32).to(x.dtype), x, tl.zeros([GROUPS, ROWS, TOKENS], tl.float32), WIDE)
        acc += sums * scales.to(tl.float32)
    logits = tl.sum(acc, 0)
    mask = (offs_n < N)[:, None] & (offs_t < M)[None, :]
    out = logits_ptr + offs_t.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(out, logits.to(logits_ptr.dtype.element_ty), mask=mask)
