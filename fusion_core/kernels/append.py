"""Appends the shared slots to a top-k that an engine has made, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .routing_reference import append_shared_slots


def reference(
    weights: torch.Tensor,
    ids: torch.Tensor,
    slots: range,
    gate: torch.Tensor | None,
    slot_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `append` computes, in torch."""
    shared = slot_weight if gate is None else gate.to(weights.dtype).sigmoid() * slot_weight
    return append_shared_slots(weights, ids, slots, shared)


def append(
    weights: torch.Tensor,
    ids: torch.Tensor,
    slots: range,
    gate: torch.Tensor | None,
    slot_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk_weights`` and ``topk_ids`` with S more columns, contiguous.

    Args:
        weights: [num_tokens, k] float32; ids: [num_tokens, k] int32. Rows may be strided.
        slots: the S ids.
        gate: logits [num_tokens, 1] of the gate that all slots share; None: they weigh ``slot_weight``.
        slot_weight: factor on the slots' weight.
    """
    tokens, top_k = weights.shape
    total = top_k + len(slots)
    out_weights = torch.empty(tokens, total, dtype=weights.dtype, device=weights.device)
    out_ids = torch.empty(tokens, total, dtype=ids.dtype, device=ids.device)
    if not tokens:
        return out_weights, out_ids  # no GPU takes an empty grid
    _append[(tokens,)](
        weights,
        ids,
        weights if gate is None else gate,
        out_weights,
        out_ids,
        weights.stride(0),
        ids.stride(0),
        0 if gate is None else gate.stride(0),
        slots.start,
        slot_weight,
        TOP_K=top_k,
        TOTAL=total,
        GATED=gate is not None,
        BLOCK=triton.next_power_of_2(total),
        num_warps=1,
    )
    return out_weights, out_ids


@triton.jit
def _append(
    weights,
    ids,
    gate,
    out_weights,
    out_ids,
    weights_stride,
    ids_stride,
    gate_stride,
    first_slot,
    slot_weight,
    TOP_K: tl.constexpr,
    TOTAL: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    routed = column < TOP_K
    weight = tl.load(weights + token * weights_stride + column, mask=routed, other=0.0)
    chosen = tl.load(ids + token * ids_stride + column, mask=routed, other=0)
    shared = slot_weight
    if GATED:
        shared = slot_weight / (1.0 + tl.exp(-tl.load(gate + token * gate_stride).to(tl.float32)))
    weight = tl.where(routed, weight, shared)
    chosen = tl.where(routed, chosen, first_slot + column - TOP_K)
    tl.store(out_weights + token * TOTAL + column, weight, mask=column < TOTAL)
    tl.store(out_ids + token * TOTAL + column, chosen, mask=column < TOTAL)
