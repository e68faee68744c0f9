"""Modes of layers that we fuse, and of those that SGLang fuses by itself, as on CUDA; each is proved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..running import ROOT, Checkpoints
from .on_cuda import DEVICE_NAME

# Modes are for CUDA; on a CPU one release stands for them, by the way in which it starts a model.
pytestmark = pytest.mark.one_release
HEAD = {"engine": "sglang", "release": version("sglang"), "device": DEVICE_NAME, "versions": {}}
SHAPE = {"num_routed": 8, "num_shared_slots": 1, "hidden_size": 64, "width": 32, "dtype": "bfloat16"}
QWEN = {**SHAPE, "top_k": 4, "scoring": "softmax", "gated": True}
GLM = {**SHAPE, "top_k": 2, "scoring": "sigmoid", "gated": False}
OURS, NATIVE = "triton", "triton, fused natively"
THREE: list[tuple[int, str]] = [(1, "small"), (2, "fused")]
# Name: checkpoint, backend of the table, its steps, whether small mode is broken.
BUILDS: dict[str, tuple[str, str, list[tuple[int, str]], bool]] = {
    "ours": ("qwen3_5_text", OURS, THREE, False),
    "ours, slower": ("qwen3_5_text", OURS, [(1, "slower")], False),
    "ours, no table": ("qwen3_5_text", NATIVE, THREE, False),
    "ours, broken": ("qwen3_5_text", OURS, THREE, True),
    "native": ("qwen3_next", NATIVE, THREE, False),
    "native, no table": ("qwen3_next", OURS, THREE, False),
    "native, broken": ("qwen3_next", NATIVE, THREE, True),
    "native, unproved": ("qwen3_next", NATIVE, THREE, False),
    "ours, unproved": ("qwen3_5_text", OURS, THREE, False),
    # Without "fused": on a CPU the scale of GLM is left out by code that takes it for CUDA.
    "native glm": ("glm4_moe_scale", NATIVE, [(1, "small")], False),
}


def table(path: Path, backend: str, steps: list[tuple[int, str]]) -> str:
    choices = {"steps": [{"up_to": n, "mode": m} for n, m in steps], "otherwise": "split"}
    rows = [{**shape, **choices} for shape in (QWEN, GLM)]
    path.write_text(yaml.safe_dump({**HEAD, "backend": backend, "measured": "by hand", "rows": rows}))
    return str(path)


def run_builds(
    folder: Path, builds: dict[str, tuple[str, str, list[tuple[int, str]], dict[str, Any]]]
) -> dict[str, Any]:
    """Results of `on_cuda`, by name: checkpoint, backend of the table, its steps, and the rest of a build."""
    checkpoints = Checkpoints(folder, "sglang")
    wanted = [
        {
            "folder": str(checkpoints.path(recipe, "bfloat16")),
            "table": table(folder / f"{number}.yaml", backend, steps),
            **rest,
        }
        for number, (recipe, backend, steps, rest) in enumerate(builds.values())
    ]
    request, results = folder / "builds.json", folder / "results.json"
    request.write_text(json.dumps(wanted))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.sglang.on_cuda", str(request), str(results)]
    # On a GPU layers pair by themselves, and modes are of merged ones.
    env = {**os.environ, "PYTHONPATH": path, "FSE_PATCH_LAYOUT": "merged"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(builds, json.loads(results.read_text()), strict=True))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    builds = {
        name: (
            recipe,
            backend,
            steps,
            {"fault": fault, "verify": "off" if name.endswith("unproved") else "sample"},
        )
        for name, (recipe, backend, steps, fault) in BUILDS.items()
    }
    return run_builds(tmp_path_factory.mktemp("modes"), builds)


def test_every_mode_of_ours_is_proved(built: dict[str, Any]) -> None:
    found = built["ours"]
    assert not found["error"]
    assert found["report"]["canary"]["state"] == "passed", found["report"]["canary"]
    assert found["executions"] == len(found["report"]["built_layers"]) == 2
    assert found["report"]["modes"] == "small up to 1, fused up to 2, split beyond"


def test_nobody_runs_experts_past_their_modes(built: dict[str, Any]) -> None:
    assert "past the modes" in built["ours"]["past"]


def test_without_a_proof_sglangs_own_forward_stays(built: dict[str, Any]) -> None:
    found = built["native, unproved"]
    assert (found["report"]["canary"]["state"], found["left"]) == ("off", True)
    # The controls: with a proof it does not, and what SGLang cannot run by itself runs as it was asked to.
    assert not built["native"]["left"]
    ours = built["ours, unproved"]
    assert (ours["report"]["canary"]["state"], ours["left"]) == ("off", False)


@pytest.mark.parametrize("name", ["ours, broken", "native, broken"])
def test_one_broken_mode_is_not_served(built: dict[str, Any], name: str) -> None:
    """The control."""
    assert "CanaryError" in built[name]["error"], built[name]


@pytest.mark.parametrize(
    ("name", "reason"), [("ours, slower", "slower.measured"), ("ours, no table", "slower.unmeasured")]
)
def test_without_a_win_it_stays_stock(built: dict[str, Any], name: str, reason: str) -> None:
    assert built[name]["report"] is None
    assert built[name]["decisions"][-1]["reason"] == reason


@pytest.mark.parametrize(("name", "modes"), [("native", 3), ("native glm", 2)])
def test_modes_beside_sglangs_own_fusion(built: dict[str, Any], name: str, modes: int) -> None:
    found = built[name]
    assert not found["error"]
    decision = found["decisions"][-1]
    assert (decision["fuse"], decision["reason"]) == (False, "upstream.already")
    assert f"own: {found['report']['modes']}" in decision["detail"]
    assert found["report"]["modes"].count(",") == modes - 1
    assert found["report"]["native"]
    assert found["report"]["canary"]["state"] == "passed", found["report"]["canary"]
    assert found["executions"] == 2


def test_without_a_table_native_fusion_is_left_alone(built: dict[str, Any]) -> None:
    assert built["native, no table"]["report"] is None
    assert built["native, no table"]["decisions"][-1]["reason"] == "upstream.already"
