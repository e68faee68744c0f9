"""The examples that need SGLang alone, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from fse_patch.lab.sglang.verify_arm import CPU_DEFAULTS, DEFAULTS

from ..examples import example, served
from .conftest import Runs
from .test_launch import arguments

pytestmark = [pytest.mark.long, pytest.mark.one_release]
RECIPE = "glm4_moe_scale"
SMALL = {**DEFAULTS, **CPU_DEFAULTS, "dtype": "float32", "log_level": "info"}


def test_offline(runs: Runs) -> None:
    said = example("offline_sglang.py", runs.checkpoints.path(RECIPE), **SMALL)
    assert "answer: [" in said
    assert "sglang, main model: shared expert fused" in said


def test_weight_updates(runs: Runs) -> None:
    old, new = runs.checkpoints.path(RECIPE), runs.checkpoints.path(RECIPE, seed=1)
    assert "after the update" in example("update_weights_sglang.py", old, new, **SMALL)


def test_serving(runs: Runs, tmp_path: Path) -> None:
    checkpoint = runs.checkpoints.path(RECIPE)
    flags = [flag for flag in arguments(checkpoint) if not flag.startswith("--model-path")]
    said, ranks = served("serve_sglang.sh", checkpoint, tmp_path / "log", *flags)
    assert said.startswith("fused, merged: fused always")
    assert [(rank["fused"], rank["layout"], rank["proof"]) for rank in ranks] == [(True, "merged", "passed")]
