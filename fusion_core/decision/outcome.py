"""Outcome of the decision for one role, `Merged`, `Paired` or `Stock`: nothing decides again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ...errors import FsePatchError
from ..checkpoint.config import MoeConfig
from ..checkpoint.families import FamilySpec, Role, Scoring, SharedWeight, family_of
from ..reasons import FUSES, Reason
from .layout import ExpertLayout


@dataclass(frozen=True)
class RoutingSpec:
    """Routing of a layer, in the terms of ``config.json``.

    ``num_expert_group`` and ``topk_group`` are 1 where experts are not grouped.
    """

    scoring: Scoring
    renormalize: bool
    routed_scaling_factor: float = 1.0
    num_expert_group: int = 1
    topk_group: int = 1
    has_correction_bias: bool = False


@dataclass(frozen=True)
class MoeSpec:
    """The sparse layers of one role: sizes, routing and the weight of the shared expert.

    Args:
        layers: their numbers, as the checkpoint counts them.
    """

    layout: ExpertLayout
    routing: RoutingSpec
    shared_weight: SharedWeight
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Decided:
    """Fields of every outcome.

    Args:
        role: "main" or "draft" (the MTP layers): their quantisation can differ.
        rule: id of the policy rule that fired, or "" where none was asked.
        policy_hash: short hash of the effective policy, part of compile-cache keys.
        quant_method: what the checkpoint declares of its weights, "none" where nothing; "" where nothing was
            read.
        read_as: the declaration under the name of those that read it, in `READERS`: a quantisation of the
            KV cache alone is "none" to its weights, and engines read it all the same; "" as `quant_method`.
        formats: of the experts in layers that may fuse, "plain" where unquantised; see proven.py.
        stored_alike: whether every layer stores routed and shared experts alike, whatever was decided; None
            where no headers show it.
        packed: whether their weights are integers that hold several, or nothing shows that they are not.
        config: sizes and routing by config.json, which the decision rests on; None where nothing was read.
        stored_layers: layers with experts in the checkpoint; by config.json alone, the sparse ones.
        pairing: what could run over weights that stay apart, or why not; None where nothing was read.
        stored: how routed and shared experts are stored, in words; "" where no headers show it.
        unread: experts that headers show to be in no format that a pass over weights apart reads; or "".
    """

    role: Role
    engine: str
    model_type: str = ""
    rule: str = ""
    policy_hash: str = ""
    quant_method: str = ""
    read_as: str = ""
    formats: tuple[str, ...] = ()
    stored_alike: bool | None = None
    packed: bool = False
    config: MoeConfig | None = None
    stored_layers: tuple[int, ...] = ()
    pairing: MoeSpec | Reason | None = None
    stored: str = ""
    unread: str = ""
    # How the weights of both kinds of experts lie where the role fuses.
    weight_layout: ClassVar[str] = ""

    @property
    def family(self) -> FamilySpec:
        """Return the family of the model.

        Raises:
            FsePatchError: it is of none.
        """
        family = family_of(self.model_type)
        if family is None:
            raise FsePatchError(f"{self.model_type!r} fuses, and is of no family that fse_patch knows")
        return family

    def _common(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(_Decided)}

    def _refused(self, reason: Reason, moe: MoeSpec) -> Stock:
        return Stock(
            **self._common(),
            reason=reason,
            layout=moe.layout,
            routing=moe.routing,
            shared_weight=moe.shared_weight,
            moe_layers=moe.layers,
        )

    def _to_dict(
        self,
        reason: Reason,
        layout: ExpertLayout | None,
        routing: RoutingSpec | None,
        shared_weight: SharedWeight | None,
        moe_layers: tuple[int, ...],
    ) -> dict[str, Any]:
        fuse = reason.code == FUSES
        return {
            "role": self.role,
            "fuse": fuse,
            "reason": reason.code,
            "detail": reason.detail,
            "weight_layout": self.weight_layout if fuse else "",
            "rule": self.rule,
            "engine": self.engine,
            "model_type": self.model_type,
            "policy_hash": self.policy_hash,
            "quant_method": self.quant_method,
            "stored_alike": self.stored_alike,
            "formats": self.formats,
            "layout": layout.to_dict() if layout else None,
            "routing": asdict(routing) if routing else None,
            "shared_weight": shared_weight,
            "moe_layers": moe_layers,
            "fused_layers": moe_layers if fuse else (),
        }


@dataclass(frozen=True, kw_only=True)
class _Fuses(_Decided):
    """Fields of both outcomes that run layers of ours.

    Args:
        detail: one line for people: what was seen and where.
    """

    moe: MoeSpec
    detail: str = ""

    def refused(self, reason: Reason) -> Stock:
        """Return what is decided where something else speaks against it."""
        return self._refused(reason, self.moe)

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as plain data, for reports."""
        moe = self.moe
        reason = Reason(FUSES, self.detail)
        return self._to_dict(reason, moe.layout, moe.routing, moe.shared_weight, moe.layers)


