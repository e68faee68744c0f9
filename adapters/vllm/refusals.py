"""What of vLLM's runtime configuration forbids to fuse a checkpoint that could."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...fusion_core.decision.outcome import Merged
from ...fusion_core.reasons import Reason
from ...settings import Settings
from ..refusals import quantised_online, without_proof
from ..running_config import config_differs
from .either_layout import refusals_of_either

# Backends that pass weight updates through `load_weights`, within a layer-wise reload.
TRANSFERS = {"nccl", "ipc"}


def refusals(
    decision: Merged,
    vllm_config: Any,
    source: Any,
    load_config: Any,
    native_right: bool,
    effective: Settings,
) -> Iterator[Reason]:
    """Say what of the runtime configuration forbids to fuse, first reason first.

    Args:
        source, load_config: model and load configuration of the role.
        native_right: vLLM's own fusion is live, and right for this checkpoint.
    """
    from vllm.platforms import current_platform

    if native_right:
        yield Reason("upstream.already", "vLLM's own fusion is on here (AITER) and right for this checkpoint")
    yield from config_differs(decision, vllm_config.model_config.hf_text_config)
    yield from refusals_of_either(decision.moe.layout, vllm_config)
    transfer = vllm_config.weight_transfer_config
    if transfer is not None and transfer.backend not in TRANSFERS:
        yield Reason("load.format", f"weights are updated by {transfer.backend}; use nccl or ipc")
    yield from quantised_online(decision, source.quantization, vllm_config.quant_config)
    platform = current_platform
    known = ("cpu", platform.is_cpu), ("cuda", platform.is_cuda), ("rocm", platform.is_rocm)
    here = next((name for name, is_here in known if is_here()), "this platform")
    yield from without_proof(decision, here, effective)
