"""What a server will do with a checkpoint: serve it fused, as the engine fuses it itself, or as stock.

The engine asks the same questions in the same order when it starts (adapters/<engine>/refusals.py); here they
are asked of a command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from packaging.version import InvalidVersion, Version

from ..adapters.patching import ledger, standing
from ..errors import FsePatchError, RefusedError
from ..fusion_core.checkpoint.families import family_of
from ..fusion_core.decision.native import fusing, gets_wrong
from ..fusion_core.decision.outcome import Decision, Merged, Paired, Stock, paired
from ..fusion_core.engines import EngineFacts, facts_of
from ..fusion_core.forward.plan import ModePlan
from ..fusion_core.forward.threshold import merged_gains
from ..fusion_core.reasons import CONTRADICTIONS, Code, Reason
from ..settings import Settings
from .command import Asked
from .machine import Device
from .modes import beside_native, plan_of
from .refusals import held, load_refusals, merged_refusals, pair_refusals

Served = Literal["fused", "native", "stock"]
# How paired layers run.
PAIRED = "few tokens, measured at the first start"


@dataclass(frozen=True)
class Verdict:
    """What a server does with one role of a model.

    Args:
        served: by this package, as the engine fuses by itself, or as it runs without us.
        reason: why not fused by us; None where it is.
        layout: how the weights lie where it is fused by this package, "merged" or "paired".
        plan: which mode runs for how many tokens; None where no mode of ours runs, or where that is measured
            at the first start.
        ends: the server ends before it has read a weight: its arguments contradict fusing, and
            FSE_PATCH_STRICT=1 asks for that.
    """

    served: Served
    engine: str
    version: str
    standing: str
    device: Device
    reason: Reason | None = None
    layout: str | None = None
    plan: ModePlan | None = None
    ends: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON. ``gain``: how many times as fast as stock layers are at least, by tokens."""
        plan = self.plan
        modes = None
        if plan is not None:
            modes = [{"up_to": limit, "mode": mode} for limit, mode in plan.steps]
            modes.append({"up_to": None, "mode": plan.otherwise})
        return {
            "served": self.served,
            "ends": self.ends,
            "layout": self.layout,
            "modes": modes,
            "reason": None if self.reason is None else self.reason.code,
            "detail": plan.source if self.reason is None and plan else getattr(self.reason, "detail", ""),
            "gain": None if plan is None or not plan.gains else dict(plan.gains),
            "engine_version": self.version,
            "version": self.standing,
            "platform": self.device.platform,
            "device": self.device.name,
        }

    def __str__(self) -> str:
        where = f"{self.engine} {self.version} on {self.device}"
        if self.served == "fused":
            how = PAIRED
            how = how if self.plan is None else f"{self.plan} ({self.plan.source}{_gain(self.plan)})"
            return f"fused, {self.layout}: {how}; {where}"
        assert self.reason is not None
        head = "fused by the engine itself" if self.served == "native" else "stock"
        if self.ends:
            head = "does not start (FSE_PATCH_STRICT=1)"
        if self.plan is not None:
            head += f", with modes of ours: {self.plan} ({self.plan.source})"
        return f"{head}: {self.reason.code}: {self.reason.detail}; {where}"


def _gain(plan: ModePlan) -> str:
    """Say what the smallest size gains, in two digits."""
    if not plan.gains:
        return ""
    tokens = min(plan.gains)
    return f": layers at least {plan.gains[tokens]:.2g}x at {tokens} token{'s' if tokens > 1 else ''}"


def verdict(
    decision: Decision,
    asked: Asked,
    version: str,
    device: Device,
    config: Mapping[str, Any],
    now: Settings,
    installed: bool = False,
) -> Verdict:
    """Say what the server does with the role of a decision.

    Args:
        version: of the engine.
        config: the model's config.json.
        now: settings of the server.
        installed: the engine is the one of this environment, whose source is then compared.

    Raises:
        FsePatchError: the version is none.
    """
    book = ledger.load(asked.engine)
    try:
        release = Version(version)
    except InvalidVersion:
        raise FsePatchError(f"{version!r} is no version number; use one like 1.2.3") from None
    facts = facts_of(asked.engine)
    made = Verdict("stock", asked.engine, version, facts.standing(release), device)
    if asked.switched_on is False:
        return replace(made, reason=Reason("disabled", "FSE_PATCH is off in this command"))
    if asked.unseen:
        return replace(made, reason=Reason("disabled", asked.unseen))
    if (reason := _not_patched(decision, book, version, now, installed)) is not None:
        return replace(made, reason=reason)
    found = made if isinstance(decision, Paired) else _settled(made, decision, asked, facts, config, now)
    return _laid_out(found, made, decision, asked, facts, config, now)


