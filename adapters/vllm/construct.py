"""Replacements for vLLM's constructors: the entry classes, the MoE block and the layer factory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...errors import FsePatchError
from ...fusion_core.routing import FusedRouter
from .decide import decide_for
from .fusion import ACTIVE, CONSTRUCTED, ModelFusion

# Arguments of the layer factory whose work the fused router does.
ROUTED_BY_US = (
    "use_grouped_topk",
    "num_expert_group",
    "topk_group",
    "scoring_func",
    "routed_scaling_factor",
    "apply_routed_scale_to_output",
    "e_score_correction_bias",
)
# Arguments that describe the unfused shared expert.
SHARED = ("shared_experts", "shared_expert_gate", "n_shared_experts", "fuse_shared_experts", "shared_expert_prefix")
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
    "activation": "silu",
}


def entry_init(original: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of an entry class: decide, then build below the decision."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        fusion = None if ACTIVE.get() else decide_for(type(self), kwargs.get("vllm_config"))
        if fusion is None:
            return original(self, *args, **kwargs)
        key_compile_cache(kwargs["vllm_config"], fusion)
        token = ACTIVE.set(fusion)
        try:
            original(self, *args, **kwargs)
        finally:
            ACTIVE.reset(token)
        check_complete(fusion, kwargs["vllm_config"])
        self._fse_patch = fusion
        CONSTRUCTED.append(fusion)

    return __init__


def layer_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    """The MoE layer factory, as one model module sees it: E+S experts, top-(k+S), our router."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        fusion = ACTIVE.get()
        layer = fusion.layer_of(kwargs.get("prefix", "")) if fusion else None
        if fusion is None or layer is None:
            return original(*args, **kwargs)
        check_arguments(fusion, layer, args, kwargs)
        shared = kwargs["shared_experts"]
        gate = getattr(shared, "expert_gate", None)
        router = FusedRouter(
            layer,
            fusion.decision,
            fusion.counter,
            shared_gate=None if gate is None else lambda hidden_states: gate(hidden_states)[0],
            correction_bias=kwargs.get("e_score_correction_bias"),
        )

        def fused_routing(
            hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return router(hidden_states, gating_output)

        kwargs = {name: value for name, value in kwargs.items() if name not in (*ROUTED_BY_US, *SHARED)}
        kwargs |= {
            "num_experts": fusion.layout.num_experts,
            "top_k": fusion.layout.fused_top_k,
            "shared_experts": None,
            "custom_routing_function": fused_routing,
        }
        runner = original(**kwargs)
        fusion.add_layer(layer, router, getattr(runner, "routed_experts", runner))
        fusion.unstripped = layer
        return runner

    return factory


def block_init(original: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of a MoE block: drop the shared MLP that its fused layer has replaced."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        fusion = ACTIVE.get()
        if fusion is not None and fusion.unstripped is not None:
            setattr(self, fusion.naming.family.shared_module, None)
            fusion.unstripped = None

    return __init__


def check_arguments(fusion: ModelFusion, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Stop where the engine builds another layer than the one that was decided on.

    Raises:
        FsePatchError: an argument contradicts the decision.
    """
    layout, routing = fusion.layout, fusion.decision.routing
    assert routing is not None
    expected = NEUTRAL | {
        "num_experts": layout.num_routed,
        "top_k": layout.top_k,
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.moe_intermediate_size,
        "renormalize": routing.renormalize,
        "scoring_func": routing.scoring,
        "routed_scaling_factor": routing.routed_scaling_factor,
        "num_expert_group": routing.num_expert_group,
        "topk_group": routing.topk_group,
    }
    wrong = [f"{n}={kwargs[n]!r}, expected {v!r}" for n, v in expected.items() if n in kwargs and kwargs[n] != v]
    if args or kwargs.get("shared_experts") is None or fusion.unstripped is not None:
        wrong.append("its construction is not the known one")
    if wrong:
        raise FsePatchError(f"layer {layer}: the engine does not build what was decided: {'; '.join(wrong)}")


def check_complete(fusion: ModelFusion, vllm_config: Any) -> None:
    """Stop if a layer that was to fuse was built another way.

    Raises:
        FsePatchError: fewer fused layers than decided, with no other pipeline stage to hold them.
    """
    missing = sorted(set(fusion.decision.fused_layers) - set(fusion.routers))
    if fusion.unstripped is not None or (missing and vllm_config.parallel_config.pipeline_parallel_size == 1):
        raise FsePatchError(f"{fusion.decision.role} model: layers {missing} were decided to fuse and did not")


def key_compile_cache(vllm_config: Any, fusion: ModelFusion) -> None:
    """Put version and policy into vLLM's compile-cache key, through ``additional_config``."""
    from ... import __version__

    mark = f"fse_patch {__version__} {fusion.decision.policy_hash} {fusion.decision.role}"
    known = vllm_config.additional_config
    if isinstance(known, dict):
        vllm_config.additional_config = {**known, mark: fusion.layout.to_dict()}
    else:
        vllm_config.additional_config = {mark: fusion.layout.to_dict(), "additional_config": known.compute_hash()}