@dataclass(frozen=True, kw_only=True)
class Merged(_Fuses):
    """Outcome: in all layers of ``moe`` the shared expert becomes the last slots of the experts' tensors."""

    weight_layout: ClassVar[str] = "merged"

    def __post_init__(self) -> None:
        if not self.moe.layers:
            raise ValueError(f"a decision to fuse no layer: {self}")


@dataclass(frozen=True, kw_only=True)
class Paired(_Fuses):
    """Outcome: weights stay where the engine keeps them, and few tokens run in one pass over both kinds."""

    weight_layout: ClassVar[str] = "paired"


@dataclass(frozen=True, kw_only=True)
class Stock(_Decided):
    """Outcome: the engine builds the role as it always does, because of ``reason``.

    Layout, routing and layers are those of the checkpoint as far as they are known, for reports.
    """

    reason: Reason
    layout: ExpertLayout | None = None
    routing: RoutingSpec | None = None
    shared_weight: SharedWeight | None = None
    moe_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.reason.code == FUSES:
            raise ValueError(f"a refusal needs a reason: {self}")

    @property
    def moe(self) -> MoeSpec | None:
        """Return the sparse layers where all of it is known: an engine may fuse them by itself."""
        if self.layout is None or self.routing is None or self.shared_weight is None:
            return None
        return MoeSpec(self.layout, self.routing, self.shared_weight, self.moe_layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as plain data, for reports."""
        return self._to_dict(self.reason, self.layout, self.routing, self.shared_weight, self.moe_layers)


Decision = Merged | Paired | Stock


def paired(decision: Decision) -> Decision:
    """Return what is decided where weights are to stay apart: `Paired`, or `Stock` with the reason."""
    if isinstance(decision, Paired) or decision.pairing is None:
        return decision
    if isinstance(decision.pairing, MoeSpec):
        layers = len(decision.pairing.layers)
        detail = f"{layers} sparse layers, in one pass over routed and shared weights where they lie"
        if decision.stored:
            detail += f"; {decision.stored}"
        return Paired(**decision._common(), moe=decision.pairing, detail=detail)
    if isinstance(decision, Merged):
        return decision.refused(decision.pairing)
    return dataclasses.replace(decision, reason=decision.pairing)


def in_layout(decisions: Mapping[Role, Decision], layout: str) -> dict[Role, Decision]:
    """Return decisions under a layout that was asked for, as `Settings` names it.

    Under "auto" and "merged" they are as the files have them: only the machine tells what "auto" takes.
    """
    return {role: paired(d) if layout == "paired" else d for role, d in decisions.items()}


def remarked(decision: Decision, remark: str) -> Decision:
    """Return ``decision`` with ``remark`` behind its line for people."""
    if not isinstance(decision, Stock):
        return dataclasses.replace(decision, detail=decision.detail + remark)
    reason = decision.reason
    return dataclasses.replace(decision, reason=Reason(reason.code, reason.detail + remark))
