"""Pairing by the checkpoint alone: which layers may run in one pass over weights that stay apart.

Nothing is merged, loaded or moved, so formats, widths and names do not matter here: what the engine made of
the weights is read and proved after it has loaded them.
"""

from __future__ import annotations

from collections.abc import Callable

from ..checkpoint.config import MoeConfig
from ..evidence.gather import LayerEvidence, RoleEvidence
from ..reasons import Reason
from .layout import ExpertLayout
from .policy import Policy, PolicyFacts


def pairing_layout(
    moe: MoeConfig,
    role: RoleEvidence,
    policy: Policy,
    facts_of: Callable[[LayerEvidence | None], PolicyFacts],
) -> ExpertLayout | Reason:
    """Return the layout of the layers of a role that may be paired, or why they may not.

    Its ``num_shared_slots`` is the number of routed widths that cover the shared expert. Activation and
    layers of the model are the caller's to check.

    Args:
        facts_of: what rules look at in a layer; of all layers for None.
    """
    for layer in role.layers or (None,):
        rule = policy.rule_for(facts_of(layer))
        if not rule.pairs:
            where = f"layer {layer.layer}" if layer else "config.json"
            return Reason("disabled" if rule.fuse else rule.reason, f"{where}: {rule.why} ({rule.id})")
    return ExpertLayout(
        num_routed=moe.num_routed,
        num_shared_slots=-(-moe.shared_intermediate_size // moe.moe_intermediate_size),
        top_k=moe.top_k,
        hidden_size=moe.hidden_size,
        moe_intermediate_size=moe.moe_intermediate_size,
    )
