"""Mode `split`, stock's way on views: the grouped GEMM over k, the shared slot as a dense MLP beside it."""

from __future__ import annotations

import torch

from ...kernels.silu_mul import silu_mul
from ..execution import Execution


def run(execution: Execution, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute the layer's output [num_tokens, H] from ``hidden_states`` and ``logits`` [num_tokens, E]."""
    routed, experts, gate_linear = execution.layout.num_routed, execution.experts, execution.gate_linear
    stream = experts.side_stream(hidden_states.shape[0])
    if gate_linear is not None and execution.logits_first:
        logits = gate_linear(hidden_states)
    if stream is not None:
        # From here on the shared expert may run. It is waited for below, before any memory is given away.
        stream.wait_stream(torch.cuda.current_stream())
    if gate_linear is not None and not execution.logits_first:
        logits = gate_linear(hidden_states)
    top_k = experts.choose(hidden_states, logits)
    out = experts.gemm(hidden_states, experts.w13[:routed], experts.w2[:routed], top_k)
    if stream is None:
        if execution.quantised is not None:
            return out.add_(_shared(execution, hidden_states))
        return out.addmm_(_inner(execution, hidden_states), experts.w2[routed].T)
    with torch.cuda.stream(stream):
        shared = _shared(execution, hidden_states)
    torch.cuda.current_stream().wait_stream(stream)
    return out.add_(shared)


def _shared(execution: Execution, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute the shared expert's part of the output, [num_tokens, H]."""
    inner = _inner(execution, hidden_states)
    if execution.quantised is not None:
        return execution.quantised.down(inner)
    return inner @ execution.experts.w2[execution.layout.num_routed].T


def _inner(execution: Execution, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute the shared expert's inner states [num_tokens, I], its weight in them."""
    if execution.quantised is not None:
        gate_up = execution.quantised.gate_up(hidden_states)
    else:
        gate_up = torch.nn.functional.linear(
            hidden_states, execution.experts.w13[execution.layout.num_routed]
        )
    factor = execution.router.control_factor
    if execution.shared_gate is None:
        return silu_mul(gate_up, factor=factor)
    return silu_mul(gate_up, hidden_states, execution.gate_row(), factor)
