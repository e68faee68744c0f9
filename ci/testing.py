"""Runs the checks and tests in the environments of ci/matrix.yaml, engine after engine, two releases at once.

    python3 ci/testing.py [lint] [core] [kernels] [vllm] ...      default: all of them
    python3 ci/testing.py faults                        every planted fault: the long part, in no default

Every step has a time limit and runs in a process group of its own, so that an engine that hangs is ended with
all its children. Its output is in .cache/logs; the end of it is shown when the step fails. The last lines are
a summary.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from environment import ROOT, VENVS, say
from envs import matrix

LOGS = ROOT / ".cache" / "logs"
CORE = VENVS / "core" / "bin"
HEARTBEAT = 30
# Releases of an engine tested side by side: most of their tests wait for a core, a process takes 1 to 2 GiB.
AT_ONCE = 2


@dataclass
class Step:
    """One process to run: its name, command, time limit in seconds and extra environment."""

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    engine: str = ""


@dataclass
class Result:
    step: Step
    seconds: float
    status: int
    closing: str


def lint() -> list[Step]:
    python, ruff = str(CORE / "python"), str(CORE / "ruff")
    staged = [python, "ci/staged.py"]
    cache = str(ROOT / ".cache" / "mypy")
    return [
        Step("ruff check", [ruff, "check", "."], 60),
        Step("ruff format", [ruff, "format", "--check", "."], 60),
        Step(
            "mypy",
            [*staged, "mypy", "--config-file", "pyproject.toml", "--cache-dir", cache, "-p", "fse_patch"],
            600,
        ),
        Step("lint-imports", [*staged, "lint-imports", "--config", "pyproject.toml", "--no-cache"], 60),
    ]


def core(engines: list[str]) -> list[Step]:
    """Every test folder that is not an engine's; the ledgers are compared with every engine that is built."""
    leave = [f"--ignore=tests/{e}" for e in (*engines, "kernels")]
    sites = sorted(map(str, VENVS.glob("*/lib/python3*/site-packages")))
    return [
        Step(
            "core tests",
            [str(CORE / "python"), "-m", "pytest", "tests", *leave],
            1800,
            {"ENGINE_SITES": os.pathsep.join(sites)},
        )
    ]


def kernels(rows: list[dict[str, object]]) -> list[Step]:
    """Triton kernels in its interpreter, in the environment that has one for them."""
    row = next(row for row in rows if row.get("kernels"))
    python = str(VENVS / str(row["name"]) / "bin" / "python")
    return [Step("kernel tests", [python, "-m", "pytest", "tests/kernels"], 900, {"TRITON_INTERPRET": "1"})]


def engine(row: dict[str, object]) -> Step:
    """The tests of one engine release, in its own environment."""
    name, kind = str(row["name"]), str(row["engine"])
    environment = {
        # Linear attention in float32; bfloat16 runs do not notice it. See docs/development.md.
        "PYTHONPATH": str(ROOT / "tests" / "shims" / "gdn_float32") if kind == "vllm" else "",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Kept between runs: without it every model class is inspected anew, 10 seconds each.
        "VLLM_CACHE_ROOT": str(ROOT / ".cache" / name),
    }
    command = [str(VENVS / name / "bin" / "python"), "-m", "pytest", f"tests/{kind}"]
    # A neighbour of a release that is tested in whole.
    command += ["-m", "not one_release"] if "base" in row else []
    return Step(f"{name} tests", command, 2700, environment, kind)


def faults(row: dict[str, object]) -> Step:
    """All planted faults, and all clean models, in one release."""
    step = engine(row)
    command = [*step.command[:-1], f"tests/{step.engine}/test_faults.py"]
    return Step(f"{row['name']} faults", command, 1200, {**step.environment, "FAULTS": "all"})


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
                env=os.environ | step.environment,
                start_new_session=True,
            )
        except FileNotFoundError:
            return Result(step, 0.0, 127, f"{step.command[0]} is not there: make envs")
        status = wait(process, step, log, begun)
    seconds = time.monotonic() - begun
    closing = last_line(log)
    if status == 124:
        closing = f"ended after its limit of {step.limit} s"
    if status:
        tail = log.read_text(errors="replace").splitlines()[-80:]
        print("\n".join(f"    | {line}" for line in tail), flush=True)
    say(f"{step.name}: {'ok' if status == 0 else f'FAILED ({status})'} in {seconds:.0f} s: {closing}\n")
    return Result(step, seconds, status, closing)


def wait(process: subprocess.Popen[bytes], step: Step, log: Path, begun: float) -> int:
    """Status of the process; 124 if it had to be ended."""
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


def main() -> int:
    rows = matrix()["engines"]
    kinds = list(dict.fromkeys(str(r["engine"]) for r in rows))
    wanted = sys.argv[1:] or ["lint", "core", "kernels", *kinds]
    steps: list[Step] = []
    for name in wanted:
        if name == "lint":
            steps += lint()
        elif name == "core":
            steps += core(kinds)
        elif name == "kernels":
            steps += kernels(rows)
        elif name in kinds:
            steps += [engine(r) for r in rows if r["engine"] == name]
        elif name == "faults":
            steps += [faults(r) for r in rows if r.get("demo")]
        else:
            print(
                f"no tests {name!r}; there are lint, core, kernels, {', '.join(kinds)}, faults",
                file=sys.stderr,
            )
            return 2
    results: list[Result] = []
    for kind, group in groupby(steps, lambda step: step.engine):
        with ThreadPoolExecutor(AT_ONCE if kind else 1) as pool:
            results += pool.map(run, group)
    print("\nsummary")
    for r in results:
        print(f"  {'ok    ' if r.status == 0 else 'FAILED'} {r.seconds:5.0f} s  {r.step.name:20} {r.closing}")
    bad = [r.step.name for r in results if r.status]
    print(f"FAILED: {', '.join(bad)}" if bad else f"passed: {len(results)} steps", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
