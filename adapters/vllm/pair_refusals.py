"""What of vLLM's runtime configuration forbids to pair a checkpoint that could be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...fusion_core.decision.outcome import Paired
from ...fusion_core.decision.paired_places import unrun
from ...fusion_core.reasons import Reason
from ...settings import CPU_THRESHOLD, LAYOUT, Settings
from ..refusals import without_graphs
from ..running_config import config_differs
from .either_layout import refusals_of_either
from .native import ENGINE


def pair_refusals(
    decision: Paired, vllm_config: Any, native_right: bool, effective: Settings
) -> Iterator[Reason]:
    """Say what of the runtime configuration forbids to pair, first reason first.

    Args:
        native_right: vLLM's own fusion is live, and right for this checkpoint.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        if not effective.cpu_threshold:
            yield Reason("backend.layout", f"vLLM packs weights on a CPU; for tests, set {CPU_THRESHOLD}")
    elif effective.layout != "paired":
        platform = "cuda" if current_platform.is_cuda() else "rocm" if current_platform.is_rocm() else ""
        device = current_platform.get_device_name()
        if (reason := unrun(ENGINE, platform, device, decision.packed)) is not None:
            yield Reason(reason.code, f"{reason.detail}; {LAYOUT}=paired takes it anyway")
        if vllm_config.model_config.enforce_eager:
            yield without_graphs("--enforce-eager")
    if native_right:
        yield Reason("upstream.already", "vLLM's own fusion is on here (AITER) and right for this checkpoint")
    yield from config_differs(decision, vllm_config.model_config.hf_text_config)
    yield from refusals_of_either(decision.moe.layout, vllm_config)
    if getattr(envs, "VLLM_BATCH_INVARIANT", False):
        yield Reason(
            "slower.unmeasured", "with VLLM_BATCH_INVARIANT, another way for another batch breaks its promise"
        )
