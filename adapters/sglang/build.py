"""Replacements where SGLang builds a model: its instantiation, the MoE blocks, their experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from ...fusion_core.checkpoint.config import UNQUANTISED
from ...fusion_core.forward.router import FusedRouter, SlotAppender
from ..check import check_complete
from ..role import ACTIVE, CONSTRUCTED
from . import native
from .check import check_experts, check_topk, output_scale, shared_gate
from .native import ARGUMENT, SWITCHED_OFF, switched_off
from .role import AppendHook, ModelFusion, NativeFusion, PastModes
from .start import decide_for


def active() -> ModelFusion | None:
    """The role under construction in this context."""
    fusion = ACTIVE.get()
    assert fusion is None or isinstance(fusion, ModelFusion)
    return fusion


def initialize_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """The loader's model instantiation: decide, then build below the decision."""

    @functools.wraps(original)
    def build(model_config: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if ACTIVE.get():
            return original(model_config, load_config, *args, **kwargs)
        fusion, off = decide_for(model_config, load_config, args, kwargs)
        token = ACTIVE.set(fusion)
        try:
            with nullcontext() if off is None else switched_off(off):
                model = original(model_config, load_config, *args, **kwargs)
        finally:
            ACTIVE.reset(token)
        if fusion is None or not (fusion.built_here or fusion.executions):
            return model
        if fusion.built_here:
            check_complete(fusion, all_here=True)  # pipeline parallelism is refused
        model._fse_patch = fusion
        CONSTRUCTED.add(fusion)
        return model

    return build


def moe_class(original: Callable[..., Any]) -> Callable[..., Any]:
    """``get_moe_impl_class``, as one model module sees it: experts are built with E+S slots and top-(k+S)."""

    @functools.wraps(original)
    def choose(*args: Any, **kwargs: Any) -> Any:
        cls = original(*args, **kwargs)
        return cls if active() is None else functools.partial(build_experts, cls)

    return choose


def build_experts(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Build the experts of a block, with room for the shared slots where its layer fuses."""
    fusion = active()
    layer = fusion.layer_at(kwargs.get("layer_id", -1)) if fusion else None
    if fusion is None or layer is None or not fusion.built_here:
        return cls(*args, **kwargs)
    check_experts(fusion, layer, cls, args, kwargs)
    layout = fusion.layout
    experts = cls(
        **{
            **kwargs,
            "num_experts": layout.num_experts,
            "top_k": layout.fused_top_k,
            "num_fused_shared_experts": layout.num_shared_slots,
        }
    )
    fusion.building = layer, experts
    fusion.unstripped = layer
    return experts


def block_init(original: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of a MoE block: append the slots to its top-k, drop the MLP that they replace."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if SWITCHED_OFF.get() and ARGUMENT in kwargs:
            kwargs[ARGUMENT] = False
        original(self, *args, **kwargs)
        fusion = active()
        if isinstance(fusion, NativeFusion):
            fusion.adopt(self)
        if fusion is None or fusion.building is None:
            return
        layer, experts = fusion.building
        check_topk(fusion, layer, self.topk)
        if not several_modes(fusion, layer, self):
            appender = SlotAppender(
                layer, fusion.decision, fusion.counter, shared_gate(self), output_scale(fusion, experts)
            )
            fusion.add_layer(layer, appender, experts)
            experts.register_forward_pre_hook(AppendHook(appender), with_kwargs=True)
        setattr(self, fusion.naming.family.shared_module, None)
        fusion.blocks[layer] = self
        fusion.building = fusion.unstripped = None

    return __init__


def several_modes(fusion: ModelFusion, layer: int, block: Any) -> bool:
    """Let a block run in several modes: an unquantised one, on CUDA, in releases known there."""
    if native.platform() != "cuda" or fusion.decision.quant_method != UNQUANTISED:
        return False
    from .run import BlockModes, attach, execution_of, runs_modes

    if not runs_modes(block):
        return False
    bias = getattr(block.gate, "e_score_correction_bias", None)
    router = FusedRouter(layer, fusion.decision, fusion.counter, shared_gate(block), bias)
    fusion.add_layer(layer, router, block.experts)
    fusion.executions[layer] = execution_of(fusion, block, router)
    attach(block, BlockModes(fusion.executions[layer], native=False))
    block.experts.register_forward_pre_hook(PastModes(layer), with_kwargs=True)
    return True


def glm_block_init(original: Callable[..., None]) -> Callable[..., None]:
    """`block_init` for GLM's block, whose forward asks this number whether there is a shared MLP to run.

    The model's attribute of that name, which its loader reads, stays 0. Qwen's model copies the number of its
    blocks, and takes 1 at most: its blocks keep theirs.
    """
    build = block_init(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if getattr(self, "shared_experts", self) is None:  # stock may have no such attribute
            self.num_fused_shared_experts = self.experts.num_fused_shared_experts

    return __init__
