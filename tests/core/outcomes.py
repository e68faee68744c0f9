"""Decisions as tests read them: of which kind they are, and their code."""

from __future__ import annotations

from fse_patch.fusion_core.decision.outcome import Decision, Merged, Stock
from fse_patch.fusion_core.reasons import FUSES


def merged(decision: Decision) -> Merged:
    """``decision``, which must fuse."""
    assert isinstance(decision, Merged), decision
    return decision


def stock(decision: Decision) -> Stock:
    """``decision``, which must not fuse."""
    assert isinstance(decision, Stock), decision
    return decision


def code(decision: Decision) -> str:
    """The code of a refusal, "ok" of what fuses."""
    return FUSES if isinstance(decision, Merged) else decision.reason.code
