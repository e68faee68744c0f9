"""LoRA adapters in the real SGLang: of the attention they run with both layouts, others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fse_patch.lab import verify

from ..lora import LAYOUTS, case_of, check
from ..lora_adapter import ATTENTION
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
