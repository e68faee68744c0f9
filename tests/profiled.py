"""What the tests of both engines say of `fse-patch profile`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .running import ROOT

LIMIT = 300.0
WINDOW = ("--streams", "2", "--warm-up", "3", "--steps", "8")


def profile(engine: str, folder: Path, arguments: dict[str, Any], *more: str, path: str = "") -> Any:
    """What the command prints, as a user runs it."""
    words = ["profile", str(folder), "--engine", engine, "--engine-args", json.dumps(arguments), *WINDOW]
    done = subprocess.run(
        [sys.executable, "-m", "fse_patch.cli.app", *words, "--json", *more],
        env={**os.environ, "FSE_PATCH": "1", "PYTHONPATH": f"{ROOT}:{path}"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


def check(report: Any) -> None:
    """Both arms had their window of decode steps alone; ours is fused, stock is not."""
    assert {name: arm["steps"] for name, arm in report["arms"].items()} == {"stock": 8, "ours": 8}
    assert report["arms"]["stock"]["roles"] == []
    (role,) = report["arms"]["ours"]["roles"]
    assert role["calls_by_mode"]["fused"] > 0
    names = {row["name"] for row in report["rows"]}
    assert any(name.startswith("aten::") for name in names)
    for row in report["rows"]:
        assert max(row["stock_ms"], row["ours_ms"]) > 0
    for arm in ("stock", "ours"):
        assert sum(row[f"{arm}_ms"] for row in report["rows"]) > 0
