"""One role of one vLLM model while it is built, loaded and run."""

from __future__ import annotations

from typing import Any

from ...fusion_core.weights.remap import SlotTensor
from .. import role
from ..role import ACTIVE, CONSTRUCTED, constructed

__all__ = ["ACTIVE", "CONSTRUCTED", "ModelFusion", "constructed"]


class ModelFusion(role.ModelFusion):
    """Writes slots with vLLM's own weight loader."""

    def _take(self, parameter: Any, part: SlotTensor, name: str) -> bool:
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

    def _share(self, experts: Any) -> tuple[int, int]:
        return int(experts.moe_config.tp_rank), int(experts.moe_config.tp_size)
