"""The examples that need SGLang alone, on a CPU."""

from __future__ import annotations

import pytest

from fse_patch.lab.sglang.verify_arm import CPU_DEFAULTS, DEFAULTS

from ..examples import example
from .conftest import Runs

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
