"""Fused equals stock on the real engine, for every family; and the proof itself can fail."""

from __future__ import annotations

import pytest

from fse_patch import verify

from . import cases
from .conftest import Runs
from .engine import Case


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", cases.FLOAT32, ids=ids)
def test_float32(runs: Runs, case: Case) -> None:
    report = runs.report(case, runs.float32(False), runs.float32(True))
    assert report["failures"] == []
    assert report["mean_abs_logprob_diff"] <= 5e-6
    assert report["max_abs_logprob_diff"] <= 1e-4
    assert report["control_diff"] > report["tolerance"]["mean"]
    assert report["greedy_tokens_equal"]


@pytest.mark.parametrize("case", cases.BFLOAT16, ids=ids)
def test_bfloat16_without_the_float32_shim(runs: Runs, case: Case) -> None:
    report = runs.report(case, runs.bfloat16(False), runs.bfloat16(True))
    assert report["failures"] == []
    assert 0 < report["mean_abs_logprob_diff"] <= 2 * report["stock_noise"]
    assert report["control_diff"] >= 10 * report["stock_noise"]


@pytest.mark.parametrize("case", cases.DRAFTS, ids=ids)
def test_speculative_decoding_with_a_fused_draft(runs: Runs, case: Case) -> None:
    report = runs.report(case, runs.drafts(False), runs.drafts(True))
    assert report["failures"] == []
    assert [role["role"] for role in report["roles"]] == ["main", "draft"]
    draft = report["roles"][1]
    assert draft["slots_loaded"] == len(draft["fused_layers"]) == 1
    assert draft["calls_by_mode"]["fused"] > 0


@pytest.mark.parametrize("case", cases.TENSOR_PARALLEL, ids=ids)
def test_tensor_parallel(runs: Runs, case: Case) -> None:
    report = runs.report(case, runs.tensor_parallel(False), runs.tensor_parallel(True))
    assert report["failures"] == []
    assert len(set(report["worker_pids"])) == 2


@pytest.mark.parametrize("fault", cases.FAULTS)
def test_a_fault_is_caught(runs: Runs, fault: str) -> None:
    recipe, words = cases.FAULTS[fault]
    case = Case(recipe, fault=fault)
    job = runs.checkpoints.job(case)
    report = verify.judge(job, runs.float32(False)[Case(recipe).name], runs.faults()[case.name])
    assert not report["passed"]
    assert any(words in failure for failure in report["failures"]), report["failures"]


@pytest.mark.parametrize("case", cases.PERMUTED, ids=ids)
def test_weight_order_does_not_matter(runs: Runs, case: Case) -> None:
    fused = runs.float32(True)
    plain = fused[Case(case.recipe).name]
    assert fused[case.name]["logprobs"] == plain["logprobs"]
    assert fused[case.name]["workers"][0]["roles"] == plain["workers"][0]["roles"] != []


@pytest.mark.parametrize("case", cases.STOCK, ids=ids)
def test_other_models_stay_stock(runs: Runs, case: Case) -> None:
    stock, fused = runs.float32(False)[case.name], runs.float32(True)[case.name]
    assert fused["workers"][0]["roles"] == []
    assert fused["logprobs"] == stock["logprobs"]
    assert fused["greedy"] == stock["greedy"]


def test_a_refused_checkpoint_is_bit_identical_to_stock(runs: Runs, tmp_path) -> None:
    policy = tmp_path / "policy.yaml"
    rule = "{id: none-here, when: {}, fuse: false, reason: disabled, why: test, source: 'none: test'}"
    policy.write_text(f"version: 1\nrules:\n  - {rule}\n")
    batch = [Case("qwen2_moe"), Case("glm4_moe_scale")]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "FSE_PATCH_POLICY": str(policy)}
    refused = runs.batch("refused", batch, True, env)
    for case in batch:
        assert refused[case.name]["workers"][0]["roles"] == []
        assert refused[case.name]["logprobs"] == runs.float32(False)[case.name]["logprobs"]
        # The control: fused and stock are not bit-identical, so the comparison could have failed.
        assert runs.float32(True)[case.name]["logprobs"] != runs.float32(False)[case.name]["logprobs"]
