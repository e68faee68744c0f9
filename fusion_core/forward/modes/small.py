"""Mode `small`, for few tokens: Triton kernels over k+S slots, four launches that overlap, no sorting."""

from __future__ import annotations

import torch

from ...kernels import experts, experts_fp8
from ..execution import Execution


def run(execution: Execution, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute the layer's output [num_tokens, H] from ``hidden_states`` and ``logits`` [num_tokens, E]."""
    weights = execution.expert_weights()
    top_k = execution.route_few(hidden_states, logits)
    if weights.scales is None:
        return experts.small_experts(hidden_states, weights, *top_k)
    return experts_fp8.small_experts(hidden_states, weights, *top_k)
