"""Replacements in vLLM's layer-wise reload: the shared expert is a part of a module now.

vLLM rebuilds every module of which an update sends anything, and what the update does not send of it is left
uninitialised. The shared expert's tensors were modules of their own, so stock vLLM keeps them, and the routed
experts, apart. Fused they are rows of one module: rows that nothing was sent for keep their values here.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from ...errors import FsePatchError
from .. import head, paired
from ..role import CONSTRUCTED, FusedRole, constructed

SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}


def process_layer(original: Callable[..., None]) -> Callable[..., None]:
    """Replace ``_layerwise_process``: fill a layer with what was sent, then copy it over the running one."""

    @functools.wraps(original)
    def process(layer: torch.nn.Module, info: Any) -> None:
        place = _place_of(layer)
        if place is None or info.kernel_tensors is None:
            return original(layer, info)
        fused_role, number = place
        running = info.kernel_tensors[0]
        unsent, problem = _unsent(layer, info, fused_role.layout.num_experts)
        if fused_role.start.ranks > 1:
            problem = "whole experts are spread over processes, where no update was run; start again"
        if problem:
            _leave(layer, info)
            fused_role.not_updated[number] = problem
            return
        fused_role.not_updated.pop(number, None)
        rows = [(p, unsent[_stem(name)]) for name, p in running.items()]
        kept = [(p, experts, p.data[experts].clone()) for p, experts in rows if experts]
        _pack_again(layer)
        original(layer, info)
        for parameter, experts, values in kept:
            parameter.data[experts] = values

    return process


def finalize(original: Callable[..., None]) -> Callable[..., None]:
    """Replace ``finalize_layerwise_processing``: say which part of the update could not be taken."""

    @functools.wraps(original)
    def finalize_layerwise_processing(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        problems = []
        for fused_role in constructed():
            where = f"of the {fused_role.name} model was not updated"
            problems += [f"layer {n} {where}: {why}" for n, why in fused_role.not_updated.items()]
            fused_role.not_updated.clear()
        if problems:
            more = f" (and {len(problems) - 1} more layers)" if problems[1:] else ""
            raise FsePatchError(problems[0] + more)
        for fused_role in constructed():
            fused_role.updated()
        for role in paired.constructed():
            role.updated()
        for own in head.constructed():
            own.updated()

    return finalize_layerwise_processing


def _place_of(experts: torch.nn.Module) -> tuple[FusedRole, int] | None:
    """Return the role and layer that a module holds the experts of."""
    places = ((r, n) for r in CONSTRUCTED for n, layer in r.layers.items() if layer.experts is experts)
    return next(places, None)


def _stem(name: str) -> str:
    return name.partition("_")[0]


def _unsent(layer: torch.nn.Module, info: Any, total: int) -> tuple[dict[str, list[int]], str]:
    """Return experts whose w13, and whose w2, was not sent; and why they cannot be kept, or nothing."""
    sent = defaultdict(set)
    for name, call in info.loaded_weights:
        sent[_stem(name), call.arguments["expert_id"]].add((name, call.arguments["shard_id"]))
    unsent: dict[str, list[int]] = defaultdict(list)
    for stem, shards in SHARDS.items():
        names = [name for name, _ in layer.named_parameters(recurse=False) if _stem(name) == stem]
        whole = {(name, shard) for name in names for shard in shards}
        unsent[stem] = [expert for expert in range(total) if sent[stem, expert] != whole]
        if part := [expert for expert in unsent[stem] if sent[stem, expert]]:
            return unsent, f"only a part of {stem} of expert {part[0]} was sent; send gate and up together"
    if any(unsent.values()) and any(p.shape[:1] != (total,) for p in info.kernel_tensors[0].values()):
        return unsent, "only some experts were sent, and they are packed together; send all of the layer"
    return unsent, ""


def _leave(layer: torch.nn.Module, info: Any) -> None:
    """Put the layer back as it runs."""
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors

    _place_kernel_tensors(layer, info)
    info.reset()


def _pack_again(layer: Any) -> None:
    """Drop the kernel on a CPU: vLLM packs experts for a new one only, and would copy plain rows over."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        layer.quant_method.moe_kernel = None
