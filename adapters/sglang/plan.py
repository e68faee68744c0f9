"""Which modes run SGLang's fused layers here: by the backend that it takes, and by what was measured."""

from __future__ import annotations

from typing import Any

from ...fusion_core.checkpoint.config import UNQUANTISED
from ...fusion_core.decision.outcome import Decision, Merged, MoeSpec
from ...fusion_core.forward.plan import ModePlan, always
from ...fusion_core.forward.tuned import Situation, plan_for
from ...fusion_core.reasons import Reason
from ...settings import Settings
from ..patching import ledger, standing
from ..refusals import SHARED_GATE, measured, unmeasured
from . import native
from .either_layout import expert_ranks

# Backends whose experts `Experts.gemm` knows how to call.
KNOWN_BACKENDS = {"triton"}
# In tables: layers that SGLang builds fused by itself. Another stock, so other measurements.
NATIVE = "triton, fused natively"


def plan_of(decision: Merged, model_config: Any, effective: Settings) -> ModePlan | Reason:
    """Return the plan for layers that are built fused by us, or why there is none."""
    from sglang.srt.runtime_context import get_server_args
    from sglang.srt.utils import cpu_has_amx_support

    platform, allowed = native.platform(), effective.allow_unmeasured
    if platform == "cpu" and not cpu_has_amx_support():
        return always("fused", "a CPU, where no speed is promised")
    if platform != "cuda":
        return unmeasured(allowed, "on this platform")
    if decision.quant_method != UNQUANTISED:
        return unmeasured(allowed, "for quantised experts")
    if expert_ranks() > 1:
        return unmeasured(allowed, "with whole experts spread over processes")
    if get_server_args().enable_deterministic_inference:
        why = "with --enable-deterministic-inference: another mode for another batch breaks its promise"
        return unmeasured(False, why)
    return measured(situation(decision.engine, decision.moe, model_config, "triton"), effective)


def native_plan(decision: Decision, moe: MoeSpec, model_config: Any, effective: Settings) -> ModePlan | None:
    """Return the plan for layers that SGLang builds fused by itself; None: they stay as they are.

    A measurement alone leads to one: nothing here is stock's but its own forward.
    """
    from sglang.srt.runtime_context import get_server_args

    if native.platform() != "cuda" or decision.quant_method != UNQUANTISED or expert_ranks() > 1:
        return None
    if moe.layout.num_shared_slots != 1 or get_server_args().enable_deterministic_inference:
        return None
    asked = situation(decision.engine, moe, model_config, NATIVE)
    plan = plan_for(asked, "cuda", effective.tuned_file, places=())
    return plan if isinstance(plan, ModePlan) else None


def situation(engine: str, moe: MoeSpec, model_config: Any, backend: str) -> Situation:
    """Return what a table is asked for."""
    from sglang.srt.runtime_context import get_server_args
    from sglang.srt.utils import get_device_name

    return Situation.of(
        moe.layout,
        get_server_args().tp_size,
        engine=engine,
        release=standing.release_here(ledger.load(engine)),
        backend=backend,
        device=get_device_name(),
        dtype=str(model_config.dtype).removeprefix("torch."),
        scoring=moe.routing.scoring,
        gated=moe.shared_weight == SHARED_GATE,
    )
