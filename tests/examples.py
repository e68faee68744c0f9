"""Runs the scripts of examples/ as users do: a process each, with this clone's package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 600


def example(name: str, *checkpoints: Path, **arguments: Any) -> str:
    """What an example prints, stderr too; one that fails fails the test with its log."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FSE_PATCH")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, checkpoints), json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        env=clean | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
