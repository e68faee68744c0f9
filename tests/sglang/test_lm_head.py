"""The LM head in 8 bits in the real SGLang: right, proved, refused where it costs too much; faults show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
from ..running import Case
from .conftest import Runs

# None is tied: SGLang builds a head for these models whatever config.json says.
CASES = [Case("qwen2_moe"), Case("qwen2_moe_wide4"), Case("glm4_moe_scale", "bfloat16")]
# Of the sizes that two processes can share.
SHARDED = Case("qwen2_moe_wide4", engine_args={"tp_size": 2})
TWO = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def heads(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> HeadRuns:
    return HeadRuns(runs, tmp_path_factory.mktemp("heads"), CASES, {}, False)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_few_tokens_run_from_the_copy(heads: HeadRuns, name: str) -> None:
    check_right(*heads.results(name))


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
def test_each_process_has_its_rows(heads: HeadRuns) -> None:
    report, ours = heads.sharded(SHARDED, TWO)
    assert report["failures"] == []
    check_each_has_its_rows(heads.results(SHARDED.plain.name)[0]["lm_head"], ours)


def updates(new: Path, old: Path) -> list[Any]:
    part = {"folder": str(old), "names": "^lm_head"}
    return [
        ("heads", {}),
        ("from_disk", {"folder": str(new)}),
        ("heads", {}),
        ("from_tensors", part),
        ("heads", {}),
        # Written as it is, by no loader.
        ("from_tensors", {**part, "folder": str(new), "load_format": "direct"}),
        ("heads", {}),
    ]


@pytest.mark.long
@pytest.mark.parametrize("fault", [None, "head_deaf"])
def test_updates_reach_the_copy(runs: Runs, fault: str | None) -> None:
    plan = {"steps": updates(runs.checkpoints.path("qwen2_moe", seed=1), runs.checkpoints.path("qwen2_moe"))}
    case = Case("qwen2_moe", engine_args=plan, fault=fault)
    (result,) = runs.arm([case], True, ENVIRONMENT).values()
    assert "steps" in result, f"{result['error']}\n{result['log']}"
    found = result["steps"][::2]
    assert found[0] == [[FEW, ""]]
    # The second update puts back what a deaf copy still has.
    stale = "" if fault is None else "head.proof"
    assert found[1:] == [[[FEW, stale]], [[FEW, ""]], [[FEW, stale]]]
