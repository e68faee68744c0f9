"""What a server of each installed engine does on this machine, in a line: how `fse-patch doctor` begins."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

from .. import settings
from ..fusion_core.checkpoint.sources import CONFIG_NAME, FolderSource
from ..fusion_core.decision.decide import decide_roles
from ..fusion_core.decision.outcome import in_layout
from ..fusion_core.decision.paired_places import unrun
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.engines import facts_of
from ..fusion_core.forward import tuned
from ..fusion_core.reasons import Reason
from . import command, machine
from .modes import backend_of, unread_backend
from .verdict import PAIRED, verdict


def verdicts(
    engines: Iterable[Mapping[str, Any]],
    checkpoint: Path | None,
    effective: settings.Settings,
    here: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Say of each installed engine what its server does on this machine, with the checkpoint if one is given.

    Rows have ``engine``, ``served`` (null where it depends on the model), ``reason`` and ``sentence``.
    """
    device = machine.here()
    if here["devices"]:
        device = machine.Device(here["platform"], here["devices"][0], here=True)
    rows = []
    for engine in engines:
        if engine["installed"] is not None:
            name, version = engine["engine"], engine["installed"]
            found = _verdict(name, version, checkpoint, effective, device)
            if (blocking := engine["blocking"]) is not None:
                found = {"served": "stock", **blocking}
            rows.append({"engine": engine["engine"], **found})
    return rows


def _verdict(
    engine: str, version: str, checkpoint: Path | None, effective: settings.Settings, device: machine.Device
) -> dict[str, Any]:
    asked = command.read([], Version(version).public, os.environ, engine)
    if checkpoint is not None:
        decisions = decide_roles(checkpoint, engine, load_policy(effective.policy_file))
        decision = in_layout(decisions, effective.layout)["main"]
        config = FolderSource(checkpoint).read_json(CONFIG_NAME)
        told = verdict(decision, asked, version, device, config, effective, installed=True)
        reason = None if told.reason is None else told.reason.code
        return {"served": told.served, "reason": reason, "sentence": str(told)}
    where = f"{engine} {version} on {device}"
    if (how := _how(asked, Version(version).public, effective, device)) is not None:
        layout = ", paired" if effective.layout == "paired" else ""
        sentence = f"fused{layout}, where the checkpoint allows it: {where}; {how}"
        return {"served": None, "reason": None, "sentence": sentence}
    if effective.layout == "paired":
        sentence = f"stock: backend.layout: {where}: engines pack weights on a CPU"
        return {"served": "stock", "reason": "backend.layout", "sentence": sentence}
    why = Reason("slower.unmeasured", "no table of this device and release")
    if effective.layout == "auto" and unrun(engine, device.platform, device.name) is None:
        unread = unread_backend(asked, facts_of(engine), device)
        if unread is None:
            sentence = f"fused, paired, where the checkpoint allows it: {where}; {PAIRED}"
            return {"served": None, "reason": None, "sentence": sentence}
        why = unread
    sentence = f"stock: {why.code}: {where}: {why.detail}"
    return {"served": "stock", "reason": why.code, "sentence": sentence}


def _how(
    asked: command.Asked, release: str, effective: settings.Settings, device: machine.Device
) -> str | None:
    """Say how layers run that are fused here, whatever the model is; None: none is."""
    if effective.layout == "paired":
        pairs = device.platform != "cpu" or bool(effective.cpu_threshold)
        return PAIRED if pairs else None
    if device.platform == "cpu":
        return "no speed is promised on a CPU"
    engine = asked.engine
    known = (engine, release, device.name)
    tables = [t for _, t in tuned.shipped() if (t.engine, t.release, t.device) == known]
    if tables or effective.tuned_file is not None:
        return f"{sum(len(table.rows) for table in tables)} shapes were measured"
    here = (engine, device.platform, backend_of(asked, facts_of(engine), device))
    splits = any(
        (place.engine, place.platform, place.backend) == here
        and release in place.releases
        and device.name in (place.devices or [device.name])
        for place in tuned.split_places()
    )
    return "no table of this device, so stock's own kernels run on the merged weights" if splits else None
