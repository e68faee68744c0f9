"""What of a launch forbids layers of ours: asked of a command line, as adapters ask it of an engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from ..adapters.lora import folders_of, refused_adapters
from ..adapters.refusals import quantised_online, undivided, unshared, without_graphs, without_proof
from ..adapters.running_config import config_differs, substituted
from ..fusion_core.checkpoint.config import UNQUANTISED
from ..fusion_core.decision.outcome import Merged, Paired
from ..fusion_core.decision.paired_places import unrun
from ..fusion_core.engines import EngineFacts, Refusal
from ..fusion_core.reasons import Reason
from ..settings import CPU_THRESHOLD, Settings
from .command import Asked
from .machine import Device
from .modes import chosen_backend, unread_backend

# Codes that are asked before adapters are: who holds which experts.
FIRST = ("parallel.", "disabled")


def merged_refusals(
    decision: Merged,
    asked: Asked,
    facts: EngineFacts,
    native_right: bool,
    device: Device,
    config: Mapping[str, Any],
    now: Settings,
) -> Iterator[Reason]:
    """Say what of a launch forbids to merge, first reason first."""
    # What switches the engine's own fusion off is asked before it.
    if native_right:
        yield Reason("upstream.already", f"{facts.engine} fuses this model by itself here")
    yield from _of_either(decision, asked, facts, config, "merged")
    method = asked["quantization"]
    found = None if decision.quant_method == UNQUANTISED else decision.read_as or decision.quant_method
    yield from quantised_online(decision, str(method) if method else found, method)
    yield from without_proof(decision, device.platform, now)


def pair_refusals(
    decision: Paired,
    asked: Asked,
    facts: EngineFacts,
    native_right: bool,
    device: Device,
    config: Mapping[str, Any],
    now: Settings,
) -> Iterator[Reason]:
    """Say what of a launch forbids to pair, first reason first."""
    if device.platform == "cpu":
        if not now.cpu_threshold:
            yield Reason("backend.layout", f"engines pack weights on a CPU; for tests, set {CPU_THRESHOLD}")
    elif now.layout != "paired":
        if (reason := unrun(facts.engine, device.platform, device.name, decision.packed)) is not None:
            yield reason
        if asked["eager"] is True and facts.launch:
            yield without_graphs("--" + facts.launch.asks["eager"].flag.replace("_", "-"))
    if native_right and not (facts.launch and facts.launch.native_backend):
        yield Reason("upstream.already", f"{facts.engine} fuses this model by itself here")
    yield from _of_either(decision, asked, facts, config, "paired")


def load_refusals(decision: Paired, asked: Asked, facts: EngineFacts, device: Device) -> Iterator[Reason]:
    """Say what the server will find when it has loaded a role that it pairs: the engine's own then serves."""
    # Who runs packed experts, the engine alone knows.
    if not decision.packed and (reason := unread_backend(asked, facts, device)) is not None:
        yield reason
    if not device.reads_fp8 and re.search("fp8|f8_", " ".join((*decision.formats, decision.stored)).lower()):
        yield Reason("backend.layout", f"FP8 weights, and {device} has no conversion of them")
    if asked.expert_ranks > 1 and decision.quant_method != UNQUANTISED and not chosen_backend(asked):
        yield Reason("backend.layout", "who runs quantised experts that are spread is not known before")
    if decision.unread:
        yield Reason(
            "backend.layout", f"experts are stored as the paired kernels do not read: {decision.unread}"
        )


def _of_either(
    decision: Merged | Paired,
    asked: Asked,
    facts: EngineFacts,
    config: Mapping[str, Any],
    layout: str,
) -> Iterator[Reason]:
    """Refuse what forbids a layout, and most of it both; in the order in which adapters ask."""
    assert facts.launch is not None
    whole, text = _running(asked, config)
    if asked["overrides"]:
        yield from config_differs(decision, text)
    rows = [row for row in held(facts.launch.refuses, asked) if row.layout in (None, layout)]
    reasons = [Reason(row.reason, row.detail.format(value=asked[row.ask])) for row in rows]
    yield from (reason for reason in reasons if reason.code.startswith(FIRST))
    yield from _sizes(decision, asked, facts)
    yield from _lora(asked)
    yield from (reason for reason in reasons if not reason.code.startswith(FIRST))
    yield from substituted(text, whole)


def held(rows: list[Refusal], asked: Asked) -> Iterator[Refusal]:
    """Return the rows that hold for what is asked."""
    return (
        row for row in rows if row.holds(asked[row.ask]) and (row.beside is None or bool(asked[row.beside]))
    )


def _sizes(decision: Merged | Paired, asked: Asked, facts: EngineFacts) -> Iterator[Reason]:
    """Refuse widths, and numbers of experts, that do not divide over processes."""
    assert facts.launch is not None
    tp, ep = ("--" + facts.launch.asks[name].flag.replace("_", "-") for name in ("tp", "ep"))
    layout, ranks = decision.moe.layout, asked.expert_ranks
    yield from undivided(layout, asked.number("tp") // ranks, None, tp, ranks)
    # Where a switch spreads experts, the engine gives some processes one more.
    if asked["ep"] is not True:
        yield from unshared(layout, ranks, ep)


def _lora(asked: Asked) -> Iterator[Reason]:
    """Refuse adapters that may change experts."""
    targets = asked["lora_targets"]
    if asked["lora"] or asked["lora_paths"]:
        names = re.split(r"[\s,]+", targets) if isinstance(targets, str) and targets else None
        adapters = folders_of(str(asked["lora_paths"] or "").split(","))
        yield from refused_adapters(names, adapters, "--lora-target-modules")


def _running(asked: Asked, config: Mapping[str, Any]) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Return the configuration that runs, with the overrides of the launch, and its language model's."""
    try:
        given = json.loads(str(asked["overrides"] or "{}"))
    except ValueError:
        given = None  # the name of a function, or what the engine itself will complain of
    overrides = dict(given) if isinstance(given, dict) else {}
    nested = overrides.pop("text_config", {})
    text = {**(config.get("text_config") or config), **overrides, **dict(nested)}
    return SimpleNamespace(**{**config, **overrides}), SimpleNamespace(**text)
