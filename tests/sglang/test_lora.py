"""LoRA adapters in the real SGLang: of the attention they run with both layouts, others are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fse_patch.lab import verify

from ..lora import KINDS, case_of, check, check_attention
from ..lora_adapter import ATTENTION, make
from ..paired import LAYOUTS
from ..running import Case
from ..vllm.processes import in_process
from .conftest import Runs

RECIPES = ["qwen2_moe", pytest.param("glm4_moe_scale", marks=pytest.mark.long)]
Arms = dict[str, tuple[Case, dict[str, Any]]]


@pytest.fixture(scope="module", autouse=True)
def arm(runs: Runs) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", "tests.sglang.lora_arm")
        yield


@pytest.fixture(scope="module")
def stock() -> Arms:
    """Stock once, by recipe."""
    return {}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters(
    runs: Runs,
    stock: Arms,
    tmp_path_factory: pytest.TempPathFactory,
    recipe: str,
    layout: str,
) -> None:
    if recipe not in stock:
        # SGLang itself refuses what an adapter's config names; this one's says less than it holds.
        case = case_of(runs, recipe, tmp_path_factory.mktemp("lora"), ATTENTION)
        stock[recipe] = case, runs.arm([case], False, {})[case.name]
    case, plain = stock[recipe]
    ours = runs.arm([case], True, LAYOUTS[layout])[case.name]
    check(plain, ours, layout)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_that_is_there_at_the_start_is_limit_enough(
    runs: Runs, tmp_path: Path, layout: str
) -> None:
    case = case_of(runs, "qwen2_moe", tmp_path)
    case = replace(case, engine_args={**case.engine_args, "at_start": "attention"})
    arms = (runs.arm([case], fused, LAYOUTS[layout])[case.name] for fused in (False, True))
    check_attention(*arms, layout)


@pytest.mark.parametrize("layout", ["merged", pytest.param("paired", marks=pytest.mark.long)])
def test_an_adapter_of_experts_is_refused_at_the_start(runs: Runs, tmp_path: Path, layout: str) -> None:
    checkpoint = runs.checkpoints.path("qwen2_moe")
    adapters = {kind: make(checkpoint, tmp_path / kind, kind) for kind in KINDS}
    # Its config says less than it holds.
    adapters["hidden"] = make(checkpoint, tmp_path / "hidden", "routed", ATTENTION)
    given = {
        kind: {"folder": str(checkpoint), "lora_paths": {kind: str(path)}} for kind, path in adapters.items()
    }
    env = {"FSE_PATCH": "sglang", **LAYOUTS[layout]}
    found = in_process("tests.sglang.decisions:probe", json.dumps(given), **env)
    for kind in ("routed", "shared", "hidden"):
        assert found[kind]["reason"] == "lora"
        changed = "base_model.model.model.layers.0.mlp."
        assert found[kind]["detail"].startswith(f"LoRA adapter {kind!r} changes {changed}")
    # The control.
    assert found["attention"]["reason"] == "ok"
