"""Which modes run vLLM's fused layers here: by the backend that vLLM picks, and by what was measured."""

from __future__ import annotations

from typing import Any

from ...fusion_core.decision.layout import ExpertLayout
from ...fusion_core.decision.outcome import Merged
from ...fusion_core.forward.plan import ModePlan, always
from ...fusion_core.forward.tuned import Situation
from ...fusion_core.reasons import Reason
from ...settings import Settings
from ..patching import ledger, standing
from ..refusals import SHARED_GATE, measured, unmeasured
from . import spread
from .either_layout import expert_ranks
from .formats import UNKNOWN, ExpertFormat, dense_word

# Backends whose experts `Experts.gemm` knows how to call.
KNOWN_BACKENDS = {"triton"}


def plan_of(
    decision: Merged, form: ExpertFormat | None, vllm_config: Any, effective: Settings
) -> ModePlan | Reason:
    """Return the plan for the layers of a decision, or why there is none.

    The backend is asked of vLLM's own selection, for the layer that stock would build and for the fused one.

    Args:
        form: of its experts; None where such layers run in one mode.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    ranks = expert_ranks(vllm_config)
    if ranks > 1 and not current_platform.is_cuda() and current_platform.device_name not in spread.LEAVE_OUT:
        return _not_left_out(current_platform.device_name)
    if current_platform.is_cpu():
        return always("fused", "a CPU, where no speed is promised")
    allowed, layout = effective.allow_unmeasured, decision.moe.layout
    if not current_platform.is_cuda():
        return unmeasured(allowed, "on this platform")
    if form is None:
        return unmeasured(allowed, "for experts of this format")
    if ranks > 1:
        return _spread_plan(form, vllm_config, layout, ranks, allowed)
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        return unmeasured(
            False, "with VLLM_BATCH_INVARIANT: another mode for another batch breaks its promise"
        )
    stock = backend(form, vllm_config, layout, layout.num_routed, layout.top_k)
    fused = backend(form, vllm_config, layout, layout.num_experts, layout.fused_top_k)
    if stock != fused or fused not in KNOWN_BACKENDS:
        return unmeasured(
            False, f"with the MoE backend {stock} of the unfused layer, {fused} of the fused one"
        )
    here = situation(form, decision, vllm_config, fused)
    if UNKNOWN in here.backend:
        return unmeasured(False, "with the kernel that vLLM picks for the unfused shared expert")
    return measured(here, effective)


def _spread_plan(
    form: ExpertFormat, vllm_config: Any, layout: ExpertLayout, ranks: int, allowed: bool
) -> ModePlan | Reason:
    """Return the plan where whole experts are spread over processes: one mode, by a backend that knows it."""
    total = layout.num_routed + ranks * layout.num_shared_slots
    picked = backend(form, vllm_config, layout, total, layout.fused_top_k, ranks)
    if picked not in spread.LEAVE_OUT:
        return _not_left_out(picked)
    return unmeasured(allowed, "with whole experts spread over processes")


def _not_left_out(picked: str) -> Reason:
    why = f"the MoE backend here ({picked}) is not known to leave out experts of other processes"
    return Reason("parallel.ep", f"{why}; run without --enable-expert-parallel")


def situation(form: ExpertFormat, decision: Merged, vllm_config: Any, backend_name: str) -> Situation:
    """Return what a table is asked for. Stock's kernel for the shared expert is a part of the backend."""
    from vllm.platforms import current_platform

    layout, parts = decision.moe.layout, vllm_config.parallel_config.tensor_parallel_size
    dense = dense_word(form, layout.hidden_size, layout.shared_intermediate_size // parts)
    return Situation.of(
        layout,
        parts,
        engine=decision.engine,
        release=standing.release_here(ledger.load(decision.engine)),
        backend=f"{backend_name}+{dense}" if dense else backend_name,
        device=current_platform.get_device_name(),
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        scoring=decision.moe.routing.scoring,
        gated=decision.moe.shared_weight == SHARED_GATE,
        quant=form.quant,
    )


def backend(
    form: ExpertFormat,
    vllm_config: Any,
    layout: ExpertLayout,
    num_experts: int,
    top_k: int,
    ranks: int = 1,
) -> str:
    """Return the backend that vLLM picks for the grouped GEMM of so many experts, in lower case.

    Args:
        ranks: over how many processes they are spread.
    """
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.layer import make_parallel_config

    stock = num_experts == layout.num_routed
    config = FusedMoEConfig(
        num_experts=num_experts,
        experts_per_token=top_k,
        hidden_dim=layout.hidden_size,
        intermediate_size=layout.moe_intermediate_size,
        num_local_experts=num_experts // ranks,
        num_logical_experts=num_experts,
        activation=MoEActivation.SILU,
        device=vllm_config.device_config.device,
        routing_method=RoutingMethodType.Renormalize if stock else RoutingMethodType.Custom,
        moe_parallel_config=make_parallel_config(None, None, None, False, vllm_config.parallel_config),
        in_dtype=vllm_config.model_config.dtype,
        moe_backend=vllm_config.kernel_config.moe_backend,
        is_lora_enabled=vllm_config.lora_config is not None,
    )
    return form.grouped(config)


def built_backend(runner: Any) -> str:
    """Return the backend that a layer was really built with."""
    method = runner.routed_experts.quant_method
    picked = getattr(method, "unquantized_backend", None) or getattr(method, "fp8_backend", None)
    return "" if picked is None else str(picked.name).lower()
