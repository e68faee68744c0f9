"""Routing of one fused layer: a top-k, the engine's or that of `route`, with the shared slots appended."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import AuditError
from ..decision.outcome import MoeSpec
from ..kernels.routing_reference import append_shared_slots, route
from .mode_registry import Mode
from .plan import ModeCounter


def on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether Triton's kernels can run on it."""
    return tensor.is_cuda


def capturing() -> bool:
    """Return whether a CUDA graph is captured on the current stream."""
    # A process without a GPU in use need not ask its driver; a CPU build of torch has nothing to ask.
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return in_use and torch.cuda.is_current_stream_capturing()


class SlotAppender:
    """An appender of one layer's shared slots to a top-k that the engine or `route` has made.

    Args:
        layer: checkpoint number of the layer.
        shared_gate: hidden_states [num_tokens, H] -> gate logits [num_tokens, 1]; needed where the
            shared weight is a sigmoid gate. Called, not read: some backends empty a gate's weight.
        counter: counts the calls of this process by layer and mode.
        output_scale: what the engine multiplies the layer's output by afterwards; the shared expert's net
            weight stays as the family says.
        ranks: as of `append_shared_slots`.
    """

    def __init__(
        self,
        layer: int,
        moe: MoeSpec,
        counter: ModeCounter,
        shared_gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
        output_scale: float = 1.0,
        ranks: int = 1,
    ) -> None:
        self.layer = layer
        self.layout = moe.layout
        self.counter = counter
        self.shared_gate = shared_gate
        self.output_scale = output_scale
        self.ranks = ranks
        # Why nothing may run through the layer yet; "" where it may.
        self.closed = ""
        # Weight of the first slot is multiplied by this: the positive control of `verify`.
        self.control_factor = 1.0
        if (shared_gate is None) == (moe.shared_weight == "sigmoid_gate"):
            raise ValueError(f"layer {layer}: shared weight {moe.shared_weight!r} and its gate disagree")

    def enter(self, mode: Mode) -> None:
        """Count that the layer runs, in this mode.

        Raises:
            AuditError: it was not proved yet.
        """
        if self.closed:
            raise AuditError(self.closed)
        # Under Dynamo this would be traced once and its effect frozen into the graph.
        if not torch.compiler.is_compiling():
            self.counter.add(self.layer, mode, capturing())

    def append(
        self, hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the shared slots to a top-k; one launch on a GPU.

        Args:
            hidden_states: [num_tokens, H]; what the shared gate sees.
            weights, ids: [num_tokens, k], float32 and int32 on a GPU.

        Returns:
            ``topk_weights`` and ``topk_ids``, both [num_tokens, k + S], dtypes as given.

        Raises:
            AuditError: the layer was not proved yet.
        """
        self.enter("fused")
        gate = None if self.shared_gate is None else self.shared_gate(hidden_states)
        if on_gpu(weights):
            from ..kernels.append import append  # needs Triton

            slots, scale = self.layout.shared_slots, 1.0 / self.output_scale
            weights, ids = append(weights, ids, slots, gate, scale, self.ranks)
        else:
            slot_weight = 1.0 if gate is None else gate.to(weights.dtype).sigmoid()
            if self.output_scale != 1.0:
                slot_weight = slot_weight / self.output_scale
            weights, ids = append_shared_slots(
                weights, ids, self.layout.shared_slots, slot_weight, self.ranks
            )
        if self.control_factor != 1.0:
            weights[:, self.layout.top_k] *= self.control_factor
        return weights, ids


class FusedRouter(SlotAppender):
    """A router of one fused layer, as its decision says. An engine calls it with what it has at hand.

    Args:
        layer, shared_gate, counter, ranks: as of `SlotAppender`.
        correction_bias: [E], where the family has one.
    """

    def __init__(
        self,
        layer: int,
        moe: MoeSpec,
        counter: ModeCounter,
        shared_gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
        correction_bias: torch.Tensor | None = None,
        ranks: int = 1,
    ) -> None:
        super().__init__(layer, moe, counter, shared_gate, ranks=ranks)
        self.routing = moe.routing
        self.correction_bias = correction_bias
        if (correction_bias is None) == self.routing.has_correction_bias:
            raise ValueError(f"layer {layer}: the correction bias and the decision disagree")

    def __call__(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose and weigh k experts for each token, and append the shared slots.

        Args:
            hidden_states: [num_tokens, H].
            router_logits: [num_tokens, E], any float dtype.

        Returns:
            ``topk_weights`` float32 and ``topk_ids`` int32, both [num_tokens, k + S].
        """
        weights, ids = route(router_logits, self.layout.top_k, self.routing, self.correction_bias)
        return self.append(hidden_states, weights, ids)
