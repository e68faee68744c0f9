"""What must hold between the start of a role and what an engine builds of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import FsePatchError
from .role import FusedRole


def check_arguments(
    fused_role: FusedRole, layer: int, seen: Mapping[str, Any], expected: Mapping[str, Any], known: bool
) -> None:
    """Stop where the engine builds another layer than the one that was decided on.

    Args:
        seen: what the engine passes; names that it leaves out are not compared.
        expected: what this engine passes besides the sizes and the scale, which both call alike.
        known: whether the construction has the shape that the adapter was written for.

    Raises:
        FsePatchError: an argument contradicts the decision.
    """
    layout, routing = fused_role.layout, fused_role.start.moe.routing
    expected = {
        **expected,
        "num_experts": layout.num_routed,
        "top_k": layout.top_k,
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.moe_intermediate_size,
        "routed_scaling_factor": routing.routed_scaling_factor,
    }
    wrong = [f"{n}={seen[n]!r}, expected {v!r}" for n, v in expected.items() if n in seen and seen[n] != v]
    if not known or fused_role.unfinished:
        wrong.append("its construction is not the known one")
    if wrong:
        raise FsePatchError(f"layer {layer}: the engine does not build what was decided: {'; '.join(wrong)}")


def check_complete(fused_role: FusedRole, all_here: bool) -> None:
    """Stop if the engine has built other layers than the checkpoint has: nothing is there to fall back to.

    Args:
        all_here: no other pipeline stage holds layers.

    Raises:
        FsePatchError: fewer fused layers than decided, or layers with experts that no weights are there for.
    """
    start, name = fused_role.start, f"{fused_role.name} model"
    missing = sorted(set(start.moe.layers) - fused_role.layers.keys())
    if fused_role.unfinished or (missing and all_here):
        dense = [number for number in missing if number not in fused_role.unfused | fused_role.begun]
        why = f"; {start.decision.engine} has built layers {dense} without experts" if dense else ""
        raise FsePatchError(f"{name}: layers {missing} were decided to fuse and did not{why}")
    empty = sorted(fused_role.unfused - {*start.moe.layers, *start.decision.stored_layers})
    if empty:
        seen = f"{start.decision.engine} has built layers {empty} with experts, and the checkpoint has none"
        raise FsePatchError(
            f"{name}: {seen} for them: unpatched too, it would answer from weights that were never loaded; "
            "the model is not served"
        )
