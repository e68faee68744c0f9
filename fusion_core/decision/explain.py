"""Explanation of a decision, layer by layer: the rule that fired and the evidence of headers and config."""

from __future__ import annotations

from typing import Any

from ..checkpoint.config import QuantConfig
from ..checkpoint.families import Role
from ..evidence.gather import Evidence, LayerEvidence
from ..evidence.specs import MlpSpec
from .decide import decide_evidence
from .policy import DEFAULT_DENY, Policy
from .storage import layer_facts, never_fuses, weight_quantisation


def explain(evidence: Evidence, engine: str, role: Role, policy: Policy) -> dict[str, Any]:
    """Explain the decision of one role, as plain data.

    Keys: role, fuse, reason, detail, rule (id, fuse, reason, why, source, number of the rule in the effective
    policy; null where the checkpoint was refused before any rule), quantisation (method, scheme, source of
    each declaration), layers: groups of layers that show the same, with "layers", "rule", "finding", "config"
    ("agrees", "differs", "contradicts", "unknown"), "config_detail", and for routed and shared experts what
    "headers" and "config" say of "gate_up" and "down".

    Raises:
        FsePatchError: the engine is unknown.
    """
    decision = decide_evidence(evidence, engine, role, policy)
    numbered = enumerate((*policy.rules, DEFAULT_DENY), 1)
    number, fired = next(((n, rule) for n, rule in numbered if rule.id == decision.rule), (0, None))
    role_evidence = evidence.roles.get(role)
    groups: list[dict[str, Any]] = []
    quant = weight_quantisation(evidence)
    for layer in role_evidence.layers if role_evidence else ():
        shown = _layer(evidence, layer, engine, role, policy, quant)
        if groups and {k: v for k, v in groups[-1].items() if k != "layers"} == shown:
            groups[-1]["layers"].append(layer.layer)
        else:
            groups.append({"layers": [layer.layer], **shown})
    return {
        "role": role,
        **{key: decision.to_dict()[key] for key in ("fuse", "reason", "detail")},
        "rule": None
        if fired is None
        else {"number": number} | fired.model_dump(include={"id", "fuse", "reason", "why", "source"}),
        "formats": list(decision.formats),
        "quantisation": [
            {"method": q.method, "scheme": q.scheme, "source": q.source or "nothing declared"}
            for q in evidence.quants
        ],
        "layers": groups,
    }


def _layer(
    evidence: Evidence, layer: LayerEvidence, engine: str, role: Role, policy: Policy, quant: QuantConfig
) -> dict[str, Any]:
    if layer.finding is not None or evidence.moe is None or layer.config is None:
        # The detail of a finding names its layer: layers with findings stay apart.
        finding = layer.finding
        text = f"{finding.code}: {finding.detail}" if finding else ""
        return {"rule": None, "finding": text, "config": None, "config_detail": ""}
    facts = layer_facts(evidence, role, layer, engine, quant)
    config = layer.config
    return {
        "rule": policy.rule_for(facts).id,
        "finding": never_fuses(facts) or "",
        "config": config.state,
        "config_detail": config.detail,
        "routed": _part(layer.routed, config.routed),
        "shared": _part(layer.shared, config.shared),
    }


def _part(spec: MlpSpec | None, claim: Any) -> dict[str, Any]:
    return {
        name: {
            "headers": " + ".join(map(str, getattr(spec, name))) if spec else None,
            "config": str(getattr(claim, name)) if claim else None,
        }
        for name in ("gate_up", "down")
    }
