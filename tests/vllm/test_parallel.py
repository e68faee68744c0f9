"""Pipeline stages with both layouts, and whole experts spread over processes, in the real vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from fse_patch.lab import verify

from ..paired import LAYOUTS
from ..parallel import LONG, RECIPES, check_paired_spread, check_right, check_spread, check_stages
from ..running import ROOT, Results, parameters
from .cases import NEWEST
from .conftest import Runs
from .engine import Case

TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
STAGES = [Case(recipe, engine_args={"pipeline_parallel_size": 2}) for recipe in RECIPES]
SHIM = str(ROOT / "tests" / "shims" / "cpu_experts")
EXPERTS = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
SPREAD = [Case(recipe, engine_args=EXPERTS) for recipe in RECIPES]


# In earlier releases the experts of a CPU route by themselves, and no stand-in can come between.
ROUTED = pytest.mark.skipif(not NEWEST, reason="experts of a CPU route by themselves")


@pytest.fixture(scope="module")
def stock() -> Results:
    """Stock in one process, by case: a stage, or an expert, in the wrong place shows too."""
    return {}


def both(
    runs: Runs, case: Case, stock: Results, arm: str, path: str = "", layout: str = "merged"
) -> tuple[Any, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", arm)
        if case.name not in stock:
            stock |= runs.arm([case.plain], False, {"PYTHONPATH": str(ROOT)})
        (ours,) = runs.arm([case], True, {"PYTHONPATH": f"{ROOT}:{path}", **TWO, **LAYOUTS[layout]}).values()
    assert "error" not in ours, f"{ours['error']}\n{ours['log']}"
    return stock[case.name], ours


@pytest.mark.parametrize("case", parameters(STAGES, (), LONG))
@pytest.mark.parametrize("layout", ["merged", pytest.param("paired", marks=pytest.mark.long)])
def test_two_stages(runs: Runs, stock: Results, case: Case, layout: str) -> None:
    plain, ours = both(runs, case, stock, "tests.vllm.fault_arm", layout=layout)
    check_right(runs.report(case, plain, ours))
    (decision,) = runs.checkpoints.job(case).decisions
    check_stages(decision, ours, layout)


@ROUTED
@pytest.mark.parametrize("case", parameters(SPREAD, (), LONG))
def test_whole_experts_over_two_processes(runs: Runs, stock: Results, case: Case) -> None:
    plain, ours = both(runs, case, stock, "tests.vllm.spread_arm", SHIM)
    check_right(runs.report(case, plain, ours))
    check_spread(plain, ours)


@ROUTED
@pytest.mark.long
@pytest.mark.parametrize("case", parameters(SPREAD))
def test_whole_experts_beside_a_shared_one_in_parts(runs: Runs, stock: Results, case: Case) -> None:
    """Paired: each process runs the experts that it has, and its part of the shared one."""
    plain, ours = both(runs, case, stock, "tests.vllm.fault_arm", SHIM, "paired")
    check_paired_spread(runs.report(case, plain, ours), ours)
