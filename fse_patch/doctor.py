"""What is installed, switched on and in force here, and what of it is wrong. Imports no engine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from packaging.version import Version

from . import settings, table_coverage
from .adapters.patching import guards, ledger, standing
from .errors import FsePatchError, RefusedError, did_you_mean
from .fusion_core.checkpoint.families import families
from .fusion_core.decision.native import fusing
from .fusion_core.decision.paired_places import unrun
from .fusion_core.decision.pairing import READS
from .fusion_core.decision.policy_file import load_policy
from .fusion_core.engines import Plugins
from .fusion_core.forward import tuned
from .fusion_core.forward.measured_cache import kept
from .launch import command
from .launch.here import verdicts
from .patches import ENGINES
from .version import __version__

NAME = command.PLUGIN


def examine(checkpoint: Path | None = None) -> dict[str, Any]:
    """Return everything, ready for JSON.

    Args:
        checkpoint: whose tuned tables are looked up; those of well-known models if None.

    Raises:
        FsePatchError: the checkpoint cannot be read, or nothing of it could be fused.

    Keys: ``verdicts``, what a server of each installed engine does here; ``environment``, ``engines``,
    ``settings``, ``policy``, ``layout``, which is asked for, and what was measured on this machine;
    ``modes``, tables of the fastest mode;
    ``hazards``, what is known to end badly here, or weakens a guard by the user's own wish; ``problems``,
    what is wrong; ``ok``, no problems.
    """
    problems: list[str] = []
    hazards: list[str] = []
    shapes = table_coverage.KNOWN if checkpoint is None else (table_coverage.shape_of(checkpoint),)
    effective = _settings(problems, hazards)
    here = _environment()
    engines = [
        _engine(engine, here["platform"], effective, problems, hazards)
        for engine in ENGINES
        if ledger.exists(engine)
    ]
    for engine in engines:
        book = ledger.load(engine["engine"])
        chosen = [patch for patch in book.patches if patch.id in engine["guards"]]
        shipped = table_coverage.shipped(engine["engine"]) if engine["installed"] else {}
        engine["tables"] = table_coverage.coverage(engine["engine"], shipped, shapes, chosen)
        hazards += _lost(engine, here["devices"])
    if not any(engine["installed"] for engine in engines):
        problems.append("no engine is installed here; install fse-patch into the engine's own environment")
    return {
        "verdicts": verdicts(engines, checkpoint, effective, here),
        "environment": here,
        "engines": engines,
        "settings": settings.origins(),
        "policy": _policy(effective, problems),
        "layout": _layout(effective, here),
        "modes": _modes(effective, here["devices"], problems),
        "hazards": hazards,
        "problems": problems,
        "ok": not problems,
    }


def _environment() -> dict[str, Any]:
    report: dict[str, Any] = {
        "fse_patch": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": None,
        "platform": "cpu",
        "devices": [],
    }
    try:
        import torch
    except ImportError:
        return report
    report["torch"] = str(torch.__version__)
    if torch.cuda.is_available():
        report["platform"] = "rocm" if torch.version.hip else "cuda"
        report["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return report


def _settings(problems: list[str], hazards: list[str]) -> settings.Settings:
    for name, entry in settings.origins().items():
        if entry["origin"] == "unknown name":
            meant = did_you_mean(name, settings.DEFAULTS)
            problems.append(f"{name} is set, and nothing reads it; {meant}")
    try:
        effective = settings.load()
    except FsePatchError as error:
        problems.append(str(error))
        return settings.Settings()
    weakened = {
        f"{settings.VERIFY}=off: what is loaded is not compared with its checkpoint": effective.verify
        == "off",
        f"{settings.ALLOW_UNPROVEN}=1: quantised formats are fused that nobody ran, or nothing proves "
        "after loading": effective.allow_unproven,
        f"{settings.LM_HEAD}={effective.lm_head}: few tokens get their logits from a quantised LM head; "
        "answers are not stock's to the bit": settings.LM_HEAD in effective.switches,
    }
    hazards += [words for words, holds in weakened.items() if holds]
    return effective


def _policy(effective: settings.Settings, problems: list[str]) -> dict[str, Any]:
    files = ["default", *([effective.policy] if effective.policy else [])]
    try:
        policy = load_policy(effective.policy_file)
    except FsePatchError as error:
        problems.append(str(error))
        return {"files": files, "hash": None, "rules": []}
    return {"files": files, "hash": policy.hash, "rules": [rule.id for rule in policy.rules]}


def _layout(effective: settings.Settings, here: dict[str, Any]) -> dict[str, Any]:
    """Return which layout is asked for, and whether `auto` would pair here; and what was measured here."""
    return {
        "asked": effective.layout,
        "pairs_by_itself": {
            engine: any(unrun(engine, here["platform"], device) is None for device in here["devices"])
            for engine in ENGINES
        },
        "reads": list(READS),
        "cache": str(effective.cache_folder),
        "measured": {name: entry.threshold for name, entry in kept(effective.cache_folder).items()},
    }


def _modes(effective: settings.Settings, devices: list[str], problems: list[str]) -> list[dict[str, Any]]:
    """Return every table of modes that is read, and whether it is for a device of this machine."""
    tables = list(tuned.shipped())
    if effective.tuned_file is not None:
        try:
            tables.insert(0, (str(effective.tuned_file), tuned.read_table(effective.tuned_file)))
        except FsePatchError as error:
            problems.append(str(error))
    return [
        {
            "file": name,
            "for": f"{table.engine} {table.release} ({table.backend}) on {table.device}",
            "here": table.device in devices,
            "shapes": [
                f"E={r.num_routed}+{r.num_shared_slots} k={r.top_k} H={r.hidden_size} I={r.width} {r.dtype}"
                for r in table.rows
            ],
        }
        for name, table in tables
    ]


def _told(error: RefusedError) -> dict[str, str]:
    return {"reason": error.reason, "sentence": f"stock: {error.reason}: {error.detail}"}


def _engine(
    engine: str, here: str, effective: settings.Settings, problems: list[str], hazards: list[str]
) -> dict[str, Any]:
    book = ledger.load(engine)
    on = engine in effective.engines
    report: dict[str, Any] = {
        "engine": engine,
        "installed": None,
        "switched_on": on,
        "tested": list(book.tested),
        "is_tested": None,
        "seams_of": None,
        "remark": "",
        "blocking": None,
        "entry_points": [],
        "guards": {},
        "native_fusion": [],
    }
    try:
        version = guards.engine_version(book)
    except FsePatchError as error:
        # A list of engines asks for each of them; 1 asks for what is there.
        if on and settings.origins()[settings.ENABLE]["value"].strip().lower() not in settings.TRUE:
            problems.append(f"{settings.ENABLE} switches {engine} on: {error}")
        return report
    release = Version(version)
    report |= {"installed": version, "is_tested": book.facts.is_tested(release)}
    try:
        found = standing.standing_of(book, version, effective.switches)
    except RefusedError as error:
        problems.append(str(error))
        return report | {"blocking": _told(error)}
    blocking = None if found.blocking is None else _told(found.blocking)
    report |= {"seams_of": found.seams_of, "remark": found.remark, "blocking": blocking}
    report["guards"] = {p.id: str(found.problems.get(p.id, "ok")) for p in found.patches}
    problems += [str(problem) for problem in found.problems.values()]
    hazards += [f"{engine} {version}: {name} does nothing here" for name in found.idle(effective.switches)]
    plugins = book.facts.plugins
    points = list(entry_points(group=plugins.group))
    report["entry_points"] = [f"{point.name} = {point.value}" for point in points]
    problems += _unseen(engine, points, plugins)
    report["native_fusion"] = _native(engine, here, version)
    hazards += [
        f"{engine} {version} fuses {entry['family']} by itself here, and gets it wrong: {entry['wrong']}"
        for entry in report["native_fusion"]
        if entry["wrong"]
    ]
    return report


def _unseen(engine: str, points: Iterable[EntryPoint], plugins: Plugins) -> list[str]:
    """Return why an engine would not load our plugin, in its own processes."""
    ours = next((point for point in points if point.name == NAME), None)
    if ours is None:
        return [f"{engine} does not see fse_patch: no entry point in {plugins.group}; install it with pip"]
    allowed = os.environ.get(plugins.variable)
    if allowed is not None and NAME not in [name.strip() for name in allowed.split(",")]:
        return [f"{engine} does not load fse_patch: {plugins.variable} is {allowed!r}; add {NAME} to it"]
    try:
        ours.load()
    except Exception as error:  # whatever is wrong with the installation
        return [f"{engine} cannot load fse_patch: {ours.value}: {type(error).__name__}: {error}"]
    return []


def _lost(engine: dict[str, Any], devices: Iterable[str]) -> list[str]:
    """Return tuned tables of this machine's devices that a fused layer would do without."""
    here = {device.replace(" ", "_") for device in devices}
    return [
        f"{engine['engine']} has a tuned table for {row['experts']} experts of width {row['width']} and none "
        f"for {row['fused_experts']} ({row['shape']}, {row['format']}): fused, it is lost; up to 26 % was "
        "measured"
        for row in engine["tables"]
        if row["table"] == "lost" and here & set(row["only_unfused"])
    ]


def _native(engine: str, here: str, version: str) -> list[dict[str, Any]]:
    """Return what the release does about shared experts by itself on this platform."""
    return [
        {
            "family": family.name,
            "by_default": entry["by_default"],
            "condition": entry["condition"],
            "wrong": entry.get("wrong", ""),
        }
        for family in families()
        for entry in fusing(engine, family.name, here, version)
    ]
