"""Arguments that forbid to fuse: served unfused, unless strictness was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from .engine import IN_PROCESS, Checkpoints
from .processes import in_process


def probe(folder: str) -> dict[str, Any]:
    """Start an engine with LoRA on, and say how that ended."""
    from vllm import LLM

    from fse_patch import runtime
    from fse_patch.lab.vllm.verify_arm import DEFAULTS

    try:
        LLM(model=folder, dtype="float32", enable_lora=True, max_lora_rank=8, **DEFAULTS)
    except SystemExit as stop:
        return {"status": stop.code, "reasons": []}
    return {"status": None, "reasons": [decision["reason"] for decision in runtime.decisions()]}


@pytest.mark.parametrize(
    ("strict", "expected"),
    [(None, {"status": None, "reasons": ["lora"]}), ("1", {"status": 3, "reasons": []})],
)
def test_lora_stops_an_engine_only_where_asked(
    checkpoints: Checkpoints, strict: str | None, expected: dict[str, Any]
) -> None:
    folder = str(checkpoints.path("qwen2_moe"))
    found = in_process(f"{__name__}:probe", folder, FSE_PATCH="vllm", FSE_PATCH_STRICT=strict, **IN_PROCESS)
    assert found == expected
