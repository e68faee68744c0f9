"""What must hold between the decision and what an engine builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import FsePatchError
from .role import ModelFusion


def check_arguments(
    fusion: ModelFusion, layer: int, seen: Mapping[str, Any], expected: Mapping[str, Any], known: bool
) -> None:
    """Stop where the engine builds another layer than the one that was decided on.

    Args:
        seen: what the engine passes; names that it leaves out are not compared.
        expected: what this engine passes besides the sizes and the scale, which both call alike.
        known: whether the construction has the shape that the adapter was written for.

    Raises:
        FsePatchError: an argument contradicts the decision.
    """
    layout, routing = fusion.layout, fusion.decision.routing
    assert routing is not None
    expected = {
        **expected,
        "num_experts": layout.num_routed,
        "top_k": layout.top_k,
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.moe_intermediate_size,
        "routed_scaling_factor": routing.routed_scaling_factor,
    }
    wrong = [f"{n}={seen[n]!r}, expected {v!r}" for n, v in expected.items() if n in seen and seen[n] != v]
    if not known or fusion.unstripped is not None:
        wrong.append("its construction is not the known one")
    if wrong:
        raise FsePatchError(f"layer {layer}: the engine does not build what was decided: {'; '.join(wrong)}")


def check_complete(fusion: ModelFusion, all_here: bool) -> None:
    """Stop if a layer that was to fuse was built another way.

    Args:
        all_here: no other pipeline stage holds layers.

    Raises:
        FsePatchError: fewer fused layers than decided.
    """
    missing = sorted(set(fusion.decision.fused_layers) - set(fusion.routers))
    if fusion.unstripped is not None or (missing and all_here):
        raise FsePatchError(
            f"{fusion.decision.role} model: layers {missing} were decided to fuse and did not"
        )
