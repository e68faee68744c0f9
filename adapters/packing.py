"""Whether an engine has left the experts as a checkpoint has them, or has packed them for its kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class AsLoaded:
    """Remembers a few rows of a load, and compares them with the same rows later."""

    def __init__(self) -> None:
        # By parameter; None once they were found again, because how an engine packs does not change.
        self._rows: dict[str, torch.Tensor] | None = {}

    def note(self, rows: Mapping[str, torch.Tensor]) -> None:
        """These rows have just been loaded."""
        self._rows = {name: _bytes(row) for name, row in rows.items()}

    def holds(self, rows: Mapping[str, torch.Tensor]) -> bool:
        """Whether they are as they were loaded; no, where nothing was loaded."""
        before = self._rows or {}
        if before and before.keys() == rows.keys():
            same = all(torch.equal(row, _bytes(rows[name])) for name, row in before.items())
            self._rows = None if same else before
        return self._rows is None


def _bytes(row: torch.Tensor) -> torch.Tensor:
    """A copy that any dtype compares by, in the host's memory."""
    return row.reshape(-1).view(torch.uint8).to("cpu", copy=True)
