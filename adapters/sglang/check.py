"""What must hold between the decision and what SGLang builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import FsePatchError
from ..check import check_arguments
from ..role import FusedRole
from ..start import PairedStart, Start

# Arguments that change what a layer computes; fused layers know their neutral values only.
NEUTRAL = {
    "num_fused_shared_experts": 0,
    "activation": "silu",
    "apply_router_weight_on_input": False,
    "with_bias": False,
    "swiglu_limit": None,
}


def check_experts(
    fused_role: FusedRole, layer: int, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Stop where the engine builds other experts than those that were decided on.

    Raises:
        FsePatchError: the class or an argument contradicts the decision.
    """
    check_arguments(fused_role, layer, kwargs, NEUTRAL, known=not args and cls.__name__ == "FusedMoE")


def output_scale(start: Start | PairedStart, experts: Any) -> float:
    """Return what the engine multiplies a layer's output by: the scale, unless the top-k has it already."""
    from sglang.srt.layers.moe import topk

    moe = start.decision.moe
    assert moe is not None
    routing = moe.routing
    # AITER's grouped top-k has the scale inside, and models leave their outputs alone then.
    by_aiter = topk._use_aiter and routing.scoring == "sigmoid"
    inside = experts.should_fuse_routed_scaling_factor_in_topk or by_aiter
    return 1.0 if inside else routing.routed_scaling_factor


def check_topk(fused_role: FusedRole, layer: int, topk: Any, slots: int = 0) -> None:
    """Stop where the engine routes otherwise than decided: its top-k is used as it is.

    Args:
        slots: shared slots that the top-k appends by itself.

    Raises:
        FsePatchError: a setting contradicts the decision.
    """
    routing, config = fused_role.start.moe.routing, topk.topk_config
    grouped = routing.scoring == "sigmoid"
    expected = {
        "top_k": fused_role.layout.top_k + slots,
        "renormalize": routing.renormalize,
        "use_grouped_topk": grouped,
    }
    if grouped:
        expected |= {"num_expert_group": routing.num_expert_group, "topk_group": routing.topk_group}
    seen = {name: getattr(config, name) for name in expected}
    if seen != expected or (config.correction_bias is None) == routing.has_correction_bias:
        raise FsePatchError(f"layer {layer}: the engine routes by {seen}, {expected} was decided")


def check_native(fused_role: FusedRole, layer: int, block: Any) -> None:
    """Stop where SGLang did not build a block fused as it does where its own fusion is on.

    Raises:
        FsePatchError: slots, scale or routing are not what the decision says.
    """
    layout, routing = fused_role.layout, fused_role.start.moe.routing
    experts, slots = block.experts, layout.num_shared_slots
    config = experts.moe_runner_config
    scale = 1.0 if config.routed_scaling_factor is None else config.routed_scaling_factor
    expected = (layout.num_experts, layout.fused_top_k, slots, routing.routed_scaling_factor)
    seen = (experts.num_experts, experts.top_k, block.num_fused_shared_experts, scale)
    if seen != expected:
        raise FsePatchError(f"SGLang built experts, top-k, slots and scale {seen}, {expected} are expected")
    check_topk(fused_role, layer, block.topk, slots if routing.scoring == "sigmoid" else 0)


def shared_gate(start: Start, block: Any) -> Callable[[torch.Tensor], Any] | None:
    """Return the block's gate: states [num_tokens, H] -> logits [num_tokens, 1], both of the model's dtype.

    A linear layer of the engine returns a bias beside them.
    """
    name = start.naming.family.shared_gate
    gate = None if name is None else getattr(block, name, None)
    if gate is None:
        return None

    def logits(hidden_states: torch.Tensor) -> Any:
        out = gate(hidden_states)
        return out[0] if isinstance(out, tuple) else out

    return logits
