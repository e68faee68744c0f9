"""Tests only: lets vLLM's experts run on a CPU in two ways in which stock ends there, in both arms alike.

Whole experts spread over processes: the kernel for a CPU takes no map of experts, and reads past the end of
its weights. Here the map is applied before it; an expert of another process weighs nothing.

LoRA: vLLM takes the Triton experts of a GPU wherever adapters are on, though they may change the attention
alone. Here it takes those of a CPU.

A plugin of vLLM that works while its folder is on PYTHONPATH, in worker processes too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import wrapt

LAYERS = "vllm.model_executor.layers.fused_moe"


def install() -> None:
    """Change vLLM's modules as they are imported."""
    wrapt.register_post_import_hook(apply_map, f"{LAYERS}.experts.cpu_moe")
    wrapt.register_post_import_hook(without_lora, f"{LAYERS}.unquantized_fused_moe_method")
    wrapt.register_post_import_hook(known, "fse_patch.adapters.vllm.spread")


def apply_map(cpu_moe: Any) -> None:
    """Leave out experts of other processes in front of the kernel."""
    honest = cpu_moe.CPUUnquantizedExperts.apply
    if "topk_ids" not in inspect.signature(honest).parameters:
        return  # an earlier release, whose experts route by themselves

    @functools.wraps(honest)
    def apply(self: Any, *, topk_weights: Any, topk_ids: Any, expert_map: Any, **kwargs: Any) -> None:
        if expert_map is not None:
            local = expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(local < 0, 0.0)
            topk_ids = local.clamp(min=0).to(topk_ids.dtype)
        honest(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=None, **kwargs)

    cpu_moe.CPUUnquantizedExperts.apply = apply


def without_lora(method: Any) -> None:
    """Select a backend as if no adapters were on."""
    honest = method.select_unquantized_moe_backend

    @functools.wraps(honest)
    def select(moe_config: Any, *args: Any, **kwargs: Any) -> Any:
        return honest(dataclasses.replace(moe_config, is_lora_enabled=False), *args, **kwargs)

    method.select_unquantized_moe_backend = select


def known(spread: Any) -> None:
    """Tell fse_patch that experts of other processes are left out here."""
    spread.LEAVE_OUT |= {"cpu"}
