"""Runs in SGLang's scheduler: what the canary says of a model that is built with a planted fault, or none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fse_patch import runtime
from fse_patch.adapters.sglang import construct
from fse_patch.errors import AuditError

from ..faults import MISLOADED, appended, changed_slots, gate_in_the_softmax, swapped, unsampled

# Planted fault: recipe, and the fault.
FAULTS: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "slot weight off by 1 %": ("qwen2_moe", lambda: appended(lambda slot, _: slot * 1.01)),
    "gate in the softmax": ("qwen2_moe", gate_in_the_softmax),
    "scale twice": ("glm4_moe_scale", lambda: patch.object(construct, "output_scale", lambda *_: 1.0)),
    "w1 and w3 swapped": ("glm4_moe_scale", lambda: unsampled(changed_slots(swapped))),
    "gate without sigmoid": ("qwen2_moe", lambda: appended(lambda *_: 1.0)),
}


def found(scheduler: Any, folder: str, fault: str, verify: str) -> dict[str, Any]:
    """The canary's findings, or the error that ends the load."""
    from . import live

    plant = (FAULTS | MISLOADED)[fault][1] if fault else nullcontext
    with patch.dict(os.environ, FSE_PATCH_VERIFY=verify), plant():
        try:
            model, _ = live.built(scheduler, folder)
        except AuditError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {**model._fse_patch.canary, "compared": model._fse_patch.compared}


def fse_prove(self: Any, file: str, builds: list[list[str]]) -> None:
    """Runs in the scheduler."""
    results = [found(self, *given) for given in builds]
    runtime.clear()
    Path(file).write_text(json.dumps(results))
