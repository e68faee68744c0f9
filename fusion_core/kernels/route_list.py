"""Routing of few tokens together with the list of the experts that they chose, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..decision.outcome import RoutingSpec
from .launch import begin, options
from .route import MAX_TOP_K, ordered, weigh
from .work_list import MOST_TOKENS, Work, clear, fit, pointers, room, sizes, write_list

# Threads of a warp, and most columns of a token's choice.
LANES = 32
TopK = tuple[torch.Tensor, torch.Tensor]


def takes(tokens: int, top_k: int, slots: int, spec: RoutingSpec) -> bool:
    """Return whether `route_list` takes so many tokens, choices and shared slots: no groups of experts."""
    grouped = spec.scoring == "sigmoid" and spec.num_expert_group > 1
    return tokens <= MOST_TOKENS and top_k <= MAX_TOP_K and top_k + slots <= LANES and not grouped


def route_list(
    logits: torch.Tensor,
    top_k: int,
    slots: range,
    spec: RoutingSpec,
    correction_bias: torch.Tensor | None = None,
    slot_weight: float = 1.0,
    part: int = 0,
    states: torch.Tensor | None = None,
) -> tuple[TopK, Work]:
    """Route as `route` does, and list what was chosen as `work_list` does.

    Args:
        part, states: as of `work_list`; the other arguments as of `route`.

    Returns:
        What `route` returns, and what `work_list` returns.
    """
    tokens, experts = logits.shape[0], slots.start
    weights = torch.empty(tokens, top_k + len(slots), dtype=torch.float32, device=logits.device)
    ids = torch.empty_like(weights, dtype=torch.int32)
    work = room(ids, part, states)
    size = sizes(work, experts + len(slots), states)
    _route_list[(1 + work.lists + (0 if states is None else tokens),)](
        logits,
        correction_bias if correction_bias is not None else logits,
        weights,
        ids,
        *pointers(work, states, logits),
        tokens,
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
        PARTS=triton.next_power_of_2(triton.cdiv(experts, LANES)),
        **size,
        # A warp for each token.
        num_warps=size["TOKENS_P2"],
        **options(logits),
    )
    return (weights, ids), work


@triton.jit
def _route_list(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, count_ptr, experts_ptr, rows_ptr, part_count_ptr,
    part_experts_ptr, part_rows_ptr, x_ptr, fitted_ptr, factors_ptr, M, stride_lm, scale, slot_weight,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, GATED: tl.constexpr,
    SIGMOID: tl.constexpr, BIASED: tl.constexpr, RENORMALIZE: tl.constexpr, PARTS: tl.constexpr,
    TOKENS_P2: tl.constexpr, PART: tl.constexpr, WHOLE_COLUMNS: tl.constexpr, WHOLE_PLACES: tl.constexpr,
    PART_COLUMNS: tl.constexpr, PART_PLACES: tl.constexpr, LISTS: tl.constexpr, WORDS: tl.constexpr,
    HIDDEN: tl.constexpr, HIDDEN_P2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    number = tl.program_id(0)
    if number <= LISTS:
        # The lists of some tokens route them once more: that takes less time than to wait for it.
        first = tl.maximum(number - 1, 0) * PART
        size = tl.where(number == 0, M, tl.minimum(PART, M - first))
        clear(rows_ptr, part_rows_ptr, number, WHOLE_COLUMNS, WHOLE_PLACES, PART_COLUMNS, PART_PLACES)
        offs_t = tl.arange(0, TOKENS_P2)
        offs_n = tl.arange(0, 32)[None, :]
        expert, weight = _choose(
            logits_ptr, bias_ptr, first + offs_t, offs_t < size, stride_lm, scale, slot_weight, EXPERTS,
            TOP_K, GATED, SIGMOID, BIASED, RENORMALIZE, PARTS, TOKENS_P2,
        )  # fmt: skip
        there = (offs_t < size)[:, None] & (offs_n < TOP_K + SLOTS)
        if number == 0:
            offs_out = offs_t[:, None] * (TOP_K + SLOTS) + offs_n
            tl.store(weights_ptr + offs_out, weight, mask=there)
            tl.store(ids_ptr + offs_out, expert, mask=there)
        write_list(
            tl.where(there, expert, -1), number, first, count_ptr, experts_ptr, rows_ptr, part_count_ptr,
            part_experts_ptr, part_rows_ptr, TOP_K + SLOTS, WHOLE_COLUMNS, PART_COLUMNS, PART_PLACES, WORDS,
        )  # fmt: skip
    elif HIDDEN:
        fit(x_ptr, fitted_ptr, factors_ptr, number - LISTS - 1, HIDDEN, HIDDEN_P2)


@triton.jit
def _choose(
    logits_ptr, bias_ptr, token, real, stride_lm, scale, slot_weight, EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, GATED: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    RENORMALIZE: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Return experts and weights of some tokens, [TOKENS, 32] each; columns from TOP_K on are the slots."""
    NONE: tl.constexpr = -(1 << 31)
    PLACES: tl.constexpr = PARTS * 32
    # The parts of a row lie in a thread's registers, so that each warp reduces its token by itself.
    offs_e = tl.arange(0, PARTS)[:, None, None] * 32 + tl.arange(0, 32)[None, None, :]
    mask_e = offs_e < EXPERTS
    row_ptr = logits_ptr + token.to(tl.int64) * stride_lm
    mask = mask_e & real[None, :, None]
    score = tl.load(row_ptr[None, :, None] + offs_e, mask=mask, other=float("-inf")).to(tl.float32)
    peak = tl.max(tl.max(score, 0), 1)[:, None]
    total = tl.full([TOKENS, 1], 1.0, tl.float32)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-score))
    elif not RENORMALIZE:
        total = tl.sum(tl.sum(tl.exp(score - peak[None, :, :]), 0), 1)[:, None]
    choice = score
    if BIASED:
        choice += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    key = tl.where(mask_e, ordered(choice), NONE)
    offs_n = tl.arange(0, 32)[None, :]
    expert = tl.zeros([TOKENS, 32], tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.max(key, 0), 1)
        place = tl.where(key == best[None, :, None], offs_e, PLACES)
        won = tl.min(tl.min(place, 0), 1)
        expert = tl.where(offs_n == k, won[:, None], expert)
        key = tl.where(offs_e == won[None, :, None], NONE, key)
    routed = offs_n < TOP_K
    chosen = tl.load(row_ptr[:, None] + expert, mask=routed & real[:, None], other=float("-inf"))
    gate = tl.full([TOKENS, 1], float("inf"), tl.float32)
    if GATED:
        gate = tl.load(row_ptr + EXPERTS, mask=real, other=0.0).to(tl.float32)[:, None]
    weight = weigh(chosen.to(tl.float32), routed, peak, total, gate, scale, slot_weight, SIGMOID, RENORMALIZE)
    return tl.where(routed, expert, EXPERTS + offs_n - TOP_K), weight
