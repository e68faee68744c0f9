"""What an arm of an end-to-end measurement runs in the process of vLLM that holds the model."""

from __future__ import annotations

from typing import Any

from .. import model_process, random_weights
from ..shared_sets import SharedSets

METHODS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
SETS = SharedSets(0)


def opened(model: Any) -> dict[str, Any]:
    """See `random_weights.opened`."""
    return random_weights.opened(model, SETS)


def report(_: Any) -> dict[str, Any]:
    """See `model_process.report`."""
    return model_process.report()
