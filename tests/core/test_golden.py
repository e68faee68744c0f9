"""The decision on every described checkpoint: a changed one is a changed row in tests/core/golden/."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.decision.decide import decide_roles
from fse_patch.fusion_core.decision.outcome import Merged
from fse_patch.fusion_core.decision.policy import Policy
from fse_patch.fusion_core.decision.policy_file import load_policy

from .golden import MODELS, ROWS, write_row
from .outcomes import code

POLICY = load_policy()
# No rule of the default policy names an engine.
ENGINES = ("vllm", "sglang")


def decided(
    folder: Path, row: dict[str, Any], engine: str = "vllm", policy: Policy = POLICY
) -> dict[str, Any]:
    """The decision on a row, in the words of its ``expect``."""
    roles = decide_roles(write_row(folder, row), engine, policy)
    main = roles["main"]
    found: dict[str, Any] = {"reason": code(main), "rule": main.rule}
    if isinstance(main, Merged):
        found["formats"] = list(main.formats)
    if "draft" in roles:
        found["draft"] = code(roles["draft"])
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_golden_decision(tmp_path: Path, row: dict[str, Any]) -> None:
    for engine in ENGINES:
        assert decided(tmp_path, row, engine) == row["expect"]


def test_there_are_enough_and_they_cover_every_format_and_family() -> None:
    sourced = [row["source"] for row in ROWS if row["source"] != "synthetic"]
    assert len(ROWS) >= 60
    assert len(sourced) >= 20
    assert all(source.startswith("https://") for source in sourced)
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    families = {MODELS[row["model"]]["family"] for row in ROWS}
    assert families == {"qwen2_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "glm4_moe"}
    methods = {row["quantization"].get("quant_method") for row in ROWS if "quantization" in row}
    assert methods >= {
        "fp8", "awq", "gptq", "auto-round", "inc", "compressed-tensors", "quark", "mxfp4", "modelopt",
        "bitsandbytes", "gguf", "fbgemm_fp8",
    }  # fmt: skip


def test_every_rule_of_the_default_policy_decides_a_row() -> None:
    assert {row["expect"]["rule"] for row in ROWS} - {""} == {rule.id for rule in POLICY.rules}


@pytest.mark.parametrize("gone", [rule.id for rule in POLICY.rules])
def test_a_policy_without_one_of_its_rules_is_noticed(tmp_path: Path, gone: str) -> None:
    less = Policy(tuple(rule for rule in POLICY.rules if rule.id != gone))
    rows = [row for row in ROWS if row["expect"]["rule"] == gone]
    assert any(decided(tmp_path / row["id"], row, policy=less) != row["expect"] for row in rows)


FUSING = [row for row in ROWS if row["expect"]["reason"] == "ok" and "stored" in row]


@pytest.mark.parametrize("part", ["routed", "shared"])
@pytest.mark.parametrize("row", FUSING, ids=lambda row: row["id"])
def test_a_row_that_fuses_does_not_once_one_side_is_stored_otherwise(
    tmp_path: Path, row: dict[str, Any], part: str
) -> None:
    changed = copy.deepcopy(row)
    changed["stored"][part] = "f32" if part == "shared" else "fp8-tensor"
    found = decided(tmp_path, changed)
    assert found["reason"].startswith("quant.")
