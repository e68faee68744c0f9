"""Makes the decisions: one a role, from one reading of the checkpoint, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...errors import FsePatchError
from ...patches import ENGINES
from ..checkpoint.config import UNQUANTISED, MoeConfig
from ..checkpoint.families import FamilySpec, Role
from ..evidence.gather import Evidence, LayerEvidence, RoleEvidence, read_evidence
from ..reasons import Reason
from .layout import ExpertLayout
from .outcome import FUSES, FusionDecision, RoutingSpec
from .policy import Policy, PolicyFacts, Rule
from .policy_file import load_policy

_ACTIVATION = "silu"


@dataclass(frozen=True)
class _Verdict:
    reason: Reason
    detail: str
    rule: str = ""
    formats: tuple[str, ...] = ()


def decide(
    checkpoint: Path, engine: str, role: Role = "main", policy: Policy | None = None
) -> FusionDecision:
    """Whether one role of ``checkpoint`` fuses in ``engine``; a role that it lacks is refused.

    Args:
        checkpoint: folder with config.json and, unless weights are not there yet, safetensors files.
        policy: effective policy; the default one if None.

    Raises:
        FsePatchError: the checkpoint is missing or malformed, or the engine is unknown.
    """
    return decide_evidence(read_evidence(Path(checkpoint)), engine, role, policy)


def decide_roles(checkpoint: Path, engine: str, policy: Policy | None = None) -> dict[Role, FusionDecision]:
    """The decision of the main model, and of the MTP draft where there is one; headers are read once."""
    evidence = read_evidence(Path(checkpoint))
    roles: tuple[Role, ...] = ("main", "draft") if "draft" in evidence.roles else ("main",)
    return {role: decide_evidence(evidence, engine, role, policy) for role in roles}


def decide_evidence(
    evidence: Evidence, engine: str, role: Role = "main", policy: Policy | None = None
) -> FusionDecision:
    """The decision that ``evidence`` leads to: a pure function of its arguments."""
    if engine not in ENGINES:
        raise FsePatchError(f"unknown engine {engine!r}; use one of {', '.join(ENGINES)}")
    policy = policy or load_policy()
    if evidence.family is None or evidence.moe is None:
        named = f"model_type {evidence.model_type!r}" if evidence.model_type else "no model_type"
        return FusionDecision(
            role=role,
            fuse=False,
            reason="family.unknown",
            detail=f"{named} is of no family that fse_patch knows",
            rule="",
            engine=engine,
            model_type=evidence.model_type,
            policy_hash=policy.hash,
            quant_method=evidence.quant.method,
        )
    family, moe, found = evidence.family, evidence.moe, evidence.roles.get(role)
    verdict = _shape_verdict(moe, found)
    if verdict is None and found is not None:
        verdict = _storage_verdict(evidence, moe, found, engine, policy)
    assert verdict is not None
    fuse = verdict.reason == FUSES
    layers = found.moe_layers if found is not None else ()
    return FusionDecision(
        role=role,
        fuse=fuse,
        reason=verdict.reason,
        # Names and values from the checkpoint are in it: one line, whatever they hold.
        detail=" ".join(verdict.detail.split()),
        rule=verdict.rule,
        engine=engine,
        model_type=evidence.model_type,
        policy_hash=policy.hash,
        quant_method=evidence.quant.method,
        formats=verdict.formats,
        stored_alike=found.stored_alike if found is not None else None,
        layout=_layout(moe),
        routing=_routing(family, moe),
        shared_weight=family.shared_weight,
        moe_layers=layers,
        fused_layers=layers if fuse else (),
    )


def _layout(moe: MoeConfig) -> ExpertLayout | None:
    if not moe.num_routed or moe.num_shared_slots is None:
        return None
    return ExpertLayout(
        num_routed=moe.num_routed,
        num_shared_slots=moe.num_shared_slots,
        top_k=moe.top_k,
        hidden_size=moe.hidden_size,
        moe_intermediate_size=moe.moe_intermediate_size,
    )


def _routing(family: FamilySpec, moe: MoeConfig) -> RoutingSpec:
    return RoutingSpec(
        scoring=family.scoring,
        renormalize=moe.renormalize,
        routed_scaling_factor=moe.routed_scaling_factor,
        num_expert_group=moe.num_expert_group,
        topk_group=moe.topk_group,
        # The bias that corrects sigmoid scores is part of that scoring in every family that has it.
        has_correction_bias=family.scoring == "sigmoid",
    )


def _shape_verdict(moe: MoeConfig, found: RoleEvidence | None) -> _Verdict | None:
    """The refusal that config.json alone leads to, or None."""
    width, shared = moe.moe_intermediate_size, moe.shared_intermediate_size
    slots = moe.num_shared_slots
    if found is None:
        return _Verdict("family.unknown", "neither config.json nor the tensors show an MTP draft")
    if not moe.num_routed or not found.moe_layers:
        return _Verdict("family.unknown", "config.json describes no layer with routed experts")
    if not shared:
        return _Verdict("width.mismatch", "the shared expert has width 0: there is nothing to fuse")
    if slots is None:
        return _Verdict(
            "width.mismatch", f"the shared expert's width {shared} is no multiple of the routed width {width}"
        )
    if moe.hidden_act != _ACTIVATION:
        return _Verdict(
            "activation.differs", f"hidden_act is {moe.hidden_act!r}; only {_ACTIVATION!r} is proven to fuse"
        )
    return None


def layer_facts(evidence: Evidence, role: Role, layer: LayerEvidence | None, engine: str) -> PolicyFacts:
    """What rules look at in one layer; ``layer`` None stands for all of them where no headers are there.

    The family of ``evidence`` is known, and the layer has no finding.
    """
    family, moe, quant = evidence.family, evidence.moe, evidence.quant
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


def _storage_verdict(
    evidence: Evidence, moe: MoeConfig, found: RoleEvidence, engine: str, policy: Policy
) -> _Verdict:
    """What tensors and policy say: all layers of the role fuse, or the first that does not is named."""
    slots = moe.num_shared_slots or 0
    rule_for = lru_cache(maxsize=None)(policy.rule_for)
    rule: Rule | None = None
    formats: set[str] = set()
    for layer in found.layers or (None,):
        if layer is not None and layer.finding is not None:
            return _Verdict(layer.finding.reason, layer.finding.detail)
        facts = layer_facts(evidence, found.role, layer, engine)
        fired = rule_for(facts)
        rule = rule or fired
        where = f"layer {layer.layer}" if layer else "config.json"
        seen = f"{where}: {_seen(evidence, layer, facts)}"
        if not fired.fuse:
            return _Verdict(fired.reason, f"{seen}; {fired.why}", fired.id)
        if reason := never_fuses(facts):
            return _Verdict(reason, f"{seen}; no rule can allow that ({fired.id} would)")
        formats.add(facts.format)
    assert rule is not None
    named = tuple(sorted(formats))
    what = f"{len(found.moe_layers)} sparse layers, {slots} shared slot{'s' if slots > 1 else ''} each"
    if not found.layers:
        detail = f"{what}; by config.json alone, no safetensors headers were there"
        return _Verdict(FUSES, detail, rule.id, named)
    dtypes = sorted({t.dtype for layer in found.layers if layer.routed for t in layer.routed.tensors})
    detail = f"{what}; routed and shared experts alike in {', '.join(dtypes)} ({', '.join(named)})"
    return _Verdict(FUSES, detail, rule.id, named)


def never_fuses(facts: PolicyFacts) -> Reason | None:
    """The refusal that holds whatever a policy says, a user's own included; None where there is none."""
    if not facts.headers:
        return None if facts.quant_method == UNQUANTISED else "quant.unknown"
    if not facts.specs_equal:
        return "quant.mixed"
    if facts.config == "agrees":
        return None
    return "quant.contradiction" if facts.config == "contradicts" else "quant.unknown"


def _seen(evidence: Evidence, layer: LayerEvidence | None, facts: PolicyFacts) -> str:
    """The evidence behind a refusal, in words."""
    quant = evidence.quant
    method = f"quant_method {quant.method}" + (f" ({quant.scheme})" if quant.scheme else "")
    if layer is None or facts.routed is None or facts.shared is None:
        return f"{method}, no safetensors headers"
    if difference := facts.routed.difference(facts.shared):
        return f"{method}, {difference}"
    if layer.config is not None and layer.config.detail:
        return f"{method}, {layer.config.detail}"
    return f"{method}, experts stored as {' + '.join(map(str, facts.routed.gate_up))}"
