"""Weights of MoE blocks for measuring: random ones, and where a fused block has those of a stock one."""

from __future__ import annotations

from typing import Any

import torch

from ...fusion_core.layout import ExpertLayout
from ..filling import as_slots
from .formats import ExpertFormat


def process(block: Any) -> None:
    """What the engine does with loaded weights."""
    for module in block.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)


def copy(stock: Any, fused: Any, shared: str, layout: ExpertLayout) -> None:
    """The weights of a stock block, as loaded, to where a fused one has them."""
    routed, ours = stock.experts.routed_experts, fused.experts.routed_experts
    mlp, first = getattr(stock, shared), layout.num_routed
    for name, parameter in ours.named_parameters(recurse=False):
        kind, _, suffix = name.partition("_")
        if kind not in ("w13", "w2"):
            continue
        bits(parameter.data)[:first].copy_(bits(getattr(routed, name).data))
        source = getattr(mlp.gate_up_proj if kind == "w13" else mlp.down_proj, suffix).data
        slots = as_slots(bits(source), kind, layout.num_shared_slots)
        bits(parameter.data)[first:].copy_(slots)
    ours_too = dict(fused.named_parameters())
    for name, parameter in stock.named_parameters():
        if ".routed_experts." not in name and name in ours_too:
            ours_too[name].data.copy_(parameter.data)


def bits(values: torch.Tensor) -> torch.Tensor:
    """FP8 numbers as bytes: not every operation takes them."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def exact(experts: Any, expert: int, name: str, form: ExpertFormat) -> torch.Tensor:
    """w13 or w2 of one expert in float64, its scales in it."""
    weight: torch.Tensor = getattr(experts, f"{name}_weight").data[expert]
    if not form.scale:
        return weight.double()
    from ...fusion_core.kernels.experts_fp8 import dequantised  # needs Triton

    scale = getattr(experts, f"{name}_{form.scale}").data[expert]
    return dequantised(weight[None], scale[None], form.block, halves=2 if name == "w13" else 1)[0]
