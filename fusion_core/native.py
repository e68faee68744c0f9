"""What a release of an engine does about the shared expert by itself, for reports; decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .. import patches
from ..errors import FsePatchError
from .decision import FusionDecision
from .families import family_of

PLATFORMS = ("cpu", "cuda", "rocm")
NATIVE_FILE = Path(patches.__file__).with_name("native.yaml")


def runtime_report(
    decision: FusionDecision, platform: str | None = None, engine_version: str | None = None
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
    known = yaml.safe_load(NATIVE_FILE.read_bytes())["engines"][decision.engine]
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
    here = [
        entry
        for entry in known["fuses"]
        if family is not None
        and family.name in entry["families"]
        and platform in entry["platforms"]
        and SpecifierSet(entry["versions"]).contains(version, prereleases=True)
    ]
    report["upstream.already"] = any(entry["by_default"] for entry in here)
    report["upstream.detail"] = (
        "; ".join(
            f"{'on by default' if entry['by_default'] else 'off by default'}, needs {entry['condition']}"
            for entry in here
        )
        or "this release does not fuse this model here"
    )
    return report


def _standing(known: dict[str, Any], version: Version) -> str:
    if any(version == Version(tested) for tested in known["tested"]):
        return "tested"
    return "read" if SpecifierSet(known["read"]).contains(version, prereleases=True) else "untested"
