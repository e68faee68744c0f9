"""The gate of a shared expert that stays unfused, in one launch. Opt-in: rounding is not stock's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# One program holds a row.
WIDEST = 8192
DTYPES = (torch.bfloat16, torch.float16)


def takes(hidden_states: torch.Tensor, gate: torch.Tensor) -> bool:
    """Return whether the kernel is for these: [num_tokens, H] and [1, H] of one 16-bit dtype, on CUDA."""
    return (
        hidden_states.is_cuda
        and hidden_states.dtype in DTYPES
        and hidden_states.dtype == gate.dtype
        and hidden_states.ndim == 2
        and hidden_states.is_contiguous()
        and len(hidden_states) > 0
        and gate.shape == (1, hidden_states.shape[1])
        and gate.shape[1] <= WIDEST
    )


def mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``forward`` of a shared expert's MLP, where it has a gate and the kernel is for it."""

    @functools.wraps(original)
    def forward(self: Any, x: torch.Tensor) -> Any:
        gate = getattr(self.expert_gate, "weight", None)
        # An adapter of LoRA shows the weight below it as its own.
        if gate is None or hasattr(self.expert_gate, "base_layer") or not takes(x, gate):
            return original(self, x)
        from ...fusion_core.kernels.gated_mlp import gated_mlp

        inner = self.act_fn(self.gate_up_proj(x)[0])
        return gated_mlp(x, gate, self.down_proj(inner)[0])

    return forward
