"""Models that SGLang's loader builds besides the main one: MTP drafts, and models that it fuses by itself."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from ..running import Case, Checkpoints, with_dense_layer, with_other_shared_dtype
from . import qwen4_exp
from .conftest import Runs

DRAFTS = ("qwen3_next_mtp", "qwen3_5_mtp", "qwen3_5_mtp_3d", "qwen3_5_text_mtp", "glm4_moe_mtp")
# Main models that SGLang does not run on a CPU, though it builds their blocks; and how many of these.
MAIN = {"glm4_moe_lite": 1}
MAIN |= {"qwen4_exp": 2} if Version(version("sglang")) >= Version("0.5.20") else {}
# What SGLang fuses by itself on CUDA, told to these models only: the engine's own model is a CPU's.
NATIVE = ("glm4_moe_scale", "qwen3_next")
# Families of which SGLang builds every layer sparse, whatever config.json says.
DENSE = ("qwen2_moe", "qwen3_next")
LIMIT = 5e-6


def builds(checkpoints: Checkpoints, folder: Path) -> dict[str, dict[str, Any]]:
    """What is built in one engine, by a name."""
    wanted: dict[str, dict[str, Any]] = {
        name: {"folder": str(checkpoints.path(name)), "draft": True} for name in DRAFTS
    }
    for name in MAIN:
        path = qwen4_exp.make(folder / name) if name == "qwen4_exp" else checkpoints.path(name)
        wanted[name] = {"folder": str(path), "draft": False}
    for name in NATIVE:
        plain = checkpoints.path(name)
        mixed = with_other_shared_dtype(plain, folder / name)
        wanted[f"{name} native"] = {"folder": str(plain), "draft": False, "platform": "cuda"}
        wanted[f"{name} mixed"] = {"folder": str(mixed), "draft": False, "platform": "cuda"}
    for name in DENSE:
        dense = with_dense_layer(checkpoints.path(name), folder / f"{name}-dense")
        wanted[f"{name} dense"] = {"folder": str(dense), "draft": False}
    return wanted


@pytest.fixture(scope="module")
def built(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By arm and name."""
    wanted = builds(runs.checkpoints, tmp_path_factory.mktemp("mixed"))
    case = Case("qwen2_moe", engine_args={"steps": [("build", given) for given in wanted.values()]})
    results = {}
    for arm in ("stock", "fused"):
        steps = runs.steps(case, arm == "fused")
        results |= {f"{arm} {name}": found for name, found in zip(wanted, steps, strict=True)}
    return results


@pytest.mark.parametrize("recipe", [*DRAFTS, *MAIN])
def test_a_model_is_built_loaded_and_right(built: dict[str, dict[str, Any]], recipe: str) -> None:
    stock, fused = built[f"stock {recipe}"], built[f"fused {recipe}"]
    number = MAIN.get(recipe, 1)
    assert [block["shared_mlp"] for block in stock["blocks"]] == [True] * number
    assert [block["shared_mlp"] for block in fused["blocks"]] == [False] * number
    assert fused["report"]["role"] == ("draft" if recipe in DRAFTS else "main")
    assert fused["report"]["canary"]["state"] == "passed", fused["report"]["canary"]
    assert fused["report"]["slots_loaded"] == len(fused["report"]["built_layers"]) == number
    wanted, got, control = (torch.tensor(x) for x in (stock["output"], fused["output"], fused["control"]))
    scale = wanted.abs().mean()
    assert (got - wanted).abs().mean() <= LIMIT * scale
    assert (control - wanted).abs().mean() > 100 * LIMIT * scale


@pytest.mark.parametrize("recipe", NATIVE)
def test_native_fusion_that_is_right_is_left_alone(built: dict[str, dict[str, Any]], recipe: str) -> None:
    stock, fused = built[f"stock {recipe} native"], built[f"fused {recipe} native"]
    assert fused["decisions"][-1]["reason"] == "upstream.already"
    assert fused["blocks"] == stock["blocks"]
    assert {(block["slots"], block["shared_mlp"]) for block in fused["blocks"]} == {(1, False)}


@pytest.mark.parametrize("recipe", NATIVE)
def test_native_fusion_of_other_specs_is_switched_off(built: dict[str, dict[str, Any]], recipe: str) -> None:
    stock, fused = built[f"stock {recipe} mixed"], built[f"fused {recipe} mixed"]
    assert {block["slots"] for block in stock["blocks"]} == {1}  # what SGLang would serve
    assert fused["decisions"][-1]["reason"] == "quant.mixed"
    assert "switched off" in fused["decisions"][-1]["detail"]
    assert {(block["slots"], block["shared_mlp"]) for block in fused["blocks"]} == {(0, True)}


@pytest.mark.parametrize("recipe", DENSE)
def test_layers_that_sglang_leaves_without_weights_are_refused(
    built: dict[str, dict[str, Any]], recipe: str
) -> None:
    """The first of two layers has no experts in the checkpoint; SGLang's own model has them all the same."""
    stock, fused = built[f"stock {recipe} dense"], built[f"fused {recipe} dense"]
    assert len(stock["blocks"]) == 2
    assert fused["blocks"] == stock["blocks"]
    assert fused["report"] is None
    assert fused["decisions"][-1]["reason"] == "upstream.wrong"
    assert "none for layers [0]" in fused["decisions"][-1]["detail"]
