"""The metrics, in an environment that has prometheus_client, as every engine's has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from .engine import Checkpoints
from .test_off import in_process

ROOT = Path(__file__).parent.parent.parent


def probe(checkpoint: str) -> dict[str, Any]:
    """Load a model, and read the default registry and `fse_patch.status`."""
    import torch
    from prometheus_client import REGISTRY, generate_latest
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins

    import fse_patch
    from fse_patch import metrics

    from .test_inherited import building

    load_general_plugins()
    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
    with building(checkpoint) as config:
        loader = get_model_loader(config.load_config)
        model = loader.load_model(vllm_config=config, model_config=config.model_config)
    assert metrics.publish(fse_patch.status)  # twice is once
    text = generate_latest(REGISTRY).decode()
    return {
        "lines": [line for line in text.splitlines() if line.startswith("fse_patch")],
        "status": fse_patch.status()["vllm"]["roles"],
        "built": type(model).__name__,
    }


@pytest.mark.one_release
def test_metrics_and_status(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = tmp_path / "qwen2_moe"
    folder.symlink_to(checkpoints.path("qwen2_moe"))
    path = os.pathsep.join([str(ROOT), str(ROOT / "ci")])
    found = in_process(f"{__name__}:probe", str(folder), FSE_PATCH="vllm", PYTHONPATH=path)
    values = dict(line.rsplit(" ", 1) for line in found["lines"])
    labels = 'engine="vllm",family="qwen2_moe",fused="true",layout="merged",reason="ok"'
    decision = f"fse_patch_decisions_total{{{labels}}}"
    assert values[decision] == "1.0"
    assert values['fse_patch_slots_loaded{engine="vllm",role="main"}'] == "2.0"
    assert any(name.startswith("fse_patch_info{") and v == "1.0" for name, v in values.items())
    assert not any("vllm" in name.partition("{")[0] for name in values)
    (role,) = found["status"]
    assert (role["slots_loaded"], role["canary"]["state"]) == (2, "passed")
    assert role["compared"] == 2 * 3 * 64
