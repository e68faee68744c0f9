"""Tuned tables that an engine ships, in a package folder made for the test, and what fusing does to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fse_patch import doctor, table_coverage
from fse_patch.adapters.patching import guards
from fse_patch.cli.doctor import table
from fse_patch.errors import FsePatchError

from .checkpoints import config_of, model_tensors, with_scales, write_checkpoint
from .test_cli_plan import fse_patch

H200, H100 = "NVIDIA_H200", "NVIDIA_H100_80GB_HBM3"
VLLM = "model_executor/layers/fused_moe/configs"
SGLANG = "srt/layers/moe/moe_runner/triton_utils/configs"
NAMES = {
    "vllm": [
        f"{VLLM}/E=4,N=32,device_name={H200}.json",
        f"{VLLM}/E=4,N=32,device_name={H100}.json",
        f"{VLLM}/E=5,N=32,device_name={H100}.json",
        f"{VLLM}/E=5,N=16,device_name={H200}.json",
        f"{VLLM}/E=4,N=32,device_name={H200},dtype=fp8_w8a8,block_shape=[16,16].json",
        f"{VLLM}/E=4,N=32,device_name={H200},dtype=fp8_w8a8.json",
        f"{VLLM}/README.md",
    ],
    "sglang": [
        f"{SGLANG}/triton_3_4_0/E=4,N=32,device_name={H200},dtype=fp8_w8a8,block_shape=[16, 16].json",
        f"{SGLANG}/triton_3_5_1/E=5,N=32,device_name={H200},dtype=fp8_w8a8,block_shape=[16, 16].json",
        f"{SGLANG}/triton_3_5_1/E=4,N=32,device_name={H100}_down.json",
        f"{SGLANG}/triton_3_5_1/E=4,N=32,device_name={H200},dtype=fp8_w8a8,per_channel_quant=True.json",
    ],
}
SMALL = table_coverage.Shape("small", 4, 1, 32)
BLOCKS = table_coverage.Shape("small", 4, 1, 32, "fp8-block", (16, 16))
CHANNELS = table_coverage.Shape("small", 4, 1, 32, "fp8-channel")
LOOKS = SimpleNamespace(qualname="get_moe_configs")
Row = Mapping[str, Any]


@pytest.fixture
def packages(tmp_path: Path) -> str:
    """A folder with both engines' packages, of which nothing but the tables is there."""
    for engine, names in NAMES.items():
        for name in ["__init__.py", *names]:
            path = tmp_path / engine / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise AssertionError('imported')" if name == "__init__.py" else "{}")
    return str(tmp_path)


def row(engine: str, packages: str, shape: table_coverage.Shape, width: int = 32, patches: Any = ()) -> Row:
    found = table_coverage.coverage(engine, table_coverage.shipped(engine, [packages]), [shape], patches)
    return next(row for row in found if row["width"] == width)


@pytest.mark.parametrize(
    ("engine", "shape", "width", "own", "left", "state"),
    [
        ("vllm", SMALL, 32, [H100], [H200], "lost"),
        ("vllm", SMALL, 16, [H200], [], "own"),
        ("vllm", SMALL, 8, [], [], "none"),
        ("vllm", BLOCKS, 32, [], [H200], "lost"),
        # vLLM has no word for scales by channel in its names, SGLang has.
        ("vllm", CHANNELS, 32, [], [H200], "lost"),
        ("sglang", CHANNELS, 32, [], [H200], "lost"),
        ("sglang", BLOCKS, 32, [H200], [], "own"),
        ("sglang", SMALL, 32, [], [], "none"),
    ],
)
def test_which_tables_there_are(
    packages: str,
    engine: str,
    shape: table_coverage.Shape,
    width: int,
    own: list[str],
    left: list[str],
    state: str,
) -> None:
    found = row(engine, packages, shape, width)
    assert (found["devices"], found["only_unfused"], found["table"]) == (own, left, state)
    assert (found["experts"], found["fused_experts"]) == (4, 5)


def test_a_patch_that_looks_for_the_table_of_e_keeps_it(packages: str) -> None:
    assert row("vllm", packages, SMALL)["table"] == "lost"
    assert row("vllm", packages, SMALL, patches=[LOOKS])["table"] == "kept"
    assert row("vllm", packages, SMALL, 16, [LOOKS])["table"] == "own"


def test_folders_of_the_users_own_count(packages: str, tmp_path: Path, monkeypatch: Any) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / f"E=5,N=32,device_name={H200}.json").write_text("{}")
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(own))
    assert row("vllm", packages, SMALL)["only_unfused"] == []


def test_the_shape_of_a_checkpoint(tmp_path: Path) -> None:
    config = config_of("qwen3_next", moe_intermediate_size=32)
    plain = write_checkpoint(tmp_path / "plain", config, model_tensors("qwen3_next"))
    assert table_coverage.shape_of(plain) == table_coverage.Shape("plain", 4, 1, 32, "plain", None)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    fp8 = write_checkpoint(tmp_path / "fp8", config, with_scales(model_tensors("qwen3_next"), 16))
    assert table_coverage.shape_of(fp8) == table_coverage.Shape("fp8", 4, 1, 32, "fp8-block", (16, 16))
    dense = write_checkpoint(tmp_path / "dense", {"model_type": "llama"}, None)
    with pytest.raises(FsePatchError, match="no shared expert that could be fused"):
        table_coverage.shape_of(dense)


def test_the_doctor_says_it(packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "qwen", config_of("qwen3_next"), model_tensors("qwen3_next"))
    shipped = table_coverage.shipped
    monkeypatch.setattr(table_coverage, "shipped", lambda engine: shipped(engine, [packages]))
    monkeypatch.setattr(guards, "engine_version", lambda book: "0.32.0")
    monkeypatch.setattr(guards, "guard", lambda *_: "")
    here = doctor._environment()
    monkeypatch.setattr(doctor, "_environment", lambda: here | {"devices": ["NVIDIA H200"]})
    # A shipped patch looks for the table of E; the control is a ledger without it.
    assert not any("tuned table" in words for words in doctor.examine(checkpoint)["hazards"])
    monkeypatch.setattr(table_coverage, "LOOK_UP", "another_name")
    report = doctor.examine(checkpoint)
    json.dumps(report)
    (hazard,) = [words for words in report["hazards"] if "tuned table" in words]
    assert "vllm has a tuned table for 4 experts of width 32 and none for 5 (qwen, plain)" in hazard
    rows = table(report)["vllm"]["tuned tables"]
    assert "qwen (4+1 experts, plain), width 32: none for E+S, the one of E is lost" in rows
    monkeypatch.setattr(doctor, "_environment", lambda: here | {"devices": ["NVIDIA H100 80GB HBM3"]})
    assert not any("tuned table" in words for words in doctor.examine(checkpoint)["hazards"])
    names = {row["shape"] for engine in doctor.examine()["engines"] for row in engine["tables"]}
    assert names == {"Qwen1.5-MoE-A2.7B", "Qwen3-Next-80B-A3B", "Qwen3.5-35B-A3B", "GLM-4.5"}


def test_a_checkpoint_that_is_none_is_bad_input(tmp_path: Path) -> None:
    done = fse_patch("doctor", tmp_path)
    assert done.returncode == 2
    assert "has no config.json" in done.stderr
