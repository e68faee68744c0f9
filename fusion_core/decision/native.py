"""Native fusion: what a release of an engine does with the shared expert by itself, and whether rightly."""

from __future__ import annotations

from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from ...errors import FsePatchError
from ...patches import PLATFORMS
from ..checkpoint.families import family_files, family_of
from ..engines import facts_of
from .outcome import Decision, Stock


def runtime_report(
    decision: Decision, platform: str | None = None, engine_version: str | None = None
) -> dict[str, Any]:
    """Report what is known of running ``decision`` on a platform and release; null where it cannot be said.

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
    facts = facts_of(decision.engine)
    report: dict[str, Any] = {
        "platform": platform,
        "engine_version": engine_version,
        "backend": next((word for name, word in facts.backends.items() if name == platform), None),
        "version": None,
        "upstream.already": None,
        "upstream.detail": "give --platform and --engine-version to know",
    }
    if version is not None:
        report["version"] = facts.standing(version)
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
    """List what patches/families/ says of how a release fuses a family by itself.

    Args:
        model: name of the model class; None stands for any of the family.

    Returns:
        Rows of `NativeFusion`, with the keys by_default, condition and those that say something.
    """
    rows = [row for file in family_files() if file.spec.name == family for row in file.native.get(engine, ())]
    return [
        row.model_dump(exclude_none=True)
        for row in rows
        if platform in row.platforms
        and SpecifierSet(row.versions).contains(version, prereleases=True)
        and (model is None or row.models is None or model in row.models)
    ]


def gets_wrong(entry: dict[str, Any], decision: Decision) -> str:
    """Say why what a release builds by itself would not be the checkpoint's model, or "".

    Args:
        entry: of `fusing`; the release is live with it.
    """
    slots = 0 if decision.moe is None else decision.moe.layout.num_shared_slots
    if "wrong" in entry:
        return str(entry["wrong"])
    if decision.stored_alike is False:
        return "routed and shared experts are stored in different ways"
    if decision.stored_alike is None and decision.packed:
        # Bits, symmetry and order of packed integers are in the config alone: of a wrong reading nothing
        # warns. The engine's own way with two modules is right for every checkpoint.
        return "nothing shows that the packed integers of routed and shared experts are stored alike"
    code = decision.reason.code if isinstance(decision, Stock) else ""
    if code == "shared.absent":
        return "the checkpoint has no shared expert to fill its slots"
    if code == "width.mismatch" or slots > entry.get("slots", slots):
        return "the shared expert is wider than the slots that it has"
    return ""
