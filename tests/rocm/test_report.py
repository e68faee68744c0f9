"""The report that a ROCm owner attaches to an issue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fse_patch import rocm
from fse_patch.fusion_core.kernels import aiter_check

from ..core.checkpoints import config_of, write_checkpoint
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
    model = write_checkpoint(tmp_path / "nothing", config_of("qwen2_moe"), None)
    status = rocm.main([str(model), "--engine", "vllm", "--out", str(out)])
    report = json.loads(out.read_text())
    assert status == report["verify"]["status"] != 0
    assert report["aiter"]["report"]["why"] == "torch is not built for ROCm"
    assert report["aiter"]["status"] == 0
    assert report["doctor"]["environment"]["platform"] == "cpu"
    assert str(out) in capsys.readouterr().out
    assert any("not installed here" in line for line in report["verify"]["report"].values() if line)
    assert report["bench"]["status"] == 2
    assert "no CUDA device" in report["bench"]["report"]["error"]


def test_inputs_and_output_are_looked_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rocm, "_child", lambda arguments: pytest.fail("something ran"))
    assert rocm.main([str(tmp_path / "nope"), "--engine", "vllm", "--out", str(tmp_path / "r.json")]) == 2
    model = write_checkpoint(tmp_path / "m", config_of("qwen2_moe"), None)
    assert rocm.main([str(model), "--engine", "vllm", "--out", "/none/r.json"]) == 2
    nope, out = capsys.readouterr().err.strip().splitlines()
    assert "nope: " in nope
    assert "--out /none/r.json: cannot be written" in out
