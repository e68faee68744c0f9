"""Mode `small`, for few tokens: Triton kernels over k+S slots, four launches that overlap, no sorting."""

from __future__ import annotations

import torch

from ...kernels.experts import small_experts
from ..execution import Execution


def run(execution: Execution, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute the layer's output [num_tokens, H] from ``hidden_states`` and ``logits`` [num_tokens, E]."""
    weights, ids = execution.route(hidden_states, execution.few_logits(hidden_states, logits))
    if execution.quantised is not None:
        return execution.quantised.small(hidden_states, (weights, ids))
    return small_experts(hidden_states, execution.experts.w13, execution.experts.w2, weights, ids)
