"""The report that a ROCm owner attaches to an issue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fse_patch import rocm
from fse_patch.fusion_core.kernels import aiter_check

from ..fakes.aiter_profiles import PROFILES, UNUSABLE, installed
from .test_check import ALL, NEWEST, last_slot_dropped, replace


def test_what_is_right_is_named() -> None:
    with installed(NEWEST):
        report = rocm.aiter_report()
    assert sorted(report["usable"]) == sorted(ALL)
    assert (report["hip"], report["why"], report["faults"]) == ("7.0", "", {})
    assert "hidden_states" in report["fused_moe"]
    json.dumps(report)


def test_what_is_wrong_is_named() -> None:
    with installed(replace(NEWEST, faults={"fused_moe": last_slot_dropped})):
        report = rocm.aiter_report()
    assert sorted(report["usable"]) == sorted(set(ALL) - {"fused_moe"})
    assert "output is" in report["faults"]["fused_moe"]
    with installed(UNUSABLE["PyPI's aiter"]):
        report = rocm.aiter_report()
    assert report["usable"] == []
    assert report["why"]


def test_the_newest_profile_is_there() -> None:
    assert PROFILES["newest"] is NEWEST
    assert {name for name, _ in aiter_check.CHECKS} == set(ALL)


def test_the_command_writes_a_file_and_ends_as_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The environment of these tests has neither ROCm nor an engine."""
    out = tmp_path / "report.json"
    status = rocm.main([str(tmp_path / "nothing"), "--engine", "vllm", "--out", str(out)])
    report = json.loads(out.read_text())
    assert status == report["verify"]["status"] != 0
    assert report["aiter"]["report"]["why"] == "torch is not built for ROCm"
    assert report["aiter"]["status"] == 0
    assert report["doctor"]["environment"]["platform"] == "cpu"
    assert str(out) in capsys.readouterr().out
    assert any("nothing" in line for line in report["verify"]["output"])
    assert report["bench"]["status"] == 2
    assert any("no CUDA device" in line for line in report["bench"]["output"])
