"""Fused equals stock on the real engine, for every family; and the proof itself can fail."""

from __future__ import annotations

import pytest

from fse_patch.lab import verify

from ..running import Case, parameters, timeless
from . import cases
from .conftest import Runs

MODELS = parameters([*cases.FLOAT32, *cases.REPLACED], cases.EACH, cases.LONG)


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", MODELS)
def test_float32(runs: Runs, case: Case) -> None:
    report = runs.report(case, runs.float32.stock[case.name], runs.float32.fused[case.name])
    assert report["failures"] == [], report.get("log")
    assert report["mean_abs_logprob_diff"] <= 5e-6
    assert report["max_abs_logprob_diff"] <= 1e-4
    assert report["control_diff"] > report["tolerance"]["mean"]
    assert report["greedy_tokens_equal"]
    assert report["answer_tokens"] > 0
    # Stand-ins for kernels ran where they had to, and nowhere else.
    assert bool(report["replaced_operations"]) == (case in cases.REPLACED)


@pytest.mark.parametrize("case", MODELS)
def test_the_patches_fired_in_the_scheduler(runs: Runs, case: Case) -> None:
    fused = runs.float32.fused[case.name]
    assert fused["workers"][0]["roles"]
    assert fused["workers"][0]["pid"] != fused["arm_pid"]


@pytest.mark.parametrize("case", cases.TENSOR_PARALLEL, ids=ids)
def test_tensor_parallel(runs: Runs, case: Case) -> None:
    report = runs.report(case, runs.float32.stock[case.name], runs.tensor_parallel.fused[case.name])
    assert report["failures"] == [], report.get("log")
    assert len(set(report["worker_pids"])) == 2


@pytest.mark.parametrize("case", parameters(cases.FAULTY, cases.EACH_FAULT, cases.LONG))
def test_a_fault_is_caught(runs: Runs, case: Case) -> None:
    words = cases.FAULTS[case.fault or ""][1]
    job = runs.checkpoints.job(case)
    report = verify.judge(job, runs.float32.stock[case.plain.name], runs.float32.fused[case.name])
    assert not report["passed"]
    # A model that is not served takes the server with it: then its log has the words, and they are the cause.
    assert any(words in failure for failure in report["failures"]), report


@pytest.mark.parametrize("case", parameters(cases.PERMUTED, long=cases.LONG))
def test_weight_order_does_not_matter(runs: Runs, case: Case) -> None:
    fused = runs.float32.fused
    plain = fused[Case(case.recipe).name]
    assert fused[case.name]["logprobs"] == plain["logprobs"]
    assert timeless(fused[case.name]) == timeless(plain) != []


@pytest.mark.parametrize("case", cases.STOCK, ids=ids)
def test_other_models_stay_stock(runs: Runs, case: Case) -> None:
    stock, fused = runs.float32.stock[case.name], runs.float32.fused[case.name]
    assert fused["workers"][0]["roles"] == []
    assert fused["logprobs"] == stock["logprobs"]
    assert fused["greedy"] == stock["greedy"]
