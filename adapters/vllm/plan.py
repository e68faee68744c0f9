"""Which modes run vLLM's fused layers here: by the backend that vLLM picks, and by what was measured."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from ... import settings
from ...fusion_core.config import UNQUANTISED
from ...fusion_core.decision import FusionDecision
from ...fusion_core.dispatch import always
from ...fusion_core.tuned import Situation
from ..planning import SHARED_GATE, Planned, on_cuda, unmeasured

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
    if decision.quant_method != UNQUANTISED:
        return unmeasured(allowed, "for quantised experts")
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return unmeasured(
            False, "with VLLM_BATCH_INVARIANT: another mode for another batch breaks its promise"
        )
    stock = backend(vllm_config, decision, layout.num_routed, layout.top_k)
    fused = backend(vllm_config, decision, layout.num_experts, layout.fused_top_k)
    if stock != fused or fused not in KNOWN_BACKENDS:
        return unmeasured(
            False, f"with the MoE backend {stock} of the unfused layer, {fused} of the fused one"
        )
    return on_cuda(situation(decision, vllm_config, fused))


def situation(decision: FusionDecision, vllm_config: Any, found: str) -> Situation:
    """What a table is asked for."""
    from vllm import __version__
    from vllm.platforms import current_platform

    assert decision.layout is not None
    assert decision.routing is not None
    return Situation.of(
        decision.layout,
        vllm_config.parallel_config.tensor_parallel_size,
        engine=decision.engine,
        release=Version(__version__).public,
        backend=found,
        device=current_platform.get_device_name(),
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        scoring=decision.routing.scoring,
        gated=decision.shared_weight == SHARED_GATE,
    )


def backend(vllm_config: Any, decision: FusionDecision, num_experts: int, top_k: int) -> str:
    """The backend that vLLM picks for unquantised experts of this number, in lower case."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.layer import make_parallel_config
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend

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
    picked, _ = select_unquantized_moe_backend(config)
    return str(picked.name).lower()


def built_backend(runner: Any) -> str:
    """The backend that a layer was really built with."""
    picked = getattr(runner.routed_experts.quant_method, "unquantized_backend", None)
    return "" if picked is None else str(picked.name).lower()
