"""What `verify` says of an LM head in 8 bits: right, off, not run, refused, a control that is not seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from fse_patch.fusion_core.proof.compare import HEAD_DIFFERENCE, Difference, Tolerance
from fse_patch.lab.verify_arm import has_head, measure_head
from fse_patch.lab.verify_head import judge_head

TOLERANCE = Tolerance.for_dtype("float32", Difference(0.0, 0.0, 1))
TOKENS = [[7, 8, 9], [4, 5, 6]]
HELD = {
    "format": "int8:g32",
    "threshold": 4,
    "threshold_from": "measured",
    "reason": "",
    "detail": "",
    "cost": {},
    "calls": {"int8:g32": 5, "stock": 3},
}


def answers(off: float, greedy: list[list[int]] = TOKENS) -> dict[str, Any]:
    best = [[[(token, -1.0 - off), (3, -9.0)] for token in tokens] for tokens in greedy]
    return {"greedy": greedy, "greedy_best": best}


STOCK = answers(0.0)


def fused(off: float = 0.01, control: float = 1.0) -> dict[str, Any]:
    return {
        "lm_heads": [[copy.deepcopy(HELD)]],
        "head_answers": answers(off),
        "head_control": answers(control),
        "head_workers": [{"lm_heads": [copy.deepcopy(HELD)]}],
    }


def test_right() -> None:
    told, failures = judge_head(STOCK, fused(), TOLERANCE)
    assert told is not None
    assert failures == []
    assert (told["mean_abs_answer_diff"], told["answer_tokens"]) == (pytest.approx(0.01), 4)
    assert told["control_diff"] == pytest.approx(1.0)
    assert (told["calls"], told["threshold"]) == ([5], 4)


def not_run(found: dict[str, Any]) -> None:
    found["head_workers"].append({"lm_heads": [{**HELD, "calls": {"stock": 9}}]})


def refused(found: dict[str, Any]) -> None:
    found["lm_heads"][0][0] |= {"threshold": 0, "reason": "head.proof", "detail": "row 5"}


def other_tokens(found: dict[str, Any]) -> None:
    found["head_answers"] = answers(0.0, [[1, 8, 9], [2, 5, 6]])


def no_number(found: dict[str, Any]) -> None:
    found["head_answers"] = answers(float("nan"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found.update(head_answers=answers(HEAD_DIFFERENCE * 1.1)), "answers differ by 0.022"),
        (lambda found: found.update(head_control=answers(HEAD_DIFFERENCE)), "control (scales doubled)"),
        (lambda found: found.update(head_control=answers(0.09)), "control (scales doubled)"),
        (not_run, "never ran it in 8 bits"),
        (refused, "refused: head.proof: row 5"),
        (other_tokens, "2 of 2 answers differ from their first token on"),
        (no_number, "answers differ by nan"),
    ],
)
def test_what_does_not_pass(change: Callable[[dict[str, Any]], None], said: str) -> None:
    found = fused()
    change(found)
    _, failures = judge_head(STOCK, found, TOLERANCE)
    assert any(said in failure for failure in failures)


def test_a_refused_head_has_no_answers() -> None:
    found = fused()
    refused(found)
    del found["head_answers"], found["head_control"], found["head_workers"]
    told, failures = judge_head(STOCK, found, TOLERANCE)
    assert told is not None
    assert (told["reason"], failures) == ("head.proof", ["LM head: refused: head.proof: row 5"])


def test_nothing_asked_nothing_told() -> None:
    assert judge_head(STOCK, {"lm_heads": [[], []]}, TOLERANCE) == (None, [])
    assert judge_head(STOCK, {}, TOLERANCE) == (None, [])


def test_an_arm_measures_it_on_and_with_its_control() -> None:
    states: list[str] = []
    found = measure_head(states.append, lambda: {"state": states[-1]}, lambda: [{"ran": states[-1]}])
    assert states == ["on", "control", "off"]
    assert (found["head_answers"], found["head_control"]) == ({"state": "on"}, {"state": "control"})
    assert found["head_workers"] == [{"ran": "on"}]
    assert has_head([{"lm_heads": []}, {"lm_heads": [HELD]}])
    assert not has_head([{"lm_heads": [{**HELD, "threshold": 0}]}])
