"""The package and both adapters import with no aiter, with one that raises, and with another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "none": None,
    "raises": 'raise RuntimeError("ROCm version file not found")',
    "another": "def flatten(iterables): ...",
}
PROBE = """
import importlib, json, sys, torch
for name in {modules}:
    importlib.import_module(name)
touched = "aiter" in sys.modules
torch.version.hip = "7.0"
from fse_patch.fusion_core.kernels import aiter
aiter.architecture = lambda: "gfx942"
print("RESULT", json.dumps([touched, aiter.probe().why]))
"""
ADAPTERS = [
    f"fse_patch.adapters.{engine}.{path.stem}"
    for engine in ("vllm", "sglang")
    for path in sorted((ROOT / "adapters" / engine).glob("*.py"))
    if path.stem not in ("__init__", "arm")
]


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_imports_and_says_why_not(tmp_path: Path, package: str) -> None:
    content = PACKAGES[package]
    if content is not None:
        (tmp_path / "aiter").mkdir()
        (tmp_path / "aiter" / "__init__.py").write_text(content)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    modules = ["fse_patch", "fse_patch.adapters.patching.transaction", *ADAPTERS]
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(modules=modules)],
        env={**os.environ, "PYTHONPATH": path, "FSE_PATCH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    touched, why = json.loads(line.removeprefix("RESULT "))
    assert not touched
    wanted = {
        "none": "ModuleNotFoundError",
        "raises": "ROCm version file not found",
        "another": "aiter.fused_moe",
    }
    assert wanted[package] in why
