"""Decisions by what is stored: tensors and policy, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..checkpoint.config import UNQUANTISED, QuantConfig
from ..checkpoint.families import Role
from ..evidence.gather import Evidence, LayerEvidence, RoleEvidence
from ..quant.methods import quantises
from ..reasons import FUSES, Code, Reason
from .policy import Policy, PolicyFacts, Rule


@dataclass(frozen=True)
class Verdict:
    """Verdict of rules and tensors; `FUSES` is the code of a role that fuses."""

    reason: Reason
    rule: str = ""
    formats: tuple[str, ...] = ()


def weight_quantisation(evidence: Evidence) -> QuantConfig:
    """Return what engines read first, or nothing where no declaration quantises a weight."""
    return evidence.quant if quantises(evidence.quants or (evidence.quant,)) else QuantConfig()


def layer_facts(
    evidence: Evidence, role: Role, layer: LayerEvidence | None, engine: str, quant: QuantConfig
) -> PolicyFacts:
    """Collect what rules look at in one layer; ``layer`` None stands for all of them without headers.

    The family of ``evidence`` is known, and the layer has no finding; ``quant`` is its `weight_quantisation`.
    """
    family, moe = evidence.family, evidence.moe
    assert family is not None
    assert moe is not None
    config = layer.config if layer else None
    return PolicyFacts(
        quant_method=quant.method,
        quant_scheme=quant.scheme,
        family=family.name,
        engine=engine,
        role=role,
        num_shared_slots=moe.num_shared_slots or 0,
        routed=layer.routed if layer else None,
        shared=layer.shared if layer else None,
        format=config.format if config else "plain" if quant.method == UNQUANTISED else "",
        config=config.state if config else None,
    )


def storage_verdict(
    evidence: Evidence, quant: QuantConfig, slots: int, role: RoleEvidence, engine: str, policy: Policy
) -> Verdict:
    """Ask tensors and policy: all layers of the role fuse, or the first that does not is named.

    Args:
        quant: as of `weight_quantisation`.
        slots: of the shared expert, in each layer.
    """
    rule_for = lru_cache(maxsize=None)(policy.rule_for)
    rules: list[Rule] = []
    formats: set[str] = set()
    for layer in role.layers or (None,):
        if layer is not None and layer.finding is not None:
            return Verdict(layer.finding)
        facts = layer_facts(evidence, role.role, layer, engine, quant)
        rule = rule_for(facts)
        rules.append(rule)
        where = f"layer {layer.layer}" if layer else "config.json"
        seen = f"{where}: {_seen(evidence, layer, facts)}"
        if not rule.fuse:
            return Verdict(Reason(rule.reason, f"{seen}; {rule.why}"), rule.id)
        if code := never_fuses(facts):
            return Verdict(Reason(code, f"{seen}; no rule can allow that ({rule.id} would)"))
        formats.add(facts.format)
    named = tuple(sorted(formats))
    what = f"{len(role.moe_layers)} sparse layers, {slots} shared slot{'s' if slots > 1 else ''} each"
    if not role.layers:
        detail = f"{what}; by config.json alone, no safetensors headers were there"
    else:
        dtypes = sorted({t.dtype for layer in role.layers if layer.routed for t in layer.routed.tensors})
        detail = f"{what}; routed and shared experts alike in {', '.join(dtypes)} ({', '.join(named)})"
    return Verdict(Reason(FUSES, detail), rules[0].id, named)


def never_fuses(facts: PolicyFacts) -> Code | None:
    """Return the refusal that holds whatever any policy says; None where there is none."""
    if not facts.headers:
        return None if facts.quant_method == UNQUANTISED else "quant.unknown"
    if not facts.specs_equal:
        return "quant.mixed"
    if facts.config == "agrees":
        return None
    return "quant.contradiction" if facts.config == "contradicts" else "quant.unknown"


def _seen(evidence: Evidence, layer: LayerEvidence | None, facts: PolicyFacts) -> str:
    """Word the evidence behind a refusal, in words."""
    quant = evidence.quant
    method = f"quant_method {quant.method}" + (f" ({quant.scheme})" if quant.scheme else "")
    if layer is None or facts.routed is None or facts.shared is None:
        return f"{method}, no safetensors headers"
    if difference := facts.routed.difference(facts.shared):
        return f"{method}, {difference}"
    if layer.config is not None and layer.config.detail:
        return f"{method}, {layer.config.detail}"
    return f"{method}, experts stored as {' + '.join(map(str, facts.routed.gate_up))}"
