"""How SGLang numbers layers and fills experts."""

from __future__ import annotations

from typing import Any

from ...fusion_core.decision.layout import ExpertLayout
from ...fusion_core.decision.outcome import Decision
from ...fusion_core.forward.layer import FusedLayer
from ...fusion_core.weights.remap import SlotTensor
from ..role import EngineSlots
from ..start import Start
from .spread import is_spread


def number_of(decision: Decision, place: int) -> int | None:
    """Return the layer that SGLang calls ``place``, or None. A draft counts its layers from 0."""
    layers = () if decision.moe is None else decision.moe.layers
    if decision.role == "draft":
        return layers[place] if place < len(layers) else None
    return place


def refresh_gate(gate: Any) -> None:
    """Renew the float32 copy that GLM's gate keeps from its first call on; others keep none."""
    if (held := getattr(gate, "_weight_fp32", None)) is not None:
        held.copy_(gate.weight.data)
    elif hasattr(gate, "_weight_fp32"):
        gate._weight_fp32 = gate.weight.data.float()


class Slots(EngineSlots):
    """Layers by SGLang's own numbers, slots by the weight loader of their parameters."""

    def number_at(self, start: Start, place: int) -> int | None:
        """Return the layer that SGLang calls ``place``, or None."""
        return number_of(start.decision, place)

    def take(self, parameter: Any, part: SlotTensor, name: str) -> bool:
        """Hand ``part`` to SGLang's weight loader, which says nothing: what it leaves out shows as poison."""
        parameter.weight_loader(parameter, part.tensor, name, shard_id=part.shard, expert_id=part.slot)
        return True

    def rows(self, layout: ExpertLayout, experts: Any) -> int:
        """Return how many experts this process holds: its routed ones, and the shared slots behind them."""
        return int(experts.num_local_experts) if is_spread(experts) else layout.num_experts

    def share(self, experts: Any) -> tuple[int, int]:
        """Return the rank in tensor parallelism of experts, and its size."""
        return int(experts.moe_tp_rank), int(experts.moe_tp_size)

    def refresh(self, layer: FusedLayer) -> None:
        """Renew the float32 copy that GLM's gate keeps from its first call on.

        It must be neither of a graph nor stale.
        """
        refresh_gate(layer.block.gate)
