"""Quantised formats that nobody ran fused: they may fuse by evidence, and adapters refuse them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fse_patch import settings
from fse_patch.adapters.refusals import without_proof
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision import proven
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.decision.proven import proven_platforms, read_proven, unproven

from .golden import ROWS, write_row
from .moe import stored_as
from .outcomes import merged

PROVEN = {"fp8-block": {"vllm": ("cpu",)}}
FP8 = next(row for row in ROWS if row["id"] == "qwen3-next-fp8-block")
PLAIN = next(row for row in ROWS if row["id"] == "qwen3-next-bf16")


def test_nothing_quantised_is_proven_yet() -> None:
    assert read_proven() == {}
    assert proven_platforms(stored_as("fp8", ("fp8-block",))) == []
    # Without quantisation: where the engine ran at all, and nobody has run it on ROCm.
    assert proven_platforms(stored_as("none", ("plain",))) == ["cpu", "cuda"]


def test_platforms_of_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "read_proven", lambda: {"fp8-block": {"vllm": ("cpu", "rocm")}})
    assert proven_platforms(stored_as("fp8", ("fp8-block",))) == ["cpu", "rocm"]


@pytest.mark.parametrize(
    ("method", "formats", "engine", "platform", "missing"),
    [
        ("none", ("plain",), "vllm", "cuda", ""),
        ("none", ("plain",), "vllm", "", ""),
        ("fp8", ("fp8-block",), "vllm", "cpu", ""),
        # Plain experts that the engine's quantisation code builds are a format of their own.
        ("fp8", ("plain",), "vllm", "cpu", "plain"),
        ("fp8", ("fp8-block", "plain"), "vllm", "cpu", "plain"),
        ("fp8", ("fp8-block",), "vllm", "cuda", "fp8-block"),
        ("fp8", ("fp8-block",), "vllm", "", "fp8-block"),
        ("fp8", ("fp8-block",), "sglang", "cpu", "fp8-block"),
        ("fp8", ("fp8-channel",), "vllm", "cpu", "fp8-channel"),
        ("gptq", ("fp8-block", "int4-gptq"), "vllm", "cpu", "int4-gptq"),
    ],
)
def test_every_format_of_a_role_must_be_proven(
    method: str, formats: tuple[str, ...], engine: str, platform: str, missing: str
) -> None:
    assert unproven(stored_as(method, formats, engine), platform, PROVEN) == missing


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("proven: {fp9: {vllm: [cpu]}}", "'fp9'"),
        ("proven: {fp8-block: {vlm: [cpu]}}", r"proven\.yaml: 'vlm' is none of vllm, sglang$"),
        ("proven: {fp8-block: {vllm: [gpu]}}", r"proven\.yaml: 'gpu' is none of cpu, cuda, rocm$"),
    ],
)
def test_the_table_knows_its_words(tmp_path: Path, text: str, wrong: str) -> None:
    table = tmp_path / "proven.yaml"
    table.write_text("proven: {fp8-block: {vllm: [cpu, cuda]}}")
    assert read_proven(table) == {"fp8-block": {"vllm": ("cpu", "cuda")}}
    read_proven.cache_clear()
    table.write_text(text)
    with pytest.raises(FsePatchError, match=wrong):
        read_proven(table)
    read_proven.cache_clear()


def test_adapters_refuse_what_is_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSE_PATCH_ALLOW_UNPROVEN", raising=False)
    quantised = merged(decide(write_row(tmp_path / "fp8", FP8), "vllm"))
    plain = merged(decide(write_row(tmp_path / "plain", PLAIN), "vllm"))
    for platform in ("cpu", "cuda", ""):
        assert list(without_proof(plain, platform, settings.load())) == []
        (reason,) = without_proof(quantised, platform, settings.load())
        assert reason.code == "quant.unproven"
        assert reason.detail.startswith("fp8-block would fuse")
    monkeypatch.setenv("FSE_PATCH_ALLOW_UNPROVEN", "1")
    assert list(without_proof(quantised, "cpu", settings.load())) == []
