"""Runs the real vLLM: batches of checkpoints in one process, because engine starts are what costs, and
functions of the tests in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

from fse_patch import verify

from ..running import ROOT, VOCAB, Case, Checkpoints

__all__ = ["VOCAB", "Case", "Checkpoints"]
ARM_TIMEOUT = 1500.0
TIMEOUT = 240.0
SPECULATIVE = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
TEXT_OF_VL = {"language_model_only": True}
# The CPU kernels of linear attention take their state in float32.
LINEAR_ATTENTION = {"mamba_ssm_cache_dtype": "float32"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def run(jobs: list[verify.VerifyJob], fused: bool, env: dict[str, str]) -> list[dict[str, Any]]:
    """One arm over the jobs, without multiprocessing unless ``env`` says so."""
    return verify.run_arm("vllm", jobs, fused, {**os.environ, **IN_PROCESS, **env}, ARM_TIMEOUT)


def in_process(place: str, *arguments: str, timeout: float = TIMEOUT, **env: str | None) -> Any:
    """Result of ``module:function`` of this folder in a new process, whose children end with it.

    An environment variable that is None is not set; our own and those of other plugins never are.
    """
    module, function = place.split(":")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FSE_PATCH") and k != "PYTHONPATH"}
    code = (
        f"import json, sys; from {module} import {function} as probe; found = probe(*sys.argv[1:]); "
        "sys.stdout.write('\\nRESULT ' + json.dumps(found) + '\\n')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT / "ci"), **{k: v for k, v in env.items() if v is not None}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    found = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert process.returncode == 0, output
    assert found, output
    return json.loads(found[-1].removeprefix("RESULT "))
