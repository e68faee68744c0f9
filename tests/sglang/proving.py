"""Runs in SGLang's scheduler: what the canary says of a model that is built with a fault, or none."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fse_patch import runtime
from fse_patch.errors import AuditError

from ..planted.weighing import shared_gate_inside_the_softmax


def found(scheduler: Any, folder: str, faulty: bool, verify: str) -> dict[str, Any]:
    """The canary's findings, or the error that ends the load."""
    from . import live

    fault = shared_gate_inside_the_softmax("sglang") if faulty else nullcontext()
    with patch.dict(os.environ, FSE_PATCH_VERIFY=verify), fault:
        try:
            model, _ = live.built(scheduler, folder)
        except AuditError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    report = model._fse_patch.report()
    return {**report["canary"], "compared": report["compared"]}


def fse_prove(self: Any, file: str, builds: list[list[Any]]) -> None:
    """Runs in the scheduler."""
    results = [found(self, *given) for given in builds]
    runtime.clear()
    Path(file).write_text(json.dumps(results))
