"""DeepGEMM compiles kernels on first use: those of the shared slots before serving, as vLLM does its own."""

from __future__ import annotations

from typing import Any

from .fp8 import Fp8Experts
from .fusion import ModelFusion


def warm_up(fusion: ModelFusion, vllm_config: Any) -> None:
    """Compile what `split` needs for any number of tokens; vLLM finds only layers that are modules."""
    execution = next(iter(fusion.executions.values()), None)
    if execution is None or "split" not in execution.plan.modes:
        return
    from vllm import envs

    if not isinstance(execution.quantised, Fp8Experts) or envs.VLLM_DEEP_GEMM_WARMUP == "skip":
        return
    from vllm.model_executor.warmup import deep_gemm_warmup as own

    for kernel, slot in execution.quantised.dense:
        if own._is_deep_gemm_backed_kernel(kernel):
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            own._deepgemm_fp8_gemm_nt_warmup(slot.weight, slot.weight_scale_inv, tokens)
