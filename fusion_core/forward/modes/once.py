"""Mode `once`, for few tokens: reads each expert that any of them chose once. Five launches that overlap."""

from __future__ import annotations

import torch

from ...kernels.experts_once import experts_once, most_tokens
from ..execution import Execution


def run(execution: Execution, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute the layer's output [num_tokens, H] from ``hidden_states`` and ``logits`` [num_tokens, E]."""
    weights, ids = execution.route_few(hidden_states, logits)
    # More tokens than the kernels take go through them in turn.
    at_once = most_tokens(ids.shape[1])
    parts = []
    for first in range(0, len(ids), at_once):
        some = slice(first, first + at_once)
        parts.append(_experts(execution, hidden_states[some], weights[some], ids[some]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _experts(
    execution: Execution, hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    experts, quantised = execution.experts, execution.quantised
    if quantised is not None:
        return quantised.once(hidden_states, (weights, ids))
    return experts_once(hidden_states, experts.w13, experts.w2, weights, ids)
