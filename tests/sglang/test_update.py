"""Weight updates of a running engine reach the shared slots; a partial one is no error."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.proof.compare import difference

from ..running import Case
from .conftest import Runs
from .test_parallel import TWO

RECIPE = "qwen2_moe_wide4"
SHARED, ROUTED = r"\.mlp\.shared_experts?\.", r"\.mlp\.experts\."
ONE = r"layers\.1\.mlp\.shared_experts?\.down_proj\."
LIMIT = 5e-6


def steps(new: Path, old: Path) -> list[Any]:
    """Change everything by tensors of the new checkpoint, in three parts, and then back at once."""
    return [
        ("logprobs", {}),
        ("from_disk", {"folder": str(new)}),
        ("logprobs", {}),
        ("from_disk", {"folder": str(old)}),
        ("from_tensors", {"folder": str(new), "names": ONE}),
        ("logprobs", {}),
        ("from_tensors", {"folder": str(new), "names": SHARED}),
        ("from_tensors", {"folder": str(new), "names": ROUTED}),
        ("logprobs", {}),
        ("reports", {}),
    ]


@pytest.fixture(scope="module")
def results(runs: Runs) -> dict[str, list[Any]]:
    """By arm; "deaf" leaves the slots as they are from the second load on."""
    new, old = runs.checkpoints.path(RECIPE, seed=1), runs.checkpoints.path(RECIPE)
    plan = {"steps": steps(new, old)}
    found = {arm: runs.steps(Case(RECIPE, engine_args=plan), arm == "fused") for arm in ("stock", "fused")}
    found["deaf"] = runs.steps(Case(RECIPE, engine_args=plan, fault="deaf_to_updates"), True)
    return found


def check(stock: list[Any], fused: list[Any], processes: int) -> None:
    scored = [i for i, step in enumerate(steps(Path(), Path())) if step[0] == "logprobs"]
    for i in scored:
        assert difference(stock[i], fused[i]).mean <= LIMIT
    for before, after in pairwise(scored):
        assert difference(fused[before], fused[after]).mean > 100 * LIMIT
    assert fused[4] == 1  # one tensor is a partial update, and no error
    assert len(fused[-1]) == processes
    for worker in fused[-1]:
        (role,) = worker["roles"]
        assert role["loads"] == 6
        assert role["slots_loaded"] == len(role["built_layers"]) * 4


def test_updates_change_the_output_as_in_stock(results: dict[str, list[Any]]) -> None:
    check(results["stock"], results["fused"], 1)


@pytest.mark.long
def test_updates_reach_both_processes(runs: Runs, results: dict[str, list[Any]]) -> None:
    """Compared with one process: a shard in the wrong place shows too."""
    new, old = runs.checkpoints.path(RECIPE, seed=1), runs.checkpoints.path(RECIPE)
    case = Case(RECIPE, engine_args={"steps": steps(new, old), "tp_size": 2})
    check(results["stock"], runs.steps(case, True, TWO), 2)


def test_slots_that_stay_old_are_seen(results: dict[str, list[Any]]) -> None:
    """The control of the test above."""
    deaf, stock = results["deaf"], results["stock"]
    assert difference(stock[0], deaf[0]).mean <= LIMIT
    for i in (2, 5, 8):
        assert difference(stock[i], deaf[i]).mean > 100 * LIMIT


@pytest.mark.long
def test_a_trainer_reaches_both_processes(runs: Runs) -> None:
    """Over gloo, where GPUs have NCCL; the call that takes the tensors is the same."""
    sent = [("from_trainer", {"folder": str(runs.checkpoints.path(RECIPE, seed=1))})]
    plan = [("logprobs", {}), *sent, ("logprobs", {})]
    one = Case(RECIPE, engine_args={"steps": plan})
    two = replace(one, engine_args={**one.engine_args, "tp_size": 2})
    stock, ours = runs.steps(one, False), runs.steps(two, True, TWO)
    for i in (0, 2):
        assert 0 < difference(stock[i], ours[i]).mean <= LIMIT
    assert difference(ours[0], ours[2]).mean > 100 * LIMIT
    # The control: slots that stay old are seen.
    deaf = runs.steps(replace(two, fault="deaf_to_updates"), True, TWO)
    assert difference(stock[2], deaf[2]).mean > 100 * LIMIT
