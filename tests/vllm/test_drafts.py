"""MTP drafts of three tokens, and in two processes, in the real vLLM with merged layers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fse_patch.lab import verify

from ..running import ROOT
from .conftest import Runs
from .engine import SPECULATIVE, Case
from .test_parallel import TWO

RECIPE = "glm4_moe_mtp"
THREE = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}


@pytest.fixture(autouse=True)
def arm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", "tests.vllm.fault_arm")
        yield


def check(runs: Runs, stock: Case, ours: Case, env: dict[str, str], processes: int) -> None:
    path = {"PYTHONPATH": str(ROOT)}
    (plain,) = runs.arm([stock], False, path).values()
    (result,) = runs.arm([ours], True, path | env).values()
    report = runs.report(ours, plain, result)
    assert report["failures"] == [], report.get("log")
    # The control is one of the main model's: see `draft_weight_off` for the draft's.
    assert report["control_diff"] > report["tolerance"]["mean"]
    assert len(result["workers"]) == processes
    for worker in result["workers"]:
        main, draft = worker["roles"]
        assert (main["role"], draft["role"], len(draft["fused_layers"])) == ("main", "draft", 1)
        # A draft of three tokens runs its layer once for each.
        tokens = ours.engine_args["speculative_config"]["num_speculative_tokens"]
        per_layer = main["calls_by_mode"]["fused"] / len(main["fused_layers"])
        assert draft["calls_by_mode"]["fused"] == tokens * per_layer


@pytest.mark.long
def test_three_drafted_tokens(runs: Runs) -> None:
    case = Case(RECIPE, engine_args=THREE)
    check(runs, case, case, {}, 1)


@pytest.mark.long
def test_a_draft_in_two_processes(runs: Runs) -> None:
    """Compared with one process: a shard in the wrong place shows too."""
    one, two = (Case(RECIPE, engine_args={**SPECULATIVE, "tensor_parallel_size": n}) for n in (1, 2))
    check(runs, one, two, TWO, 2)
