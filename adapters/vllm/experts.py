"""What the modes of a fused layer need of vLLM's experts: weights, grouped GEMM, routing, second stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...errors import FsePatchError

if TYPE_CHECKING:
    from ...fusion_core.forward.execution import TopK  # needs Triton


def check_output(fused_experts: Any) -> None:
    """Stop where vLLM's experts do not give the sum of their outputs, weighed: all modes give that.

    Raises:
        FsePatchError: somebody takes the outputs before the sum, or does it later; for this model alone.
    """
    if getattr(fused_experts, "post_gemm2_hook", None) is not None:
        raise FsePatchError("vLLM's experts have a post_gemm2_hook, which the modes of a layer would bypass")
    if getattr(fused_experts.moe_config, "_defer_moe_finalize", False):
        raise FsePatchError("vLLM's experts are asked to leave their sum to a later layer")


class Experts:
    """`GroupedExperts` of one of vLLM's layers, whose experts are Triton's."""

    def __init__(self, routed_experts: Any, stock_router: Any) -> None:
        self.routed_experts = routed_experts
        self.stock_router = stock_router

    @property
    def w13(self) -> torch.Tensor:
        """Return w13 [E + S, 2 * I, H], as loaded."""
        weight: torch.Tensor = self.routed_experts.w13_weight
        return weight

    @property
    def w2(self) -> torch.Tensor:
        """Return w2 [E + S, H, I], as loaded."""
        weight: torch.Tensor = self.routed_experts.w2_weight
        return weight

    def gemm(
        self, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, top_k: TopK
    ) -> torch.Tensor:
        """Run vLLM's own kernels on states [num_tokens, H], and copy no result out of a workspace."""
        layer, (weights, ids) = self.routed_experts, top_k
        kernel = layer.quant_method.moe_kernel.impl
        # Rounds the states to FP8 where the kernel multiplies in it, and leaves plain ones alone. The kernel
        # has scales of all experts, and reads those of the chosen ones.
        states, scale, *_ = kernel.prepare_finalize.prepare(
            hidden_states,
            weights,
            ids,
            w13.shape[0],
            None,
            False,
            kernel.fused_experts.quant_config,
            defer_input_quant=kernel.fused_experts.expects_unquantized_inputs,
        )
        experts, tokens, rows, hidden, slots = kernel.fused_experts.moe_problem_size(states, w13, w2, ids)
        # Newer releases return more than the third, which is the output.
        workspace13, workspace2, *_ = kernel._allocate_buffers(
            hidden_states.dtype,
            hidden_states.device,
            tokens,
            tokens,
            rows,
            hidden,
            slots,
            experts,
            experts,
            None,
            layer.activation,
        )
        output = torch.empty_like(hidden_states)
        unfinished = kernel.fused_experts.apply(
            output=output,
            hidden_states=states,
            w1=w13,
            w2=w2,
            topk_weights=weights,
            topk_ids=ids,
            activation=layer.activation,
            global_num_experts=experts,
            expert_map=None,
            a1q_scale=scale,
            a2_scale=kernel.fused_experts.a2_scale,
            workspace13=workspace13,
            workspace2=workspace2,
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        if unfinished is not None:
            raise FsePatchError("vLLM's experts left the sum of their outputs to be done later")
        return output

    def choose(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> TopK:
        """Choose by stock's own router over logits [num_tokens, E], its scale in the weights: k columns."""
        chosen: TopK = self.stock_router.select_experts(
            hidden_states=hidden_states,
            router_logits=logits,
            topk_indices_dtype=self.routed_experts.quant_method.topk_indices_dtype,
            input_ids=None,
        )
        return chosen

    def side_stream(self, num_tokens: int) -> torch.cuda.Stream | None:
        """Return the stream that vLLM's shared experts take, without expert or data parallelism."""
        from vllm import envs
        from vllm.utils.torch_utils import aux_stream

        if envs.VLLM_DISABLE_SHARED_EXPERTS_STREAM:
            return None
        if num_tokens > envs.VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD:
            return None
        stream: torch.cuda.Stream | None = aux_stream()
        return stream
