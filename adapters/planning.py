"""From a measured table, or the lack of one, to a plan for an engine's fused layers or a reason for none."""

from __future__ import annotations

from .. import settings
from ..fusion_core.dispatch import ModePlan, always
from ..fusion_core.tuned import SLOWER, Situation, plan_for
from .deciding import Refusal

SHARED_GATE = "sigmoid_gate"
# A plan, or None and why there is none.
Planned = tuple[ModePlan | None, str]


def unmeasured(allowed: bool, where: str) -> Planned:
    """What runs where nothing was measured: one mode if the user wants it so, otherwise nothing fused."""
    if allowed:
        return always("fused", f"{settings.ALLOW_UNMEASURED} is set; nothing was measured {where}"), ""
    return None, f"no measurement shows that fusing is not slower {where}; `fse-patch tune` makes one"


def on_cuda(situation: Situation) -> Planned:
    """The plan for layers on a CUDA device: measured, or stock's kernels on views."""
    effective = settings.load()
    found = plan_for(situation, "cuda", effective.tuned_file)
    if isinstance(found, ModePlan):
        return found, ""
    if found == SLOWER:
        return None, SLOWER
    return unmeasured(effective.allow_unmeasured, "for this shape, dtype, device and release")


def refusal(why: str) -> Refusal:
    """The refusal that stands for no plan."""
    if why == SLOWER:
        return "slower.measured", "a tuned table says that fusing is slower here for some number of tokens"
    return "slower.unmeasured", why
