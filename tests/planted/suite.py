"""Runs planted faults and clean models in one process of an engine, and says how each start ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..running import ROOT, Checkpoints
from . import altered
from .table import FAULTS, Fault

TIMEOUT = 600.0


@dataclass(frozen=True)
class Start:
    """How a start ended, and the log of its process."""

    outcome: str
    log: str


def faults(engine: str) -> list[Any]:
    """The faults of an engine, as parameters of a test; those that `make test` leaves out are long."""
    return [
        pytest.param(fault, id=fault.id, marks=[] if fault.sample else pytest.mark.long)
        for fault in FAULTS.values()
        if engine in fault.engines
    ]


def job(name: str | None, folder: Path, draft: bool = False, update: Path | None = None) -> dict[str, Any]:
    return {"fault": name, "folder": str(folder), "draft": draft, "update": update and str(update)}


def jobs(faults: Iterable[Fault], checkpoints: Checkpoints, folder: Path) -> list[dict[str, Any]]:
    """What the process is asked for."""
    made = []
    for fault in faults:
        source = checkpoints.path(fault.recipe)
        if fault.altered:
            made.append(job(None, altered.make(fault.name, source, folder / fault.name)))
            continue
        other = checkpoints.path(fault.recipe, seed=1) if fault.update else None
        made.append({**job(fault.name, source, fault.draft, other), "without": fault.without})
    return made


def run(engine: str, wanted: list[dict[str, Any]], folder: Path) -> list[Start]:
    """Start after start in one process."""
    request, result, log = folder / "jobs.json", folder / "results.json", folder / "log"
    request.write_text(json.dumps(wanted))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FSE_PATCH")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as out:
        status = subprocess.run(
            [sys.executable, "-m", "tests.planted.run", engine, str(request), str(result)],
            cwd=ROOT,
            env={**clean, "PYTHONPATH": path},
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT,
        ).returncode
    said = log.read_text(errors="replace")[-20000:]
    assert status == 0, said
    found = json.loads(result.read_text())
    assert len(found) == len(wanted), said
    return [Start(entry["outcome"], said) for entry in found]


def run_all(
    engine: str,
    checkpoints: Checkpoints,
    folder: Path,
    clean: dict[str, dict[str, Any]],
    asked: Collection[str],
) -> dict[str, str]:
    """How each start ended, by the fault's id or the clean model's name, in one process.

    The faults are those whose ids are ``asked`` for. A plain start comes first, and another one last: no
    fault is left behind.
    """
    chosen = [fault for fault in FAULTS.values() if engine in fault.engines and fault.id in asked]
    plain = job(None, checkpoints.path("qwen2_moe"))
    names = [fault.id for fault in chosen] + list(clean)
    wanted = [*jobs(chosen, checkpoints, folder), *clean.values()]
    first, *starts, last = run(engine, [plain, *wanted, plain], folder)
    assert (first.outcome, last.outcome) == ("", ""), first.log
    return {name: start.outcome for name, start in zip(names, starts, strict=True)}
