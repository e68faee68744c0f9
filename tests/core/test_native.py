"""What a release fuses by itself, and whether that is the checkpoint's model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision import native
from fse_patch.fusion_core.decision.decide import decide
from fse_patch.fusion_core.decision.native import fusing, gets_wrong, runtime_report
from fse_patch.fusion_core.decision.outcome import Merged
from fse_patch.fusion_core.reasons import Reason

from .golden import ROWS, write_row
from .outcomes import code, merged

RIGHT = {"by_default": False, "condition": "AITER"}
ONE_SLOT = {**RIGHT, "slots": 1}


def decided(folder: Path, **changes: Any) -> Merged:
    """The decision on a checkpoint whose experts are stored alike."""
    row = next(row for row in ROWS if row["expect"]["reason"] == "ok" and "stored" in row)
    return dataclasses.replace(merged(decide(write_row(folder, row), "vllm")), **changes)


def test_what_is_right_is_not_found_wrong(tmp_path: Path) -> None:
    decision = decided(tmp_path)
    assert decision.stored_alike is True
    assert gets_wrong(RIGHT, decision) == ""
    assert (
        gets_wrong({**RIGHT, "wrong": "its slot is never written"}, decision) == "its slot is never written"
    )


def test_experts_stored_apart_are_found_wrong(tmp_path: Path) -> None:
    assert "different ways" in gets_wrong(RIGHT, decided(tmp_path, stored_alike=False))
    # Nobody knows: the engine has it on, and nothing speaks against it.
    assert gets_wrong(RIGHT, decided(tmp_path, stored_alike=None)) == ""


def test_a_doubt_about_packed_integers_is_one_too_many(tmp_path: Path) -> None:
    assert "packed integers" in gets_wrong(RIGHT, decided(tmp_path, stored_alike=None, packed=True))
    assert gets_wrong(RIGHT, decided(tmp_path, stored_alike=True, packed=True)) == ""


def test_a_shared_expert_wider_than_its_slots_is_found_wrong(tmp_path: Path) -> None:
    decision = decided(tmp_path)
    layout = dataclasses.replace(decision.moe.layout, num_shared_slots=2)
    wide = dataclasses.replace(decision, moe=dataclasses.replace(decision.moe, layout=layout))
    assert "wider" in gets_wrong(ONE_SLOT, wide)
    assert gets_wrong(RIGHT, wide) == ""
    unfit = dataclasses.replace(decision.refused(Reason("width.mismatch", "")), layout=None)
    assert "wider" in gets_wrong(RIGHT, unfit)


# All experts in one tensor, of the same format.
STACKED = {"stacked": "bf16", "stacked-fp8": "fp8-block:128"}
STORED = [row for row in ROWS if {"routed", "shared"} <= row.get("stored", {}).keys()]
# Packed integers of one size; the config is not understood, is wrong of one part, or orders columns across
# slots.
DOUBTED = {
    "glm-4.6-awq-of-gptqmodel-shared-declared-left-out",
    "glm-4.5-air-awq-gemv", "glm-4.5-gptq-symmetry-and-a-new-key", "glm-4.6-auto-round-as-gptq-of-floats",
    "glm-4.6-auto-round-as-gptq-with-quantised-activations", "glm-4.6-awq-of-llm-awq",
    "glm-4.6-awq-two-layouts", "qwen1.5-moe-gptq-activation-order",
    "qwen1.5-moe-gptq-four-slots-and-a-new-key", "qwen3-next-experts-in-a-scheme-that-nobody-knows",
    "qwen3-next-gptq-dynamic-override-of-one-expert", "qwen3-next-gptq-dynamic-that-hangs",
    "qwen3-next-w4a16-pruned", "qwen3-next-w4a16-the-engines-class-otherwise",
    "qwen3.5-35b-auto-round-activations-of-the-shared-expert",
    "qwen3.5-35b-auto-round-granularity-of-tomorrow", "qwen3.5-35b-auto-round-rotation",
    "qwen3.5-35b-gptqmodel-7-activations", "qwen3.5-35b-gptqmodel-7-layouts-that-disagree",
    "qwen3.5-35b-gptqmodel-7-methods-that-disagree", "qwen3.5-35b-gptqmodel-7-planar",
    "qwen3.5-35b-gptqmodel-7-rotation", "qwen3.5-35b-two-regexes-for-one-module",
}  # fmt: skip


@pytest.mark.parametrize("row", STORED, ids=lambda row: row["id"])
def test_the_reason_that_came_first_does_not_hide_that_experts_are_stored_apart(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    """Upstream fused Quark checkpoints that exclude the shared expert; the policy refuses all of Quark."""
    decision = decide(write_row(tmp_path, row), "vllm")
    routed, shared = row["stored"]["routed"], row["stored"]["shared"]
    alike = STACKED.get(routed, routed) == shared and code(decision) != "quant.mixed"
    assert (decision.stored_alike is not False) == alike
    doubted = decision.stored_alike is None and decision.packed
    assert doubted == (row["id"] in DOUBTED)
    assert bool(gets_wrong(RIGHT, decision)) == (not alike or doubted or code(decision) == "width.mismatch")


def test_there_are_checkpoints_whose_reason_is_another() -> None:
    apart = {r["expect"]["reason"] for r in STORED if r["stored"]["routed"] != r["stored"]["shared"]}
    assert apart >= {"quant.mixed", "quant.mxfp4", "quant.quark"}


@pytest.mark.parametrize(
    ("version", "right", "wrong"),
    [("0.19.1", 0, 0), ("0.22.1", 0, 1), ("0.24.0", 0, 1), ("0.25.1", 1, 0), ("0.32.0", 1, 0)],
)
def test_vllm_releases_that_get_qwen3_5_wrong(version: str, right: int, wrong: int) -> None:
    here = fusing("vllm", "qwen3_5_moe", "rocm", version)
    assert [sum("wrong" not in e for e in here), sum("wrong" in e for e in here)] == [right, wrong]
    assert fusing("vllm", "qwen3_5_moe", "cuda", version) == []


def test_a_report_says_what_a_release_gets_wrong(tmp_path: Path) -> None:
    decision = decided(tmp_path, model_type="qwen3_5_moe")
    old = runtime_report(decision, "rocm", "0.24.0")
    assert not old["upstream.already"]
    assert "wrong: the blocks fuse and the loader drops the shared expert" in old["upstream.detail"]
    assert "wrong" not in runtime_report(decision, "rocm", "0.32.0")["upstream.detail"]


NOT_SAID = "give --platform and --engine-version to know"
SWITCH = "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS"
NOT_HERE = "this release does not fuse this model here"


@pytest.mark.parametrize(
    ("model", "engine", "platform", "release", "expected"),
    [
        ("qwen3_next", "vllm", None, None, (None, None, None, NOT_SAID)),
        ("qwen3_next", "vllm", "cpu", None, ("cpu", None, None, NOT_SAID)),
        ("qwen3_next", "vllm", None, "0.32.0", (None, "tested", None, NOT_SAID)),
        ("qwen3_next", "sglang", "cpu", "0.5.20", (None, "tested", False, NOT_HERE)),
        ("qwen3_next", "sglang", "cuda", "0.1", ("triton", "untested", False, NOT_HERE)),
        ("llama", "vllm", "cuda", "0.24.0", ("triton", "read", False, NOT_HERE)),
        (
            "qwen3_next", "vllm", "rocm", "0.32.0",
            ("triton", "tested", False, f"off by default, needs AITER on gfx9 and {SWITCH}=1"),
        ),
        (
            "qwen3_next", "sglang", "cuda", "0.5.20",
            ("triton", "tested", True, "on by default, needs no expert parallelism"),
        ),
    ],
)  # fmt: skip
def test_a_report_of_a_release(
    tmp_path: Path, model: str, engine: str, platform: str | None, release: str | None, expected: Any
) -> None:
    decision = decided(tmp_path, model_type=model, engine=engine)
    report = runtime_report(decision, platform, release)
    keys = ("platform", "engine_version", "backend", "version", "upstream.already", "upstream.detail")
    assert report == dict(zip(keys, (platform, release, *expected), strict=True))


def test_a_report_has_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = [
        {"models": ["A", "B"], "by_default": False, "condition": "x"},
        {"by_default": True, "condition": "y", "wrong": "the slot is empty"},
    ]
    monkeypatch.setattr(native, "fusing", lambda *of: asked.append(of) or rows)
    report = runtime_report(decided(tmp_path, model_type="qwen3_5_moe"), "rocm", "0.32.0+cpu")
    assert report["upstream.detail"] == (
        "A, B: off by default, needs x; on by default, needs y, wrong: the slot is empty"
    )
    # One that is wrong is none that fuses rightly.
    assert report["upstream.already"] is False
    assert asked == [("vllm", "qwen3_5_moe", "rocm", "0.32.0+cpu")]


@pytest.mark.parametrize(
    ("platform", "release", "words"),
    [
        ("gpu", None, "unknown platform 'gpu'; use one of cpu, cuda, rocm"),
        ("cpu", "newest", "'newest' is no version number; use one like 1.2.3"),
    ],
)
def test_a_platform_or_a_release_that_is_none(
    tmp_path: Path, platform: str, release: str | None, words: str
) -> None:
    with pytest.raises(FsePatchError) as error:
        runtime_report(decided(tmp_path), platform, release)
    assert str(error.value) == words
