"""Registry of the execution modes, ways to run one fused layer: a file each in `modes/`, a line in `MODES`.

Imports neither torch nor Triton: plans and tables name modes where neither is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Mode = str
# `Execution`, hidden_states [num_tokens, H], router logits [num_tokens, E] -> output [num_tokens, H].
Run = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class ExecutionMode:
    """A mode; its function ``run`` is in the file of its name in `modes/`.

    Args:
        layouts: layouts of the weights that it can run on.
        most_slots: shared slots that it can run, None for any number.
        most_tokens: for more of them it is not measured, None for no limit.
    """

    name: Mode
    layouts: tuple[str, ...] = ("merged",)
    most_slots: int | None = None
    most_tokens: int | None = None

    def runs(self, num_shared_slots: int, num_tokens: int) -> bool:
        """Return whether it is worth measuring for such a layer and so many tokens."""
        fits = self.most_slots is None or num_shared_slots <= self.most_slots
        return fits and (self.most_tokens is None or num_tokens <= self.most_tokens)

    def load(self) -> Run:
        """Import its function; some need Triton."""
        run: Run = importlib.import_module(f"{__package__}.modes.{self.name}").run
        return run


MODES: Mapping[Mode, ExecutionMode] = {
    mode.name: mode
    for mode in (
        # Its kernels read an expert once for every token that chose it.
        ExecutionMode("small", most_tokens=32),
        # So many tokens go through its kernels at once.
        ExecutionMode("once", most_tokens=16),
        ExecutionMode("fused"),
        # More slots than one are no single dense MLP in w2 without a copy.
        ExecutionMode("split", most_slots=1),
    )
}
