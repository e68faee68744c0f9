"""What an arm of an end-to-end measurement runs in the process of vLLM that holds the model."""

from __future__ import annotations

from typing import Any

from .. import model_process, random_weights
from ..shared_sets import SharedSets

METHODS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
SETS = SharedSets(0)


def bench_open(model: Any) -> dict[str, Any]:
    """Draw the weights of ``model``, and say what is there."""
    return random_weights.draw_model(model, SETS)


def report(_: Any) -> dict[str, Any]:
    """Return what the roles of this process really ran."""
    return model_process.report()
