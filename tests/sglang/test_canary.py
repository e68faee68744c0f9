"""The canary on SGLang's real loader and models, in its scheduler: what it proves, and what not.

That it stops every planted fault is shown by test_faults.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from ..running import Case
from . import cases
from .conftest import Runs

FAMILIES = ("qwen2_moe_wide4", "qwen3_next", "qwen3_5_text_3d", "glm4_moe_shared2_scale", "glm4_moe_grouped")


@pytest.fixture(scope="module")
def found(runs: Runs) -> dict[str, Any]:
    def folder(recipe: str) -> str:
        return str(runs.checkpoints.path(recipe))

    builds = {recipe: [folder(recipe), False, "sample"] for recipe in FAMILIES}
    builds["all"] = [folder("qwen2_moe"), False, "all"]
    builds["faulty"] = [folder("qwen2_moe"), True, "sample"]
    builds["off"] = [folder("qwen2_moe"), True, "off"]
    steps = [("prove", {"builds": list(builds.values())}), ("reports", {})]
    results, reports = runs.steps(Case("qwen2_moe", engine_args={"steps": steps}), fused=True)
    return dict(zip(builds, results, strict=True)) | {"engine": reports[0]["roles"][0]["canary"]}


def test_the_engine_that_serves_was_proved(found: dict[str, Any]) -> None:
    assert found["engine"]["state"] == "passed", found["engine"]


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_clean_checkpoint_passes(found: dict[str, Any], recipe: str) -> None:
    assert found[recipe]["state"] == "passed", found[recipe]
    assert found[recipe]["deviation"] < 1e-5
    assert len(found[recipe]["layers"]) == 1
    assert found[recipe]["compared"] >= 2 * 3 * 64


def test_a_fault_stops_the_load(found: dict[str, Any]) -> None:
    assert "CanaryError" in found["faulty"].get("error", ""), found["faulty"]
    assert "the model is not served" in found["faulty"]["error"]


@pytest.mark.long
@pytest.mark.parametrize("case", cases.TENSOR_PARALLEL, ids=lambda case: case.name)
def test_the_ranks_of_tensor_parallelism_prove_alike(runs: Runs, case: Case) -> None:
    result = runs.tensor_parallel.fused[case.name]
    assert "workers" in result, result.get("log")
    roles = [role for worker in result["workers"] for role in worker["roles"]]
    assert [role["canary"]["state"] for role in roles] == ["passed", "passed"]
    assert all(role["compared"] for role in roles)


@pytest.mark.parametrize("case", cases.BFLOAT16, ids=lambda case: case.name)
def test_bfloat16_passes(runs: Runs, case: Case) -> None:
    result = runs.float32.fused[case.name]
    assert "workers" in result, result.get("log")
    canary = result["workers"][0]["roles"][0]["canary"]
    assert canary["state"] == "passed", canary
    assert 1e-4 < canary["deviation"] < 2**-6


def test_the_settings_say_which_layers(found: dict[str, Any]) -> None:
    assert found["all"]["layers"] == [0, 1]
    assert found["off"]["state"] == "off"
