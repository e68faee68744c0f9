"""The execution of one of SGLang's MoE blocks, in several modes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...errors import FsePatchError
from ...fusion_core.gate_rows import GateRows
from ...fusion_core.routing import FusedRouter
from ..built import BuiltModel
from .experts import Experts, routed_topk
from .plan import KNOWN_BACKENDS

if TYPE_CHECKING:
    from ...fusion_core.execution import LayerExecution  # needs Triton

# Of a block: its `BlockModes`.
ATTRIBUTE = "_fse_patch_modes"


class BlockModes:
    """Runs one block by its execution.

    Args:
        native: SGLang fuses the block by itself: the mode "fused" is its own forward.
    """

    def __init__(self, execution: LayerExecution, native: bool) -> None:
        self.execution = execution
        self.native = native
        # Of the operator that runs it under torch.compile.
        self.number = -1

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The block's output [num_tokens, H], without the sum over processes."""
        return self.execution(hidden_states, hidden_states)

    def is_left(self, hidden_states: torch.Tensor) -> bool:
        """Whether SGLang's own forward runs ``hidden_states`` [num_tokens, H]."""
        if not self.native:
            return False
        execution = self.execution
        # The number of tokens is a symbol there; and what nothing has proved yet is not served.
        if torch.compiler.is_compiling() or execution.router.closed:
            return True
        mode = execution.forced or execution.plan.mode_of(hidden_states.shape[0])
        # Where the control of `verify` is with the router, it needs a forward that asks that.
        return mode == "fused" and execution.router.control_factor == 1.0

    def note_left(self) -> None:
        """SGLang's own forward runs."""
        if not self.execution.router.closed:
            self.execution.router.enter("fused")


def execution_of(fusion: BuiltModel, block: Any, router: FusedRouter) -> LayerExecution:
    """The execution of a block, as soon as it is built.

    Raises:
        FsePatchError: SGLang took another backend for its experts.
    """
    from ...fusion_core.execution import LayerExecution

    backend = block.experts.quant_method.runner.runner_backend.value
    if backend not in KNOWN_BACKENDS:
        raise FsePatchError(f"layer {router.layer}: SGLang took the MoE backend {backend!r}")
    assert fusion.plan is not None
    shared_gate = getattr(block, "shared_expert_gate", None)

    def gate_linear(hidden_states: torch.Tensor) -> torch.Tensor:
        logits: Any = block.gate(hidden_states)
        found: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
        return found

    return LayerExecution(
        router,
        fusion.plan,
        Experts(block.experts, routed_topk(block, fusion.decision), block.alt_stream),
        GateRows([block.gate] if shared_gate is None else [block.gate, shared_gate]),
        gate_linear,
        shared_gate,
    )
