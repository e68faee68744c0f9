"""The examples that need vLLM alone, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..examples import example, served
from .engine import Checkpoints

pytestmark = [pytest.mark.long, pytest.mark.one_release]
RECIPE = "glm4_moe_scale"
SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}


def test_offline(checkpoints: Checkpoints) -> None:
    said = example("offline_vllm.py", checkpoints.path(RECIPE), **SMALL)
    assert "main model: layers [1, 2] are fused; proof: passed" in said


def test_weight_updates(checkpoints: Checkpoints) -> None:
    old, new = checkpoints.path(RECIPE), checkpoints.path(RECIPE, seed=1)
    assert "after the update" in example("update_weights_vllm.py", old, new, **SMALL)


def test_serving(checkpoints: Checkpoints, tmp_path: Path) -> None:
    flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"]
    said, ranks = served("serve_vllm.sh", checkpoints.path(RECIPE), tmp_path / "log", *flags)
    assert said.startswith("fused, merged: fused always")
    assert [(rank["fused"], rank["layout"], rank["proof"]) for rank in ranks] == [(True, "merged", "passed")]
