"""Append of the shared slots to a top-k that an engine has made, in one launch."""

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
    ranks: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `append` computes, in torch; shapes and dtypes as there."""
    shared = slot_weight if gate is None else gate.to(weights.dtype).sigmoid() * slot_weight
    return append_shared_slots(weights, ids, slots, shared, ranks)


def append(
    weights: torch.Tensor,
    ids: torch.Tensor,
    slots: range,
    gate: torch.Tensor | None,
    slot_weight: float = 1.0,
    ranks: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append S columns to ``topk_weights`` and ``topk_ids``.

    Args:
        weights: [num_tokens, k] float32; ids: [num_tokens, k] int32. Rows may be strided.
        slots: the S ids.
        gate: logits [num_tokens, 1] of the gate that all slots share; None: they weigh ``slot_weight``.
        slot_weight: factor on the slots' weight.
        ranks: as of `append_shared_slots`.

    Returns:
        Both as [num_tokens, k + S], contiguous, dtypes as given.
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
        RANKS=ranks,
        TOP_K=top_k,
        TOTAL=total,
        GATED=gate is not None,
        BLOCK_N=triton.next_power_of_2(total),
        num_warps=1,
    )
    return out_weights, out_ids


@triton.jit
def _append(
    weights_ptr,
    ids_ptr,
    gate_ptr,
    out_weights_ptr,
    out_ids_ptr,
    stride_wm,
    stride_im,
    stride_gm,
    first_slot,
    slot_weight,
    RANKS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOTAL: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    routed = offs_n < TOP_K
    weight = tl.load(weights_ptr + token * stride_wm + offs_n, mask=routed, other=0.0)
    expert = tl.load(ids_ptr + token * stride_im + offs_n, mask=routed, other=0)
    shared = slot_weight
    if GATED:
        shared = slot_weight / (1.0 + tl.exp(-tl.load(gate_ptr + token * stride_gm).to(tl.float32)))
    weight = tl.where(routed, weight, shared)
    slot = first_slot + (token % RANKS).to(tl.int32) * (TOTAL - TOP_K) + offs_n - TOP_K
    expert = tl.where(routed, expert, slot)
    mask = offs_n < TOTAL
    tl.store(out_weights_ptr + token * TOTAL + offs_n, weight, mask=mask)
    tl.store(out_ids_ptr + token * TOTAL + offs_n, expert, mask=mask)
