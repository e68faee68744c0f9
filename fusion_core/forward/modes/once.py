"""Mode `once`, for few tokens: reads each expert that any of them chose once. Four launches that overlap."""

from __future__ import annotations

import torch

from ...kernels.experts_once import experts_once, part_tokens
from ...kernels.work_list import MOST_TOKENS
from ..execution import Execution
from . import small


def run(execution: Execution, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute the layer's output [num_tokens, H] from ``hidden_states`` and ``logits`` [num_tokens, E]."""
    weights = execution.expert_weights()
    if weights is None:
        return small.run(execution, hidden_states, logits)
    logits = execution.few_logits(hidden_states, logits)
    # More tokens than the kernels take go through them in turn.
    parts = []
    for states, some in zip(hidden_states.split(MOST_TOKENS), logits.split(MOST_TOKENS), strict=True):
        part = part_tokens(len(states), weights)
        fitted = states.contiguous() if weights.scales is not None else None
        (topk_weights, topk_ids), work = execution.route_list(states, some, part, fitted)
        parts.append(experts_once(states, weights, topk_weights, topk_ids, work=work))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
