"""What `fse-patch verify` says to people: a sentence first, and the reasons where it did not pass."""

from __future__ import annotations

import pytest

from fse_patch.cli.verify import sentences
from fse_patch.lab.verify import judge

from .test_verify_judge import arm, job


def test_one_that_passed() -> None:
    said = sentences(judge(job(), arm(False), arm(True)))
    assert said[0].startswith("passed: fused differs from stock by 0 (mean over ")
    assert "limit 5e-06); the planted fault was seen: " in said[0]
    assert said[1:] == ["fused in the engine: layers 0, 2; slots loaded: 4"]


def test_what_the_proof_does_not_cover_is_said() -> None:
    report = judge(job(), arm(False), arm(True)) | {"replaced_operations": ["a", "b"]}
    assert sentences(report)[-1].endswith("stand-ins ran: a, b")


def test_one_that_did_not_says_why() -> None:
    said = sentences(judge(job(), arm(False), arm(True, by=0.5)))
    assert said
    assert all(line.startswith("not passed: ") for line in said)
    assert "log-probabilities differ by 0.5" in said[0]


@pytest.mark.parametrize("report", [{"refused": [{"reason": "lora"}]}, {"refused": [], "ended": "stock"}])
def test_an_error_says_it_alone(report: dict[str, object]) -> None:
    assert sentences({"passed": False, "failures": ["x"], **report}) == []
    # The control: an engine that ended when it was fused is a failure, and no error.
    assert sentences({"passed": False, "failures": ["x"], "ended": "fused"}) == ["not passed: x"]
