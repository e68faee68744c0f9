"""What `apply` did, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

REFUSED = "refused"


@dataclass(frozen=True)
class PatchReport:
    """One patch; its state is "applied", "waiting for import", "not applied" or, with a reason, "refused"."""

    id: str
    target: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """Every patch of the ledger that is for the installed release.

    Args:
        reason: why nothing was patched, in one line; "" if the patches are on.
        remark: whose seams a release has that is not listed; "" for one that is.
    """

    engine: str
    engine_version: str
    patches: tuple[PatchReport, ...]
    reason: str = ""
    remark: str = ""

    @property
    def on(self) -> bool:
        """Return whether the engine is patched, now or as its modules are imported."""
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "engine": self.engine,
            "engine_version": self.engine_version,
            "on": self.on,
            "reason": self.reason,
            "remark": self.remark,
            "patches": [asdict(p) for p in self.patches],
        }

    def summary(self) -> str:
        """Return the report in one line."""
        name = f"{self.engine} {self.engine_version}".strip()
        if not self.on:
            return f"{name}: off: {self.reason}"
        states = [p.state for p in self.patches]
        counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        return "; ".join(filter(None, (f"{name}: on: {counts or 'no patches'}", self.remark)))

    def __str__(self) -> str:
        width = max((len(p.id) for p in self.patches), default=0)
        lines = (f"  {p.id:{width}}  {p.target}  {p.state} {p.reason}".rstrip() for p in self.patches)
        return "\n".join([self.summary(), *lines])
