"""What pipeline stages ran: each its own layers, all of them together those that were decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.lab.ran_as_decided import by_stage, ran_as_decided

from .moe import decision

Workers = list[dict[str, Any]]
MAIN = decision(ExpertLayout(4, 2, 2, 8, 4), layers=(0, 2, 3))


def role(layers: list[int]) -> dict[str, Any]:
    return {
        "role": "main",
        "built_layers": layers,
        "fused_layers": list(layers),
        "slots_loaded": 2 * len(layers),
        "calls_by_mode": {"fused": len(layers)},
    }


def workers(first: list[int], second: list[int]) -> Workers:
    """Two stages of two processes each."""
    stages = [(0, first), (0, first), (1, second), (1, second)]
    return [{"pid": 11 + n, "stage": s, "roles": [role(layers)]} for n, (s, layers) in enumerate(stages)]


@pytest.mark.parametrize(("first", "second"), [([0], [2, 3]), ([0, 2, 3], []), ([], [0, 2, 3])])
def test_stages_that_run_all_layers_pass(first: list[int], second: list[int]) -> None:
    assert ran_as_decided(MAIN, workers(first, second)) == []


def test_a_stage_without_layers_has_no_role() -> None:
    ran = workers([0, 2, 3], [])
    for worker in ran[2:]:
        worker["roles"] = []
    assert ran_as_decided(MAIN, ran) == []


def a_stage_stayed_stock(ran: Workers) -> None:
    for worker in ran[2:]:
        worker["roles"] = []
        worker["refused"] = [{"role": "main", "reason": "disabled", "detail": "a test"}]


def a_process_stayed_stock(ran: Workers) -> None:
    ran[3]["roles"] = []


def a_layer_was_not_built(ran: Workers) -> None:
    for worker in ran[2:]:
        worker["roles"] = [role([3])]


def a_process_built_a_layer_less(ran: Workers) -> None:
    ran[3]["roles"] = [role([3])]


def a_layer_did_not_run(ran: Workers) -> None:
    ran[2]["roles"][0]["fused_layers"] = [2]


def a_layer_is_in_both_stages(ran: Workers) -> None:
    for worker in ran[:2]:
        worker["roles"] = [role([0, 2])]


def a_slot_was_not_loaded(ran: Workers) -> None:
    ran[0]["roles"][0]["slots_loaded"] = 1


FAULTS: dict[Callable[[Workers], None], str] = {
    a_stage_stayed_stock: "[0], [0, 2, 3] were decided: disabled: a test",
    a_process_stayed_stock: "process 14: was not fused",
    a_layer_was_not_built: "[0, 3], [0, 2, 3] were decided",
    a_process_built_a_layer_less: "process 14: layers [3] ran fused, [2, 3] were decided",
    a_layer_did_not_run: "process 13: layers [2] ran fused, [2, 3] were decided",
    a_layer_is_in_both_stages: "[0, 2, 2, 3], [0, 2, 3] were decided",
    a_slot_was_not_loaded: "process 11: 1 of 2 shared slots",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_told(fault: Callable[[Workers], None]) -> None:
    ran = workers([0], [2, 3])
    fault(ran)
    assert any(FAULTS[fault] in problem for problem in ran_as_decided(MAIN, ran))


def test_one_stage_runs_all() -> None:
    """The control of the tests above: what a stage may leave out, one alone may not."""
    ran = workers([0], [2, 3])[2:]
    assert ran_as_decided(MAIN, ran) != []


def test_processes_are_sorted_by_stage() -> None:
    assert [w["pid"] for w in by_stage(workers([0], [2, 3])[::-1])[0]] == [12, 11]
