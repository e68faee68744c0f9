"""Session-wide runs of the engine, shared by all tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fse_patch import verify

from . import cases
from .engine import IN_PROCESS, Case, Checkpoints, run

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


class Runs:
    """Results of both arms by case name; each batch runs when a test first asks for it."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.done: dict[tuple[str, bool], Results] = {}

    def batch(self, name: str, batch: list[Case], fused: bool, env: dict[str, str] | None = None) -> Results:
        if (name, fused) not in self.done:
            results = run([self.checkpoints.job(c) for c in batch], fused, env)
            self.done[name, fused] = {c.name: r for c, r in zip(batch, results, strict=True)}
        return self.done[name, fused]

    def report(self, case: Case, stock: Results, fused: Results) -> dict[str, Any]:
        return verify.judge(self.checkpoints.job(case), stock[case.name], fused[case.name])

    def float32(self, fused: bool) -> Results:
        alone = cases.PERMUTED if fused else []
        return self.batch("float32", [*cases.FLOAT32, *cases.STOCK, *alone], fused)

    def bfloat16(self, fused: bool) -> Results:
        # Without the float32 shim of the linear attention: as users run it.
        return self.batch("bfloat16", cases.BFLOAT16, fused, {**IN_PROCESS, "PYTHONPATH": ""})

    def drafts(self, fused: bool) -> Results:
        return self.batch("drafts", cases.DRAFTS, fused)

    def tensor_parallel(self, fused: bool) -> Results:
        env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return self.batch("tensor_parallel", cases.TENSOR_PARALLEL, fused, env)

    def faults(self) -> Results:
        faulty = [Case(recipe, fault=fault) for fault, (recipe, _) in cases.FAULTS.items()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(verify.ARM_MODULES, "vllm", "tests.vllm.fault_arm")
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
            return self.batch("faults", faulty, True)


@pytest.fixture(scope="session")
def runs(checkpoints: Checkpoints) -> Runs:
    return Runs(checkpoints)
