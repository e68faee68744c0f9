"""Weights that change while two processes share merged layers, by vLLM's own `reload_weights`.

Stock on a CPU answers wrongly after a reload, and so does stock under the paired layout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fse_patch.fusion_core.proof.compare import difference
from fse_patch.lab import verify

from ..parallel import LIMIT
from ..running import ROOT
from .conftest import Runs
from .engine import Case
from .test_parallel import TWO

RECIPE = "qwen2_moe_wide4"


@pytest.fixture(scope="module")
def arms(runs: Runs) -> dict[str, Any]:
    """Stock in one process that was started on the old weights, and on the new ones; and ours in two."""
    new = runs.checkpoints.path(RECIPE, seed=1)
    case = Case(RECIPE, engine_args={"tensor_parallel_size": 2, "new": str(new)})
    plain, path = runs.checkpoints.job(case.plain), {"PYTHONPATH": str(ROOT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", "tests.vllm.update_arm")
        old_and_new = runs.run([plain, replace(plain, checkpoint=new)], False, path)
        (ours,) = runs.arm([case], True, path | TWO).values()
    found = dict(zip(("old", "new", "ours"), (*old_and_new, ours), strict=True))
    for result in found.values():
        assert "error" not in result, f"{result['error']}\n{result['log']}"
    return found


@pytest.mark.long
def test_an_update_reaches_both_processes(arms: dict[str, Any]) -> None:
    ours = arms["ours"]

    def off(step: str, weights: str) -> float:
        return difference(arms[weights]["logprobs"], ours[step]).mean

    for step, weights in (("old", "old"), ("new", "new"), ("old again", "old")):
        assert 0 < off(step, weights) <= LIMIT
    # The shared expert alone: neither the old model nor the new one.
    assert min(off("shared", weights) for weights in ("old", "new")) > 100 * LIMIT
    assert [worker["roles"][0]["loads"] for worker in ours["workers"]] == [4, 4]
    # The control: slots that stay old are seen.
    assert off("deaf", "new") > 100 * LIMIT
