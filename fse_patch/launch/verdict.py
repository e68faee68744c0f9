"""What a server will do with a checkpoint: serve it fused, as the engine fuses it itself, or as stock.

The engine asks the same questions in the same order when it starts (adapters/<engine>/refusals.py); here they
are asked of a command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from ..adapters.patching import guards, ledger
from ..adapters.refusals import quantised_online, without_proof
from ..adapters.running_config import config_differs
from ..errors import FsePatchError, RefusedError
from ..fusion_core.checkpoint.config import UNQUANTISED
from ..fusion_core.checkpoint.families import family_of
from ..fusion_core.decision.native import fusing, gets_wrong
from ..fusion_core.decision.outcome import Decision, Merged, Stock
from ..fusion_core.engines import EngineFacts, Refusal, facts_of
from ..fusion_core.forward.plan import ModePlan
from ..fusion_core.reasons import CONTRADICTIONS, Code, Reason
from ..settings import Settings
from .command import Asked
from .machine import Device
from .modes import beside_native, plan_of

Served = Literal["fused", "native", "stock"]
LAYOUT = "merged"


@dataclass(frozen=True)
class Verdict:
    """What a server does with one role of a model.

    Args:
        served: by this package, as the engine fuses by itself, or as it runs without us.
        reason: why not fused by us; None where it is.
        plan: which mode runs for how many tokens; None where no mode of ours runs.
        ends: the server ends before it has read a weight: its arguments contradict fusing, and
            FSE_PATCH_STRICT=1 asks for that.
    """

    served: Served
    engine: str
    version: str
    standing: str
    device: Device
    reason: Reason | None = None
    plan: ModePlan | None = None
    ends: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON. ``gain`` is null: tables say which mode is the fastest, not by how much."""
        plan = self.plan
        modes = None
        if plan is not None:
            modes = [{"up_to": limit, "mode": mode} for limit, mode in plan.steps]
            modes.append({"up_to": None, "mode": plan.otherwise})
        return {
            "served": self.served,
            "ends": self.ends,
            "layout": LAYOUT if self.served == "fused" else None,
            "modes": modes,
            "reason": None if self.reason is None else self.reason.code,
            "detail": plan.source if self.reason is None and plan else getattr(self.reason, "detail", ""),
            "gain": None,
            "engine_version": self.version,
            "version": self.standing,
            "platform": self.device.platform,
            "device": self.device.name,
        }

    def __str__(self) -> str:
        where = f"{self.engine} {self.version} on {self.device}"
        if self.served == "fused" and self.plan is not None:
            return f"fused, {LAYOUT}: {self.plan} ({self.plan.source}); {where}"
        assert self.reason is not None
        head = "fused by the engine itself" if self.served == "native" else "stock"
        if self.ends:
            head = "does not start (FSE_PATCH_STRICT=1)"
        if self.plan is not None:
            head += f", with modes of ours: {self.plan} ({self.plan.source})"
        return f"{head}: {self.reason.code}: {self.reason.detail}; {where}"


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
    try:
        for patch in guards.check_version(book, version, now.allow_untested):
            if installed and (patch.setting is None or patch.setting in now.switches):
                guards.check_source(book, patch)
    except RefusedError as error:
        code: Code = "fingerprint" if error.reason == "fingerprint" else "version.untested"
        return replace(made, reason=Reason(code, error.detail))
    return _settled(made, decision, asked, facts, config, now)


def _settled(
    made: Verdict,
    decision: Decision,
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
    reasons = _refusals(decision, asked, facts, right, made.device, config, now)
    reason = next(reasons, None)
    # Modes for what the engine fuses by itself, where nothing else forbids them.
    beside = beside_native(decision, asked, facts, made, config, now) if right and not any(reasons) else None
    plan = reason or plan_of(decision, asked, facts, made, config, now)
    if isinstance(plan, ModePlan):
        return replace(made, served="fused", plan=plan)
    if plan.code != "upstream.already":
        return _refused(made, plan, now)
    return replace(made, served="native", reason=plan, plan=beside)


def _refused(made: Verdict, reason: Reason, now: Settings) -> Verdict:
    return replace(made, reason=reason, ends=reason.code in CONTRADICTIONS and now.strict_arguments)


def _refusals(
    decision: Merged,
    asked: Asked,
    facts: EngineFacts,
    native_right: bool,
    device: Device,
    config: Mapping[str, Any],
    now: Settings,
) -> Iterator[Reason]:
    assert facts.launch is not None
    rows = _held(facts.launch.refuses, asked)
    # What switches the engine's own fusion off is asked before it.
    if native_right:
        yield Reason("upstream.already", f"{facts.engine} fuses this model by itself here")
    yield from _overrides(decision, asked, config)
    yield from (Reason(row.reason, row.detail.format(value=asked[row.ask])) for row in rows)
    method = asked["quantization"]
    found = None if decision.quant_method == UNQUANTISED else decision.read_as or decision.quant_method
    yield from quantised_online(decision, str(method) if method else found, method)
    yield from without_proof(decision, device.platform, now)


def _held(rows: list[Refusal], asked: Asked) -> Iterator[Refusal]:
    return (row for row in rows if row.holds(asked[row.ask]))


def _overrides(decision: Merged, asked: Asked, config: Mapping[str, Any]) -> Iterator[Reason]:
    """Refuse overrides of what the decision rests on, as the engine does when it has applied them."""
    text = asked["overrides"]
    if not text:
        return
    try:
        overrides = json.loads(str(text))
    except ValueError:
        return  # the name of a function, or what the engine itself will complain of
    if isinstance(overrides, dict):
        nested = overrides.pop("text_config", {})
        held = dict(config.get("text_config") or config)
        yield from config_differs(decision, SimpleNamespace(**{**held, **overrides, **dict(nested)}))


def _native(
    decision: Decision, asked: Asked, facts: EngineFacts, device: Device, version: str
) -> dict[str, Any] | None:
    """Return what is known of the engine's own fusion, if this launch would have it."""
    family, launch = family_of(decision.model_type), facts.launch
    if family is None or launch is None or any(_held(launch.native_declined, asked)):
        return None
    wanted = bool(launch.native_wanted) and all(r.holds(asked[r.ask]) for r in launch.native_wanted)
    here = fusing(facts.engine, family.name, device.platform, version)
    return next((entry for entry in here if entry["by_default"] or wanted), None)
