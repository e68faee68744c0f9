"""Runs in SGLang's scheduler: models built and loaded as on ROCm, with a profile of the fake AITER."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fse_patch import runtime
from fse_patch.adapters.sglang import build, native
from fse_patch.errors import AuditError

from ..fakes.aiter_profiles import PROFILES, installed

CALLS: list[int] = []


@contextmanager
def rocm(profile: str) -> Iterator[None]:
    """SGLang's own grouped top-k is AITER's; where its output is scaled is asked of the same switch."""
    from sglang.srt.layers.moe import topk
    from sglang.srt.models import glm4_moe

    with ExitStack() as stack:
        stack.enter_context(installed(PROFILES[profile]))
        from aiter import biased_grouped_topk

        def counted(*args: Any) -> None:
            CALLS.append(len(args))
            biased_grouped_topk(*args)

        stack.enter_context(patch.dict(os.environ, FSE_PATCH_ALLOW_UNMEASURED="1"))
        stack.enter_context(patch.object(native, "platform", lambda: "rocm"))
        for module in (topk, glm4_moe):
            stack.enter_context(patch.object(module, "_use_aiter", True))
        stack.enter_context(patch.object(topk, "biased_grouped_topk", topk.biased_grouped_topk_gpu))
        stack.enter_context(patch.object(topk, "aiter_biased_grouped_topk", counted, create=True))
        yield


def found(scheduler: Any, folder: str, profile: str, scaled_again: bool) -> dict[str, Any]:
    """The canary's findings, or the error that ends the load."""
    from . import live

    def scale(start: Any, experts: Any) -> float:
        return float(start.moe.routing.routed_scaling_factor)

    CALLS.clear()
    fault = patch.object(build, "output_scale", scale) if scaled_again else nullcontext()
    with rocm(profile), fault:
        try:
            model, _ = live.built(scheduler, folder)
        except AuditError as error:
            return {"error": f"{type(error).__name__}: {error}", "calls": len(CALLS)}
    fused_role = getattr(model, "_fse_patch", None)
    canary = {} if fused_role is None else fused_role.report()["canary"]
    return {**canary, "decisions": runtime.decisions(), "calls": len(CALLS)}


def fse_rocm(self: Any, file: str, builds: list[list[Any]]) -> None:
    """Called by the step ``rocm``."""
    results = []
    for given in builds:
        runtime.clear()
        results.append(found(self, *given))
    runtime.clear()
    Path(file).write_text(json.dumps(results))
