"""Mode `once`, for few tokens: reads each expert that any of them chose once. Five launches that overlap."""

from __future__ import annotations

import torch

from ...kernels.experts_once import experts_once
from ...kernels.once_tiles import takes
from ...kernels.work_list import MOST_TOKENS
from ..execution import Execution
from . import small


def run(execution: Execution, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute the layer's output [num_tokens, H] from ``hidden_states`` and ``logits`` [num_tokens, E]."""
    weights = execution.expert_weights()
    if not takes(weights):
        return small.run(execution, hidden_states, logits)
    topk_weights, topk_ids = execution.route_few(hidden_states, logits)
    # More tokens than the kernels take go through them in turn.
    parts = []
    for first in range(0, len(hidden_states), MOST_TOKENS):
        some = slice(first, first + MOST_TOKENS)
        parts.append(experts_once(hidden_states[some], weights, topk_weights[some], topk_ids[some]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
