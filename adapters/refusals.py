"""From a measured table, or the lack of one, to a plan for an engine's fused layers or a reason for none.
Whether an engine reads a checkpoint's quantisation as it is stored, or makes another one of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import settings
from ..fusion_core.checkpoint.config import UNQUANTISED
from ..fusion_core.decision.outcome import FusionDecision
from ..fusion_core.forward.plan import ModePlan, always
from ..fusion_core.forward.tuned import SLOWER, Situation, plan_for
from ..fusion_core.quant.methods import READERS
from ..fusion_core.reasons import Reason
from .start import Refusal

# MERGED adapters/planning.py


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


# MERGED adapters/quantisation.py


def online(decision: FusionDecision, method: str | None, built: object) -> Iterator[tuple[Reason, str]]:
    """Refuse a checkpoint that the engine quantises, or quantises otherwise, while it loads.

    Args:
        method: what the engine runs, by its own name: of its --quantization, or as it found it.
        built: the engine's quantisation, None where it has none.
    """
    running, declared = (method or "").lower().replace("_", "-"), decision.quant_method
    if declared == UNQUANTISED:
        if built is not None or running not in {"", *READERS[UNQUANTISED]}:
            yield (
                "quant.online",
                f"the checkpoint is quantised on the fly ({method or 'by an argument'}); load it as it is",
            )
    elif running and running not in READERS.get(declared, frozenset({declared})):
        yield (
            "quant.online",
            f"the checkpoint is {declared} and would be run as {method}; run without --quantization {method}",
        )
