"""A layer of SGLang that runs paired: parts of its block answer for few tokens, weights as SGLang keeps them.

SGLang's own forward of the block stays, with its streams and its sum over processes. For few tokens the
shared experts' part gives nothing, and the routed experts' part gives the sum of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...fusion_core.forward.paired import PAIRED
from ..paired import PairedRole
from .pair_layer import BlockLayer, unreduced


def pair_block(role: PairedRole, block: Any, number: int | None) -> None:
    """Let a block that SGLang has built run paired, where its layer is one of ``role``."""
    # A block that inherits its constructor comes here twice.
    if number is None or number not in role.start.decision.moe.layers or number in role.layers:
        return
    kind = QwenBlock if hasattr(block, "_forward_router_experts") else GlmBlock
    role.take(number, lambda: kind(number, role, block))


class QwenBlock(BlockLayer):
    """The block of Qwen2-MoE, Qwen3-Next and Qwen3.5."""

    # An output that is finished elsewhere is stock's.
    deferred = False

    def __init__(self, number: int, role: PairedRole, block: Any) -> None:
        super().__init__(number, role, block)
        self.replace(block, "_forward_router_experts", self._router_experts)
        self.replace(block, "forward", self._forward)

    def runs(self, hidden_states: torch.Tensor) -> bool:
        """Return whether these states run paired."""
        return not self.deferred and super().runs(hidden_states)

    def _forward(
        self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # forward(hidden_states, forward_batch, defer_finalize)
        self.deferred = bool(kwargs.get("defer_finalize", args[1] if len(args) > 1 else False))
        try:
            return original(hidden_states, *args, **kwargs)
        finally:
            self.deferred = False

    def _router_experts(
        self, original: Callable[..., Any], hidden_states: torch.Tensor, **kwargs: Any
    ) -> Any:
        if not self.arm:
            self.layer.count(hidden_states)
        return self.total(hidden_states) if self.runs(hidden_states) else original(hidden_states, **kwargs)

    def _dual_stream(
        self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        if self.runs(hidden_states):
            return self.block._forward_router_experts(hidden_states), None
        return original(hidden_states, *args, **kw)


class GlmBlock(BlockLayer):
    """The block of GLM-4: one forward, in which gate and top-k have nothing to do for few tokens."""

    # While it asks what the block multiplies by.
    probing = False

    def __init__(self, number: int, role: PairedRole, block: Any) -> None:
        super().__init__(number, role, block)
        self.replace(block.topk, "forward", self._topk)
        self.replace(block.experts, "forward", self._experts)
        self.after = self._multiplied()

    def _multiplied(self) -> float:
        """Return what the block multiplies its experts' output by: what its forward makes of a one.

        That is the scale, or 1 where their kernels or the top-k have it inside: it differs by platform.
        """
        one = torch.ones(1, self.moe.layout.hidden_size, dtype=torch.float32, device="cpu")
        self.arm, self.probing = PAIRED, True
        try:
            with unreduced(self.block), torch.no_grad():
                return float(self.block.forward_normal(one)[0, 0])
        finally:
            self.arm, self.probing = "", False

    def answer(self, original: Callable[..., Any], hidden_states: torch.Tensor) -> Any:
        """Answer as the gate does, where its logits are used."""
        return hidden_states if self.runs(hidden_states) else super().answer(original, hidden_states)

    def _topk(self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        return None if self.runs(hidden_states) else original(hidden_states, *args, **kw)

    def _experts(
        self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        if self.probing:
            return hidden_states.clone()
        if not self.arm:
            self.layer.count(hidden_states)
        return self.total(hidden_states) if self.runs(hidden_states) else original(hidden_states, *args, **kw)

    def _dual_stream(
        self, original: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        if self.runs(hidden_states):
            return self.block.forward_normal(hidden_states)  # it adds no shared part that is not there
        return original(hidden_states, *args, **kw)
