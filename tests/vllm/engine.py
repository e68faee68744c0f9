"""Runs batches of checkpoints in the real vLLM: many in one process, because engine starts are what costs."""

from __future__ import annotations

import os
from typing import Any

from fse_patch.lab import verify

from ..running import VOCAB, Case, Checkpoints

__all__ = ["VOCAB", "Case", "Checkpoints"]
ARM_TIMEOUT = 1500.0
SPECULATIVE = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
TEXT_OF_VL = {"language_model_only": True}
# The CPU kernels of linear attention take their state in float32.
LINEAR_ATTENTION = {"mamba_ssm_cache_dtype": "float32"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def run(jobs: list[verify.VerifyJob], fused: bool, env: dict[str, str]) -> list[dict[str, Any]]:
    """One arm over the jobs, without multiprocessing unless ``env`` says so."""
    return verify.run_arm("vllm", jobs, fused, {**os.environ, **IN_PROCESS, **env}, ARM_TIMEOUT)
