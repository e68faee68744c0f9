"""What the modes of a fused layer need of SGLang's experts: weights, grouped GEMM, routing, second stream."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...fusion_core.decision.outcome import MoeSpec

if TYPE_CHECKING:
    from ...fusion_core.forward.execution import TopK  # needs Triton


# Fields of a TopKConfig that are about shared slots, as they are without any.
NO_SLOTS: dict[str, Any] = {"num_fused_shared_experts": 0, "fused_shared_experts_scaling_factor": None}


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
    return RoutedTopK(
        block.topk.topk_config,
        top_k=layout.top_k,
        renormalize=routing.renormalize,
        use_grouped_topk=True,
        num_expert_group=routing.num_expert_group,
        topk_group=routing.topk_group,
        routed_scaling_factor=routing.routed_scaling_factor,
        apply_routed_scaling_factor_on_output=True,
    )


class RoutedTopK:
    """SGLang's choice of experts by a configuration alone, without what its TopK class adds to that.

    Args:
        config: the TopKConfig of a block, which may count shared slots.
        changes: of its fields.
    """

    def __init__(self, config: Any, **changes: Any) -> None:
        from sglang.srt.layers.moe.topk import select_experts

        # Releases have a number, or a record that has one.
        alone = {name: value for name, value in NO_SLOTS.items() if hasattr(config, name)}
        if (record := getattr(config, "shared_experts", None)) is not None:
            alone["shared_experts"] = type(record)()
        self.topk_config = replace(config, **alone, **changes)
        self._select = select_experts

    def __call__(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> Any:
        """Choose for states [num_tokens, H] by logits [num_tokens, E]; SGLang's standard top-k output."""
        return self._select(
            hidden_states=hidden_states, router_logits=router_logits, topk_config=self.topk_config
        )
