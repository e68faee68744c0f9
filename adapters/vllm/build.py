"""Replacements for vLLM's constructors: the entry classes, the MoE block and the layer factory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...fusion_core.forward.aiter_router import router_class
from ..check import check_complete
from . import native
from .check import check_arguments, key_compile_cache
from .role import ACTIVE, CONSTRUCTED
from .run import several_modes, take_gate
from .start import announce_other, decide_for

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
SHARED = (
    "shared_experts",
    "shared_expert_gate",
    "n_shared_experts",
    "fuse_shared_experts",
    "shared_expert_prefix",
)


def initialize(original: Callable[..., Any]) -> Callable[..., Any]:
    """``initialize_model``: a model that nothing decided for is named too, so silence never means on."""

    @functools.wraps(original)
    def initialize_model(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        # Parts of a model are initialised through here as well, with a prefix.
        if not kwargs.get("prefix"):
            announce_other(type(model))
        return model

    return initialize_model


def entry_init(original: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of an entry class: decide, then build below the decision."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # A prefix makes it a part of another model, whose weights nobody remaps.
        part = ACTIVE.get() or kwargs.get("prefix")
        fusion, off = (None, False) if part else decide_for(type(self), kwargs.get("vllm_config"))
        if fusion is not None:
            key_compile_cache(kwargs["vllm_config"], fusion)
        token = ACTIVE.set(fusion or ACTIVE.get())
        try:
            with native.switched_off(off):
                original(self, *args, **kwargs)
        finally:
            ACTIVE.reset(token)
        if off:
            setattr(self, native.MARK, True)
        if fusion is None:
            return
        check_complete(fusion, kwargs["vllm_config"].parallel_config.pipeline_parallel_size == 1)
        self._fse_patch = fusion
        CONSTRUCTED.add(fusion)

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
        router = router_class()(
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

        several = several_modes(fusion, router, gate, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in (*ROUTED_BY_US, *SHARED)}
        kwargs |= several | {
            "num_experts": fusion.layout.num_experts,
            "top_k": fusion.layout.fused_top_k,
            "shared_experts": None,
            "custom_routing_function": fused_routing,
        }
        runner = original(**kwargs)
        fusion.add_layer(layer, router, getattr(runner, "routed_experts", runner))
        if several:
            fusion.executions[layer] = runner.execute
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
            fusion.blocks[fusion.unstripped] = self
            execution = fusion.executions.get(fusion.unstripped)
            if execution is not None and execution.gate is None:
                take_gate(self, execution)
            fusion.unstripped = None

    return __init__
