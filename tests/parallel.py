"""What the tests of both engines say of runs in several processes."""

from __future__ import annotations

from typing import Any

from fse_patch.fusion_core.decision.outcome import Merged
from fse_patch.fusion_core.proof.compare import difference
from fse_patch.lab.ran_as_decided import ran_as_decided

from .spread_faults import FAULTS

LIMIT = 5e-6
RECIPES = ["qwen2_moe_wide4", "glm4_moe_shared2_scale"]
# In `make test-all` alone.
LONG = {"glm4_moe_shared2_scale"}
Result = dict[str, Any]


def check_right(report: Result) -> None:
    """Answers as in stock, in one process."""
    assert report["failures"] == [], report["failures"]
    assert 0 < report["mean_abs_logprob_diff"] <= LIMIT


def check_stages(decision: Merged, ours: Result, layout: str) -> None:
    """Two stages ran their own layers, and all of them together."""
    layouts = {worker["roles"][0].get("weight_layout", "merged") for worker in ours["workers"]}
    assert layouts == {layout}
    stages = {worker["stage"]: worker["roles"][0]["built_layers"] for worker in ours["workers"]}
    assert sorted(stages) == [0, 1]
    assert [*stages[0], *stages[1]] == list(decision.moe.layers)
    assert all(stages.values())
    # The control: one stage alone is not the model.
    assert ran_as_decided(decision, ours["workers"][:1]) != []


def check_paired_spread(report: Result, ours: Result) -> None:
    """Each process ran its own experts and its part of the shared one, and proved them."""
    check_right(report)
    assert len(ours["workers"]) == 2
    for worker in ours["workers"]:
        (role,) = worker["roles"]
        assert set(role["calls_by_mode"]) == {"paired"}
        assert role["paired"]["proof"]["state"] == "passed"
    # The control: one shared weight times 1.01.
    assert report["control_diff"] > report["tolerance"]["mean"]


def check_spread(stock: Result, ours: Result) -> None:
    """The shared part twice, not at all, or halved, is seen by the answers and by the canary."""
    assert len(ours["workers"]) == 2
    for fault in FAULTS:
        told = ours["faults"][fault]
        off = difference(stock["logprobs"], told["logprobs"]).mean
        assert (off > 100 * LIMIT) == bool(fault), (fault, off)
        said = [text for process in told["canary"] for text in process]
        assert len(said) == 2
        assert all("canary" in text for text in said) == bool(fault), said
        assert any(said) == bool(fault), said
