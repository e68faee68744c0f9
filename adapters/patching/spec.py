"""A patch as data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .source import split

Unneeded = Literal["native", "tables"]


@dataclass(frozen=True)
class Source:
    """A definition of the engine that is replaced or relied on.

    Args:
        reference: where it is defined, as ``pkg.mod:Qual.name``.
        fingerprints: engine version to hash, for every release it was read in.
        versions: releases in which it is depended on.
    """

    reference: str
    fingerprints: dict[str, str]
    versions: SpecifierSet = field(default_factory=SpecifierSet)


@dataclass(frozen=True)
class PatchSpec:
    """One replacement of one attribute of the engine.

    Args:
        id: unique in the ledger of its engine.
        target: the binding that is replaced, as ``pkg.mod:Qual.name``.
        versions: releases it is for; any of the specifiers may match.
        source: where the original is defined. Differs from the target for a name that is imported into the
            target's module (then that binding alone is replaced) and for an inherited method.
        holds: what the target holds at run time; differs from the source where a class decorator replaced it.
        relies_on: code that is not replaced but whose behaviour the replacement assumes.
        factory: ``module:function``, called with the original, returns the replacement.
        why: what breaks without it.
        upstream: a link, or "none: " and the reason.
        remove_when: what makes it unnecessary.
        unneeded: how that can be seen of a release: "native", it fuses the patch's families by itself and
            rightly, on every platform and by default; "tables", it ships a table for E+S wherever it has one
            for E. None where somebody has to read it.
        setting: environment variable that asks for it; without one it is always put in.
        families: model families that it is for; none: all of them.
    """

    id: str
    target: str
    versions: tuple[SpecifierSet, ...]
    source: Source
    holds: str
    relies_on: tuple[Source, ...]
    factory: str
    why: str
    upstream: str
    remove_when: str
    setting: str | None = None
    unneeded: Unneeded | None = None
    families: frozenset[str] = frozenset()

    @property
    def module(self) -> str:
        """Return the module that has to be imported before the patch can be put in."""
        return split(self.target)[0]

    @property
    def qualname(self) -> str:
        """Return the attribute's name inside its module."""
        return split(self.target)[1]

    @property
    def imported(self) -> bool:
        """Return whether the target is a name bound elsewhere than where it is defined."""
        return self.source.reference != self.target

    def is_for(self, version: Version) -> bool:
        """Return whether a specifier matches ``version``; local labels such as +cpu do not count."""
        return any(_matches(specifier, version) for specifier in self.versions)

    def at(self, version: Version) -> PatchSpec:
        """Return this patch with what it relies on in one release alone."""
        return replace(self, relies_on=tuple(s for s in self.relies_on if _matches(s.versions, version)))


def _matches(specifier: SpecifierSet, version: Version) -> bool:
    return specifier.contains(version.public, prereleases=True)
