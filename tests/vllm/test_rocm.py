"""The real models of every family, built, loaded and proved as on ROCm, on each profile of the fake AITER.

On a CPU: torch says that it is built for ROCm, and `import aiter` gives the fake. What a layer computes then
is compared with its checkpoint in float64, by the canary; the experts run in vLLM's CPU kernel."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest

from ..fakes.aiter_profiles import PROFILES, UNUSABLE
from .engine import Checkpoints
from .processes import ROOT, in_process
from .test_canary import load

# Every profile routes the first two; the others are routed by the same code.
EACH = ("qwen2_moe_wide4", "glm4_moe_shared2_scale")
FAMILIES = ("qwen3_next", "qwen3_5_text_3d", "qwen3_5_vl_3d", "glm4_moe_grouped")
NEWEST, NONE = "newest", "no aiter"
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "ci"), str(ROOT / "tests" / "shims" / "gdn_float32")])


def counted(calls: list[str], name: str, call: Any) -> Any:
    def wrapper(*args: Any) -> Any:
        calls.append(name)
        return call(*args)

    return wrapper


def proved(checkpoint: str, profile: Any) -> dict[str, Any]:
    """The canary's findings under a profile, and what of AITER was called."""
    from fse_patch.fusion_core.forward import aiter_router
    from fse_patch.fusion_core.kernels import aiter

    from ..fakes.aiter_profiles import installed

    calls: list[str] = []
    names = ("softmax_topk", "grouped_topk")
    wrapped = {name: counted(calls, name, getattr(aiter_router, name)) for name in names}
    # Groups of this size lose the scale in batches that these are not.
    with installed(profile), patch.multiple(aiter_router, **wrapped), patch.object(aiter, "GATE_GROUP", 0):
        found = load(checkpoint)
    return {**found, "aiter": sorted(set(calls))}


def broken(checkpoint: str) -> dict[str, Any]:
    """An AITER that passed its check and is wrong afterwards: routed experts weigh a little too much."""
    from fse_patch.fusion_core.forward import aiter_router

    honest = {name: getattr(aiter_router, name) for name in ("softmax_topk", "grouped_topk")}

    def off(name: str) -> Any:
        def topk(*args: Any) -> Any:
            weights, ids = honest[name](*args)
            return weights * 1.02, ids

        return topk

    with patch.multiple(aiter_router, **{name: off(name) for name in honest}):
        return proved(checkpoint, PROFILES[NEWEST])


def probe(folder: str) -> dict[str, Any]:
    """Everything that one process can find out; ``folder`` has the checkpoints."""
    import torch
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
    found: dict[str, Any] = {}
    for name, profile in {**PROFILES, **UNUSABLE, NONE: None}.items():
        for recipe in EACH:
            found[f"{name}: {recipe}"] = proved(f"{folder}/{recipe}", profile)
    for recipe in FAMILIES:
        found[recipe] = proved(f"{folder}/{recipe}", PROFILES[NEWEST])
    for recipe in EACH:
        found[f"broken: {recipe}"] = broken(f"{folder}/{recipe}")
    return found


@pytest.fixture(scope="module")
def found(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Paths of the test's own: rendezvous files lie beside them.
    folder = tmp_path_factory.mktemp("rocm")
    for recipe in (*EACH, *FAMILIES):
        (folder / recipe).symlink_to(checkpoints.path(recipe))
    result: dict[str, Any] = in_process(
        f"{__name__}:probe", str(folder), FSE_PATCH="vllm", PYTHONPATH=PYTHONPATH, timeout=600.0
    )
    return result


def topk(recipe: str) -> list[str]:
    return ["grouped_topk" if recipe.startswith("glm") else "softmax_topk"]


@pytest.mark.parametrize("recipe", EACH)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_release_routes_the_real_blocks(found: dict[str, Any], profile: str, recipe: str) -> None:
    result = found[f"{profile}: {recipe}"]
    assert result["state"] == "passed", result
    assert result["deviation"] < 1e-5
    assert result["aiter"] == topk(recipe)


@pytest.mark.parametrize("recipe", EACH)
@pytest.mark.parametrize("profile", [*UNUSABLE, NONE])
def test_without_a_usable_aiter_the_reference_routes(
    found: dict[str, Any], profile: str, recipe: str
) -> None:
    result = found[f"{profile}: {recipe}"]
    assert result["state"] == "passed", result
    assert result["aiter"] == []


@pytest.mark.parametrize("recipe", FAMILIES)
def test_every_family_on_the_newest_release(found: dict[str, Any], recipe: str) -> None:
    assert found[recipe]["state"] == "passed", found[recipe]
    assert found[recipe]["aiter"] == topk(recipe)


@pytest.mark.parametrize("recipe", EACH)
def test_an_aiter_that_is_wrong_after_its_check_is_stopped(found: dict[str, Any], recipe: str) -> None:
    """The control: the canary sees what AITER gives."""
    result = found[f"broken: {recipe}"]
    assert "CanaryError" in result.get("error", ""), result
    assert result["aiter"] == topk(recipe)
