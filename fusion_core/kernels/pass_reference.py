"""The pass over routed and shared experts in torch: the reference of `experts_once`, and what a CPU runs.

In float32, or float64 for float64 states, whatever the weights are stored as.
"""

from __future__ import annotations

import torch

from . import int4_reference
from .expert_weights import Block, ExpertWeights, slots_of


def experts_once(
    hidden_states: torch.Tensor,
    routed: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared: ExpertWeights | None = None,
) -> torch.Tensor:
    """Sum the chosen experts and the shared one for each token.

    Args:
        hidden_states: [num_tokens, H].
        topk_weights, topk_ids: [num_tokens, k + S], float and int32. Ids E..E+S-1 stand for the parts of the
            shared expert, each I columns wide but for the last; a pair with a negative id is left out.

    Returns:
        [num_tokens, H] in the dtype of the states.
    """
    exact = torch.promote_types(hidden_states.dtype, torch.float32)
    states, weights = hidden_states.to(exact), topk_weights.to(exact)
    count = routed.w13.shape[0]
    out = torch.zeros_like(states)
    for expert in topk_ids.unique().tolist():
        if 0 <= expert < count:
            tokens, columns = (topk_ids == expert).nonzero(as_tuple=True)
            w13, w2 = dense(routed, exact, expert)
            out.index_add_(0, tokens, _inner(states[tokens], w13) @ w2.T * weights[tokens, columns, None])
    if shared is not None:
        slots = torch.arange(count, count + slots_of(shared, routed.width), device=topk_ids.device)
        of_slot = ((topk_ids[:, :, None] == slots) * weights[:, :, None]).sum(dim=1)
        of_column = of_slot.repeat_interleave(routed.width, dim=1)[:, : shared.width]
        w13, w2 = dense(shared, exact, 0)
        out += (_inner(states, w13) * of_column) @ w2.T
    return out.to(hidden_states.dtype)


def dense(experts: ExpertWeights, dtype: torch.dtype, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w13 [2 * I, H] and w2 [H, I] of one expert with their scales applied."""
    if (int4 := experts.int4) is not None:
        return (
            int4_reference.dense(int4, "w13", experts.w13, expert, dtype),
            int4_reference.dense(int4, "w2", experts.w2, expert, dtype),
        )
    w13, w2 = experts.w13[expert].to(dtype), experts.w2[expert].to(dtype)
    if (scales := experts.scales) is not None:
        half = w13.shape[0] // 2
        of_w13 = scales.w13[expert]
        # w3 begins a block of its own: its scales follow those of w1. One row is for both.
        s1, s3 = of_w13.chunk(2) if len(of_w13) > 1 else (of_w13, of_w13)
        parts = ((w13[:half], s1), (w13[half:], s3))
        w13 = torch.cat([part * _spread(s, scales.block, part) for part, s in parts])
        w2 = w2 * _spread(scales.w2[expert], scales.block, w2)
    return w13, w2


def _spread(scales: torch.Tensor, block: Block, weight: torch.Tensor) -> torch.Tensor:
    """Repeat scales [rows, columns] over the blocks of ``weight``."""
    spread = scales.to(weight.dtype)
    for dim, size in enumerate(block):
        spread = spread.repeat_interleave(size or weight.shape[dim], dim).narrow(dim, 0, weight.shape[dim])
    return spread


def _inner(states: torch.Tensor, w13: torch.Tensor) -> torch.Tensor:
    gate, up = (states @ w13.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
