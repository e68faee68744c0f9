"""Mode `fused`: the engine's grouped GEMM over k+S slots."""

from __future__ import annotations

import torch

from ..execution import Execution


def run(execution: Execution, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute the layer's output [num_tokens, H] from ``hidden_states`` and ``logits`` [num_tokens, E]."""
    if execution.gate is not None:
        if execution.gate_linear is not None and execution.shared_gate is None:
            # As stock has them: GLM's are float32, and in 16 bit two that are close may change places.
            logits = execution.gate_linear(hidden_states)
        else:
            # The columns beyond E + G are of the alignment; routing reads the first ones of each row.
            both = torch.nn.functional.linear(hidden_states, execution.gate.padded)
            logits = both[:, : execution.gate.count]
    experts = execution.experts
    return experts.gemm(hidden_states, experts.w13, experts.w2, execution.route(hidden_states, logits))
