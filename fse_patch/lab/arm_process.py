"""A process of an arm: started on its jobs, watched, and ended with all that it has started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..fusion_core.engines import facts_of
from ..settings import ENABLE
from .verify_arm import BEGUN, HasRequest

LOG_LINES = 60
POLL = 0.3  # seconds between looks at a running arm

Progress = Callable[[str], None]


def run_process(
    engine: str,
    jobs: Sequence[HasRequest],
    fused: bool,
    env: Mapping[str, str],
    timeout: float,
    tell: Callable[[int], None],
    arm: str,
) -> tuple[list[dict[str, Any]], str, str]:
    """Start one process on ``jobs`` and end it, with its children, at the timeout.

    Args:
        tell: is called with the index of each job that starts.
        arm: module that runs them, with "{engine}" for its name.

    Returns:
        The results it left, its log, and in words how it ended.
    """
    with tempfile.TemporaryDirectory(prefix="fse_patch_") as folder:
        request, result, log = (Path(folder) / name for name in ("request.json", "result.json", "log"))
        request.write_text(json.dumps([job.request() for job in jobs]))
        environment = {**facts_of(engine).lab.environment, **env, ENABLE: engine if fused else "0"}
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", arm.format(engine=engine), str(request), str(result)],
                env=environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                in_time = watch(process, result, len(jobs), timeout, tell)
            finally:
                end(process)
        ending = f"ended with status {process.returncode}"
        if not in_time:
            ending = f"was not finished in {timeout:g} s; raise --timeout"
        return read_results(result), log.read_text(errors="replace"), ending


def log_of(number: int, log: str) -> str:
    """Return what a process wrote for one of its jobs; all of it, where the log does not tell them apart."""
    _, begun, rest = log.partition(BEGUN.format(number=number))
    return rest.partition(BEGUN.format(number=number + 1))[0] if begun else log


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: children of an engine that crashed would keep its memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_results(result: Path) -> list[dict[str, Any]]:
    """Return what an arm has left so far: it writes after each job."""
    done: list[dict[str, Any]] = json.loads(result.read_text()) if result.exists() else []
    return done


def watch(
    process: subprocess.Popen[bytes], result: Path, jobs: int, timeout: float, tell: Callable[[int], None]
) -> bool:
    """Wait for an arm and tell of each job that starts; return whether it ended in ``timeout`` seconds."""
    end = time.monotonic() + timeout
    told = -1
    while process.poll() is None and time.monotonic() < end:
        done = len(read_results(result))
        while told < min(done, jobs - 1):
            told += 1
            tell(told)
        try:
            process.wait(POLL)
        except subprocess.TimeoutExpired:
            continue
    return process.poll() is not None
