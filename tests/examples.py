"""Runs the scripts of examples/ as users do: a process each, with this clone's package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fse_patch.cli.status import ask
from fse_patch.lab.compare.servers import HOST, started
from fse_patch.lab.free_port import free_port

ROOT = Path(__file__).parents[1]
LIMIT = 600


def around() -> dict[str, str]:
    """The environment of a script: this clone's package, and this environment's commands."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FSE_PATCH")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return clean | {"PYTHONPATH": path, "PATH": commands}


def example(name: str, *checkpoints: Path, **arguments: Any) -> str:
    """What an example prints, stderr too; one that fails fails the test with its log."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, checkpoints), json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        env=around(),
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def served(name: str, checkpoint: Path, log: Path, *flags: str) -> tuple[str, list[Any]]:
    """What a serving example prints until its server answers, and what `fse-patch status` says of it."""
    port = free_port()
    words = [str(ROOT / "examples" / name), str(checkpoint), "--host", HOST, "--port", str(port), *flags]
    with started(name, words, around(), port, log, LIMIT) as server:
        return server.log(), ask(server.url, "", 30)
