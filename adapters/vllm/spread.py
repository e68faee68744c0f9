"""Whole experts spread over processes: behind its own ones, each holds the slots of the shared expert.

Slot j of process r is expert E + r * S + j to all of them, as `append_shared_slots` counts. vLLM's own map
of experts leaves the slots of other processes out, as it leaves out their routed experts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...fusion_core.engines import facts_of

# Backends whose kernels leave out what the map gives -1. On a CPU they take no map and read past the end of
# the weights: stock itself ends there.
LEAVE_OUT = frozenset(facts_of("vllm").leave_out)


@cache
def experts_class() -> type[Any]:
    """Return the subclass of the installed release's experts that have ``slots`` more in each process."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    class SpreadExperts(RoutedExperts):  # type: ignore[misc]
        """Routed experts of this process, and behind them its slots; ``first_id`` is added to a slot's id."""

        def __init__(self, *args: Any, slots: int, expert_map_manager: Any, **kwargs: Any) -> None:
            moe_config = kwargs.get("moe_config", args[2] if len(args) > 2 else None)
            first = add_slots(expert_map_manager, moe_config, slots)
            super().__init__(*args, expert_map_manager=expert_map_manager, **kwargs)
            self.first_id = first

    return SpreadExperts


def add_slots(manager: Any, moe_config: Any, slots: int) -> int:
    """Add the slots of every process to the map of experts, and those of this one to what it holds.

    Returns:
        What is added to E + j for slot j of this process.
    """
    held, ranks, rank = int(manager.local_num_experts), int(manager.ep_size), int(manager.ep_rank)
    places = torch.full((ranks, slots), -1, dtype=manager.expert_map.dtype, device=manager.expert_map.device)
    places[rank] = torch.arange(held, held + slots)
    manager._expert_map = torch.cat([manager.expert_map, places.flatten()])
    manager._local_num_experts = moe_config.num_local_experts = held + slots
    manager.global_num_experts = moe_config.num_experts = moe_config.num_experts + ranks * slots
    return rank * slots


def is_spread(experts: Any) -> bool:
    """Return whether a process's experts are ours, with slots behind its own."""
    return hasattr(experts, "first_id")


def first_id(experts: Any) -> int:
    """Return what is added to E + j for slot j of this process."""
    return int(getattr(experts, "first_id", 0))
