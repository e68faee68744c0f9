"""Which modes run SGLang's fused layers here: by the backend that it takes, and by what was measured."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from ... import settings
from ...fusion_core.checkpoint.config import UNQUANTISED
from ...fusion_core.decision.outcome import FusionDecision
from ...fusion_core.forward.plan import ModePlan, always
from ...fusion_core.forward.tuned import Situation, plan_for
from ..patching import guards, ledger
from ..refusals import SHARED_GATE, Planned, on_cuda, unmeasured
from . import native

# Backends whose experts `Experts.gemm` knows how to call.
KNOWN_BACKENDS = {"triton"}
# In tables: layers that SGLang builds fused by itself. Another stock, so other measurements.
NATIVE = "triton, fused natively"


def plan_of(decision: FusionDecision, model_config: Any) -> Planned:
    """The plan for layers that are built fused by us, or None and why there is none."""
    from sglang.srt.runtime_context import get_server_args
    from sglang.srt.utils import cpu_has_amx_support

    platform, allowed = native.platform(), settings.load().allow_unmeasured
    if platform == "cpu" and not cpu_has_amx_support():
        return always("fused", "a CPU, where no speed is promised"), ""
    if platform != "cuda":
        return unmeasured(allowed, "on this platform")
    if decision.quant_method != UNQUANTISED:
        return unmeasured(allowed, "for quantised experts")
    if get_server_args().enable_deterministic_inference:
        why = "with --enable-deterministic-inference: another mode for another batch breaks its promise"
        return unmeasured(False, why)
    return on_cuda(situation(decision, model_config, "triton"))


def native_plan(decision: FusionDecision, model_config: Any) -> ModePlan | None:
    """The plan for layers that SGLang builds fused by itself; None: they stay as they are.

    A measurement alone leads to one: nothing here is stock's but its own forward.
    """
    from sglang.srt.runtime_context import get_server_args

    layout = decision.layout
    if native.platform() != "cuda" or decision.quant_method != UNQUANTISED or layout is None:
        return None
    if layout.num_shared_slots != 1 or get_server_args().enable_deterministic_inference:
        return None
    asked = situation(decision, model_config, NATIVE)
    found = plan_for(asked, "cuda", settings.load().tuned_file, places=())
    return found if isinstance(found, ModePlan) else None


def situation(decision: FusionDecision, model_config: Any, backend: str) -> Situation:
    """What a table is asked for."""
    from sglang.srt.runtime_context import get_server_args
    from sglang.srt.utils import get_device_name

    assert decision.layout is not None
    assert decision.routing is not None
    return Situation.of(
        decision.layout,
        get_server_args().tp_size,
        engine=decision.engine,
        release=Version(guards.engine_version(ledger.load(decision.engine))).public,
        backend=backend,
        device=get_device_name(),
        dtype=str(model_config.dtype).removeprefix("torch."),
        scoring=decision.routing.scoring,
        gated=decision.shared_weight == SHARED_GATE,
    )
