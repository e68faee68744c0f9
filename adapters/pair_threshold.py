"""The threshold of a paired role: a test's, the cache's, or measured now on the real layers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import settings as variables
from ..fusion_core.decision.outcome import Paired
from ..fusion_core.forward import measured_cache
from ..fusion_core.forward.measured_cache import PairedSituation
from ..fusion_core.forward.threshold import ROUTINGS, SIZES, Threshold, lower_bound, threshold_of
from ..fusion_core.proof.paired import inputs_of
from ..fusion_core.reasons import Reason
from ..version import __version__
from .graph_timing import capture, in_turn
from .paired import EngineLayer, PairedEngine, PairedRole

# Layers of one shape that run in turn: one alone would stay in the cache of the device.
LAYERS = 4
# Seconds of all readings.
BUDGET = 10.0
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Tokens where the user wants no measurement, and takes the risk.
UNMEASURED = 16


@dataclass(frozen=True)
class Chosen:
    """A threshold: ``reason`` says why it is 0; ``bounds`` as of `LoadedPairs`."""

    tokens: int
    source: str
    reason: Reason | None = None
    seconds: float = 0.0
    bounds: Mapping[str, float] = field(default_factory=dict)


def choose(role: PairedRole, engine: PairedEngine) -> Chosen:
    """Return the threshold of a role whose proof has passed."""
    effective = role.start.settings
    if effective.cpu_threshold and not torch.cuda.is_available():
        return Chosen(effective.cpu_threshold, variables.CPU_THRESHOLD)
    first = role.layers[min(role.layers)]
    here = situation(role.start.decision, first, engine)
    folder = effective.cache_folder
    if effective.measure != "always" and (kept := measured_cache.load(folder, here)) is not None:
        return _chosen(kept.threshold, "cache", 0.0, kept.bounds)
    if effective.measure == "off":
        if effective.allow_unmeasured:
            return Chosen(UNMEASURED, variables.ALLOW_UNMEASURED)
        why = f"{variables.MEASURE} is off, and nothing was measured here before"
        return Chosen(0, "", Reason("slower.unmeasured", why))
    begun = time.perf_counter()
    found = measure(role, engine)
    bounds = {f"{size} {routing}": round(bound, 4) for (size, routing), bound in found.bounds.items()}
    measured_cache.keep(folder, here, found.tokens, bounds)
    return _chosen(found.tokens, "measured", time.perf_counter() - begun, bounds)


def _chosen(tokens: int, source: str, seconds: float, bounds: Mapping[str, float]) -> Chosen:
    if tokens:
        return Chosen(tokens, source, None, seconds, bounds)
    why = f"the engine's own layers were measured to be as fast or faster ({source})"
    return Chosen(0, source, Reason("slower.measured", why), seconds, bounds)


def situation(decision: Paired, layer: EngineLayer, engine: PairedEngine) -> PairedSituation:
    """Return what a threshold is kept by."""
    now, layout = layer.read(), decision.moe.layout
    routed, shared = now.formats
    return PairedSituation(
        device=torch.cuda.get_device_name(),
        driver=_driver(),
        engine=decision.engine,
        release=engine.release(),
        backend=layer.backend,
        dtype=str(layer.dtype).removeprefix("torch."),
        routed=routed,
        shared=shared,
        num_experts=now.routed.w13.shape[0],
        top_k=layout.top_k,
        hidden_size=layout.hidden_size,
        width=now.routed.width,
        shared_width=0 if now.shared is None else now.shared.width,
        scoring=decision.moe.routing.scoring,
        gated=now.shared_gate is not None,
        version=__version__,
    )


def _driver() -> str:
    """Return the version of NVIDIA's driver where its module tells it; else that of CUDA or ROCm in torch."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[0] if found else str(torch.version.cuda or torch.version.hip)


@torch.inference_mode()
def measure(role: PairedRole, engine: PairedEngine) -> Threshold:
    """Time stock against ours in CUDA graphs, on layers of the largest group of one shape in turn."""
    layers = _alike(role)[:LAYERS]
    until = time.perf_counter() + BUDGET
    ratios: dict[tuple[int, str], list[float]] = {}
    for size in SIZES:
        for routing in ROUTINGS:
            ratios[size, routing] = _ratios(layers, engine, size, routing)
        slower = any(lower_bound(ratios[size, routing]) < 0.9 for routing in ROUTINGS)
        # Sizes above one that clearly loses do not count.
        if slower or time.perf_counter() > until:
            break
    return threshold_of(ratios)


def _alike(role: PairedRole) -> list[EngineLayer]:
    groups: dict[Any, list[EngineLayer]] = {}
    for _, layer in sorted(role.layers.items()):
        now = layer.read()
        groups.setdefault((now.routed.w13.shape, now.formats), []).append(layer)
    return max(groups.values(), key=len)


def _ratios(layers: list[EngineLayer], engine: PairedEngine, size: int, routing: str) -> list[float]:
    """Return times stock over ours, a number for each round; graphs are freed at the end."""
    first = layers[0]
    given = inputs_of(
        first.layer.moe.layout,
        size,
        routing,
        first.dtype,
        first.logits_dtype,
        first.read().routed.w13.device,
    )
    captured = [layer.layer.captured for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(engine.context(size))

        def run(arm: Callable[[EngineLayer], Any]) -> Any:
            return capture(lambda: [arm(layer) for layer in layers])

        states, logits = given.hidden_states, given.logits
        graphs = {
            "stock": run(lambda layer: layer.stock(states, logits)),
            "ours": run(lambda layer: layer.ours(states, logits)),
        }
        seconds = in_turn(graphs)
    # These graphs are gone: their addresses bind nobody.
    for layer, before in zip(layers, captured, strict=True):
        layer.layer.captured = before
    return [stock / ours for stock, ours in zip(seconds["stock"], seconds["ours"], strict=True)]
