"""How vLLM numbers layers and fills experts."""

from __future__ import annotations

import re
from typing import Any

from ...fusion_core.decision.layout import ExpertLayout
from ...fusion_core.forward.layer import FusedLayer
from ...fusion_core.weights.remap import SlotTensor
from ..role import EngineSlots
from ..start import Start
from .spread import first_id, is_spread

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Slots(EngineSlots):
    """Layers by the prefix of their modules, slots by the weight loader of their parameters."""

    def number_at(self, start: Start, place: str) -> int | None:
        """Return the layer that a module's prefix lies in, or None."""
        match = LAYER.search(place)
        return int(match[1]) if match else None

    def take(self, parameter: Any, part: SlotTensor, name: str) -> bool:
        """Hand ``part`` to vLLM's weight loader; it says whether it took it."""
        return bool(
            parameter.weight_loader(
                parameter,
                part.tensor,
                name,
                shard_id=part.shard,
                expert_id=part.slot,
                return_success=True,
            )
        )

    def id_of(self, experts: Any, slot: int) -> int:
        """Return vLLM's number of a slot of this process: each process has numbers of its own."""
        return slot + first_id(experts)

    def rows(self, layout: ExpertLayout, experts: Any) -> int:
        """Return how many experts this process holds: its routed ones, and the shared slots behind them."""
        return int(experts.local_num_experts) if is_spread(experts) else layout.num_experts

    def share(self, experts: Any) -> tuple[int, int]:
        """Return the rank in tensor parallelism, and its size."""
        return int(experts.moe_config.tp_rank), int(experts.moe_config.tp_size)

    def refresh(self, layer: FusedLayer) -> None:
        """Do nothing: vLLM keeps no copies of gates."""
