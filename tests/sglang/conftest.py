"""Session-wide runs of the engine, shared by all tests of this folder."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fse_patch import verify

from ..running import Case, Checkpoints
from . import cases

Results = dict[str, dict[str, Any]]
ARM_TIMEOUT = 1800.0
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Pair:
    """Results of both arms, by case name."""

    stock: Results
    fused: Results


class Runs:
    """Both arms of each batch, run side by side when a test first asks for them."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.done: dict[str, Pair] = {}

    def pair(self, name: str, stock: list[Case], fused: list[Case], env: dict[str, str]) -> Pair:
        if name not in self.done:
            batches = [(stock, [self.checkpoints.job(c) for c in stock], False)]
            batches.append((fused, [self.checkpoints.job(c) for c in fused], True))
            with ThreadPoolExecutor() as pool:
                futures = [
                    pool.submit(verify.run_arm, "sglang", jobs, on, {**os.environ, **env}, ARM_TIMEOUT)
                    for _, jobs, on in batches
                ]
            results = (
                {case.name: result for case, result in zip(batch, future.result(), strict=True)}
                for future, (batch, _, _) in zip(futures, batches, strict=True)
            )
            self.done[name] = Pair(*results)
        return self.done[name]

    def report(self, case: Case, stock: dict[str, Any], fused: dict[str, Any]) -> dict[str, Any]:
        return verify.judge(self.checkpoints.job(case), stock, fused)

    @property
    def float32(self) -> Pair:
        """With an arm that can be told to make a fault."""
        both = [*cases.FLOAT32, *cases.REPLACED, *cases.STOCK]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(verify.ARM_MODULES, "sglang", "tests.sglang.fault_arm")
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            fused = [*both, *cases.PERMUTED, *cases.FAULTY]
            return self.pair("float32", both, fused, {"PYTHONPATH": path})

    @property
    def tensor_parallel(self) -> Pair:
        env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
        return self.pair("tensor_parallel", [], cases.TENSOR_PARALLEL, env)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(Checkpoints(tmp_path_factory.mktemp("checkpoints"), "sglang"))
