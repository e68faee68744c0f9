"""SGLang's own fusion of the shared expert: where it is live, whether it is right, how it is switched off."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from ...fusion_core.decision.native import fusing
from ..patching import ledger, standing

ENGINE = "sglang"
# Releases from 0.5.18 on ask this of the class before they build a layer; a text is a no.
GATE = "shared_experts_fusion_disable_reason"
# Classes of 0.5.17 look into the configuration by this method instead.
OLD_GATE = "determine_num_fused_shared_experts"
# Blocks that do not ask it take the answer as this argument.
ARGUMENT = "support_shared_expert_fusion"
SWITCHED_OFF: ContextVar[bool] = ContextVar("fse_patch_native_off", default=False)


def platform() -> str:
    """Return the platform's name, as `fse-patch plan` takes it; "" for one that nobody has looked at."""
    from sglang.srt.utils import is_cpu, is_cuda, is_hip

    return next((name for name, on in (("cpu", is_cpu), ("cuda", is_cuda), ("rocm", is_hip)) if on()), "")


def live(cls: type, family: str, model_config: Any, quantised: object) -> dict[str, Any] | None:
    """Return what is known of SGLang's own fusion, if it would build ``cls`` with it in this process."""
    from sglang.srt.models import qwen2_moe
    from sglang.srt.runtime_context import get_server_args

    if get_server_args().disable_shared_experts_fusion:
        return None
    version = standing.release_here(ledger.load(ENGINE))
    here = fusing(ENGINE, family, platform(), version, cls.__name__)
    entry = next((e for e in here if e["by_default"] or qwen2_moe._use_aiter), None)
    if entry is None or _is_declined(cls, model_config.hf_config, quantised):
        return None
    if block := entry.get("block"):
        asked = importlib.import_module(f"sglang.srt.models.{block}").can_fuse_shared_expert
        return entry if asked(model_config.hf_text_config, quantised) else None
    return entry


def _is_declined(cls: type, config: Any, quantised: object) -> bool:
    """Return whether ``cls`` itself would not fuse here, by the device and by how experts are spread."""
    if (gate := getattr(cls, GATE, None)) is not None:
        return bool(gate(config, quantised))
    if (gate := getattr(cls, OLD_GATE, None)) is None:
        return False
    model = SimpleNamespace(config=config, quant_config=quantised, num_fused_shared_experts=0)
    # Its answer is in the model, and a no in SGLang's settings, which are put back.
    with _configured(off=False):
        gate(model)
    return not model.num_fused_shared_experts


@contextmanager
def switched_off(cls: type) -> Iterator[None]:
    """Build ``cls`` without the native fusion, whatever SGLang would decide."""
    original, old = vars(cls).get(GATE), hasattr(cls, OLD_GATE) and not hasattr(cls, GATE)
    setattr(cls, GATE, staticmethod(lambda *_: "fse_patch decides for this model."))
    token = SWITCHED_OFF.set(True)
    try:
        with _configured(off=True) if old else nullcontext():
            yield
    finally:
        SWITCHED_OFF.reset(token)
        if original is None:
            delattr(cls, GATE)
        else:
            setattr(cls, GATE, original)


def _configured(off: bool) -> AbstractContextManager[Any]:
    from sglang.srt.runtime_context import get_exec

    scope: AbstractContextManager[Any] = get_exec().moe.override(disable_shared_experts_fusion=off)
    return scope
