"""Runs the checks and tests in the environments of ci/matrix.yaml, two processes at once.

    python3 ci/testing.py [lint] [core] [kernels] [vllm] ...      default: all of them, the longest first
    python3 ci/testing.py vllm-0.32.0                   one release, by its name in the matrix
    python3 ci/testing.py faults                        every planted fault, in no default

What runs in each environment is in ci/steps.py. Every step has a time limit and runs in a process group of
its own, so that an engine that hangs is ended with all its children. Its output is in .cache/logs; the end of
it is shown when the step fails. The last lines are a summary.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import steps
from environment import ROOT, say
from envs import matrix
from steps import Step

LOGS = ROOT / ".cache" / "logs"
HEARTBEAT = 30
# Processes of tests side by side: most of their tests wait for a core, each takes 1 to 4 GiB.
AT_ONCE = 2
# Where each has a thread for every core, they wait for each other at every operation.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
RUNNING: set[subprocess.Popen[bytes]] = set()
INTERRUPTED = threading.Event()


@dataclass(frozen=True)
class Result:
    """How a step ended: its exit status, 124 at its limit, and the last line that it wrote."""

    step: Step
    seconds: float
    status: int
    closing: str


def run(step: Step) -> Result:
    """Run a step to its end or its limit; its output goes to its log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / (step.name.replace(" ", "-") + ".log")
    begun = time.monotonic()
    say(f"{step.name}\n")
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=ONE_THREAD | os.environ | step.environment,
                start_new_session=True,
            )
        except FileNotFoundError:
            return Result(step, 0.0, 127, f"{step.command[0]} is not there: make envs")
        RUNNING.add(process)
        status = wait(process, step, log, begun)
        RUNNING.discard(process)
    seconds = time.monotonic() - begun
    closing = last_line(log)
    if status == 124:
        closing = f"ended after its limit of {step.limit} s"
    if status and not INTERRUPTED.is_set():
        tail = log.read_text(errors="replace").splitlines()[-80:]
        print("\n".join(f"    | {line}" for line in tail), flush=True)
    say(f"{step.name}: {'ok' if status == 0 else f'FAILED ({status})'} in {seconds:.0f} s: {closing}\n")
    return Result(step, seconds, status, closing)


def wait(process: subprocess.Popen[bytes], step: Step, log: Path, begun: float) -> int:
    """Return the status of the process; 124 if it had to be ended."""
    while True:
        left = begun + step.limit - time.monotonic()
        try:
            return process.wait(max(0.1, min(HEARTBEAT, left)))
        except subprocess.TimeoutExpired:
            if time.monotonic() - begun < step.limit:
                seconds = time.monotonic() - begun
                print(f"         {seconds:4.0f} s  {step.name}: {last_line(log)[:80]}", flush=True)
                continue
        except BaseException:
            end(process)
            raise
        end(process)
        return 124


def end(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: an engine's workers outlive the process that started them."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else ""


def run_all(asked: list[Step], run: Callable[[Step], Result] = run) -> list[Result]:
    """Run steps side by side, those that run alone before all others; results in their order."""
    alone = {step.name: run(step) for step in asked if step.alone}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        beside = pool.map(run, [step for step in asked if not step.alone])
        try:
            return [alone[step.name] if step.alone else next(beside) for step in asked]
        except KeyboardInterrupt:
            # Threads do not get it: they would go on with what waits.
            INTERRUPTED.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                end(process)
            raise


def everything(rows: list[steps.Row]) -> list[str]:
    """Return the names of all of `make test`.

    The slow ones first, so that the last ones to run side by side end at about the same time.
    """
    whole = [str(row["name"]) for row in rows if row.get("whole")]
    others = [str(row["name"]) for row in rows if not row.get("whole") and not row.get("short")]
    return ["lint", *whole, "core", "kernels", *others]


def chosen(names: list[str], rows: list[steps.Row]) -> list[Step]:
    """Return the steps of what was asked for; a KeyError for a name that is none."""
    rows = sorted(rows, key=lambda row: not row.get("whole"))
    there = {"lint": steps.lint(), "core": [steps.core(rows)], "kernels": [steps.kernels(rows, "not long")]}
    there |= {
        kind: [steps.engine(row) for row in rows if row["engine"] == kind and not row.get("short")]
        for kind in steps.engines(rows)
    }
    there |= {str(row["name"]): [steps.engine(row)] for row in rows}
    there["faults"] = [steps.faults(row) for row in rows if row.get("whole")]
    return [step for name in names for step in there[name]]


def main(arguments: list[str]) -> int:
    """Run the steps that are named, or all of `make test`; returns an exit status."""
    rows = matrix()["engines"]
    try:
        asked = chosen(arguments or everything(rows), rows)
    except KeyError as unknown:
        there = ", ".join(["lint", "core", *steps.engines(rows), "kernels", "faults"])
        print(f"no tests {unknown}; there are {there}", file=sys.stderr)
        return 2
    results = run_all(asked)
    print("\nsummary")
    for r in results:
        print(f"  {'ok    ' if r.status == 0 else 'FAILED'} {r.seconds:5.0f} s  {r.step.name:20} {r.closing}")
    bad = [r.step.name for r in results if r.status]
    print(f"FAILED: {', '.join(bad)}" if bad else f"passed: {len(results)} steps", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
