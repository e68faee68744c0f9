"""Runs the scripts of examples/ as users do: a process each, with this clone's package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from fse_patch.cli.status import ask
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


def served(name: str, checkpoint: Path, log: Path, *flags: str, **env: str) -> tuple[str, list[Any]]:
    """What a serving example prints until its server answers, and what `fse-patch status` says of it."""
    port = free_port()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [str(ROOT / "examples" / name), str(checkpoint), "--port", str(port), *flags],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=around() | env,
            start_new_session=True,
        )
    limit = time.monotonic() + LIMIT
    try:
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < limit, log.read_text(errors="replace")[-4000:]
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.5)
        return log.read_text(errors="replace"), ask(f"http://127.0.0.1:{port}", "", 30)
    finally:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            process.terminate()
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
