"""How `fse-patch verify` ends where nothing could be compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from ..running import ROOT
from .engine import Checkpoints


def verify(checkpoints: Checkpoints, **arguments: Any) -> tuple[int, dict[str, Any], str]:
    """Its status, its object, and what it says to people; engine arguments as vLLM names them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FSE_PATCH")}
    command = [sys.executable, "-m", "fse_patch.cli.app", "verify", str(checkpoints.path("qwen2_moe"))]
    done = subprocess.run(
        [*command, "--engine", "vllm", "--json", "--engine-args", json.dumps(arguments)],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def test_an_argument_that_is_misspelt(checkpoints: Checkpoints) -> None:
    status, report, said = verify(checkpoints, tensor_paralel_size=2)
    assert (status, report["exit_status"]) == (2, 2)
    assert "'tensor_paralel_size'; did you mean tensor_parallel_size?" in said


def test_an_engine_that_does_not_start_has_a_status_of_its_own(checkpoints: Checkpoints) -> None:
    status, report, said = verify(checkpoints, max_model_len=99999999)
    assert status == 4
    assert report["passed"] is False
    assert "nothing was compared: " in said.splitlines()[-1]
