"""Files of SGLang's own that hold a model as it is in memory: a fused run writes none."""

from __future__ import annotations

from pathlib import Path

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
