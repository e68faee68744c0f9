"""GLM-4 on SGLang as on ROCm: the engine's own top-k is AITER's, which has the scale inside.

On a CPU, with the switches of SGLang's modules set in its scheduler and each profile of the fake AITER; what
a layer computes is compared with its checkpoint by the canary."""

from __future__ import annotations

from typing import Any

import pytest

from ..fakes.aiter_profiles import PROFILES
from ..running import Case
from .conftest import Runs

RECIPES = ("glm4_moe_scale", "glm4_moe_shared2_scale", "glm4_moe_grouped")
NEWEST = "newest"


@pytest.fixture(scope="module")
def found(runs: Runs) -> dict[str, Any]:
    def folder(recipe: str) -> str:
        return str(runs.checkpoints.path(recipe))

    builds = {name: [folder(RECIPES[0]), name, False] for name in PROFILES}
    builds |= {recipe: [folder(recipe), NEWEST, False] for recipe in RECIPES}
    builds["scaled again"] = [folder(RECIPES[0]), NEWEST, True]
    builds["qwen"] = [folder("qwen2_moe"), NEWEST, False]
    case = Case("qwen2_moe", engine_args={"steps": [("rocm", {"builds": list(builds.values())})]})
    (results,) = runs.steps(case, fused=True)
    return dict(zip(builds, results, strict=True))


@pytest.mark.parametrize("name", [*PROFILES, *RECIPES])
def test_the_slot_weighs_what_the_checkpoint_says(found: dict[str, Any], name: str) -> None:
    assert found[name]["state"] == "passed", found[name]
    assert found[name]["deviation"] < 1e-5
    assert found[name]["calls"] > 0


def test_a_scale_that_is_taken_out_again_is_stopped(found: dict[str, Any]) -> None:
    """The control, and sgl-project/sglang#28237: AITER's weights have it, and nothing scales the output."""
    assert "CanaryError" in found["scaled again"].get("error", ""), found["scaled again"]
    assert found["scaled again"]["calls"] > 0


def test_softmax_is_not_aiters_here(found: dict[str, Any]) -> None:
    assert found["qwen"]["state"] == "passed", found["qwen"]
    assert found["qwen"]["calls"] == 0
