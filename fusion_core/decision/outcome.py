"""The one decision that constructor, loader and router of a role read, and none makes again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from ..checkpoint.families import Role, Scoring, SharedWeight
from .layout import ExpertLayout

FUSES: Final = "ok"


@dataclass(frozen=True)
class RoutingSpec:
    """How a layer routes, in the terms of ``config.json``.

    ``num_expert_group`` and ``topk_group`` are 1 where experts are not grouped.
    """

    scoring: Scoring
    renormalize: bool
    routed_scaling_factor: float = 1.0
    num_expert_group: int = 1
    topk_group: int = 1
    has_correction_bias: bool = False


@dataclass(frozen=True)
class FusionDecision:
    """Fuse or not, why, and with which layout. Frozen; made before anything is allocated.

    Args:
        role: "main" or "draft" (the MTP layers): their quantisation can differ.
        reason: "ok", or the refusal code of docs/refusals.md.
        detail: one line for people: what was seen and where.
        rule: id of the policy rule that fired, or "" where none was asked.
        moe_layers: sparse layers of the role that have a shared expert, by checkpoint number.
        fused_layers: those of them that fuse: all or none.
        policy_hash: short hash of the effective policy, part of compile-cache keys.
        formats: of the experts in layers that may fuse, "plain" where unquantised; see proven.py.
        quant_method: what the checkpoint declares, "none" where nothing; "" where nothing was read.
        stored_alike: whether every layer stores routed and shared experts alike, whatever the reason is; None
            where no headers show it.
    """

    role: Role
    fuse: bool
    reason: str
    detail: str
    rule: str
    engine: str
    model_type: str
    policy_hash: str = ""
    quant_method: str = ""
    stored_alike: bool | None = None
    formats: tuple[str, ...] = ()
    layout: ExpertLayout | None = None
    routing: RoutingSpec | None = None
    shared_weight: SharedWeight | None = None
    moe_layers: tuple[int, ...] = ()
    fused_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.fuse != (self.reason == FUSES) or self.fuse != bool(self.fused_layers):
            raise ValueError(f"contradictory decision: {self}")
        if self.fuse and (self.layout is None or self.routing is None or self.shared_weight is None):
            raise ValueError(f"a decision to fuse needs layout, routing and shared weight: {self}")

    def to_dict(self) -> dict[str, Any]:
        """The decision as plain data."""
        return asdict(self)
