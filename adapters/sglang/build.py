"""Replacements where SGLang builds a model: its instantiation, the MoE blocks, their experts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ...errors import FsePatchError
from ...fusion_core.checkpoint.config import UNQUANTISED
from ...fusion_core.forward.layer import FusedLayer
from ...fusion_core.forward.router import FusedRouter, SlotAppender
from ...fusion_core.kernels.aiter import without_padding
from .. import paired
from ..check import check_complete
from ..load import attach
from ..paired import PAIRING, PairedRole, pairing
from ..role import ACTIVE, FusedRole, building
from ..start import PairedStart, Start
from ..stop import stop_told
from . import native
from .check import check_experts, check_native, check_topk, output_scale, shared_gate
from .native import ARGUMENT, SWITCHED_OFF, switched_off
from .pair import pair_block
from .role import Slots, number_of
from .spread import map_slots
from .start import start_of

log = logging.getLogger("fse_patch")
# On experts that were built with slots: the number of their layer.
BUILT = "_fse_patch_layer"


def initialize_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the loader's model instantiation: decide, then build below the decision."""

    @functools.wraps(original)
    @stop_told()
    def build(model_config: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if ACTIVE.get() or PAIRING.get():
            return original(model_config, load_config, *args, **kwargs)
        from sglang.srt.model_loader.utils import get_model_architecture
        from sglang.srt.runtime_context import get_server_args

        cls = get_model_architecture(model_config)[0]
        start = start_of(cls, model_config, load_config, args[0] if args else kwargs.get("quant_config"))
        fused_role = FusedRole(start, Slots()) if isinstance(start, Start) else None
        native_off = start is not None and start.native_off
        apart = PairedRole(start) if isinstance(start, PairedStart) else None
        with building(fused_role), pairing(apart), switched_off(cls) if native_off else nullcontext():
            model = original(model_config, load_config, *args, **kwargs)
        # Where no layer could be taken in, somebody must still say so.
        if apart is not None and (apart.layers or apart.unbuilt):
            paired.attach(model, apart)
        if fused_role is not None and fused_role.start.merged:
            check_complete(fused_role, all_here=get_server_args().pp_size == 1)
        if fused_role is not None and fused_role.layers:
            attach(model, fused_role)
        return model

    return build


def moe_class(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``get_moe_impl_class``, as one model module sees it: experts get E+S slots and top-(k+S)."""

    @functools.wraps(original)
    def choose(*args: Any, **kwargs: Any) -> Any:
        cls = original(*args, **kwargs)
        return cls if ACTIVE.get() is None else functools.partial(build_experts, cls)

    return choose


def build_experts(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Build the experts of a block, with room for the shared slots where its layer fuses."""
    fused_role, place = ACTIVE.get(), kwargs.get("layer_id", -1)
    layer = fused_role.layer_at(place) if fused_role else None
    if fused_role is None or layer is None or not fused_role.start.merged:
        if fused_role is not None:
            fused_role.leave(place)
        return cls(*args, **kwargs)
    check_experts(fused_role, layer, cls, args, kwargs)
    layout = fused_role.layout
    experts = cls(
        **{
            **kwargs,
            "num_experts": layout.num_experts,
            "top_k": layout.fused_top_k,
            "num_fused_shared_experts": layout.num_shared_slots,
        }
    )
    if fused_role.start.ranks > 1:
        map_slots(experts, layout)
    setattr(experts, BUILT, layer)
    fused_role.begin(layer)
    return experts


def block_init(original: Callable[..., None]) -> Callable[..., None]:
    """Replace ``__init__`` of a MoE block: append the slots to its top-k, drop the MLP that they replace."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if SWITCHED_OFF.get() and ARGUMENT in kwargs:
            kwargs[ARGUMENT] = False
        original(self, *args, **kwargs)
        if (apart := PAIRING.get()) is not None:
            pair_block(apart, self, number_of(apart.start.decision, self.layer_id))
            return
        fused_role = ACTIVE.get()
        if fused_role is None:
            return
        if not fused_role.start.merged:
            adopt(fused_role, self)
            return
        layer: int | None = getattr(getattr(self, "experts", None), BUILT, None)
        # A block that inherits its constructor comes here twice.
        if layer is None or layer not in fused_role.unfinished:
            return
        check_topk(fused_role, layer, self.topk)
        setattr(self, fused_role.start.naming.family.shared_module, None)
        take_over(fused_role, layer, self)

    return __init__


def take_over(fused_role: FusedRole, layer: int, block: Any) -> None:
    """Make a block one of the fused layers; in several modes on CUDA, in releases known there."""
    start, experts = fused_role.start, block.experts
    plain = start.decision.quant_method == UNQUANTISED and start.ranks == 1
    if native.platform() == "cuda" and plain:
        from .run import BlockModes, attach_modes, execution_of, runs_modes

        if runs_modes(block):
            router = routed_by_us(fused_role, layer, block)
            execution = execution_of(start, block, router)
            fused_role.add_layer(FusedLayer(layer, router, experts, block, execution))
            attach_modes(block, BlockModes(execution, native=False))
            experts.register_forward_pre_hook(PastModes(layer), with_kwargs=True)
            return
    scale = output_scale(start, experts)
    gate = shared_gate(start, block)
    appender = SlotAppender(layer, start.moe, fused_role.counter, gate, scale, start.ranks)
    fused_role.add_layer(FusedLayer(layer, appender, experts, block))
    experts.register_forward_pre_hook(AppendHook(appender), with_kwargs=True)


def adopt(fused_role: FusedRole, block: Any) -> None:
    """Give its modes to a block that SGLang has built fused by itself, where it is what is known.

    A block that is not stays SGLang's own, and the log says so.
    """
    from .run import ATTRIBUTE, BlockModes, attach_modes, execution_of, runs_modes

    layer = fused_role.layer_at(block.layer_id)
    # A block that inherits its constructor comes here twice.
    if layer is None or not runs_modes(block) or hasattr(block, ATTRIBUTE):
        return
    try:
        check_native(fused_role, layer, block)
        router = routed_by_us(fused_role, layer, block)
        execution = execution_of(fused_role.start, block, router)
        fused_role.add_layer(FusedLayer(layer, router, block.experts, block, execution))
    except (AttributeError, FsePatchError) as error:
        log.warning("%s model: layer %d stays as SGLang has it: %s", fused_role.name, layer, error)
        return
    attach_modes(block, BlockModes(execution, native=True))


def routed_by_us(fused_role: FusedRole, layer: int, block: Any) -> FusedRouter:
    """Return a router for the modes of a block."""
    start, bias = fused_role.start, getattr(block.gate, "e_score_correction_bias", None)
    return FusedRouter(layer, start.moe, fused_role.counter, shared_gate(start, block), bias)


def glm_block_init(original: Callable[..., None]) -> Callable[..., None]:
    """Replace ``__init__`` of GLM's block as `block_init` does, and say that it has fused slots.

    Its forward asks the block's ``num_fused_shared_experts`` whether there is a shared MLP to run.

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


class PastModes:
    """Forward pre-hook of experts whose block runs in modes, which call their kernels and not them.

    Whoever else calls them has a top-k without the shared slots, and would leave the shared expert out.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(
        self, experts: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args[0] if args else kwargs["hidden_states"]):
            raise FsePatchError(f"layer {self.layer}: SGLang runs its experts past the modes of their block")
        return args, kwargs


class AppendHook:
    """Forward pre-hook of the fused experts: the engine's top-k goes in with the shared slots appended."""

    def __init__(self, appender: SlotAppender) -> None:
        self.appender = appender
        # Rows that pad a batch must leave the layer as 0 there, as the engine's own slots do.
        self.padding = native.platform() == "rocm"

    def __call__(
        self, experts: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(("hidden_states", "topk_output"), args, strict=False)), **kwargs}
        topk = given["topk_output"]
        # Without the slots the shared expert would be left out in silence.
        if topk.format.name != "STANDARD" or len(topk) != 3:
            raise FsePatchError(
                f"layer {self.appender.layer}: the engine's top-k came as {type(topk).__name__}; "
                "only the standard one has room for the shared slots"
            )
        weights, ids = self.appender.append(given["hidden_states"], topk.topk_weights, topk.topk_ids)
        if self.padding:
            weights, ids = without_padding(weights, ids, self.appender.layout.top_k)
        given["topk_output"] = topk._replace(topk_weights=weights, topk_ids=ids)
        return (), given
