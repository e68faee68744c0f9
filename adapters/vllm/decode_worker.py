"""What an arm of an end-to-end measurement runs in the process of vLLM that holds the model."""

from __future__ import annotations

from typing import Any

from ...errors import FsePatchError
from .. import decoding, verifying
from ..shared_sets import SharedSets

METHODS = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
SETS = SharedSets(0)


def opened(model: Any) -> dict[str, Any]:
    """Draw the weights of ``model``, and say what is there, or ``error``."""
    decoding.spread(model)
    try:
        return {**report(model), "device": decoding.device(), "shared": SETS.check()}
    except FsePatchError as error:
        return {"error": str(error)}


def report(_: Any) -> dict[str, Any]:
    """See `verifying.report`."""
    return verifying.report()
