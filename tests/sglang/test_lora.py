"""LoRA adapters in the real SGLang: of the attention they run with both layouts, others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fse_patch.fusion_core.proof.compare import difference
from fse_patch.lab import verify

from ..lora import LIMIT, case_of, check
from ..lora_adapter import ATTENTION
from ..paired import LAYOUTS
from ..running import Case
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


@pytest.mark.parametrize("layout", ["merged", pytest.param("paired", marks=pytest.mark.long)])
def test_adapters_that_are_there_at_the_start(
    runs: Runs, tmp_path_factory: pytest.TempPathFactory, layout: str
) -> None:
    """SGLang takes its modules from those; one that changes experts leaves all to SGLang, and says so."""
    case = case_of(runs, "qwen2_moe", tmp_path_factory.mktemp("lora"), ATTENTION)
    found: dict[str, dict[bool, dict[str, Any]]] = {}
    for kind in ("attention", "routed"):
        asked = replace(case, engine_args={**case.engine_args, "at_start": kind})
        arms = {fused: runs.arm([asked], fused, LAYOUTS[layout]) for fused in (False, True)}
        found[kind] = {fused: result[case.name] for fused, result in arms.items()}
        for result in found[kind].values():
            assert "error" not in result, f"{result['error']}\n{result['log']}"
    stock, ours = found["attention"][False], found["attention"][True]
    (role,) = ours["workers"][0]["roles"]
    assert role.get("weight_layout", "merged") == layout
    for asked_of in ("plain", "adapted"):
        assert 0 < difference(stock[asked_of], ours[asked_of]).mean <= LIMIT
    # The control: the adapter changes answers.
    assert difference(stock["plain"], stock["adapted"]).mean > 1000 * LIMIT
    stock, ours = found["routed"][False], found["routed"][True]
    assert ours["workers"][0]["roles"] == []
    (refused,) = ours["workers"][0]["refused"]
    assert refused["reason"] == "lora"
    assert "LoRA adapter 'routed' changes base_model.model.model.layers.0.mlp.experts" in refused["detail"]
    assert ours["adapted"] == stock["adapted"]
