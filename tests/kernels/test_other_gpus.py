"""What a paired layer launches, compiled for GPUs that are not here: it fits their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLAIN, INT4 = "plain+plain", "marlin g128+plain"
ALL = [PLAIN, INT4, "awq g128+plain", "bytes g32+plain"]
FP8 = ["block+plain", "block+block", "channel+plain"]


# Bytes of shared memory that a block may have where tiles were timed.
H200 = 227 << 10


@dataclass(frozen=True)
class Gpu:
    """A GPU as Triton has it, with the bytes of shared memory that a block may have."""

    backend: str
    architecture: str
    memory: int

    @property
    def words(self) -> list[str]:
        """What the command takes."""
        warp = "64" if self.architecture.startswith("gfx9") else "32"
        return [self.backend, self.architecture, warp, str(self.memory)]


# CUDA's programming guide, table of compute capabilities; for AMD the LDS that a workgroup may have.
GPUS = {
    "A100": Gpu("cuda", "80", 163 << 10),
    "RTX 3090": Gpu("cuda", "86", 99 << 10),
    "L40S": Gpu("cuda", "89", 99 << 10),
    "H200": Gpu("cuda", "90", H200),
    "B200": Gpu("cuda", "100", H200),
    "GB10": Gpu("cuda", "121", 99 << 10),
    "MI300X": Gpu("hip", "gfx942", 64 << 10),
    "MI355X": Gpu("hip", "gfx950", 160 << 10),
    "Strix Halo": Gpu("hip", "gfx1151", 64 << 10),
}
# No conversion from e4m3; on the last one it is emulated, and takes over a quarter of an hour to compile.
WITHOUT_FP8 = ("A100", "RTX 3090", "Strix Halo")
LONG = pytest.mark.long
Line = dict[str, Any]


def compiled(gpu: Gpu, *formats: str) -> tuple[list[Line], str]:
    """What was compiled, and the end of what Triton said."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", *gpu.words, *formats],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return lines, ran.stderr[-2000:] if ran.returncode else ""


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("RTX 3090", [PLAIN, INT4]),
        ("MI300X", [PLAIN]),
        ("MI355X", [PLAIN]),
        ("Strix Halo", [PLAIN]),
        *(pytest.param(name, ALL, marks=LONG) for name in GPUS),
        *(pytest.param(name, FP8, marks=LONG) for name in GPUS if name not in WITHOUT_FP8),
    ],
)
def test_every_launch_compiles_and_fits(name: str, formats: list[str]) -> None:
    gpu = GPUS[name]
    lines, said = compiled(gpu, *formats)
    assert not said
    assert {(line["format"], line["tokens"]) for line in lines} == {(f, n) for f in formats for n in (1, 16)}
    assert all(line["shared"] <= gpu.memory for line in lines)
    kernels = {line["kernel"] for line in lines}
    assert kernels >= {"route._route", "router_logits._router_logits", "experts_once.w13_kernel"}
    assert ("router_logits._product" in kernels) == (gpu.backend == "cuda")
    # Tiles are those of an H200, and stay so there. Others do not fit the plain ones.
    if PLAIN in formats or gpu.memory == H200:
        assert any(line["fewer"] for line in lines) == (gpu.memory < H200)


def test_what_fits_nowhere_is_said() -> None:
    """The control: the routing fits any device, and no tile a device of 2 KiB."""
    lines, said = compiled(Gpu("cuda", "86", 2 << 10), INT4)
    assert "out of resource: shared memory" in said
    assert not [line for line in lines if line["kernel"].startswith("experts_once.")]
