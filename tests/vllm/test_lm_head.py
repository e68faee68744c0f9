"""The LM head in 8 bits in the real vLLM: right, proved, refused where it costs too much; faults show."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fse_patch.lab import verify

from ..head_faults import HEAD_FAULTS
from ..lm_head import (
    ENVIRONMENT,
    FAULTS,
    FEW,
    HeadRuns,
    check_each_has_its_rows,
    check_refused,
    check_right,
    check_seen_by_verify,
)
from ..running import ROOT
from .conftest import Runs
from .engine import IN_PROCESS, SPECULATIVE, Case
from .processes import in_process

# The draft has the main model's head.
CASES = [
    Case("qwen2_moe"),
    Case("qwen2_moe_wide4", "bfloat16"),
    Case("glm4_moe_mtp", engine_args=SPECULATIVE),
]
SHARDED = Case("qwen2_moe", engine_args={"tensor_parallel_size": 2})
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.fixture(scope="module")
def heads(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> HeadRuns:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", "tests.vllm.fault_arm")
        shim = ROOT / "tests" / "shims" / "gdn_float32"
        found = HeadRuns(
            runs, tmp_path_factory.mktemp("heads"), CASES, {"PYTHONPATH": f"{ROOT}:{shim}"}, True
        )
        for ours in (False, True):
            found.arm(ours)
    return found


@pytest.mark.parametrize("name", [*(case.name for case in CASES), "tied"])
def test_few_tokens_run_from_the_copy(heads: HeadRuns, name: str) -> None:
    check_right(*heads.results(name))


def test_a_draft_runs_from_the_same_copy(heads: HeadRuns) -> None:
    ours = heads.results(CASES[2].name)[2]
    (held,) = ours["head_workers"][0]["lm_heads"]
    plain = heads.results(CASES[0].name)[2]["head_workers"][0]["lm_heads"][0]
    # One copy, and a call of the draft's for each step beside those of the main model.
    assert held["calls"]["int8:g32"] > plain["calls"]["int8:g32"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(heads: HeadRuns, fault: str) -> None:
    report, stock, ours = heads.results(fault)
    check_refused(report, ours, "head.proof")
    assert ours["greedy"] == stock["greedy"]


def test_a_head_that_loses_too_much_is_refused(heads: HeadRuns) -> None:
    report, _, ours = heads.results("head_limit_lower")
    check_refused(report, ours, "head.inaccurate")


def test_without_proof_and_limit_verify_sees_it(heads: HeadRuns) -> None:
    check_seen_by_verify(heads.results("head_rows_rolled")[0])


@pytest.mark.long
def test_each_process_has_its_rows(runs: Runs, heads: HeadRuns) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", "tests.vllm.fault_arm")
        report, ours = heads.sharded(SHARDED, TWO)
    assert report["failures"] == []
    check_each_has_its_rows(heads.results(CASES[0].name)[0]["lm_head"], ours)


def probe(folder: str, new: str, fault: str) -> list[Any]:
    """Up to how many tokens the copy runs, and what is wrong with it: at first, and after an update."""
    from .test_update import Engine

    def held(_: Any) -> list[Any]:
        from fse_patch.adapters.head import constructed

        found = [(own.limit, own.fault(FEW)) for own in constructed()]
        return [(limit, fault.code if fault else "") for limit, fault in found]

    with HEAD_FAULTS[fault]() if fault else nullcontext():
        engine = Engine(Path(folder))
        before = engine.llm.collective_rpc(held)
        assert engine.update_from(Path(new)) == ""
        return [*before, *engine.llm.collective_rpc(held)]


@pytest.mark.long
@pytest.mark.one_release
@pytest.mark.parametrize("fault", ["", "head_deaf"])
def test_an_update_reaches_the_copy(runs: Runs, fault: str) -> None:
    folders = [str(runs.checkpoints.path("qwen2_moe", seed=seed)) for seed in (0, 1)]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'ci'}", "FSE_PATCH": "vllm", **ENVIRONMENT, **IN_PROCESS}
    found = in_process(f"{__name__}:probe", *folders, fault, **env)
    assert found == [[[FEW, ""]], [[FEW, "head.proof" if fault else ""]]]
