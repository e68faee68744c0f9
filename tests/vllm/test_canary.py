"""The canary on vLLM's real loader and models, without an engine around them: what it proves, and what not.

That it stops every planted fault is shown by test_faults.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ..planted.weighing import shared_gate_inside_the_softmax
from ..running import parameters
from . import cases
from .conftest import Runs
from .engine import Case, Checkpoints
from .test_inherited import building
from .test_off import in_process

FAMILIES = ("qwen2_moe_wide4", "qwen3_next", "qwen3_5_text_3d", "glm4_moe_shared2_scale", "glm4_moe_grouped")
# Built, loaded and proved; on a CPU vLLM stops in its first forward pass. 0.28 does not know it.
BFLOAT16 = ("qwen2_moe", *(["qwen4_exp"] if cases.NEWEST else []))


def load(checkpoint: str, dtype: str = "float32", **options: Any) -> dict[str, Any]:
    """The canary's findings on a model that vLLM's own loader has loaded, or the error."""
    import torch
    from vllm.model_executor.model_loader import get_model_loader

    from fse_patch.errors import AuditError

    with building(checkpoint) as config:
        config.model_config.dtype = getattr(torch, dtype)
        for name, value in options.items():
            setattr(config.load_config, name, value)
        try:
            loader = get_model_loader(config.load_config)
            model = loader.load_model(vllm_config=config, model_config=config.model_config)
        except AuditError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    report = model._fse_patch.report()
    return {**report["canary"], "calls": report["calls_by_mode"], "compared": report["compared"]}


def run_unproved(checkpoint: str) -> str:
    """What a fused block says where the loader's hook never came to prove it."""
    import torch
    from vllm.model_executor.model_loader import get_model_loader

    from fse_patch.adapters import prove
    from fse_patch.adapters.vllm.prove import Prover
    from fse_patch.errors import AuditError

    with building(checkpoint) as config, patch.object(prove, "prove", lambda *_: None):
        loader = get_model_loader(config.load_config)
        fused_role = loader.load_model(vllm_config=config, model_config=config.model_config)._fse_patch
    try:
        block = fused_role.layers[0].block
        Prover(config).output(block, torch.zeros(1, fused_role.layout.hidden_size))
    except AuditError as error:
        return f"{fused_role.report()['canary']['state']}: {error}"
    return "ran"


def probe(folder: str) -> dict[str, Any]:
    """Everything that one process can find out; ``folder`` has the checkpoints by dtype and recipe."""
    import torch
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
    found: dict[str, Any] = {}
    for recipe in FAMILIES:
        found[recipe] = load(f"{folder}/float32/{recipe}")
    for recipe in BFLOAT16:
        found[f"bfloat16 {recipe}"] = load(f"{folder}/bfloat16/{recipe}", "bfloat16")
    with patch.dict(os.environ, FSE_PATCH_VERIFY="all"):
        found["all"] = load(f"{folder}/float32/qwen2_moe")
    with shared_gate_inside_the_softmax("vllm"):
        found["faulty"] = load(f"{folder}/float32/qwen2_moe")
        with patch.dict(os.environ, FSE_PATCH_VERIFY="off"):
            found["off"] = load(f"{folder}/float32/qwen2_moe")
    found["dummy"] = load(f"{folder}/float32/qwen2_moe", load_format="dummy")
    found["unproved"] = run_unproved(f"{folder}/float32/qwen2_moe")
    found["again"] = load(f"{folder}/float32/qwen2_moe")
    return found


@pytest.fixture(scope="module")
def found(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # Paths of the test's own: rendezvous files lie beside them.
    folder = tmp_path_factory.mktemp("canary")
    for dtype, recipes in {
        "float32": {*FAMILIES, "qwen2_moe"},
        "bfloat16": {*BFLOAT16},
    }.items():
        (folder / dtype).mkdir()
        for recipe in recipes:
            (folder / dtype / recipe).symlink_to(checkpoints.path(recipe, dtype))
    result: dict[str, Any] = in_process(
        f"{__name__}:probe", str(folder), FSE_PATCH="vllm", PYTHONPATH=SHIM + os.pathsep + CI
    )
    return result


ROOT = Path(__file__).parent.parent.parent
SHIM, CI = str(ROOT / "tests" / "shims" / "gdn_float32"), os.pathsep.join([str(ROOT), str(ROOT / "ci")])


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_clean_checkpoint_passes(found: dict[str, Any], recipe: str) -> None:
    assert found[recipe]["state"] == "passed", found[recipe]
    assert found[recipe]["deviation"] < 1e-5
    assert len(found[recipe]["layers"]) == 1
    assert found[recipe]["calls"] == {}
    assert found[recipe]["compared"] >= 2 * 3 * 64


@pytest.mark.parametrize("recipe", BFLOAT16)
def test_bfloat16_passes(found: dict[str, Any], recipe: str) -> None:
    result = found[f"bfloat16 {recipe}"]
    assert result["state"] == "passed", result
    assert 1e-4 < result["deviation"] < 2**-6


def test_a_fault_stops_the_load(found: dict[str, Any]) -> None:
    assert "CanaryError" in found["faulty"].get("error", ""), found["faulty"]
    assert "the model is not served" in found["faulty"]["error"]


@pytest.mark.long
@pytest.mark.one_release
@pytest.mark.parametrize("case", cases.TENSOR_PARALLEL, ids=lambda case: case.name)
def test_the_ranks_of_tensor_parallelism_prove_alike(runs: Runs, case: Case) -> None:
    result = runs.tensor_parallel.fused[case.name]
    roles = [role for worker in result["workers"] for role in worker["roles"]]
    assert [role["canary"]["state"] for role in roles] == ["passed", "passed"]
    assert all(role["compared"] for role in roles)


@pytest.mark.parametrize("case", parameters(cases.DRAFTS, long=cases.LONG))
def test_drafts_are_proved_too(runs: Runs, case: Case) -> None:
    (worker,) = runs.float32.fused[case.name]["workers"]
    roles = {role["role"]: role["canary"]["state"] for role in worker["roles"]}
    assert roles == {"main": "passed", "draft": "passed"}


def test_all_layers_are_proved_where_asked_for(found: dict[str, Any]) -> None:
    assert found["all"]["state"] == "passed"
    assert found["all"]["layers"] == [0, 1]


def test_what_proves_nothing_says_so(found: dict[str, Any]) -> None:
    assert found["off"]["state"] == "off"
    assert found["dummy"]["state"] == "not_loaded"
    assert found["unproved"].startswith("pending: main model: layer 0 runs before")
    assert found["again"]["state"] == "passed"
