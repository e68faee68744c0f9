"""Copies of an installed engine that are another release: links to its files, with a few of its own.

A copy is found first where its folder is the first of PYTHONPATH; it takes no space, and is made in no time.
"""

from __future__ import annotations

import ast
import math
import os
from importlib import metadata, util
from pathlib import Path
from typing import Any

from fse_patch.adapters.patching.source import nodes_in, split
from fse_patch.fusion_core.engines import facts_of
from fse_patch.lab import arm_process, verify

# Newer than every release that there will be for a while.
VERSION = "0.99.0"
LIMIT = 400.0


def copy(engine: str, folder: Path, changed: str = "") -> Path:
    """Make a copy of the installed engine with ``VERSION`` in ``folder``.

    Args:
        changed: a function of it, as ``pkg.mod:Qual.name``, whose body gets one more statement.
    """
    facts = facts_of(engine)
    spec = util.find_spec(facts.import_name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (package,) = map(Path, spec.submodule_search_locations)
    name = next(n for n in facts.distributions if installed(n))
    info = folder / f"{name.replace('-', '_')}-{VERSION}.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n")
    link(package, folder / facts.import_name)
    version = Path("_version.py")
    text = (package / version).read_text().replace(f"'{metadata.version(name)}'", f"'{VERSION}'")
    assert VERSION in text
    own(package, folder / facts.import_name, version, text)
    if changed:
        module, qualname = split(changed)
        file = Path(*module.split(".")[1:]).with_suffix(".py")
        own(package, folder / facts.import_name, file, with_a_statement(package / file, qualname))
    return folder


def installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def link(source: Path, target: Path) -> None:
    """Make a folder of links to what is in another one, but for what Python has compiled."""
    target.mkdir()
    for entry in source.iterdir():
        if entry.name != "__pycache__":
            (target / entry.name).symlink_to(entry)


def own(package: Path, target: Path, file: Path, text: str) -> None:
    """Put a file of its own into a copy, and folders of links on the way to it."""
    for part in [*reversed(file.parents)][1:]:
        if (target / part).is_symlink():
            (target / part).unlink()
            link(package / part, target / part)
    (target / file).unlink()
    (target / file).write_text(text)


def with_a_statement(file: Path, qualname: str) -> str:
    """Return the text of a file with a statement more, that does nothing, in a function."""
    (function,) = nodes_in(file, qualname)
    assert isinstance(function, ast.FunctionDef)
    first = function.body[0]
    lines = file.read_text().splitlines(keepends=True)
    lines.insert(first.lineno - 1, " " * first.col_offset + "pass\n")
    return "".join(lines)


def serve(
    engine: str, job: verify.VerifyJob, copied: Path, **env: str
) -> tuple[list[dict[str, Any]], list[str], str]:
    """Run one fused arm in a copy: its results, lines of ours in its log, and how it ended."""
    path = os.pathsep.join(filter(None, [str(copied), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **env}
    results, log, ending = arm_process.run_process(
        engine, [job], True, environment, LIMIT, lambda _: None, verify.ARM
    )
    lines = [line for line in log.splitlines() if "fse_patch" in line and "job 0 begins" not in line]
    assert results or ending != "ended with status 0", log
    return results, lines, ending


def check_fused(
    results: list[dict[str, Any]], lines: list[str], job: verify.VerifyJob, seams_of: str
) -> None:
    """A copy with other numbers alone is served fused, proved, and says whose seams it has."""
    (result,) = results
    assert "error" not in result, result
    assert verify.ran_as_decided(job.decisions[0], result["workers"]) == []
    assert [role["canary"]["state"] for w in result["workers"] for role in w["roles"]] == ["passed"]
    told = [line for line in lines if "main model: shared expert fused: " in line]
    remark = f"; release {VERSION} is new, its seams are those of {seams_of}"
    assert len(told) == 1
    assert told[0].endswith(remark)


def check_stock(results: list[dict[str, Any]], lines: list[str], seam: str) -> None:
    """A copy with another seam is served unfused, with one warning, which names it."""
    (result,) = results
    assert "error" not in result, result
    assert [worker["roles"] for worker in result["workers"]] == [[]]
    assert all(math.isfinite(value) for prompt in result["logprobs"] for value in prompt)
    assert len(lines) == 1
    assert " not fused: release.seam: " in lines[0]
    assert f"{VERSION}: patch " in lines[0]
    assert f": {seam} reads " in lines[0]
