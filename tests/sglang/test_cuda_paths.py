"""What layers with modes meet on CUDA: a second stream, torch.compile, several processes, other backends."""

from __future__ import annotations

from typing import Any

import pytest

from .test_modes import NATIVE, OURS, run_builds

pytestmark = pytest.mark.one_release
THREE = [(1, "small"), (2, "fused")]
OLD = {"capability": [7, 5]}
# Name: checkpoint, backend of the table, its steps, what else of a build.
BUILDS: dict[str, tuple[str, str, list[tuple[int, str]], dict[str, Any]]] = {
    "ours, streams": ("qwen3_5_text", OURS, THREE, {"probe": "dual stream"}),
    "native, streams": ("qwen3_next", NATIVE, THREE, {"probe": "dual stream"}),
    "ours, compiled": ("qwen3_5_text", OURS, [(2, "small"), (3, "fused")], {"probe": "compiled"}),
    "native glm": ("glm4_moe_scale", NATIVE, [(1, "small")], {"probe": "all-reduce"}),
    # SGLang fuses GLM-4 from capability 8.0 on; below, we do.
    "our glm": ("glm4_moe_scale", OURS, THREE, {**OLD, "probe": "choice"}),
    "our glm, summed": ("glm4_moe_scale", OURS, THREE, {**OLD, "probe": "all-reduce"}),
    "ktransformers": ("qwen3_5_text", OURS, THREE, {"server": {"kt_weight_path": "nowhere"}}),
    "ktransformers, native": ("qwen3_next", NATIVE, THREE, {"server": {"kt_weight_path": "nowhere"}}),
}
SIDE = ["side waits for main", "on side", "off side", "main waits for side"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    builds = {
        name: (recipe, backend, steps, {"fault": False, "verify": "sample", **rest})
        for name, (recipe, backend, steps, rest) in BUILDS.items()
    }
    return run_builds(tmp_path_factory.mktemp("cuda"), builds)


def probed(built: dict[str, Any], name: str) -> Any:
    found = built[name]
    assert not found["error"], found["error"]
    assert found["report"]["canary"]["state"] == "passed", found["report"]["canary"]
    return found["probe"]


def test_split_alone_takes_the_second_stream(built: dict[str, Any]) -> None:
    found = probed(built, "ours, streams")
    assert found["log"] == {"1": [], "2": [], "3": SIDE}
    # Another order of the same sum, in bfloat16.
    assert max(found["distance"].values()) < 0.01
    # The control: without the hook the whole layer moves to the second stream, in small mode too.
    assert "on side" in found["unhooked"]


def test_what_is_left_to_sglang_takes_its_streams(built: dict[str, Any]) -> None:
    found = probed(built, "native, streams")
    assert (found["log"]["1"], found["log"]["3"]) == ([], SIDE)
    assert found["log"]["2"] == SIDE  # fused is SGLang's own forward
    assert max(found["distance"].values()) < 0.01


def test_under_compile_the_mode_goes_by_the_real_number_of_tokens(built: dict[str, Any]) -> None:
    found = probed(built, "ours, compiled")
    assert found["modes"] == [{"small": 1}, {"fused": 1}, {"split": 1}]
    assert found["distance"] == [0.0, 0.0, 0.0]
    assert (found["graphs"], found["operators"]) == (1, 1)
    assert set(found["checks"].values()) == {"SUCCESS"}, found["checks"]
    # The control: traced through, the layer is no graph, or one for each mode.
    bare = found["bare"]
    assert "error" in bare or bare["graphs"] > 1, bare


@pytest.mark.parametrize("name", ["native glm", "our glm, summed"])
def test_glm_sums_over_processes_once(built: dict[str, Any], name: str) -> None:
    found = probed(built, name)
    once = {"sums": 1, "factor": 2.0} if found["sums itself"] else {"sums": 0, "factor": 1.0}
    assert found["two"] == once
    # The controls: one process has nothing to sum, and what SGLang sums later is not summed here.
    assert found["one process"]["sums"] == found["two, skipped"]["sums"] == 0


def test_glm_left_to_sglang_sums_once(built: dict[str, Any]) -> None:
    """The control of what the modes do: from 0.5.22 on a later layer sums."""
    found = probed(built, "native glm")
    assert found["two, left"] == found["two"]


def test_our_glm_chooses_stocks_experts(built: dict[str, Any]) -> None:
    found = probed(built, "our glm")
    assert found["ours"] == 0
    assert found["16 bit"] > 0  # the control


@pytest.mark.parametrize("name", ["ktransformers", "ktransformers, native"])
def test_another_backend_is_refused_before_anything_is_built(built: dict[str, Any], name: str) -> None:
    found = built[name]
    assert found["report"] is None
    decision = found["decisions"][-1]
    wanted = "upstream.already" if name.endswith("native") else "backend.routing"
    assert (decision["fuse"], decision["reason"]) == (False, wanted)
    assert "own:" not in decision["detail"]  # no modes either
