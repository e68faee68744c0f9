"""What a server will do with a checkpoint: serve it fused, as the engine fuses it itself, or as stock.

The engine asks the same questions in the same order when it starts (adapters/<engine>/refusals.py); here they
are asked of a command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from types import SimpleNamespace
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from ..adapters.patching import guards, ledger
from ..adapters.refusals import SHARED_GATE, measured, quantised_online, unmeasured, without_proof
from ..adapters.running_config import config_differs
from ..errors import FsePatchError, RefusedError
from ..fusion_core.checkpoint.config import UNQUANTISED
from ..fusion_core.checkpoint.families import family_of
from ..fusion_core.decision.native import fusing, gets_wrong
from ..fusion_core.decision.outcome import Decision, Merged, Stock
from ..fusion_core.engines import EngineFacts, Refusal, facts_of
from ..fusion_core.forward.plan import ModePlan, always
from ..fusion_core.forward.tuned import Situation, plan_for
from ..fusion_core.reasons import CONTRADICTIONS, Reason
from ..settings import Settings
from .command import Asked
from .machine import Device

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
    decision: Decision, asked: Asked, version: str, device: Device, config: Mapping[str, Any], now: Settings
) -> Verdict:
    """Say what the server does with the role of a decision.

    Args:
        version: of the engine.
        config: the model's config.json.
        now: settings of the server.

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
        guards.check_version(book, version, now.allow_untested)
    except RefusedError as error:
        return replace(made, reason=Reason("version.untested", error.detail))
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
    beside = _beside(decision, asked, facts, made, config, now) if right and not any(reasons) else None
    plan = reason or _plan(decision, asked, facts, made, config, now)
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


def _plan(
    decision: Merged,
    asked: Asked,
    facts: EngineFacts,
    made: Verdict,
    config: Mapping[str, Any],
    now: Settings,
) -> ModePlan | Reason:
    device, allowed = made.device, now.allow_unmeasured
    if device.platform == "cpu" and not (device.amx and _has_amx_kernels(facts)):
        return always("fused", "a CPU, where no speed is promised")
    if device.platform != "cuda":
        return unmeasured(allowed, "on this platform")
    if asked["batch_invariant"]:
        return unmeasured(False, "with batch invariance: another mode for another batch breaks its promise")
    if decision.quant_method != UNQUANTISED:
        return unmeasured(allowed, "for quantised experts, as far as can be said without the engine")
    backend = _backend(asked, facts, device)
    if backend != facts.backends.get("cuda"):
        return unmeasured(False, f"with the MoE backend {backend}")
    return measured(_situation(decision, asked, made, backend, config), now)


def _beside(
    decision: Merged,
    asked: Asked,
    facts: EngineFacts,
    made: Verdict,
    config: Mapping[str, Any],
    now: Settings,
) -> ModePlan | None:
    """Return the measured modes for layers that the engine builds fused by itself; None: it is left alone."""
    backend = facts.launch.native_backend if facts.launch else ""
    fits = made.device.platform == "cuda" and decision.quant_method == UNQUANTISED
    if not (backend and fits) or decision.moe.layout.num_shared_slots != 1 or asked["batch_invariant"]:
        return None
    plan = plan_for(_situation(decision, asked, made, backend, config), "cuda", now.tuned_file, places=())
    return plan if isinstance(plan, ModePlan) else None


def _situation(
    decision: Merged, asked: Asked, made: Verdict, backend: str, config: Mapping[str, Any]
) -> Situation:
    return Situation.of(
        decision.moe.layout,
        asked.number("tp"),
        engine=made.engine,
        release=Version(made.version).public,
        backend=backend,
        device=made.device.name,
        dtype=_dtype(asked, config),
        scoring=decision.moe.routing.scoring,
        gated=decision.moe.shared_weight == SHARED_GATE,
    )


def _has_amx_kernels(facts: EngineFacts) -> bool:
    names = facts.launch.amx_kernels if facts.launch else ()
    return any(True for name in names for _ in metadata.distributions(name=name))


def _backend(asked: Asked, facts: EngineFacts, device: Device) -> str:
    """Return the MoE backend that the engine picks: the user's, that of the device, or of its platform."""
    given = asked["moe_backend"]
    if isinstance(given, str) and given != "auto":
        return given
    for row in facts.launch.backends if facts.launch else ():
        if any(words in device.name for words in row.devices):
            return row.backend
    return facts.backends.get(device.platform, "auto")


def _dtype(asked: Asked, config: Mapping[str, Any]) -> str:
    """Return the dtype that runs: the user's, or the checkpoint's, halved where it is float32."""
    names = {"half": "float16", "float": "float32"}
    given = str(asked["dtype"] or "auto")
    if given != "auto":
        return names.get(given, given)
    text = config.get("text_config") or config
    stored = next(
        (str(c[k]) for c in (text, config) for k in ("dtype", "torch_dtype") if c.get(k)), "bfloat16"
    )
    stored = stored.removeprefix("torch.")
    return "float16" if stored == "float32" else stored
