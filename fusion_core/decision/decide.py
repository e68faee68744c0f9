"""Decisions: one a role, from one reading of the checkpoint, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import FsePatchError
from ...patches import ENGINES
from ..checkpoint.config import MoeConfig, QuantConfig
from ..checkpoint.families import FamilySpec, Role, families, without_shared_expert
from ..checkpoint.sources import Source
from ..checkpoint.weight_files import AUTO
from ..evidence.gather import Evidence, RoleEvidence, read_evidence
from ..quant.methods import packs, reader_of
from ..reasons import FUSES, Reason
from .layout import ExpertLayout
from .outcome import Decision, Merged, MoeSpec, RoutingSpec, Stock
from .pairing import pairing_layout, pairing_unread, pairing_words
from .policy import Policy
from .policy_file import load_policy
from .storage import Verdict, layer_facts, storage_verdict, weight_quantisation

_ACTIVATION = "silu"


def decide(
    checkpoint: Source | Path,
    engine: str,
    role: Role = "main",
    policy: Policy | None = None,
    load_format: str = AUTO,
) -> Decision:
    """Decide whether one role of ``checkpoint`` fuses in ``engine``; a role that it lacks is refused.

    Args:
        checkpoint: where config.json is and, unless weights are not there yet, safetensors files: a folder or
            a `Source`.
        policy: effective policy; the default one if None.

    Raises:
        FsePatchError: the checkpoint is missing or malformed, or the engine is unknown.
    """
    return decide_evidence(read_evidence(checkpoint, engine, load_format), engine, role, policy)


def decide_roles(
    checkpoint: Source | Path, engine: str, policy: Policy | None = None, load_format: str = AUTO
) -> dict[Role, Decision]:
    """Decide for the main model, and for the MTP draft where there is one; headers are read once."""
    evidence = read_evidence(checkpoint, engine, load_format)
    roles: tuple[Role, ...] = ("main", "draft") if "draft" in evidence.roles else ("main",)
    return {role: decide_evidence(evidence, engine, role, policy) for role in roles}


def decide_evidence(
    evidence: Evidence, engine: str, role: Role = "main", policy: Policy | None = None
) -> Decision:
    """Decide by ``evidence``: a pure function of its arguments."""
    if engine not in ENGINES:
        raise FsePatchError(f"unknown engine {engine!r}; use one of {', '.join(ENGINES)}")
    policy = policy or load_policy()
    quant = weight_quantisation(evidence)
    common: dict[str, Any] = {
        "role": role,
        "engine": engine,
        "model_type": evidence.model_type,
        "policy_hash": policy.hash,
        "quant_method": quant.method,
        "read_as": reader_of(evidence.quant),
    }
    if evidence.family is None or evidence.moe is None:
        return Stock(**common, reason=_no_family(evidence.model_type))
    moe, layers = evidence.moe, evidence.roles.get(role)
    routing, shared_weight = _routing(evidence.family, moe), evidence.family.shared_weight
    layout = _fusable(moe, layers)
    if isinstance(layout, Reason) or layers is None:
        verdict = Verdict(layout) if isinstance(layout, Reason) else Verdict(_NO_DRAFT)
    elif reason := (
        evidence.refusal or layers.finding or _built_otherwise(evidence.family, moe, layers, engine)
    ):
        verdict = Verdict(reason)
    else:
        verdict = storage_verdict(evidence, quant, layout.num_shared_slots, layers, engine, policy)
    common |= {
        "rule": verdict.rule,
        "formats": verdict.formats,
        "stored_alike": layers.stored_alike if layers else None,
        "packed": _packed(layers, quant),
        "config": moe,
        "stored_layers": (layers.stored_layers or layers.moe_layers) if layers else (),
        "pairing": _pairing(evidence, quant, layers, engine, policy),
        "stored": pairing_words(layers.layers) if layers else "",
        "unread": pairing_unread(layers.layers) if layers else "",
    }
    # Names and values from the checkpoint are in it: one line, whatever they hold.
    detail = " ".join(verdict.reason.detail.split())
    if isinstance(layout, ExpertLayout) and layers and verdict.reason.code == FUSES:
        spec = MoeSpec(layout, routing, shared_weight, layers.moe_layers)
        return Merged(**common, moe=spec, detail=detail)
    return Stock(
        **common,
        reason=Reason(verdict.reason.code, detail),
        layout=_layout(moe),
        routing=routing,
        shared_weight=shared_weight,
        moe_layers=layers.moe_layers if layers else (),
    )


def _pairing(
    evidence: Evidence, quant: QuantConfig, role: RoleEvidence | None, engine: str, policy: Policy
) -> MoeSpec | Reason:
    family, moe = evidence.family, evidence.moe
    assert family is not None
    assert moe is not None
    reason = _unsparse(moe, role)
    if reason is None and role is not None:
        reason = _other_activation(moe) or _built_otherwise(family, moe, role, engine)
    if reason is not None or role is None:
        return reason or _NO_DRAFT
    layout = pairing_layout(
        moe, role, policy, lambda layer: layer_facts(evidence, role.role, layer, engine, quant)
    )
    if isinstance(layout, Reason):
        return layout
    return MoeSpec(layout, _routing(family, moe), family.shared_weight, role.moe_layers)


def _no_family(model_type: str) -> Reason:
    """Say why a model is of no family: it has no shared expert, or nobody has looked at it."""
    if model_type in without_shared_expert():
        return Reason("shared.absent", f"models of model_type {model_type!r} have no shared expert")
    named = f"model_type {model_type!r}" if model_type else "no model_type"
    known = ", ".join(sorted({name for family in families() for name in family.model_types}))
    return Reason("family.unknown", f"{named} is of no family that fse_patch knows; it knows {known}")


def _packed(layers: RoleEvidence | None, quant: QuantConfig) -> bool:
    specs = [spec for layer in layers.layers for spec in (layer.routed, layer.shared)] if layers else []
    if any(spec.packed for spec in specs if spec):
        return True
    return (not specs or None in specs) and packs(quant)


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


_NO_DRAFT = Reason("family.unknown", "neither config.json nor the tensors show an MTP draft")


def _fusable(moe: MoeConfig, layers: RoleEvidence | None) -> ExpertLayout | Reason:
    """Return the layout, or the refusal that config.json alone leads to."""
    width, shared = moe.moe_intermediate_size, moe.shared_intermediate_size
    if reason := _unsparse(moe, layers):
        return reason
    layout = _layout(moe)
    if layout is None:
        return Reason(
            "width.mismatch", f"the shared expert's width {shared} is no multiple of the routed width {width}"
        )
    return _other_activation(moe) or layout


def _unsparse(moe: MoeConfig, layers: RoleEvidence | None) -> Reason | None:
    """Return the refusal of a role without a layer that has both kinds of experts."""
    if layers is None:
        return _NO_DRAFT
    if not moe.num_routed or not layers.moe_layers:
        return Reason("family.unknown", "config.json describes no layer with routed experts")
    if not moe.shared_intermediate_size:
        return Reason("shared.absent", "the shared expert has width 0: there is nothing to fuse")
    return None


def _other_activation(moe: MoeConfig) -> Reason | None:
    if moe.hidden_act == _ACTIVATION:
        return None
    return Reason(
        "activation.differs", f"hidden_act is {moe.hidden_act!r}; only {_ACTIVATION!r} is proven to fuse"
    )


def _built_otherwise(family: FamilySpec, moe: MoeConfig, layers: RoleEvidence, engine: str) -> Reason | None:
    """Return the refusal of a model that the engine itself builds otherwise than its checkpoint is."""
    if engine not in family.every_layer_sparse or layers.role != "main":
        return None
    stored = layers.stored_layers or layers.moe_layers
    empty = sorted(set(range(moe.num_hidden_layers)) - set(stored))
    if not empty:
        return None
    seen = f"{engine} builds every layer with experts, and the checkpoint has none for layers {empty}"
    why = f"unpatched {engine} answers from weights that were never loaded, and wrongly"
    return Reason("upstream.wrong", f"{seen}: {why}")
