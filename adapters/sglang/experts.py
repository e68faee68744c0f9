"""What the modes of a fused layer need of SGLang's experts: weights, grouped GEMM, routing, second stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...fusion_core.decision.outcome import MoeSpec

if TYPE_CHECKING:
    from ...fusion_core.forward.execution import TopK  # needs Triton


class Experts:
    """`GroupedExperts` of one of SGLang's layers, whose experts are Triton's.

    Args:
        experts: its FusedMoE.
        topk: its TopK, or one that gives k columns with the scale in their weights; see `routed_topk`.
        stream: what stock runs the shared expert beside, or None.
    """

    def __init__(self, experts: Any, topk: Any, stream: torch.cuda.Stream | None) -> None:
        from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import outplace_fused_experts
        from sglang.srt.model_executor.runner import get_is_capture_mode

        self.experts = experts
        self.topk = topk
        self.stream = stream
        self._run = outplace_fused_experts
        self._capturing = get_is_capture_mode

    @property
    def w13(self) -> torch.Tensor:
        """Return w13 [E + S, 2 * I, H], as loaded."""
        weight: torch.Tensor = self.experts.w13_weight
        return weight

    @property
    def w2(self) -> torch.Tensor:
        """Return w2 [E + S, H, I], as loaded."""
        weight: torch.Tensor = self.experts.w2_weight
        return weight

    def gemm(
        self, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, top_k: TopK
    ) -> torch.Tensor:
        """Run SGLang's own kernels on states [num_tokens, H], as its runner does; never in place."""
        weights, ids = top_k
        output: torch.Tensor = self._run(hidden_states, w13, w2, weights, ids, filter_expert=False)
        return output

    def choose(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> TopK:
        """Choose by SGLang's own top-k over logits [num_tokens, E], its scale in the weights: k columns."""
        top_k = self.topk(hidden_states, logits)
        return top_k.topk_weights, top_k.topk_ids

    def side_stream(self, num_tokens: int) -> torch.cuda.Stream | None:
        """Return the stream that SGLang's blocks take: while a graph is captured."""
        return self.stream if self._capturing() else None


def routed_topk(block: Any, moe: MoeSpec) -> Any:
    """Return a TopK of k columns for a block, the scale in its weights: its own one where that is such."""
    routing, layout = moe.routing, moe.layout
    if routing.scoring == "softmax":
        return block.topk
    from sglang.srt.layers.moe.topk import TopK

    return TopK(
        top_k=layout.top_k,
        renormalize=routing.renormalize,
        use_grouped_topk=True,
        num_expert_group=routing.num_expert_group,
        topk_group=routing.topk_group,
        correction_bias=block.topk.topk_config.correction_bias,
        routed_scaling_factor=routing.routed_scaling_factor,
        apply_routed_scaling_factor_on_output=True,
    )
