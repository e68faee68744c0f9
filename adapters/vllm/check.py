"""What must hold between the decision and what vLLM builds, and the mark that keeps their graphs apart."""

from __future__ import annotations

from typing import Any

from ...version import __version__
from ..check import check_arguments
from ..role import FusedRole
from ..start import Start

# Arguments that change what a layer computes; fused layers know their neutral values only.
NEUTRAL = {
    "router": None,
    "custom_routing_function": None,
    "zero_expert_type": None,
    "hash_indices_table": None,
    "routed_input_transform": None,
    "routed_output_transform": None,
    "apply_router_weight_on_input": False,
    "has_bias": False,
    "num_redundant_experts": 0,
    "enable_eplb": False,
    "is_sequence_parallel": False,
    "activation": "silu",
}


def check_experts(fused_role: FusedRole, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Stop where the engine builds other experts than those that were decided on.

    Raises:
        FsePatchError: an argument contradicts the decision.
    """
    routing = fused_role.start.moe.routing
    expected = NEUTRAL | {
        "renormalize": routing.renormalize,
        "scoring_func": routing.scoring,
        "num_expert_group": routing.num_expert_group,
        "topk_group": routing.topk_group,
    }
    known = not args and kwargs.get("shared_experts") is not None
    check_arguments(fused_role, layer, kwargs, expected, known)


def key_compile_cache(vllm_config: Any, start: Start) -> None:
    """Put version and policy into vLLM's compile-cache key, through ``additional_config``."""
    mark = f"fse_patch {__version__} {start.decision.policy_hash} {start.decision.role}"
    layout = start.moe.layout.to_dict()
    known = vllm_config.additional_config
    if isinstance(known, dict):
        vllm_config.additional_config = {**known, mark: layout}
    else:
        vllm_config.additional_config = {mark: layout, "additional_config": known.compute_hash()}
