"""`fse-patch profile` in the real SGLang."""

from __future__ import annotations

import pytest

from ..profiled import check, profile
from .conftest import Runs


@pytest.mark.long
@pytest.mark.one_release
def test_kernels_of_decode_steps(runs: Runs) -> None:
    check(profile("sglang", runs.checkpoints.path("qwen2_moe"), {"dtype": "float32"}))
