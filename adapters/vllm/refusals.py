"""What of vLLM's runtime configuration forbids to fuse a checkpoint that could."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    model = vllm_config.model_config
    yield from config_differs(decision, model.hf_text_config)
    yield from refusals_of_either(decision.moe.layout, vllm_config)
    if _substituted(model):
        why = "config.json has constants stand in for some experts (approximate_experts)"
        yield Reason("backend.routing", why)
    transfer = vllm_config.weight_transfer_config
    if transfer is not None and transfer.backend not in TRANSFERS:
        yield Reason("load.format", f"weights are updated by {transfer.backend}; use nccl or ipc")
    yield from quantised_online(decision, source.quantization, vllm_config.quant_config)
    platform = current_platform
    known = ("cpu", platform.is_cpu), ("cuda", platform.is_cuda), ("rocm", platform.is_rocm)
    here = next((name for name, is_here in known if is_here()), "this platform")
    yield from without_proof(decision, here, effective)


def _substituted(model_config: Any) -> bool:
    """Return whether experts are left out of the tensors, and constants stand in for them; from 0.33 on."""
    configs = [getattr(model_config, name, None) for name in ("hf_text_config", "hf_config")]
    if any(getattr(config, "approximate_experts", None) is not None for config in configs):
        return True
    declared: Any = getattr(configs[1], "compression_config", None)
    for key in ("transform_config", "expert_substitution"):
        declared = declared.get(key) if isinstance(declared, Mapping) else None
    return declared is not None