def _not_patched(
    decision: Decision, book: ledger.Ledger, version: str, now: Settings, installed: bool
) -> Reason | None:
    """Return why nothing of the model is patched in this release; None: everything can be."""
    family = family_of(decision.model_type)
    try:
        if installed:
            here = standing.standing_of(book, version, now.switches)
            problem = here.problem_of(family.name if family else "")
        else:
            problem = standing.problem_of_named(book, version)
    except RefusedError as error:
        problem = error
    return None if problem is None else Reason(cast(Code, problem.reason), problem.detail)


def _laid_out(
    found: Verdict,
    made: Verdict,
    decision: Decision,
    asked: Asked,
    facts: EngineFacts,
    config: Mapping[str, Any],
    now: Settings,
) -> Verdict:
    """Return the verdict under the layout that is asked for, as `adapters.start.laid_out` picks it.

    Args:
        found: what holds where weights are merged.
        made: with nothing settled yet.
    """
    gains = found.served == "fused" and found.plan is not None and merged_gains(found.plan)
    if now.layout == "merged" or (now.layout == "auto" and gains):
        return found
    apart = paired(decision)
    if isinstance(apart, Paired):
        native = _native(decision, asked, facts, made.device, made.version)
        right = native is not None and not gets_wrong(native, decision)
        reason = next(pair_refusals(apart, asked, facts, right, made.device, config, now), None)
        if reason is None:
            # By then it is too late to merge.
            late = next(load_refusals(apart, asked, facts, made.device), None)
            if late is None:
                return replace(made, served="fused", layout="paired")
            return found if found.served == "native" else replace(made, reason=late)
        apart = apart.refused(reason)
    if now.layout == "auto" or not isinstance(apart, Stock):
        return found
    return _refused(made, apart.reason, now)


def _settled(
    made: Verdict,
    decision: Merged | Stock,
    asked: Asked,
    facts: EngineFacts,
    config: Mapping[str, Any],
    now: Settings,
) -> Verdict:
    native = _native(decision, asked, facts, made.device, made.version)
    wrong = "" if native is None else gets_wrong(native, decision)
    if isinstance(decision, Stock):
        if native is not None and not wrong:
            by_itself = Reason("upstream.already", f"{facts.engine} fuses this model by itself here")
            return replace(made, served="native", reason=by_itself)
        return _refused(made, decision.reason, now)
    right = native is not None and not wrong
    reasons = merged_refusals(decision, asked, facts, right, made.device, config, now)
    reason = next(reasons, None)
    # Modes for what the engine fuses by itself, where nothing else forbids them.
    beside = beside_native(decision, asked, facts, made, config, now) if right and not any(reasons) else None
    plan = reason or plan_of(decision, asked, facts, made, config, now)
    if isinstance(plan, ModePlan):
        return replace(made, served="fused", layout="merged", plan=plan)
    if plan.code != "upstream.already":
        return _refused(made, plan, now)
    return replace(made, served="native", reason=plan, plan=beside)


def _refused(made: Verdict, reason: Reason, now: Settings) -> Verdict:
    return replace(made, reason=reason, ends=reason.code in CONTRADICTIONS and bool(now.strict))


def _native(
    decision: Decision, asked: Asked, facts: EngineFacts, device: Device, version: str
) -> dict[str, Any] | None:
    """Return what is known of the engine's own fusion, if this launch would have it."""
    family, launch = family_of(decision.model_type), facts.launch
    if family is None or launch is None or any(held(launch.native_declined, asked)):
        return None
    wanted = bool(launch.native_wanted) and all(r.holds(asked[r.ask]) for r in launch.native_wanted)
    here = fusing(facts.engine, family.name, device.platform, version)
    return next((entry for entry in here if entry["by_default"] or wanted), None)
