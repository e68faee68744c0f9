"""LoRA adapters in the real vLLM: of the attention they run with both layouts, others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fse_patch.lab import verify

from ..lora import case_of, check
from ..paired import LAYOUTS
from ..running import ROOT, Case
from .conftest import Runs

RECIPES = ["qwen2_moe", pytest.param("glm4_moe_scale", marks=pytest.mark.long)]
Arms = dict[str, tuple[Case, dict[str, Any]]]


@pytest.fixture(scope="module")
def path() -> Iterator[dict[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ARM", "tests.vllm.lora_arm")
        # Wherever LoRA is on, stock takes experts that no CPU runs.
        yield {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'shims' / 'cpu_experts'}"}


@pytest.fixture(scope="module")
def stock() -> Arms:
    """Stock once, by recipe."""
    return {}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters(
    runs: Runs,
    stock: Arms,
    path: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    recipe: str,
    layout: str,
) -> None:
    if recipe not in stock:
        case = case_of(runs, recipe, tmp_path_factory.mktemp("lora"))
        stock[recipe] = case, runs.arm([case], False, path)[case.name]
    case, plain = stock[recipe]
    ours = runs.arm([case], True, path | LAYOUTS[layout])[case.name]
    check(plain, ours, layout)
