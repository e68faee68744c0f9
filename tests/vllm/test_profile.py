"""`fse-patch profile` in the real vLLM."""

from __future__ import annotations

import pytest

from ..profiled import check, profile
from ..running import Checkpoints

ARGUMENTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
}


@pytest.mark.long
@pytest.mark.one_release
def test_kernels_of_decode_steps(checkpoints: Checkpoints) -> None:
    check(profile("vllm", checkpoints.path("qwen2_moe"), ARGUMENTS))
