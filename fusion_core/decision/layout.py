"""Layout of one MoE layer: where its experts lie in the fused tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ExpertLayout:
    """Slots of a fused MoE layer: 0..E-1 are the routed experts, E..E+S-1 the shared expert.

    A shared expert that is S times as wide as a routed one splits exactly into S slots along the
    intermediate dimension, because SiLU(x.w1) * (x.w3) acts on each intermediate column alone and
    w2 sums over them: y = sum_j w2[:, j] * h[j].

    Args:
        num_routed: E, routed experts of the layer.
        num_shared_slots: S, slots that the shared expert takes.
        top_k: k, routed experts chosen for each token.
        hidden_size: H, width of ``hidden_states``.
        moe_intermediate_size: I, intermediate width of one slot.
    """

    num_routed: int
    num_shared_slots: int
    top_k: int
    hidden_size: int
    moe_intermediate_size: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"ExpertLayout.{name} must be at least 1, got {value}")
        if self.top_k > self.num_routed:
            raise ValueError(f"top_k {self.top_k} exceeds the {self.num_routed} routed experts")

    @property
    def num_experts(self) -> int:
        """Return E + S: rows of the fused ``w13`` and ``w2``."""
        return self.num_routed + self.num_shared_slots

    @property
    def fused_top_k(self) -> int:
        """Return k + S: columns of the fused ``topk_ids``."""
        return self.top_k + self.num_shared_slots

    @property
    def shared_intermediate_size(self) -> int:
        """Return S * I: intermediate width of the shared expert in the checkpoint."""
        return self.num_shared_slots * self.moe_intermediate_size

    @property
    def shared_slots(self) -> range:
        """Return the slot ids of the shared expert."""
        return range(self.num_routed, self.num_experts)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for reports and hashes."""
        return asdict(self)
