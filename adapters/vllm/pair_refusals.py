"""What of vLLM's runtime configuration forbids to pair a checkpoint that could be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...fusion_core.decision.outcome import Paired
from ...fusion_core.decision.paired_places import unrun
from ...fusion_core.reasons import Reason
from ...settings import CPU_THRESHOLD, LAYOUT, Settings
from ..running_config import config_differs
from .native import ENGINE

# Modules that the pass reads: an adapter on one of them would be left out.
READ = {"gate", "shared_expert_gate", "experts", "gate_up_proj", "gate_proj", "up_proj", "down_proj"}


def pair_refusals(
    decision: Paired, vllm_config: Any, native_right: bool, effective: Settings
) -> Iterator[Reason]:
    """Say what of the runtime configuration forbids to pair, first reason first.

    Args:
        native_right: vLLM's own fusion is live, and right for this checkpoint.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if current_platform.is_cpu():
        if not effective.cpu_threshold:
            yield Reason("backend.layout", f"vLLM packs weights on a CPU; for tests, set {CPU_THRESHOLD}")
    elif effective.layout != "paired":
        platform = "cuda" if current_platform.is_cuda() else "rocm" if current_platform.is_rocm() else ""
        if (reason := unrun(ENGINE, platform, current_platform.get_device_name())) is not None:
            yield Reason(reason.code, f"{reason.detail}; {LAYOUT}=paired takes it anyway")
    if native_right:
        yield Reason("upstream.already", "vLLM's own fusion is on here (AITER) and right for this checkpoint")
    yield from config_differs(decision, model.hf_text_config)
    if parallel.enable_eplb:
        yield Reason("parallel.eplb", "the expert load balancer is on; run without --enable-eplb")
    if parallel.data_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        yield Reason("parallel.all2all", "tokens are gathered from other ranks; run without data parallelism")
    if parallel.use_sequence_parallel_moe:
        yield Reason("parallel.all2all", "the MoE layers are sequence parallel; run without it")
    if (adapters := vllm_config.lora_config) is not None:
        targets = getattr(adapters, "target_modules", None)
        if targets is None or any(name.rpartition(".")[2] in READ for name in targets):
            why = "LoRA may touch experts; give --lora-target-modules without MLP and experts"
            yield Reason("lora", why)
    outputs = getattr(vllm_config, "aux_output_config", model)
    if getattr(outputs, "enable_return_routed_experts", False):
        yield Reason(
            "routing.capture", "routed experts are captured; run without --enable-return-routed-experts"
        )
    if envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY:
        yield Reason("routing.simulator", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY is set; unset it")
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        yield Reason(
            "slower.unmeasured", "with VLLM_BATCH_INVARIANT, another way for another batch breaks its promise"
        )
