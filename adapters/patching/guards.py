"""Guards: is the installed engine the one that the patches were written against? Imports no engine."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version

from ...errors import FsePatchError
from .ledger import Ledger
from .source import SCOPES, fingerprint, nodes, nodes_in, source_file, split
from .spec import PatchSpec, Source

_WHAT_TO_DO = "run `fse-patch patches --engine {engine}`, and use a listed release: {listed}"


def engine_version(ledger: Ledger, site_packages: Sequence[str] | None = None) -> str:
    """Read the version of the installed engine, from its metadata.

    Raises:
        FsePatchError: it is not installed, or its version is not one.
    """
    path = sys.path if site_packages is None else list(site_packages)
    names = ledger.facts.distributions
    installed = (d.version for name in names for d in metadata.distributions(name=name, path=path))
    version = next((text for text in installed if text), "")
    if not version or source_file(ledger.facts.import_name, site_packages) is None:
        raise FsePatchError(
            f"{ledger.engine}: not installed here (looked for {' or '.join(names)}); "
            "install fse-patch into the engine's own environment"
        )
    try:
        Version(version)
    except InvalidVersion as error:
        raise FsePatchError(f"{ledger.engine}: its version {version!r} is not a version") from error
    return version


def _problem(source: Source, read: Callable[[str], str | None]) -> str:
    seen = read(source.reference)
    if seen is None:
        return f"{source.reference} is not defined in the installed source"
    if seen not in source.fingerprints.values():
        return f"{source.reference} reads {seen}, none of {len(source.fingerprints)} known sources"
    return ""


def _binding_problem(patch: PatchSpec, site_packages: Sequence[str] | None) -> str:
    """Check a target that is not its source: an imported name, or a method that its class inherits."""
    module, qualname = split(patch.target)
    owner = qualname.rpartition(".")[0]
    if not patch.imported:
        return ""
    if not nodes(f"{module}:{owner or qualname}", site_packages):
        return f"{module} does not bind {owner or qualname}"
    if any(isinstance(node, SCOPES) for node in nodes(patch.target, site_packages)):
        return f"{patch.target} has a definition of its own, not that of {patch.source.reference}"
    return ""


def guard(
    patch: PatchSpec,
    site_packages: Sequence[str] | None = None,
    read: Callable[[str], str | None] | None = None,
) -> str:
    """Say what is wrong with the installed source of a patch, in a line, or "" if it is as expected.

    Args:
        read: gives the fingerprint of a definition there, or None; by default it is read anew.
    """
    read = read or (lambda reference: fingerprint(reference, site_packages))
    problems = (_problem(s, read) for s in (patch.source, *patch.relies_on))
    return next((p for p in problems if p), "") or _binding_problem(patch, site_packages)


def worded(ledger: Ledger, version: str, patch: PatchSpec, problem: str) -> str:
    """Say in a line which patch a problem is with, and what to do about it."""
    where = f"{ledger.engine} {version}: patch {patch.id} of {patch.target}"
    return f"{where}: {problem}; {_WHAT_TO_DO.format(engine=ledger.engine, listed=', '.join(ledger.listed))}"


def check_factory(patch: PatchSpec) -> None:
    """Check that a factory is there, before anything is patched: it is imported late.

    Raises:
        FsePatchError: our own package is incomplete.
    """
    module, qualname = split(patch.factory)
    try:
        spec = importlib.util.find_spec(module)  # imports its parent packages, which are light and ours
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not nodes_in(Path(spec.origin), qualname):
        raise FsePatchError(f"patch {patch.id}: no factory {patch.factory}")
