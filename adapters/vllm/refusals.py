"""What of vLLM's runtime configuration forbids to fuse a checkpoint that could."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...fusion_core.decision.native import gets_wrong
from ...fusion_core.decision.outcome import FusionDecision
from ..refusals import online, refusal
from ..start import Refusal, config_difference, proof
from .plan import plan_of

# Loaders that pass every checkpoint tensor by its name through `load_weights`, or none at all.
LOAD_FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "runai_streamer", "pt", "npcache", "dummy"}
# Backends that pass weight updates through `load_weights`, within a layer-wise reload.
TRANSFERS = {"nccl", "ipc"}


def refusals(
    decision: FusionDecision, vllm_config: Any, source: Any, load_config: Any, own: dict[str, Any] | None
) -> Iterator[Refusal]:
    """What of the runtime configuration forbids to fuse, first reason first.

    Args:
        source, load_config: of the role's own checkpoint, see `checkpoint_of`.
        own: vLLM's own fusion, where it is live; see `native.live`.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if own is not None and not gets_wrong(own, decision):
        yield "upstream.already", "vLLM's own fusion is on here (AITER) and right for this checkpoint"
    if differing := config_difference(decision, model.hf_text_config):
        yield "config.differs", f"{differing}; run without overrides of the MoE configuration"
    if parallel.enable_expert_parallel:
        yield "parallel.ep", "expert parallelism is on; run without --enable-expert-parallel"
    if parallel.enable_eplb:
        yield "parallel.eplb", "the expert load balancer is on; run without --enable-eplb"
    if parallel.data_parallel_size > 1:
        yield "parallel.dp", f"data_parallel_size is {parallel.data_parallel_size}; run with 1"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        yield "parallel.dp", "prefill context parallelism is on; run without it"
    if vllm_config.lora_config is not None:
        yield "lora", "LoRA is enabled; run without --enable-lora"
    outputs = getattr(vllm_config, "aux_output_config", model)
    if getattr(outputs, "enable_return_routed_experts", False):
        yield "routing.capture", "routed experts are captured; run without --enable-return-routed-experts"
    if envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY:
        yield "routing.simulator", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY is set; unset it"
    if load_config.load_format not in LOAD_FORMATS:
        yield "load.format", f"load_format is {load_config.load_format}; use auto or safetensors"
    transfer = vllm_config.weight_transfer_config
    if transfer is not None and transfer.backend not in TRANSFERS:
        yield "load.format", f"weights are updated by {transfer.backend}; use nccl or ipc"
    yield from online(decision, source.quantization, vllm_config.quant_config)
    platform = current_platform
    known = ("cpu", platform.is_cpu), ("cuda", platform.is_cuda), ("rocm", platform.is_rocm)
    yield from proof(decision, next((name for name, here in known if here()), "this platform"))
    plan, why = plan_of(decision, vllm_config)
    if plan is None:
        yield refusal(why)
