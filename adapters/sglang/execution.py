"""Executions of SGLang's layers that differ from the core's. Needs Triton."""

from __future__ import annotations

import torch

from ...fusion_core.dispatch import Mode
from ...fusion_core.execution import LayerExecution, TopK
from ...fusion_core.kernels.route import route

__all__ = ["Float32Gate", "LayerExecution"]


class Float32Gate(LayerExecution):
    """Of GLM: its logits are float32. Rounded to 16 bit, they choose other experts where two are close."""

    def _route(self, hidden_states: torch.Tensor, logits: torch.Tensor, mode: Mode) -> TopK:
        if mode != "fused":
            return super()._route(hidden_states, logits, mode)
        assert self.gate_linear is not None
        router, layout = self.router, self.layout
        logits = self.gate_linear(hidden_states)
        return route(logits, layout.top_k, layout.shared_slots, router.routing, router.correction_bias)
