"""What an arm of an end-to-end measurement runs in the process of vLLM that holds the model."""

from __future__ import annotations

from typing import Any

from .. import drawing, verifying
from ..shared_sets import SharedSets

METHODS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
SETS = SharedSets(0)


def opened(model: Any) -> dict[str, Any]:
    """See `drawing.opened`."""
    return drawing.opened(model, SETS)


def report(_: Any) -> dict[str, Any]:
    """See `verifying.report`."""
    return verifying.report()
