"""Every entry of the shipped ledgers, against real installed engines, read and not imported.

Engines come from ENGINE_SITES (site-packages folders) and from the environment that runs the tests.
"""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import replace

import pytest
from packaging.version import Version

from fse_patch import table_coverage
from fse_patch.adapters.patching import guards, ledger, standing
from fse_patch.adapters.patching.source import nodes
from fse_patch.errors import FsePatchError
from fse_patch.patches import ENGINES

BOOKS = {engine: ledger.load(engine) for engine in ENGINES if ledger.exists(engine)}


def installed() -> list[tuple[str, str, tuple[str, ...]]]:
    """Engine, version and folders of every installation that can be seen."""
    given = os.environ.get("ENGINE_SITES", "")
    sites = [(s,) for s in given.split(os.pathsep) if s]
    found = []
    for site in [*sites, tuple(sys.path)]:
        for engine, book in BOOKS.items():
            try:
                found.append((engine, guards.engine_version(book, site), site))
            except FsePatchError:
                continue
    return found


@pytest.mark.parametrize("engine", BOOKS)
def test_factories_are_there(engine: str) -> None:
    for patch in BOOKS[engine].patches:
        guards.check_factory(patch)


@pytest.mark.parametrize("engine", BOOKS)
def test_every_listed_release_has_patches_and_fingerprints(engine: str) -> None:
    book = BOOKS[engine]
    for version in book.listed:
        patches = book.patches_for(Version(version))
        assert patches
        for source in {s.reference: s for p in patches for s in (p.source, *p.relies_on)}.values():
            assert version in source.fingerprints, f"{source.reference}: run ci/fingerprint.py on {version}"


@pytest.mark.parametrize("engine", BOOKS)
def test_everything_relied_on_is_so_in_a_listed_release(engine: str) -> None:
    book = BOOKS[engine]
    looked_at = [p for version in book.listed for p in book.patches_for(Version(version))]
    named = {(p.id, s.reference) for p in book.patches for s in p.relies_on}
    assert named == {(p.id, s.reference) for p in looked_at for s in p.relies_on}


@pytest.mark.skipif(not installed(), reason="no engine here and none in ENGINE_SITES")
@pytest.mark.parametrize(
    ("engine", "version", "site"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in installed()]
)
def test_guards_pass_on_installed_engines(engine: str, version: str, site: tuple[str, ...]) -> None:
    here = standing.standing_of(BOOKS[engine], version, site_packages=site)
    assert (here.problems, here.remark) == ({}, "")


@pytest.mark.skipif(not installed(), reason="no engine here and none in ENGINE_SITES")
@pytest.mark.parametrize(
    ("engine", "version", "site"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in installed()]
)
def test_without_its_row_an_installed_engine_is_new(engine: str, version: str, site: tuple[str, ...]) -> None:
    """Its seams may be those of another release; where they are not, each family says which one differs."""
    book, release = BOOKS[engine], Version(version).public
    rows = [row for row in book.facts.releases if row.release != release]
    facts = book.facts.model_copy(update={"releases": rows})
    if Version(version) < min(Version(row.release) for row in rows):
        pytest.skip("the oldest one")
    here = standing.standing_of(replace(book, facts=facts), version, site_packages=site)
    assert here.remark.startswith(f"release {version} is new, its seams are those of ")
    assert {problem.reason for problem in here.problems.values()} <= {"release.seam"}


@pytest.mark.skipif(not installed(), reason="no engine here and none in ENGINE_SITES")
@pytest.mark.parametrize(
    ("engine", "version", "site"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in installed()]
)
def test_tuned_tables_of_installed_engines_are_found(
    engine: str, version: str, site: tuple[str, ...]
) -> None:
    """Every release ships one for Qwen3-Next's experts cut in four, on an H200."""
    shipped = table_coverage.shipped(engine, list(site))
    rows = table_coverage.coverage(engine, shipped, table_coverage.KNOWN, ())
    (row,) = [r for r in rows if r["shape"] == "Qwen3-Next-80B-A3B" and r["width"] == 128]
    assert "NVIDIA_H200" in row["devices"] + row["only_unfused"]
    assert len(shipped) > 100


@pytest.mark.parametrize(("engine", "version", "site"), installed() or [pytest.param("", "", (), id="none")])
def test_guards_notice_another_release(engine: str, version: str, site: tuple[str, ...]) -> None:
    """The control: with the fingerprints of that release taken out, some guard must object."""
    if not engine:
        pytest.skip("no engine here and none in ENGINE_SITES")
    problems = []
    for patch in BOOKS[engine].patches_for(Version(version)):
        known = patch.source.fingerprints
        mine = known[Version(version).public]
        others = {v: h for v, h in known.items() if h != mine}
        known_before = dict(known)
        known.clear()
        known.update(others)
        problems.append(guards.guard(patch, site))
        known.clear()
        known.update(known_before)
    assert any(problems)


@pytest.mark.parametrize(("engine", "version", "site"), installed() or [pytest.param("", "", (), id="none")])
def test_workspaces_are_the_first_two_buffers(engine: str, version: str, site: tuple[str, ...]) -> None:
    """A layer's modes take these two of what an installed vLLM allocates, and leave the rest."""
    if engine != "vllm":
        pytest.skip("a matter of vLLM")
    module = "vllm.model_executor.layers.fused_moe.modular_kernel"
    (function,) = nodes(f"{module}:FusedMoEKernelModularImpl._allocate_buffers", site)
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    assert returned
    for value in returned:
        assert isinstance(value, ast.Tuple)
        assert [ast.unparse(item) for item in value.elts[:2]] == ["workspace13", "workspace2"]
