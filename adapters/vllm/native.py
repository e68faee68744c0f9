"""vLLM's own fusion of the shared expert, on AITER: where it is live, and how it is switched off."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...fusion_core.decision.native import fusing
from .. import load as loading
from ..patching import ledger, standing

ENGINE = "vllm"
# On the class `rocm_aiter_ops`. Blocks ask it when they are built; loaders up to 0.28 ask it again.
GATE = "is_fusion_moe_shared_experts_enabled"
# The platform that it exists on, as `fse-patch plan` takes it.
PLATFORM = "rocm"
# On models that were built without it: their weights are loaded without it too.
MARK = "_fse_patch_native_off"


def live(family: str) -> dict[str, Any] | None:
    """Return what is known of vLLM's own fusion, if it would build a model of ``family`` with it here."""
    from vllm._aiter_ops import rocm_aiter_ops

    if not getattr(rocm_aiter_ops, GATE)():
        return None
    version = standing.release_here(ledger.load(ENGINE))
    return next(iter(fusing(ENGINE, family, PLATFORM, version)), None)


@contextmanager
def switched_off(off: bool) -> Iterator[None]:
    """Build or load a model without the native fusion where ``off``; other models of the process keep it."""
    if not off:
        yield
        return
    from vllm._aiter_ops import rocm_aiter_ops

    original = vars(rocm_aiter_ops)[GATE]
    setattr(rocm_aiter_ops, GATE, classmethod(lambda _: False))
    try:
        yield
    finally:
        setattr(rocm_aiter_ops, GATE, original)


def load_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_weights`` of entry classes: what was built without native fusion is loaded so."""
    fill = loading.load_weights(original)

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        with switched_off(getattr(self, MARK, False)):
            return fill(self, *args, **kwargs)

    return load
