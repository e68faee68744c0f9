"""Session-wide runs of the engine, shared by all tests of this folder."""

from __future__ import annotations

import os
from typing import Any

import pytest

from fse_patch.lab import verify

from .. import running
from ..running import ROOT, Checkpoints, Pair, asked
from . import cases
from .engine import run


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"), "vllm")


def on_its_core(jobs: list[verify.VerifyJob], fused: bool, env: dict[str, str]) -> list[dict[str, Any]]:
    """Each arm on a core of its own."""
    return run(jobs, fused, {"VLLM_CPU_OMP_THREADS_BIND": str(int(fused)), **env})


class Runs(running.Runs):
    """What the tests of this folder run."""

    @property
    def float32(self) -> Pair:
        """With the float32 shim of linear attention, and an arm that can be told to make a fault."""
        both = [*cases.FLOAT32, *cases.STOCK, *cases.DRAFTS, *cases.ANSWERS, cases.STOCK_IS_WRONG[0]]
        stock = {case.name: case for case in [*both, *cases.REPORTS.stock_cases(), *cases.LAID_OUT]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "ARM", "tests.vllm.fault_arm")
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            fused = [*both, *cases.PERMUTED, *cases.REFUSED, *cases.FAULTY, *cases.FAULTY_ANSWERS]
            fused += [*cases.REPORTS.fused_cases(), *cases.LAID_OUT]
            return self.pair("float32", list(stock.values()), fused, {"PYTHONPATH": path})

    @property
    def bfloat16(self) -> Pair:
        """Without the shim: as users run it."""
        return self.pair("bfloat16", cases.BFLOAT16, cases.BFLOAT16, {"PYTHONPATH": ""})

    @property
    def tensor_parallel(self) -> Pair:
        env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return self.pair("tensor_parallel", [], cases.TENSOR_PARALLEL, env)


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Runs:
    return Runs(checkpoints, on_its_core, asked(request))
