"""Whether an engine reads a checkpoint's quantisation as it is stored, or makes another one of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..fusion_core.config import UNQUANTISED
from ..fusion_core.decision import FusionDecision
from ..fusion_core.reasons import Reason

_AWQ = frozenset({"awq", "awq-marlin", "auto-awq"})
_GPTQ = frozenset({"gptq", "gptq-marlin", "auto-gptq", "gptqmodel"})
_ROUND = frozenset({"auto-round", "inc"})
# Method that a checkpoint declares -> engines' names of the code that reads it; others have one name.
READERS: Mapping[str, frozenset[str]] = {
    "awq": _AWQ,
    "gptq": _GPTQ,
    "gptqmodel": _GPTQ,
    "auto-round": _ROUND,
    "autoround": _ROUND,
    "intel/auto-round": _ROUND,
    "inc": _ROUND,
    # Not modelopt-fp4: SGLang makes FP4 of FP8 under that name.
    "modelopt": frozenset({"modelopt", "modelopt-fp8", "modelopt-mixed"}),
}
# What engines take for no quantisation.
_NONE = frozenset({"", "none", "unquant"})


def online(decision: FusionDecision, method: str | None, built: object) -> Iterator[tuple[Reason, str]]:
    """Refuse a checkpoint that the engine quantises, or quantises otherwise, while it loads.

    Args:
        method: what the engine runs, by its own name: of its --quantization, or as it found it.
        built: the engine's quantisation, None where it has none.
    """
    running, own = (method or "").lower().replace("_", "-"), decision.quant_method
    if own == UNQUANTISED:
        if built is not None or running not in _NONE:
            yield (
                "quant.online",
                f"the checkpoint is quantised on the fly ({method or 'by an argument'}); load it as it is",
            )
    elif running and running not in READERS.get(own, frozenset({own})):
        yield (
            "quant.online",
            f"the checkpoint is {own} and would be run as {method}; run without --quantization {method}",
        )
