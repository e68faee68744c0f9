"""Which layout `verify` and `bench --end-to-end` run: the one asked for, or what a server would take here."""

from __future__ import annotations

from pathlib import Path

import pytest

from fse_patch.cli import target, verify
from fse_patch.launch import machine

from .plans import BEST, checkpoint

honest = target.verdict


@pytest.mark.parametrize(
    ("device", "asked", "name", "layout"),
    [
        ("NVIDIA H100", "auto", "qwen3.6-35b-fp8-block", "paired"),
        ("NVIDIA H100", "merged", "qwen3.6-35b-fp8-block", "merged"),
        ("NVIDIA A100", "auto", "qwen3.6-35b-fp8-block", "merged"),
        ("NVIDIA H100", "auto", "qwen3.6-35b-gptq-routed-only", "paired"),
        ("MI300X", "auto", "qwen3.6-35b-gptq-routed-only", "merged"),
        ("cpu", "auto", "qwen3.6-35b-fp8-block", "merged"),
        ("MI300X", "auto", "qwen3.6-35b-fp8-block", "merged"),
    ],
)
def test_the_layout_of_this_machine(
    device: str, asked: str, name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.Target, "release", BEST["vllm"])
    monkeypatch.setattr(machine, "here", lambda: machine.named(device))
    # The engine is not installed here.
    monkeypatch.setattr(target, "verdict", lambda *args: honest(*args[:-1], False))
    monkeypatch.setenv("FSE_PATCH_LAYOUT", asked)
    assert verify.layout_here(checkpoint(name, tmp_path), "vllm") == layout
