"""A release that no row lists: fused where all its seams were read, unfused where one was not."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest

from .. import other_release
from ..running import Case, Checkpoints
from .test_launch import WRAPPER, arguments, ended

CASE = Case("glm4_moe_scale")
SEAM = "sglang.srt.models.glm4_moe:Glm4MoeSparseMoeBlock.forward"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"), "sglang")


def test_with_known_seams_it_is_served_fused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    job = checkpoints.job(CASE)
    results, lines, _ = other_release.serve("sglang", job, other_release.copy("sglang", tmp_path))
    other_release.check_fused(results, lines, job, version("sglang"))


def test_with_another_seam_it_is_served_unfused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    job, copied = checkpoints.job(CASE), other_release.copy("sglang", tmp_path, SEAM)
    results, lines, _ = other_release.serve("sglang", job, copied)
    other_release.check_stock(results, lines, SEAM)


def test_with_another_seam_a_strict_server_ends(checkpoints: Checkpoints, tmp_path: Path) -> None:
    copied = other_release.copy("sglang", tmp_path / "copy", SEAM)
    path = os.pathsep.join(filter(None, [str(copied), os.environ.get("PYTHONPATH")]))
    args = arguments(checkpoints.path(CASE.recipe))
    status, log = ended(WRAPPER, args, tmp_path / "log", FSE_PATCH_STRICT="1", PYTHONPATH=path)
    assert status != 0
    (line,) = [line for line in log.splitlines() if f": {SEAM} reads " in line]
    assert line.startswith(f"fse_patch: sglang: release.seam: sglang {other_release.VERSION}: patch ")
    assert "loading shards" not in log
