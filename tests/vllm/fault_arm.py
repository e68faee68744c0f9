"""An arm whose jobs can ask for a deliberate fault in our own code: the controls of the verification."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from fse_patch.adapters.vllm import build
from fse_patch.adapters.vllm.pair import RunnerLayer
from fse_patch.fusion_core.forward import router
from fse_patch.lab.vllm import verify_arm
from fse_patch.lab.vllm.worker import VerifyExtension

from ..head_faults import HEAD_FAULTS
from ..pair_faults import UNPROVED, faults
from ..slot_faults import PROVED, SLOT_FAULTS

FEW = 4  # tokens of a decode step: a token of each prompt
KV_CACHE = 64 << 20  # bytes; what an engine takes it clears
honest_route = router.route


def scaled_twice(logits: Any, top_k: int, spec: Any, bias: Any = None) -> Any:
    weights, ids = honest_route(logits, top_k, spec, bias)
    return weights * spec.routed_scaling_factor, ids


def shared_scaled(weights: Any, ids: Any, slots: range, slot_weight: Any, ranks: int = 1) -> Any:
    return honest_append(weights, ids, slots, slot_weight * 2.5, ranks)


def in_few_tokens(factor: float) -> Any:
    """The shared expert's weight times ``factor`` where answers are decoded."""

    def append(weights: Any, ids: Any, slots: range, slot_weight: Any, ranks: int = 1) -> Any:
        few = factor if weights.shape[0] <= FEW else 1.0
        return honest_append(weights, ids, slots, slot_weight * few, ranks)

    return patch.object(router, "append_shared_slots", append)


@contextmanager
def refused_by_policy() -> Iterator[None]:
    """No fault of ours: the user's policy says no."""
    rule = "{id: not-here, when: {}, fuse: false, reason: disabled, why: a test, source: 'none: a test'}"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "policy.yaml"
        file.write_text(f"version: 1\nrules:\n  - {rule}\n")
        with patch.dict(os.environ, FSE_PATCH_POLICY=str(file)):
            yield


honest_append = router.append_shared_slots
FAULTS = {
    None: nullcontext,
    **SLOT_FAULTS,
    "scale_applied_twice": lambda: patch.object(router, "route", scaled_twice),
    "shared_expert_scaled": lambda: patch.object(router, "append_shared_slots", shared_scaled),
    "answers_1_percent": lambda: in_few_tokens(1.01),
    "answers_halved": lambda: in_few_tokens(0.5),
    "patch_never_fired": lambda: patch.object(build, "start_of", lambda *_: None),
    "refused_by_policy": refused_by_policy,
    "control_without_effect": lambda: patch.object(VerifyExtension, "fse_control", lambda *_: None),
}
PAIR_FAULTS = faults(RunnerLayer)
FAULTS |= PAIR_FAULTS | HEAD_FAULTS
honest_run = verify_arm.run_job


def kernels_once() -> None:
    """Let vLLM put its CPU kernels in once: at each start it looks through every module to do so."""
    from vllm.platforms import current_platform

    platform, name = type(current_platform), "register_triton_kernel_overrides"
    if hasattr(platform, name):
        setattr(platform, name, staticmethod(cache(getattr(platform, name))))


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    fault = job["engine_args"].pop("fault", None)
    job["engine_args"].setdefault("kv_cache_memory_bytes", KV_CACHE)
    try:
        # Several times a start, in a process that is not short of memory.
        with patch.object(gc, "collect", lambda *_: 0):
            return run_with(fault, job)
    finally:
        gc.collect()


def run_with(fault: str | None, job: dict[str, Any]) -> dict[str, Any]:
    with ExitStack() as stack:
        stack.enter_context(FAULTS[fault]())
        proved = fault in PROVED or (fault in PAIR_FAULTS and not fault.startswith(UNPROVED))
        if fault is not None and not proved:
            # The log-probabilities have to show it by themselves: the canary would stop most faults before.
            stack.enter_context(patch.dict(os.environ, FSE_PATCH_VERIFY="off"))
        return honest_run(job)


if __name__ == "__main__":
    kernels_once()
    verify_arm.run_job = run_job
    verify_arm.main(Path(sys.argv[1]), Path(sys.argv[2]))
