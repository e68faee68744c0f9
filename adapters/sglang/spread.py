"""Whole experts spread over processes: behind its own ones, each holds the slots of the shared expert.

Slot j of process r is expert E + r * S + j to all of them, as `append_shared_slots` counts. SGLang's own map
of experts leaves the slots of other processes out, as it leaves out their routed experts.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import FsePatchError
from ...fusion_core.decision.layout import ExpertLayout
from ...fusion_core.engines import facts_of

# Who runs experts and leaves out what the map gives -1. On a CPU it is counted like an expert: stock itself
# ends there.
LEAVE_OUT = frozenset(facts_of("sglang").leave_out)


def is_spread(experts: Any) -> bool:
    """Return whether the map of a process's experts is ours, with the slots of every process."""
    return hasattr(experts, "has_slots_of_all")


def map_slots(experts: Any, layout: ExpertLayout) -> None:
    """Give the dispatcher of ``experts`` a map with the slots of every process.

    Raises:
        FsePatchError: it maps no experts, or in another way.
    """
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

    dispatcher = experts.dispatcher
    mapped = type(dispatcher) is StandardDispatcher and not dispatcher.skip_local_expert_mapping
    if not mapped or dispatcher.local_expert_mapping is not None:
        raise FsePatchError(
            f"layer {experts.layer_id}: {type(dispatcher).__name__} is no dispatcher that is known"
        )
    ranks, rank, slots = experts.moe_ep_size, experts.moe_ep_rank, layout.num_shared_slots
    held = layout.num_routed // ranks
    local = torch.full((layout.num_routed + ranks * slots,), -1, dtype=torch.int32)
    local[rank * held : (rank + 1) * held] = torch.arange(held, dtype=torch.int32)
    first = layout.num_routed + rank * slots
    local[first : first + slots] = torch.arange(held, held + slots, dtype=torch.int32)
    experts.has_slots_of_all = True
    dispatcher.local_expert_mapping = local.to(experts.w13_weight.device)
