"""Functions of the tests in processes of their own; imports nothing of ours: tests look at what is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 240.0


def in_process(place: str, *arguments: str, timeout: float = TIMEOUT, **env: str | None) -> Any:
    """Result of ``module:function`` of this folder in a new process, whose children end with it.

    An environment variable that is None is not set; our own and those of other plugins never are.
    """
    module, function = place.split(":")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FSE_PATCH") and k != "PYTHONPATH"}
    code = (
        f"import json, sys; from {module} import {function} as probe; found = probe(*sys.argv[1:]); "
        "sys.stdout.write('\\nRESULT ' + json.dumps(found) + '\\n')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT / "ci"), **{k: v for k, v in env.items() if v is not None}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    found = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert process.returncode == 0, output
    assert found, output
    return json.loads(found[-1].removeprefix("RESULT "))
