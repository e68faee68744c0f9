"""Runs planted faults and clean models in one process of an engine, and says how each start ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..running import ROOT, Checkpoints
from . import altered
from .table import FAULTS, Fault

TIMEOUT = 600.0
# Set by `make test-faults`: all faults and clean models, and not the sample alone.
WHOLE = os.environ.get("FAULTS") == "all"


@dataclass(frozen=True)
class Start:
    """How a start ended, and the log of its process."""

    outcome: str
    log: str


def chosen(engine: str) -> list[Fault]:
    """The faults of this run."""
    return [f for f in FAULTS.values() if engine in f.engines and (WHOLE or f.sample)]


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
    engine: str, checkpoints: Checkpoints, folder: Path, clean: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """How each start ended, by the fault's id or the clean model's name, in one process.

    A plain start comes first, and another one last: no fault is left behind.
    """
    faults = chosen(engine)
    plain = job(None, checkpoints.path("qwen2_moe"))
    names = [fault.id for fault in faults] + list(clean)
    wanted = [*jobs(faults, checkpoints, folder), *clean.values()]
    first, *starts, last = run(engine, [plain, *wanted, plain], folder)
    assert (first.outcome, last.outcome) == ("", ""), first.log
    return {name: start.outcome for name, start in zip(names, starts, strict=True)}
