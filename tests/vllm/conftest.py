"""Session-wide runs of the engine, shared by all tests of this folder."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fse_patch import verify

from . import cases
from .engine import Case, Checkpoints, run

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"), "vllm")


@dataclass(frozen=True)
class Pair:
    """Results of both arms, by case name."""

    stock: Results
    fused: Results


class Runs:
    """Both arms of each batch, run when a test first asks for them, each arm on a core of its own."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.done: dict[str, Pair] = {}

    def pair(self, name: str, stock: list[Case], fused: list[Case], env: dict[str, str]) -> Pair:
        if name not in self.done:
            # In opposite orders: an engine inspects every new model class for ten seconds, and keeps what
            # it found for the other arm.
            arms = [([self.checkpoints.job(c) for c in batch], batch) for batch in (stock, fused[::-1])]
            with ThreadPoolExecutor() as pool:
                futures = [
                    pool.submit(run, jobs, bool(number), {"VLLM_CPU_OMP_THREADS_BIND": str(number), **env})
                    for number, (jobs, _) in enumerate(arms)
                ]
            results = (
                {c.name: r for c, r in zip(batch, future.result(), strict=True)}
                for future, (_, batch) in zip(futures, arms, strict=True)
            )
            self.done[name] = Pair(*results)
        return self.done[name]

    def report(self, case: Case, stock: dict[str, Any], fused: dict[str, Any]) -> dict[str, Any]:
        return verify.judge(self.checkpoints.job(case), stock, fused)

    @property
    def float32(self) -> Pair:
        """With the float32 shim of linear attention, and an arm that can be told to make a fault."""
        both = [*cases.FLOAT32, *cases.STOCK, *cases.DRAFTS]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(verify.ARM_MODULES, "vllm", "tests.vllm.fault_arm")
            root = str(Path(__file__).parents[2])
            path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
            fused = [*both, *cases.PERMUTED, *cases.REFUSED, *cases.FAULTY]
            return self.pair("float32", both, fused, {"PYTHONPATH": path})

    @property
    def bfloat16(self) -> Pair:
        """Without the shim: as users run it."""
        return self.pair("bfloat16", cases.BFLOAT16, cases.BFLOAT16, {"PYTHONPATH": ""})

    @property
    def tensor_parallel(self) -> Pair:
        env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return self.pair("tensor_parallel", [], cases.TENSOR_PARALLEL, env)


@pytest.fixture(scope="session")
def runs(checkpoints: Checkpoints) -> Runs:
    return Runs(checkpoints)
