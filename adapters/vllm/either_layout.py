"""What of vLLM's runtime configuration forbids to run layers of ours, however their weights lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...fusion_core.decision.layout import ExpertLayout
from ...fusion_core.reasons import Reason
from ..lora import refused_targets
from ..refusals import undivided
from ..running_config import substituted


def refusals_of_either(layout: ExpertLayout, vllm_config: Any) -> Iterator[Reason]:
    """Say what forbids both layouts, first reason first."""
    yield from _spread(layout, vllm_config)
    if vllm_config.lora_config is not None:
        yield from refused_targets(vllm_config.lora_config.target_modules, "--lora-target-modules")
    yield from _memory(vllm_config)
    yield from _routing(vllm_config)
    model = vllm_config.model_config
    yield from substituted(*(getattr(model, name, None) for name in ("hf_text_config", "hf_config")))


def expert_ranks(vllm_config: Any) -> int:
    """Return over how many processes whole experts are spread; 1: they are not."""
    parallel = vllm_config.parallel_config
    return int(parallel.tensor_parallel_size) if parallel.enable_expert_parallel else 1


def _spread(layout: ExpertLayout, vllm_config: Any) -> Iterator[Reason]:
    """Refuse what moves experts, or tokens, between processes."""
    parallel = vllm_config.parallel_config
    data, context = parallel.data_parallel_size, getattr(parallel, "prefill_context_parallel_size", 1)
    if parallel.enable_eplb:
        yield Reason("parallel.eplb", "the expert load balancer is on; run without --enable-eplb")
    if parallel.enable_expert_parallel and max(data, context) > 1:
        why = "tokens are sent to the processes of their experts; run with --data-parallel-size 1"
        yield Reason("parallel.all2all", why)
    if data > 1:
        yield Reason("parallel.dp", f"data_parallel_size is {data}; run with 1")
    if context > 1:
        yield Reason("parallel.dp", "prefill context parallelism is on; run without it")
    if parallel.use_sequence_parallel_moe:
        yield Reason("parallel.all2all", "the MoE layers are sequence parallel; run without it")
    if expert_ranks(vllm_config) == 1:
        block = getattr(vllm_config.quant_config, "weight_block_size", None)
        yield from undivided(layout, parallel.tensor_parallel_size, block, "--tensor-parallel-size")


def _memory(vllm_config: Any) -> Iterator[Reason]:
    """Refuse what takes weights away from where they were loaded."""
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        flags = "--cpu-offload-gb and --offload-group-size"
        yield Reason("memory.offload", f"weights are kept in the host's memory; run without {flags}")
    if vllm_config.model_config.enable_sleep_mode:
        yield Reason("memory.sleep", "weights leave the device in sleep; run without --enable-sleep-mode")


def _routing(vllm_config: Any) -> Iterator[Reason]:
    """Refuse what looks at, or replaces, the engine's own routing."""
    from vllm import envs

    outputs = getattr(vllm_config, "aux_output_config", vllm_config.model_config)
    if getattr(outputs, "enable_return_routed_experts", False):
        why = "routed experts are captured; run without --enable-return-routed-experts"
        yield Reason("routing.capture", why)
    if envs.VLLM_MOE_ROUTING_SIMULATION_STRATEGY:
        yield Reason("routing.simulator", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY is set; unset it")
