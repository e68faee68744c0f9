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
from ..fusion_core.decision.policy_file import load_policy
from ..fusion_core.forward import tuned
from . import command, machine
from .verdict import verdict


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
        decision = decide_roles(checkpoint, engine, load_policy(effective.policy_file))["main"]
        config = FolderSource(checkpoint).read_json(CONFIG_NAME)
        told = verdict(decision, asked, version, device, config, effective)
        reason = None if told.reason is None else told.reason.code
        return {"served": told.served, "reason": reason, "sentence": str(told)}
    where = f"{engine} {version} on {device}"
    if device.platform == "cpu":
        sentence = f"fused, where the checkpoint allows it: {where}; no speed is promised on a CPU"
        return {"served": None, "reason": None, "sentence": sentence}
    release, name = Version(version).public, device.name
    tables = [t for _, t in tuned.shipped() if (t.engine, t.release, t.device) == (engine, release, name)]
    if tables or effective.tuned_file is not None:
        shapes = sum(len(table.rows) for table in tables)
        sentence = f"fused, where the checkpoint allows it: {where}; {shapes} shapes were measured"
        return {"served": None, "reason": None, "sentence": sentence}
    sentence = f"stock: slower.unmeasured: {where}: no table of this device and release"
    return {"served": "stock", "reason": "slower.unmeasured", "sentence": sentence}
