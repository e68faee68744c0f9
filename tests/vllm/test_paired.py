"""Paired layers in the real vLLM: right for every family, stock above the threshold, faults are caught."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fse_patch.lab import verify

from ..pair_faults import UNPROVED
from ..paired import (
    ALL,
    FAULTS,
    FEW,
    PairedRuns,
    check_all_tokens,
    check_caught,
    check_few_tokens,
    environment,
    role_of,
)
from ..running import ROOT, asked, parameters
from .conftest import Runs
from .engine import SPECULATIVE, TEXT_OF_VL, Case

FAMILIES = [
    Case("qwen2_moe_wide4"),
    Case("qwen3_next"),
    Case("qwen3_5_text"),
    Case("glm4_moe_scale"),
    Case("qwen3_5_vl_3d", engine_args=TEXT_OF_VL),
    Case("glm4_moe_shared2_scale"),
    Case("glm4_moe_grouped"),
]
LONG = {"qwen3_5_text", "qwen3_5_vl_3d", "glm4_moe_grouped"}
FEW_FAMILIES = [case for case in FAMILIES if case.recipe in ("qwen3_next", "glm4_moe_scale")]
OTHER_FAMILIES = [case for case in FAMILIES if case not in FEW_FAMILIES]
# vLLM serves routed + shared / scale in this dtype, and so do we.
HALF = [Case("glm4_moe_scale", "float16"), Case("qwen2_moe", "bfloat16")]
DRAFTS = [Case("qwen3_next_mtp", engine_args=SPECULATIVE)]
FAULTY = [Case("qwen3_next", fault=name) for name in FAULTS]
SHOWN = [Case("qwen3_next", fault=UNPROVED + name) for name in FAULTS]
STOCK = [*FAMILIES, *HALF, *DRAFTS]
# Compared with one process: a shard in the wrong place shows too. Expert parallelism ends vLLM itself on
# a CPU: its experts there read experts that they do not have.
TWO = {"tensor_parallel_size": 2}
PARALLEL = [Case(recipe, engine_args=TWO) for recipe in ("qwen2_moe_wide4", "glm4_moe_shared2_scale")]


@pytest.fixture(scope="module")
def paired(runs: Runs, request: pytest.FixtureRequest) -> Iterator[PairedRuns]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", "tests.vllm.fault_arm")
        shim = ROOT / "tests" / "shims" / "gdn_float32"
        yield PairedRuns(runs, asked(request), {"PYTHONPATH": f"{ROOT}:{shim}"})


def report(paired: PairedRuns, case: Case, cases: list[Case], threshold: int) -> tuple[Any, Any, Any]:
    stock = paired.results(STOCK, threshold, fused=False)[case.plain.name if case.fault else case.name]
    ours = paired.results(cases, threshold)[case.name]
    return paired.runs.report(case, stock, ours), stock, ours


@pytest.mark.parametrize("case", parameters(FAMILIES, {"qwen3_next", "glm4_moe_scale"}, LONG))
def test_all_tokens(paired: PairedRuns, case: Case) -> None:
    check_all_tokens(report(paired, case, FAMILIES, ALL)[0])


@pytest.mark.parametrize("case", parameters(FEW_FAMILIES))
def test_few_tokens(paired: PairedRuns, case: Case) -> None:
    check_few_tokens(*report(paired, case, FEW_FAMILIES, FEW))


@pytest.mark.long
@pytest.mark.parametrize("case", parameters(OTHER_FAMILIES))
def test_few_tokens_of_other_families(paired: PairedRuns, case: Case) -> None:
    check_few_tokens(*report(paired, case, OTHER_FAMILIES, FEW))


@pytest.mark.parametrize("case", parameters(HALF, (), {"qwen2_moe"}))
def test_16_bit(paired: PairedRuns, case: Case) -> None:
    found, _, ours = report(paired, case, HALF, ALL)
    assert found["failures"] == []
    paired_as = role_of(ours)["paired"]
    assert paired_as["reason"] == ""
    # Above 1, vLLM's own answers are not the checkpoint's in this dtype.
    said = "stock is off" if case.recipe == "glm4_moe_scale" else "passed"
    assert paired_as["proof"]["canary"].startswith(said)


@pytest.mark.long
@pytest.mark.parametrize("case", parameters(DRAFTS))
def test_a_draft_is_proved_by_itself(paired: PairedRuns, case: Case) -> None:
    # A step checks a drafted token beside the next one of each prompt.
    found, _, ours = report(paired, case, DRAFTS, 2 * FEW)
    assert found["failures"] == []
    assert role_of(ours, "draft")["calls_by_mode"]["paired"] > 0


@pytest.mark.long
@pytest.mark.parametrize("case", parameters(PARALLEL))
def test_two_processes(paired: PairedRuns, case: Case) -> None:
    stock = paired.results(STOCK, ALL, fused=False)[case.name]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    (ours,) = paired.runs.arm([case], True, paired.env | environment(ALL) | env).values()
    found = paired.runs.report(case, stock, ours)
    assert found["failures"] == []
    assert len(ours["workers"]) == 2
    for worker in ours["workers"]:
        (role,) = worker["roles"]
        assert (role["paired"]["threshold"], role["paired"]["proof"]["state"]) == (ALL, "passed")


@pytest.mark.parametrize("case", parameters(FAULTY))
def test_a_fault_is_caught_and_stock_serves(paired: PairedRuns, case: Case) -> None:
    check_caught(*report(paired, case, FAULTY, FEW)[1:])


@pytest.mark.parametrize("case", parameters(SHOWN))
def test_without_a_proof_the_fault_would_be_served(paired: PairedRuns, case: Case) -> None:
    """The control of the test above."""
    found, _, ours = report(paired, case, SHOWN, FEW)
    assert role_of(ours)["paired"]["proof"]["state"] == "off"
    assert any("of answers" in failure for failure in found["failures"])
