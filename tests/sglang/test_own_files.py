"""Files of SGLang's own that hold a model as it is in memory: a fused run writes none, reads none fused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ..running import Case
from .conftest import Runs


@pytest.mark.long
def test_a_fused_run_writes_none(runs: Runs, tmp_path: Path) -> None:
    said = {}
    for arm in ("fused", "stock"):
        (folder := tmp_path / arm).mkdir()
        steps = [("save", {"folder": str(folder)}), ("logprobs", {})]
        said[arm], answers = runs.steps(Case("qwen2_moe", engine_args={"steps": steps}), arm == "fused")
        assert answers  # it goes on
    assert "start with FSE_PATCH=0 to save the model" in said["fused"]
    assert not list((tmp_path / "fused").iterdir())
    # The control.
    assert said["stock"] == ""
    assert list((tmp_path / "stock").iterdir())


def read(runs: Runs, folder: Path, fused: bool) -> dict[str, Any]:
    """What an engine answers that is started on such files, or how its start ended."""
    case = Case("qwen2_moe", engine_args={"load_format": "sharded_state"})
    (result,) = runs.run([replace(runs.checkpoints.job(case), checkpoint=folder)], fused, {})
    return result


@pytest.mark.long
def test_such_files_do_not_load_in_silence(runs: Runs, tmp_path: Path) -> None:
    folders = {"stock": tmp_path / "stock", "fused": tmp_path / "fused"}
    answers = {}
    for arm, folder in folders.items():
        folder.mkdir()
        steps = [("save", {"folder": str(folder)}), ("logprobs", {})]
        case = Case("qwen2_moe", engine_args={"steps": steps}, fault="saves_anyway")
        said, answers[arm] = runs.steps(case, arm == "fused")
        assert said == ""
        assert list(folder.glob("*.safetensors"))
        shutil.copy(runs.checkpoints.path("qwen2_moe") / "config.json", folder)
    # Stock's files are stock's in a process of ours too.
    plain, ours = (read(runs, folders["stock"], fused) for fused in (False, True))
    assert plain["logprobs"] == answers["stock"] == ours["logprobs"]
    (worker,) = ours["workers"]
    assert worker["roles"] == []
    assert [refused["reason"] for refused in worker["refused"]] == ["load.format"]
    # Files of a fused run, had it written any, end an engine, patched or not.
    for fused in (False, True):
        assert "error" in read(runs, folders["fused"], fused)
