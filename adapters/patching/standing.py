"""Standing of an installed release: the listed release whose seams it has, and what of them differs.

A seam is a definition of the engine that a patch replaces or relies on. Its text is reviewed where its
fingerprint is on file, of whichever release. Imports no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from packaging.version import Version

from ...errors import RefusedError
from . import guards
from .ledger import Ledger
from .source import fingerprint
from .spec import PatchSpec

Read = Callable[[str], str | None]


@dataclass(frozen=True)
class Standing:
    """An installed release as it stands to those that are listed.

    Args:
        version: as it is installed.
        seams_of: the listed release whose patches it gets: itself, or the one that is closest by its seams.
        others: listed releases that the text of some seams is from.
        patches: those for ``seams_of``.
        problems: what is wrong, by the id of a patch: a code, and a line that names the seam.
    """

    engine: str
    version: str
    seams_of: str
    others: tuple[str, ...] = ()
    patches: tuple[PatchSpec, ...] = ()
    problems: Mapping[str, RefusedError] = field(default_factory=dict)

    @property
    def blocking(self) -> RefusedError | None:
        """Return the first problem with a patch that every family needs."""
        return next((self.problems[p.id] for p in self._wrong() if not p.families), None)

    @property
    def refused(self) -> dict[str, RefusedError]:
        """Return the families that are left alone, each with its first problem."""
        found: dict[str, RefusedError] = {}
        for patch in self._wrong():
            for family in sorted(patch.families):
                found.setdefault(family, self.problems[patch.id])
        return found

    def problem_of(self, family: str) -> RefusedError | None:
        """Return why models of a family stay as the engine builds them; None: nothing is in the way."""
        return self.blocking or self.refused.get(family)

    @property
    def usable(self) -> tuple[PatchSpec, ...]:
        """Return the patches of all families that are not left alone."""
        refused = self.refused.keys()
        return tuple(p for p in self.patches if not p.families or p.families - refused)

    def idle(self, switches: Iterable[str]) -> list[str]:
        """Return the switches that no patch of this release answers."""
        return sorted({*switches} - {patch.setting for patch in self.patches})

    @property
    def remark(self) -> str:
        """Say whose seams a new release has; "" for one that is listed."""
        if self.seams_of == public(self.version):
            return ""
        whose = " and ".join((self.seams_of, *self.others))
        return f"release {self.version} is new, its seams are those of {whose}"

    def _wrong(self) -> Iterable[PatchSpec]:
        return (patch for patch in self.patches if patch.id in self.problems)


def public(version: str) -> str:
    """Return a version without its local label, such as +cpu."""
    return Version(version).public


def check_age(ledger: Ledger, version: str) -> None:
    """Look whether a release is older than every listed one; its source need not be there.

    Raises:
        RefusedError: ``version.untested``: it is.
    """
    if not ledger.listed or Version(version) < min(map(Version, ledger.listed)):
        which = ", ".join(ledger.listed) or "none"
        why = f"{ledger.engine} {version} is older than every listed release ({which}); install one of them"
        raise RefusedError("version.untested", why)


def problem_of_named(ledger: Ledger, version: str) -> RefusedError | None:
    """Return what is wrong with a release that is only named, and not installed; None: it is listed.

    Raises:
        RefusedError: it is older than every listed one.
    """
    if public(version) in ledger.listed:
        return None
    check_age(ledger, version)
    why = f"{ledger.engine} {version} is not listed, and its code is not here to be compared"
    return RefusedError("version.untested", f"{why}; ask again where it is installed")


def standing_of(
    ledger: Ledger, version: str, switches: Iterable[str] = (), site_packages: Sequence[str] | None = None
) -> Standing:
    """Compare an installed release with the listed ones.

    Args:
        version: as it is installed.
        switches: settings that ask for patches which nobody gets otherwise.

    Raises:
        RefusedError: ``version.untested``: it is older than every listed release.
    """
    check_age(ledger, version)
    here, listed = Version(version), [Version(release) for release in ledger.listed]
    read = cache(lambda reference: fingerprint(reference, site_packages))
    asked = frozenset(switches)
    # Of the others newer ones come first: what is new will most often be like the newest.
    nearest = sorted(listed, key=lambda known: (known <= here, known), reverse=True)
    best: Standing | None = None
    for release in [Version(here.public)] if here.public in ledger.listed else nearest:
        patches = ledger.patches_for(release)
        patches = tuple(p for p in patches if p.setting is None or p.setting in asked)
        found = _compared(ledger, version, release, patches, read, site_packages)
        if best is None or _distance(found) < _distance(best):
            best = found
        if _distance(best) == (0, 0):
            break
    assert best is not None
    return best


def _distance(standing: Standing) -> tuple[int, int]:
    return len(standing.problems), len(standing.others)


def _compared(
    ledger: Ledger,
    version: str,
    release: Version,
    patches: tuple[PatchSpec, ...],
    read: Read,
    site_packages: Sequence[str] | None,
) -> Standing:
    """Compare an installation with one listed release, whose patches these are."""
    if public(version) == release.public:
        code, others = "fingerprint", set[str]()
    else:
        sources = (source for patch in patches for source in (patch.source, *patch.relies_on))
        code, others = "release.seam", {_other(s.fingerprints, release, read(s.reference)) for s in sources}
    problems = {
        patch.id: RefusedError(code, guards.worded(ledger, version, patch, problem))
        for patch in patches
        if (problem := guards.guard(patch, site_packages, read))
    }
    newest = sorted(others - {""}, key=Version, reverse=True)
    return Standing(ledger.engine, version, release.public, tuple(newest), patches, problems)


def _other(known: Mapping[str, str], release: Version, seen: str | None) -> str:
    """Return the newest release that has the text which is seen, where that of ``release`` is another."""
    if seen is None or known.get(release.public) == seen:
        return ""
    return max((r for r, value in known.items() if value == seen), key=Version, default="")


_here: dict[str, Standing] = {}


def note(standing: Standing) -> None:
    """Keep the standing of an engine in this process, for what is decided by its release."""
    _here[standing.engine] = standing


def forget(engine: str) -> None:
    """Drop what `note` has kept."""
    _here.pop(engine, None)


def refused_here(engine: str) -> Mapping[str, RefusedError]:
    """Return the families that are left alone in this process, each with the reason."""
    standing = _here.get(engine)
    return {} if standing is None else standing.refused


def remark_here(engine: str) -> str:
    """Return `Standing.remark` of an engine in this process; "" where nothing was noted."""
    standing = _here.get(engine)
    return "" if standing is None else standing.remark


def release_here(ledger: Ledger) -> str:
    """Return the listed release that the installed one counts as; its own number where nothing was noted."""
    standing = _here.get(ledger.engine)
    return public(guards.engine_version(ledger)) if standing is None else standing.seams_of
