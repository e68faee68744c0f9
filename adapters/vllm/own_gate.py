"""Router logits inside the layer, where a block computes them before it (Qwen2-MoE, GLM-4).

Few tokens then need one launch for them, and GLM-4 no copy of its states in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...fusion_core.gate_rows import GateRows

if TYPE_CHECKING:
    from ...fusion_core.execution import LayerExecution  # needs Triton


def take_gate(block: Any, execution: LayerExecution) -> None:
    """Let ``execution`` compute the logits of ``block``, whose forward then hands on its states alone.

    Its own forward is known by its fingerprint: logits of the states in the gate's dtype, then the layer.
    """
    gate, shared_gate = block.gate, execution.shared_gate

    def logits(hidden_states: torch.Tensor) -> torch.Tensor:
        found: Any = gate(hidden_states.to(gate.weight.dtype))
        out: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return out

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.view(-1, hidden_states.shape[-1])
        out: torch.Tensor = block.experts(hidden_states=states, router_logits=states)
        return out.view(hidden_states.shape)

    rows = GateRows([gate] if shared_gate is None else [gate, shared_gate])
    execution.compute_logits(rows, logits, before_shared=True)
    block.forward = forward
