"""The pass over routed and shared experts where it runs: kernels on a GPU, the torch reference elsewhere."""

from __future__ import annotations

import torch

from ..kernels import pass_reference
from ..kernels.expert_weights import ExpertWeights
from .router import on_gpu

# Up to so many tokens the kernels without a list of experts are faster on an H200, by the tables there; they
# read an expert once for each token. With a wide shared expert that is soon too often.
SMALL, SMALL_WIDE = 8, 1


def run_pass(
    hidden_states: torch.Tensor,
    routed: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared: ExpertWeights | None,
) -> torch.Tensor:
    """Sum the chosen experts and the shared one; arguments and result as of `pass_reference.experts_once`."""
    if not on_gpu(hidden_states):
        return pass_reference.experts_once(hidden_states, routed, topk_weights, topk_ids, shared)
    from ..kernels import experts, experts_fp8  # these need Triton
    from ..kernels.experts_once import experts_once
    from ..kernels.once_tiles import takes
    from ..kernels.work_list import MOST_TOKENS

    kinds = [weights for weights in (routed, shared) if weights is not None]
    alike = len({weights.scales is None for weights in kinds}) == 1
    most = SMALL if shared is None or shared.width <= routed.width else SMALL_WIDE
    if any(weights.int4 is not None for weights in kinds):
        most = 0  # the other kernels do not read them
    small = experts.small_experts if routed.scales is None else experts_fp8.small_experts
    if not all(takes(weights) for weights in kinds):
        return small(hidden_states, routed, topk_weights, topk_ids, shared)
    # More tokens than the kernels take go through them in turn.
    parts = []
    for first in range(0, len(hidden_states), MOST_TOKENS):
        some = slice(first, first + MOST_TOKENS)
        states = hidden_states[some]
        run = small if alike and len(states) <= most else experts_once
        parts.append(run(states, routed, topk_weights[some], topk_ids[some], shared))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
