"""Loaders by their format: those that pass tensors by their names fuse, all others are refused by code."""

from __future__ import annotations

from pathlib import Path

import pytest

from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.patches import ENGINES

from .checkpoints import config_of, model_tensors, write_checkpoint

BY_NAME = ("auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
IN_THEIR_WAY = (
    "sharded_state", "runai_streamer_sharded", "tensorizer", "bitsandbytes", "gguf", "layered", "remote",
    "presharded", "flash_rl",
)  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("load_format", [*BY_NAME, *IN_THEIR_WAY])
def test_a_load_format(tmp_path: Path, engine: str, load_format: str) -> None:
    folder = write_checkpoint(tmp_path, config_of("qwen2_moe"), model_tensors("qwen2_moe"))
    decision = decide_roles(folder, engine, load_format=load_format)["main"].to_dict()
    assert decision["reason"] == ("ok" if load_format in BY_NAME else "load.format")
    assert decision["fuse"] or f"load format of {engine} is {load_format}" in decision["detail"]
