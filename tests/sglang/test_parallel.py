"""Pipeline stages with both layouts, and whole experts spread over processes, in the real SGLang."""

from __future__ import annotations

from typing import Any

import pytest

from fse_patch.lab import verify

from ..paired import LAYOUTS
from ..parallel import LONG, RECIPES, check_paired_spread, check_right, check_spread, check_stages
from ..running import Case, Results, parameters
from .conftest import Runs

TWO = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
# SGLang's own path on a CPU counts what its map leaves out; the stand-in of the kernel package does not.
LEAVE_OUT = {"FSE_PATCH_TEST_LEAVE_OUT": "1"}
STAGES = [Case(recipe, engine_args={"pp_size": 2}) for recipe in RECIPES]
# Of its three layers the first is dense, and all that SGLang would give to the first stage.
SPLIT = {"glm4_moe_shared2_scale": {"SGLANG_PP_LAYER_PARTITION": "2,1"}}
SPREAD = [Case(recipe, engine_args={"tp_size": 2, "ep_size": 2}) for recipe in RECIPES]


@pytest.fixture(scope="module")
def stock() -> Results:
    """Stock in one process, by case: a stage, or an expert, in the wrong place shows too."""
    return {}


def both(runs: Runs, case: Case, stock: Results, arm: str, env: dict[str, str] = TWO) -> tuple[Any, Any]:
    if case.name not in stock:
        stock |= runs.arm([case.plain], False, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", arm)
        (ours,) = runs.arm([case], True, env).values()
    assert "error" not in ours, f"{ours['error']}\n{ours['log']}"
    return stock[case.name], ours


@pytest.mark.parametrize("case", parameters(STAGES, (), LONG))
@pytest.mark.parametrize("layout", ["merged", pytest.param("paired", marks=pytest.mark.long)])
def test_two_stages(runs: Runs, stock: Results, case: Case, layout: str) -> None:
    env = TWO | SPLIT.get(case.recipe, {}) | LAYOUTS[layout]
    plain, ours = both(runs, case, stock, "tests.sglang.arm", env)
    check_right(runs.report(case, plain, ours))
    (decision,) = runs.checkpoints.job(case).decisions
    check_stages(decision, ours, layout)


@pytest.mark.parametrize("case", parameters(SPREAD, (), LONG))
def test_whole_experts_over_two_processes(runs: Runs, stock: Results, case: Case) -> None:
    plain, ours = both(runs, case, stock, "tests.sglang.spread_arm", TWO | LEAVE_OUT)
    report = runs.report(case, plain, ours)
    check_right(report)
    assert report["replaced_operations"] == ["moe_forward_native"]
    check_spread(plain, ours)


@pytest.mark.long
@pytest.mark.parametrize("case", parameters(SPREAD))
def test_whole_experts_beside_a_shared_one_in_parts(runs: Runs, stock: Results, case: Case) -> None:
    """Paired: each process runs the experts that it has, and its part of the shared one."""
    plain, ours = both(runs, case, stock, "tests.sglang.arm", TWO | LEAVE_OUT | LAYOUTS["paired"])
    check_paired_spread(runs.report(case, plain, ours), ours)
