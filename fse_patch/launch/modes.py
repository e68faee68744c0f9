"""Which modes a server runs fused layers in: by its device, its backend, and by what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any, Protocol

from packaging.version import Version

from ..adapters.refusals import SHARED_GATE, measured, unmeasured
from ..fusion_core.checkpoint.config import UNQUANTISED
from ..fusion_core.decision.outcome import Merged
from ..fusion_core.engines import EngineFacts
from ..fusion_core.forward.plan import ModePlan, always
from ..fusion_core.forward.tuned import Situation, plan_for
from ..fusion_core.reasons import Reason
from ..settings import Settings
from .command import Asked
from .machine import Device


class Place(Protocol):
    """Where it runs: a release of the engine, on a device."""

    @property
    def version(self) -> str:
        """Return the release."""

    @property
    def device(self) -> Device:
        """Return the device."""


def plan_of(
    decision: Merged,
    asked: Asked,
    facts: EngineFacts,
    here: Place,
    config: Mapping[str, Any],
    now: Settings,
) -> ModePlan | Reason:
    """Return the plan for layers that are built fused by us, or why there is none."""
    device, allowed = here.device, now.allow_unmeasured
    backend, spread = backend_of(asked, facts, device), asked.expert_ranks > 1
    if spread and (runner := _runner(decision, asked, device, backend)) not in facts.leave_out:
        why = f"the MoE backend here ({runner}) is not known to leave out experts of other processes"
        return Reason("parallel.ep", why)
    if device.platform == "cpu" and not (device.amx and _has_amx_kernels(facts)):
        return always("fused", "a CPU, where no speed is promised")
    if device.platform != "cuda":
        return unmeasured(allowed, "on this platform")
    if spread:
        return unmeasured(allowed, "with whole experts spread over processes")
    if asked["batch_invariant"]:
        return unmeasured(False, "with batch invariance: another mode for another batch breaks its promise")
    if decision.quant_method != UNQUANTISED:
        return unmeasured(allowed, "for quantised experts, as far as can be said without the engine")
    if backend != facts.backends.get("cuda"):
        return unmeasured(False, f"with the MoE backend {backend}")
    return measured(_situation(decision, asked, here, backend, config), now)


def beside_native(
    decision: Merged,
    asked: Asked,
    facts: EngineFacts,
    here: Place,
    config: Mapping[str, Any],
    now: Settings,
) -> ModePlan | None:
    """Return the measured modes for layers that the engine builds fused by itself; None: it is left alone."""
    backend = facts.launch.native_backend if facts.launch else ""
    fits = here.device.platform == "cuda" and decision.quant_method == UNQUANTISED
    if not (backend and fits) or decision.moe.layout.num_shared_slots != 1 or asked["batch_invariant"]:
        return None
    plan = plan_for(_situation(decision, asked, here, backend, config), "cuda", now.tuned_file, places=())
    return plan if isinstance(plan, ModePlan) else None


def _situation(
    decision: Merged, asked: Asked, here: Place, backend: str, config: Mapping[str, Any]
) -> Situation:
    return Situation.of(
        decision.moe.layout,
        asked.number("tp"),
        engine=decision.engine,
        release=Version(here.version).public,
        backend=backend,
        device=here.device.name,
        dtype=_dtype(asked, config),
        scoring=decision.moe.routing.scoring,
        gated=decision.moe.shared_weight == SHARED_GATE,
    )


def _has_amx_kernels(facts: EngineFacts) -> bool:
    names = facts.launch.amx_kernels if facts.launch else ()
    return any(True for name in names for _ in metadata.distributions(name=name))


def chosen_backend(asked: Asked) -> str:
    """Return the MoE backend that the user picked, "" for none."""
    for name in ("moe_backend", "kernel_config"):
        given = asked[name]
        if isinstance(given, str) and given != "auto":
            return given.lower().replace("-", "_")  # as vLLM reads it
    return ""


def backend_of(asked: Asked, facts: EngineFacts, device: Device) -> str:
    """Return the MoE backend that the engine picks: the user's, that of the device, or of its platform."""
    if chosen := chosen_backend(asked):
        return chosen
    for row in facts.launch.backends if facts.launch else ():
        if any(words in device.name for words in row.devices):
            return row.backend
    return facts.backends.get(device.platform, "auto")


def unread_backend(asked: Asked, facts: EngineFacts, device: Device) -> Reason | None:
    """Refuse a MoE backend that keeps experts in an order that is not read; None: it is none of these."""
    backend = backend_of(asked, facts, device)
    if facts.launch and backend.startswith(tuple(facts.launch.unread_backends)):
        return Reason("backend.layout", f"{backend} runs experts here, in an order of its own")
    return None


def _runner(decision: Merged, asked: Asked, device: Device, backend: str) -> str:
    """Return who runs experts that are spread: quantised ones, as far as can be said without the engine."""
    if device.platform != "cuda":
        return device.platform
    plain = decision.quant_method == UNQUANTISED
    return backend if plain or chosen_backend(asked) else "auto"


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
