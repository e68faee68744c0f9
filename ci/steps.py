"""What there is to run, in the environments of ci/matrix.yaml: the checks, and the tests of each environment.

`make test` runs all tests but those marked `long` on one release of each engine, which has ``whole`` in the
matrix; on the other releases, of these, the tests marked `every_release`. `make test-all` runs all tests on
all releases, but for those marked `one_release` where a release stands on the packages of another. What is
``short`` in the matrix is in `make test-all` alone: a model of each block is built, loaded and verified.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from environment import ROOT, VENVS

CORE = VENVS / "core" / "bin"
Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One process to run: its name, command, time limit in seconds and extra environment.

    One that runs ``alone`` has files that others would write too.
    """

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = False


def engines(rows: list[Row]) -> list[str]:
    """Return the engines of the matrix, each once."""
    return list(dict.fromkeys(str(row["engine"]) for row in rows))


def lint() -> list[Step]:
    """Check style, types and the import contracts."""
    python, ruff = str(CORE / "python"), str(CORE / "ruff")
    staged = [python, "ci/staged.py"]
    cache = str(ROOT / ".cache" / "mypy")
    commands = {
        "ruff check": [ruff, "check", "."],
        "ruff format": [ruff, "format", "--check", "."],
        "mypy": [*staged, "mypy", "--config-file", "pyproject.toml", "--cache-dir", cache, "-p", "fse_patch"],
        "lint-imports": [*staged, "lint-imports", "--config", "pyproject.toml", "--no-cache"],
    }
    return [Step(name, command, 600, alone=True) for name, command in commands.items()]


def core(rows: list[Row]) -> Step:
    """Test every folder that is not an engine's; the ledgers are compared with every engine that is built."""
    leave = [f"--ignore=tests/{name}" for name in (*engines(rows), "kernels")]
    sites = sorted(map(str, VENVS.glob("*/lib/python3*/site-packages")))
    command = [str(CORE / "python"), "-m", "pytest", "tests", *leave]
    return Step("core tests", command, 1800, {"ENGINE_SITES": os.pathsep.join(sites)})


def kernels(rows: list[Row], marks: str = "") -> Step:
    """Test Triton kernels in its interpreter, in the environment for that; ``marks`` as of `of_engine`."""
    row = next(row for row in rows if row.get("kernels"))
    command = [str(VENVS / str(row["name"]) / "bin" / "python"), "-m", "pytest", "tests/kernels"]
    return Step("kernel tests", command + (["-m", marks] if marks else []), 1800, {"TRITON_INTERPRET": "1"})


def mutants() -> Step:
    """Change the core in 200 small ways, and count what the core tests notice."""
    return Step("mutants", [str(CORE / "python"), "ci/mutants.py", "--sample", "200"], 5400)


def of_engine(row: Row, name: str, tests: Sequence[str], marks: str, limit: int = 3600) -> Step:
    """Test one engine release, in its own environment; ``marks`` as pytest's ``-m``, empty for all."""
    environment = {
        # Linear attention in float32; bfloat16 runs do not notice it. See docs/development.md.
        "PYTHONPATH": str(ROOT / "tests" / "shims" / "gdn_float32") if row["engine"] == "vllm" else "",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Kept between runs: without it every model class is inspected anew, 10 seconds each.
        "VLLM_CACHE_ROOT": str(ROOT / ".cache" / str(row["name"])),
    }
    command = [str(VENVS / str(row["name"]) / "bin" / "python"), "-m", "pytest", *tests]
    return Step(f"{row['name']} {name}", command + (["-m", marks] if marks else []), limit, environment)


def engine(row: Row) -> Step:
    """Run what `make test` runs on a release."""
    marks = "not long" if row.get("whole") else "every_release and not long"
    return of_engine(row, "tests", [f"tests/{row['engine']}"], marks)


def short(row: Row) -> Step:
    """Build, load and verify a model of each block in a release, and a fault."""
    return of_engine(row, "short", [f"tests/{row['engine']}/test_verify.py"], "every_release and not long")


def faults(row: Row) -> Step:
    """Run all planted faults, and all clean models, in one release."""
    return of_engine(row, "faults", [f"tests/{row['engine']}/test_faults.py"], "", 1200)
