"""Replacements for vLLM's constructors: the entry classes, the MoE block and the layer factory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ... import settings
from ...errors import FsePatchError
from ...fusion_core.forward.aiter_router import router_class
from ...fusion_core.forward.layer import FusedLayer
from ...fusion_core.forward.router import FusedRouter
from .. import paired
from ..check import check_complete
from ..load import attach
from ..paired import PAIRING, PairedRole, pairing
from ..role import ACTIVE, FusedRole, building
from ..start import PairedStart, Start, announce_other
from ..stop import stop_told
from . import native, spread
from .check import check_experts, key_compile_cache
from .pair import pair_block
from .plan import built_backend
from .role import Slots
from .run import runner_arguments, take_gate
from .start import start_of

# On the module that the layer factory makes: its `BuiltLayer`.
BUILT = "_fse_patch_built"
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


def initialize_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``initialize_model``: a model that nothing decided for is named too: silence never means on."""

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        # Parts of a model are initialised through here as well, with a prefix.
        if not kwargs.get("prefix"):
            announce_other(native.ENGINE, type(model), settings.load())
        return model

    return build


def entry_init(original: Callable[..., None]) -> Callable[..., None]:
    """Replace ``__init__`` of an entry class: decide, then build below the decision."""

    @functools.wraps(original)
    @stop_told()
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # A prefix makes it a part of another model, whose weights nobody remaps.
        part = ACTIVE.get() or PAIRING.get() or kwargs.get("prefix")
        start = None if part else start_of(type(self), kwargs.get("vllm_config"))
        fused_role = FusedRole(start, Slots()) if isinstance(start, Start) else None
        apart = PairedRole(start) if isinstance(start, PairedStart) else None
        if fused_role is not None:
            key_compile_cache(kwargs["vllm_config"], fused_role.start)
        native_off = start is not None and start.native_off
        with (
            building(fused_role or ACTIVE.get()),
            pairing(apart or PAIRING.get()),
            native.switched_off(native_off),
        ):
            original(self, *args, **kwargs)
        if native_off:
            setattr(self, native.MARK, True)
        if apart is not None:
            paired.attach(self, apart)
        if fused_role is not None:
            check_complete(fused_role, kwargs["vllm_config"].parallel_config.pipeline_parallel_size == 1)
            attach(self, fused_role)

    return __init__


@dataclass(frozen=True)
class BuiltLayer:
    """What the layer factory leaves on the module that it makes, for the block that asked for it."""

    number: int
    router: FusedRouter
    experts: torch.nn.Module
    execution: Any


def layer_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the MoE layer factory, as one model module sees it: E+S experts, top-(k+S), our router."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        fused_role, place = ACTIVE.get(), kwargs.get("prefix", "")
        layer = fused_role.layer_at(place) if fused_role else None
        if fused_role is None or layer is None:
            if fused_role is not None:
                fused_role.leave(place)
            return original(*args, **kwargs)
        check_experts(fused_role, layer, args, kwargs)
        start, layout = fused_role.start, fused_role.layout
        gate = getattr(kwargs["shared_experts"], "expert_gate", None)
        router = router_class()(
            layer,
            start.moe,
            fused_role.counter,
            shared_gate=None if gate is None else lambda hidden_states: gate(hidden_states)[0],
            correction_bias=kwargs.get("e_score_correction_bias"),
            ranks=start.ranks,
        )

        def fused_routing(
            hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return router(hidden_states, gating_output)

        modes = runner_arguments(start, router, gate, kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in (*ROUTED_BY_US, *SHARED)}
        if start.ranks > 1:
            slots = {"slots": layout.num_shared_slots}
            modes |= {"routed_experts_cls": spread.experts_class(), "routed_experts_args": slots}
        else:
            kwargs["num_experts"] = layout.num_experts
        kwargs |= modes | {
            "top_k": layout.fused_top_k,
            "shared_experts": None,
            "custom_routing_function": fused_routing,
        }
        runner = original(**kwargs)
        experts = getattr(runner, "routed_experts", runner)
        if start.ranks > 1 and built_backend(runner) not in spread.LEAVE_OUT:
            raise FsePatchError(f"{place}: vLLM took the MoE backend {built_backend(runner)!r}")
        setattr(runner, BUILT, BuiltLayer(layer, router, experts, getattr(runner, "execute", None)))
        fused_role.begin(layer)
        return runner

    return factory


def block_init(original: Callable[..., None]) -> Callable[..., None]:
    """Replace ``__init__`` of a MoE block: drop the shared MLP that its fused layer has replaced."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if (apart := PAIRING.get()) is not None:
            pair_block(apart, self)
            return
        fused_role = ACTIVE.get()
        built: BuiltLayer | None = getattr(getattr(self, "experts", None), BUILT, None)
        # A block that inherits its constructor comes here twice.
        if fused_role is None or built is None or built.number not in fused_role.unfinished:
            return
        setattr(self, fused_role.start.naming.family.shared_module, None)
        fused_role.add_layer(FusedLayer(built.number, built.router, built.experts, self, built.execution))
        if built.execution is not None and built.execution.gate is None:
            take_gate(self, built.execution)

    return __init__
