"""Routing of a fused layer: k routed experts as the family routes them, then S shared slots.

The torch reference: traceable by Dynamo, and float64 where the logits are float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import AuditError
from ..decision.outcome import FusionDecision, RoutingSpec
from .plan import Mode, ModeCounter


def route(
    logits: torch.Tensor,
    top_k: int,
    spec: RoutingSpec,
    correction_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts for each token and weigh them.

    Softmax (Qwen): p = softmax(logits); the k largest, renormalised to sum 1 if ``renormalize``.
    Sigmoid (GLM-4, DeepSeek-V3): s = sigmoid(logits); s + bias chooses, first ``topk_group`` groups
    by the sum of their two best experts, then experts in them; the weights are s without the bias.
    Both are multiplied by ``routed_scaling_factor``.

    Args:
        logits: router logits, [num_tokens, E], any float dtype.
        correction_bias: [E], added for choosing only.

    Returns:
        ``topk_weights`` float32 (float64 for float64 logits) and ``topk_ids`` int32,
        both [num_tokens, top_k].
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if spec.scoring == "softmax":
        # Top-k of the logits is top-k of the probabilities, without their ties.
        chosen, ids = scores.topk(top_k, dim=-1)
        if spec.renormalize:
            weights = chosen.softmax(dim=-1)
        else:
            weights = (chosen - scores.logsumexp(dim=-1, keepdim=True)).exp()
    else:
        scores = scores.sigmoid()
        choice = scores if correction_bias is None else scores + correction_bias.to(scores.dtype)
        if spec.num_expert_group > 1:
            choice = _mask_groups(choice, spec, best=1 if correction_bias is None else 2)
        ids = choice.topk(top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if spec.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
    if spec.routed_scaling_factor != 1.0:
        weights = weights * spec.routed_scaling_factor
    return weights, ids.to(torch.int32)


def _mask_groups(choice: torch.Tensor, spec: RoutingSpec, best: int) -> torch.Tensor:
    """-inf for all experts outside the ``topk_group`` groups with the best expert(s)."""
    groups = choice.reshape(choice.shape[0], spec.num_expert_group, choice.shape[1] // spec.num_expert_group)
    group_scores = groups.topk(best, dim=-1).values.sum(dim=-1)
    kept = group_scores.topk(spec.topk_group, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
    return groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)


def append_shared_slots(
    weights: torch.Tensor, ids: torch.Tensor, slots: range, slot_weight: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the shared slots to a top-k.

    Args:
        weights, ids: [num_tokens, k].
        slots: the S slot ids, each appended to every token.
        slot_weight: net weight of the shared expert, [num_tokens, 1] or one number. All slots of a
            split shared expert carry the same weight, as each holds a part of the same sum.

    Returns:
        [num_tokens, k + S] of both, contiguous (CPU and AITER kernels ignore strides).
    """
    num_tokens, num_slots = weights.shape[0], len(slots)
    if isinstance(slot_weight, torch.Tensor):
        shared = slot_weight.to(weights.dtype).expand(num_tokens, num_slots)
    else:
        shared = weights.new_full((num_tokens, num_slots), slot_weight)
    slot_ids = torch.arange(slots.start, slots.stop, dtype=ids.dtype, device=ids.device)
    return (
        torch.cat([weights, shared], dim=-1),
        torch.cat([ids, slot_ids.expand(num_tokens, num_slots)], dim=-1),
    )


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether Triton's kernels can run on it."""
    return tensor.is_cuda


def capturing() -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    # A process without a GPU in use need not ask its driver; a CPU build of torch has nothing to ask.
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return in_use and torch.cuda.is_current_stream_capturing()


class SlotAppender:
    """Appends the shared slots of one layer to a top-k that the engine or `route` has made.

    Args:
        layer: checkpoint number of the layer.
        shared_gate: hidden_states [num_tokens, H] -> gate logits [num_tokens, 1]; needed where the
            shared weight is a sigmoid gate. Called, not read: some backends empty a gate's weight.
        counter: counts the calls of this process by layer and mode.
        output_scale: what the engine multiplies the layer's output by afterwards; the shared expert's net
            weight stays as the family says.
    """

    def __init__(
        self,
        layer: int,
        decision: FusionDecision,
        counter: ModeCounter,
        shared_gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
        output_scale: float = 1.0,
    ) -> None:
        assert decision.layout is not None
        self.layer = layer
        self.layout = decision.layout
        self.counter = counter
        self.shared_gate = shared_gate
        self.output_scale = output_scale
        # Why nothing may run through the layer yet; "" where it may.
        self.closed = ""
        # Weight of the first slot is multiplied by this: the positive control of `verify`.
        self.control_factor = 1.0
        if (shared_gate is None) == (decision.shared_weight == "sigmoid_gate"):
            raise ValueError(f"layer {layer}: shared weight {decision.shared_weight!r} and its gate disagree")

    def enter(self, mode: Mode) -> None:
        """The layer runs, in this mode: count it.

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
        """``topk_weights`` and ``topk_ids``, [num_tokens, k + S], from [num_tokens, k] of both.

        One launch on a GPU.
        """
        self.enter("fused")
        gate = None if self.shared_gate is None else self.shared_gate(hidden_states)
        if on_gpu(weights):
            from ..kernels.append import append  # needs Triton

            weights, ids = append(weights, ids, self.layout.shared_slots, gate, 1.0 / self.output_scale)
        else:
            slot_weight = 1.0 if gate is None else gate.to(weights.dtype).sigmoid()
            if self.output_scale != 1.0:
                slot_weight = slot_weight / self.output_scale
            weights, ids = append_shared_slots(weights, ids, self.layout.shared_slots, slot_weight)
        if self.control_factor != 1.0:
            weights[:, self.layout.top_k] *= self.control_factor
        return weights, ids


class FusedRouter(SlotAppender):
    """Routes one fused layer, as its decision says. An engine calls it with what it has at hand.

    Args:
        layer, shared_gate, counter: as of `SlotAppender`.
        correction_bias: [E], where the family has one.
    """

    def __init__(
        self,
        layer: int,
        decision: FusionDecision,
        counter: ModeCounter,
        shared_gate: Callable[[torch.Tensor], torch.Tensor] | None = None,
        correction_bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__(layer, decision, counter, shared_gate)
        assert decision.routing is not None
        self.routing = decision.routing
        self.correction_bias = correction_bias
        if (correction_bias is None) == self.routing.has_correction_bias:
            raise ValueError(f"layer {layer}: the correction bias and the decision disagree")

    def __call__(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``topk_weights`` and ``topk_ids``, [num_tokens, k + S], for ``hidden_states`` [num_tokens, H]."""
        weights, ids = route(router_logits, self.layout.top_k, self.routing, self.correction_bias)
        return self.append(hidden_states, weights, ids)
