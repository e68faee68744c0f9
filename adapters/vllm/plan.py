"""Which modes run vLLM's fused layers here: by the backend that vLLM picks, and by what was measured."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from ... import settings
from ...fusion_core.decision.outcome import FusionDecision
from ...fusion_core.forward.plan import always
from ...fusion_core.forward.tuned import Situation
from ..refusals import SHARED_GATE, Planned, on_cuda, unmeasured
from .formats import UNKNOWN, ExpertFormat, dense_word, format_of

# Backends whose experts `Experts.gemm` knows how to call.
KNOWN_BACKENDS = {"triton"}


def plan_of(decision: FusionDecision, vllm_config: Any) -> Planned:
    """The plan for the layers of a decision, or None and why there is none.

    The backend is asked of vLLM's own selection, for the layer that stock would build and for the fused one.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return always("fused", "a CPU, where no speed is promised"), ""
    allowed = settings.load().allow_unmeasured
    layout = decision.layout
    assert layout is not None
    if not current_platform.is_cuda():
        return unmeasured(allowed, "on this platform")
    form = format_of(decision, vllm_config)
    if form is None:
        return unmeasured(allowed, "for experts of this format")
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return unmeasured(
            False, "with VLLM_BATCH_INVARIANT: another mode for another batch breaks its promise"
        )
    stock = backend(form, vllm_config, decision, layout.num_routed, layout.top_k)
    fused = backend(form, vllm_config, decision, layout.num_experts, layout.fused_top_k)
    if stock != fused or fused not in KNOWN_BACKENDS:
        return unmeasured(
            False, f"with the MoE backend {stock} of the unfused layer, {fused} of the fused one"
        )
    here = situation(form, decision, vllm_config, fused)
    if UNKNOWN in here.backend:
        return unmeasured(False, "with the kernel that vLLM picks for the unfused shared expert")
    return on_cuda(here)


def situation(form: ExpertFormat, decision: FusionDecision, vllm_config: Any, found: str) -> Situation:
    """What a table is asked for. Stock's kernel for the shared expert is a part of the backend."""
    from vllm import __version__
    from vllm.platforms import current_platform

    assert decision.layout is not None
    assert decision.routing is not None
    parts = vllm_config.parallel_config.tensor_parallel_size
    shared = decision.layout.num_shared_slots * decision.layout.moe_intermediate_size // parts
    dense = dense_word(form, decision.layout.hidden_size, shared)
    return Situation.of(
        decision.layout,
        parts,
        engine=decision.engine,
        release=Version(__version__).public,
        backend=f"{found}+{dense}" if dense else found,
        device=current_platform.get_device_name(),
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        scoring=decision.routing.scoring,
        gated=decision.shared_weight == SHARED_GATE,
        quant=form.quant,
    )


def backend(
    form: ExpertFormat, vllm_config: Any, decision: FusionDecision, num_experts: int, top_k: int
) -> str:
    """The backend that vLLM picks for the grouped GEMM of so many experts, in lower case."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.layer import make_parallel_config

    layout = decision.layout
    assert layout is not None
    stock = num_experts == layout.num_routed
    config = FusedMoEConfig(
        num_experts=num_experts,
        experts_per_token=top_k,
        hidden_dim=layout.hidden_size,
        intermediate_size=layout.moe_intermediate_size,
        num_local_experts=num_experts,
        num_logical_experts=num_experts,
        activation=MoEActivation.SILU,
        device=vllm_config.device_config.device,
        routing_method=RoutingMethodType.Renormalize if stock else RoutingMethodType.Custom,
        moe_parallel_config=make_parallel_config(None, None, None, False, vllm_config.parallel_config),
        in_dtype=vllm_config.model_config.dtype,
        moe_backend=vllm_config.kernel_config.moe_backend,
    )
    return form.grouped(config)


def built_backend(runner: Any) -> str:
    """The backend that a layer was really built with."""
    method = runner.routed_experts.quant_method
    picked = getattr(method, "unquantized_backend", None) or getattr(method, "fp8_backend", None)
    return "" if picked is None else str(picked.name).lower()
