"""Routing of a fused layer in torch: k routed experts as the family routes them, then S shared slots.

The reference of `route.py` and `append.py`, and what runs where there is no GPU: traceable by Dynamo, and
float64 where the logits are float64.
"""

from __future__ import annotations

import torch

from ..decision.outcome import RoutingSpec


def route(
    logits: torch.Tensor,
    top_k: int,
    spec: RoutingSpec,
    correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts for each token and weigh them.

    Softmax (Qwen): p = softmax(logits); the k largest, renormalised to sum 1 if ``renormalize``.
    Sigmoid (GLM-4, DeepSeek-V3): s = sigmoid(logits); s + bias chooses, first ``topk_group`` groups
    by the sum of their two best experts, then experts in them; the weights are s without the bias.
    Both are multiplied by ``routed_scaling_factor``. So do `Qwen2MoeSparseMoeBlock` and
    `Glm4MoeTopkRouter` of Transformers.

    Args:
        logits: router logits, [num_tokens, E], any float dtype.
        correction_bias: [E], any float dtype, added for choosing only.

    Returns:
        ``topk_weights`` float32 (float64 for float64 logits) and ``topk_ids`` int32,
        both [num_tokens, top_k].
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if spec.scoring == "softmax":
        # Top-k of the logits is top-k of the probabilities, without their ties.
        chosen, ids = scores.topk(top_k, dim=-1)
        if spec.renormalize:
            weights = chosen.softmax(dim=-1)
        else:
            weights = (chosen - scores.logsumexp(dim=-1, keepdim=True)).exp()
    else:
        scores = scores.sigmoid()
        choice = scores if correction_bias is None else scores + correction_bias.to(scores.dtype)
        if spec.num_expert_group > 1:
            choice = _mask_groups(choice, spec, best=1 if correction_bias is None else 2)
        ids = choice.topk(top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if spec.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
    if spec.routed_scaling_factor != 1.0:
        weights = weights * spec.routed_scaling_factor
    return weights, ids.to(torch.int32)


def _mask_groups(choice: torch.Tensor, spec: RoutingSpec, best: int) -> torch.Tensor:
    """Put -inf for all experts outside the ``topk_group`` groups with the best expert(s)."""
    groups = choice.reshape(choice.shape[0], spec.num_expert_group, choice.shape[1] // spec.num_expert_group)
    group_scores = groups.topk(best, dim=-1).values.sum(dim=-1)
    kept = group_scores.topk(spec.topk_group, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
    return groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)


def append_shared_slots(
    weights: torch.Tensor,
    ids: torch.Tensor,
    slots: range,
    slot_weight: torch.Tensor | float,
    ranks: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the shared slots to a top-k.

    Args:
        weights, ids: [num_tokens, k], any float and any integer dtype.
        slots: the S slot ids, each appended to every token; of the first process.
        slot_weight: net weight of the shared expert, [num_tokens, 1] or one number. All slots of a
            split shared expert carry the same weight, as each holds a part of the same sum.
        ranks: over how many processes whole experts are spread. Each has slots of its own, of ids behind
            those of the process before it, and token i takes those of process i mod ``ranks``.

    Returns:
        Both as [num_tokens, k + S], dtypes as given, contiguous (CPU and AITER kernels ignore strides).
    """
    num_tokens, num_slots = weights.shape[0], len(slots)
    if isinstance(slot_weight, torch.Tensor):
        shared = slot_weight.to(weights.dtype).expand(num_tokens, num_slots)
    else:
        shared = weights.new_full((num_tokens, num_slots), slot_weight)
    slot_ids = torch.arange(slots.start, slots.stop, dtype=ids.dtype, device=ids.device)
    if ranks > 1:
        rank = torch.arange(num_tokens, dtype=ids.dtype, device=ids.device) % ranks
        slot_ids = slot_ids + num_slots * rank.unsqueeze(-1)
    return (
        torch.cat([weights, shared], dim=-1),
        torch.cat([ids, slot_ids.expand(num_tokens, num_slots)], dim=-1),
    )
