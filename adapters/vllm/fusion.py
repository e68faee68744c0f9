"""One role of one vLLM model while it is built, loaded and run."""

from __future__ import annotations

from typing import Any

from ...fusion_core.remap import SlotTensor
from .. import model_fusion
from ..model_fusion import ACTIVE, CONSTRUCTED, constructed

__all__ = ["ACTIVE", "CONSTRUCTED", "ModelFusion", "constructed"]


class ModelFusion(model_fusion.ModelFusion):
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
