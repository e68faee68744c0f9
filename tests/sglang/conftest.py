"""Session-wide runs of the engine, shared by all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from fse_patch.lab import verify

from .. import running
from ..running import ROOT, Checkpoints, Pair, asked
from . import cases

ARM_TIMEOUT = 1800.0


def run(jobs: list[verify.VerifyJob], fused: bool, env: dict[str, str]) -> list[dict[str, Any]]:
    """One arm over the jobs."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return verify.run_arm("sglang", jobs, fused, {**os.environ, "PYTHONPATH": path, **env}, ARM_TIMEOUT)


class Runs(running.Runs):
    """What the tests of this folder run."""

    @property
    def float32(self) -> Pair:
        """With an arm that can be told to make a fault."""
        both = [*cases.FLOAT32, *cases.REPLACED, *cases.STOCK]
        stock = {case.name: case for case in [*both, *cases.REPORTS.stock_cases(), *cases.LAID_OUT]}
        fused = [
            *both,
            *cases.BFLOAT16,
            *cases.PERMUTED,
            *cases.FAULTY,
            *cases.REPORTS.fused_cases(),
            *cases.LAID_OUT,
        ]
        return self.pair("float32", list(stock.values()), fused, {})

    @property
    def tensor_parallel(self) -> Pair:
        env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
        return self.pair("tensor_parallel", [], cases.TENSOR_PARALLEL, env)


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", "tests.sglang.arm")
        yield Runs(Checkpoints(tmp_path_factory.mktemp("checkpoints"), "sglang"), run, asked(request))
