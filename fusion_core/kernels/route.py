"""Routing of a fused layer in one launch: from logits of E experts and the shared gate to k+S slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..decision.outcome import RoutingSpec
from .launch import begin, options
from .routing_reference import append_shared_slots
from .routing_reference import route as route_reference

# More would not fit the registers of one program, and no model of the families asks for more.
MAX_TOP_K = 16
# Zeros that a program stores at once: 16 bytes a thread and store in 16 bits.
STEP = tl.constexpr(1024)


def reference(
    logits: torch.Tensor,
    top_k: int,
    slots: range,
    spec: RoutingSpec,
    correction_bias: torch.Tensor | None = None,
    slot_weight: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what `route` computes, in torch; float64 where the logits are float64."""
    experts = slots.start
    weights, ids = route_reference(logits[:, :experts], top_k, spec, correction_bias)
    shared: torch.Tensor | float = slot_weight
    if logits.shape[1] > experts:
        shared = logits[:, experts:].to(weights.dtype).sigmoid() * slot_weight
    return append_shared_slots(weights, ids, slots, shared)


def route(
    logits: torch.Tensor,
    top_k: int,
    slots: range,
    spec: RoutingSpec,
    correction_bias: torch.Tensor | None = None,
    slot_weight: float = 1.0,
    zeros: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose and weigh ``top_k`` experts for each token, and append the shared slots.

    Args:
        logits: [num_tokens, E + G], contiguous rows. G = 1: the last column is the logit of the gate that all
            slots share. G = 0: the slots weigh ``slot_weight``.
        slots: the S ids of the shared slots; they start at E.
        spec: how the family routes; `routing_reference.route` has the formulas.
        correction_bias: [E] float32, added for choosing only.
        slot_weight: factor on the slots' weight.
        zeros: [num_tokens, N], contiguous: gets zeros in the same launch, whatever it is for.

    Returns:
        ``topk_weights`` float32 and ``topk_ids`` int32, both [num_tokens, top_k + S].

    Raises:
        ValueError: ``top_k`` is over MAX_TOP_K.
    """
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k is {top_k}; the kernel takes {MAX_TOP_K} at most")
    tokens, experts = logits.shape[0], slots.start
    groups = spec.num_expert_group if spec.scoring == "sigmoid" else 1
    weights = torch.empty(tokens, top_k + len(slots), dtype=torch.float32, device=logits.device)
    ids = torch.empty_like(weights, dtype=torch.int32)
    _route[(tokens,)](
        logits,
        correction_bias if correction_bias is not None else logits,
        weights,
        ids,
        weights if zeros is None else zeros,
        logits.stride(0),
        spec.routed_scaling_factor,
        slot_weight,
        EXPERTS=experts,
        TOP_K=top_k,
        SLOTS=len(slots),
        GATED=logits.shape[1] > experts,
        SIGMOID=spec.scoring == "sigmoid",
        BIASED=correction_bias is not None,
        RENORMALIZE=spec.renormalize,
        GROUPS=groups,
        TOP_GROUPS=spec.topk_group if groups > 1 else 1,
        GROUPS_P2=triton.next_power_of_2(groups),
        IN_GROUP_P2=triton.next_power_of_2(experts // groups),
        OUT_P2=triton.next_power_of_2(top_k + len(slots)),
        ZEROS=0 if zeros is None else zeros.shape[1],
        num_warps=1,
        **options(logits),
    )
    return weights, ids


@triton.jit
def _route(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    zeros_ptr,
    stride_lm,
    scale,
    slot_weight,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    GATED: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS_P2: tl.constexpr,
    IN_GROUP_P2: tl.constexpr,
    OUT_P2: tl.constexpr,
    ZEROS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    if ZEROS:
        for first in tl.range(0, ZEROS, STEP):
            offs_z = first + tl.arange(0, STEP)
            row = tl.zeros([STEP], zeros_ptr.dtype.element_ty)
            tl.store(zeros_ptr + token * ZEROS + offs_z, row, mask=offs_z < ZEROS)
    PLACES: tl.constexpr = GROUPS_P2 * IN_GROUP_P2
    NONE: tl.constexpr = -(1 << 31)
    IN_GROUP: tl.constexpr = EXPERTS // GROUPS
    place = tl.arange(0, PLACES)
    offs_e = place // IN_GROUP_P2 * IN_GROUP + place % IN_GROUP_P2
    mask_e = (place // IN_GROUP_P2 < GROUPS) & (place % IN_GROUP_P2 < IN_GROUP)
    row_ptr = logits_ptr + token * stride_lm
    score = tl.load(row_ptr + offs_e, mask=mask_e, other=float("-inf")).to(tl.float32)
    peak = tl.max(score, 0)
    total = 1.0
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-score))
    elif not RENORMALIZE:
        total = tl.sum(tl.exp(score - peak), 0)
    choice = score
    if BIASED:
        choice += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    if GROUPS > 1:
        choice = tl.where(mask_e, choice, float("-inf"))
        choice = _keep_groups(choice, GROUPS, TOP_GROUPS, GROUPS_P2, IN_GROUP_P2, BIASED)
    # Reductions of 32-bit integers are one instruction. Of equal values the first place wins; no choice falls
    # beyond the experts.
    key = tl.where(mask_e, _ordered(choice), NONE)
    offs_n = tl.arange(0, OUT_P2)
    expert = tl.zeros([OUT_P2], tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(key, 0)
        won = tl.min(tl.where(key == best, place, PLACES), 0)
        expert = tl.where(offs_n == k, won // IN_GROUP_P2 * IN_GROUP + won % IN_GROUP_P2, expert)
        key = tl.where(place == won, NONE, key)
    routed = offs_n < TOP_K
    weight = tl.load(row_ptr + expert, mask=routed, other=float("-inf")).to(tl.float32)
    weight = 1.0 / (1.0 + tl.exp(-weight)) if SIGMOID else tl.exp(weight - peak)
    if RENORMALIZE:
        total = tl.sum(weight, 0)
    weight = weight / total * scale
    shared = slot_weight
    if GATED:
        gate = tl.load(row_ptr + EXPERTS).to(tl.float32)
        shared = slot_weight / (1.0 + tl.exp(-gate))
    weight = tl.where(routed, weight, shared)
    expert = tl.where(routed, expert, EXPERTS + offs_n - TOP_K)
    offs_out = token * (TOP_K + SLOTS) + offs_n
    mask = offs_n < TOP_K + SLOTS
    tl.store(weights_ptr + offs_out, weight, mask=mask)
    tl.store(ids_ptr + offs_out, expert, mask=mask)


@triton.jit
def _ordered(value):
    """Map float32 to int32 of the same order, all above the least one; both zeros are one."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _keep_groups(
    choice,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS_P2: tl.constexpr,
    IN_GROUP_P2: tl.constexpr,
    TWO_BEST: tl.constexpr,
):
    """Put -inf for all experts outside the groups with the best expert, or the best two."""
    table = tl.reshape(choice, [GROUPS_P2, IN_GROUP_P2])
    mark = tl.max(table, 1)
    if TWO_BEST:
        first = tl.argmax(table, 1)
        offs_n = tl.arange(0, IN_GROUP_P2)
        mark += tl.max(tl.where(offs_n[None, :] == first[:, None], float("-inf"), table), 1)
    group = tl.arange(0, GROUPS_P2)
    mark = tl.where(group < GROUPS, mark, float("-inf"))
    kept = tl.zeros([GROUPS_P2], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.argmax(mark, 0)
        kept = tl.where(group == best, 1, kept)
        mark = tl.where(group == best, float("-inf"), mark)
    table = tl.where(kept[:, None] == 1, table, float("-inf"))
    return tl.reshape(table, [GROUPS_P2 * IN_GROUP_P2])
