"""What a release of an engine does about the shared expert by itself, and whether that is right."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ... import patches
from ...errors import FsePatchError
from ..checkpoint.families import family_of
from .outcome import Decision, Stock

PLATFORMS = ("cpu", "cuda", "rocm")
NATIVE_FILE = Path(patches.__file__).with_name("native.yaml")


def runtime_report(
    decision: Decision, platform: str | None = None, engine_version: str | None = None
) -> dict[str, Any]:
    """What is known of running ``decision`` on a platform and a release; null where it cannot be said.

    Keys: platform, engine_version; "backend", stock's MoE backend for unquantised weights; "version", one of
    "tested", "read" (its source was studied) and "untested"; "upstream.already", whether this release fuses
    this family here without a switch; "upstream.detail", on what that depends.

    Raises:
        FsePatchError: the platform is unknown, or the version is none.
    """
    if platform is not None and platform not in PLATFORMS:
        raise FsePatchError(f"unknown platform {platform!r}; use one of {', '.join(PLATFORMS)}")
    try:
        version = None if engine_version is None else Version(engine_version)
    except InvalidVersion:
        raise FsePatchError(f"{engine_version!r} is no version number; use one like 1.2.3") from None
    known = _known(decision.engine)
    report: dict[str, Any] = {
        "platform": platform,
        "engine_version": engine_version,
        "backend": known["backends"].get(platform),
        "version": None,
        "upstream.already": None,
        "upstream.detail": "give --platform and --engine-version to know",
    }
    if version is not None:
        report["version"] = _standing(known, version)
    if version is None or platform is None:
        return report
    family = family_of(decision.model_type)
    here = [] if family is None else fusing(decision.engine, family.name, platform, str(version))
    right = [entry for entry in here if "wrong" not in entry]
    report["upstream.already"] = any(entry["by_default"] for entry in right)
    report["upstream.detail"] = (
        "; ".join(
            (f"{', '.join(entry['models'])}: " if "models" in entry else "")
            + f"{'on by default' if entry['by_default'] else 'off by default'}, needs {entry['condition']}"
            + (f", wrong: {entry['wrong']}" if "wrong" in entry else "")
            for entry in here
        )
        or "this release does not fuse this model here"
    )
    return report


def fusing(
    engine: str, family: str, platform: str, version: str, model: str | None = None
) -> list[dict[str, Any]]:
    """Entries of native.yaml that hold here.

    Args:
        model: name of the model class; None stands for any of the family.

    Returns:
        Mappings with the keys by_default, condition and, where there is something to say, slots and wrong.
    """
    return [
        entry
        for entry in _known(engine)["fuses"]
        if family in entry["families"]
        and platform in entry["platforms"]
        and SpecifierSet(entry["versions"]).contains(version, prereleases=True)
        and (model is None or model in entry.get("models", [model]))
    ]


def gets_wrong(entry: dict[str, Any], decision: Decision) -> str:
    """Why what a release builds by itself would not be the checkpoint's model, or "".

    Args:
        entry: of `fusing`; the release is live with it.
    """
    slots = 0 if decision.moe is None else decision.moe.layout.num_shared_slots
    if "wrong" in entry:
        return str(entry["wrong"])
    if decision.stored_alike is False:
        return "routed and shared experts are stored in different ways"
    mismatch = isinstance(decision, Stock) and decision.reason.code == "width.mismatch"
    if mismatch or slots > entry.get("slots", slots):
        return "the shared expert is wider than the slots that it has"
    return ""


@cache
def _known(engine: str) -> dict[str, Any]:
    known: dict[str, Any] = yaml.safe_load(NATIVE_FILE.read_bytes())["engines"][engine]
    return known


def _standing(known: dict[str, Any], version: Version) -> str:
    if any(version == Version(tested) for tested in known["tested"]):
        return "tested"
    return "read" if SpecifierSet(known["read"]).contains(version, prereleases=True) else "untested"
