"""FP8 experts in vLLM: what stands for plain products in a layer's modes, and the warm-up of its kernels."""

from __future__ import annotations

from typing import Any

import torch

from ...fusion_core.kernels.expert_weights import ExpertWeights, Scales
from ..role import FusedRole


class Slot:
    """One matrix of one expert as vLLM's dense kernels ask for a layer's weight.

    Read anew each time: a reload may put other parameters in the place of these. It keeps the checkpoint's
    scales: stock rounds them to powers of two, and the weights again, which DeepGEMM does not need on Hopper.
    """

    input_scale = input_scale_ub = None

    def __init__(self, experts: Any, name: str, number: int) -> None:
        self.experts, self.name, self.number = experts, name, number

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight [out, in], float8_e4m3fn."""
        weight: torch.Tensor = getattr(self.experts, f"{self.name}_weight")
        return weight[self.number]

    @property
    def weight_scale_inv(self) -> torch.Tensor:
        """Return its scales [out / rows, in / columns], float32."""
        scale: torch.Tensor = getattr(self.experts, f"{self.name}_weight_scale_inv")
        return scale[self.number]


class TensorSlot(Slot):
    """The same where one scale is for all of a matrix: such kernels take it as [in, out]."""

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight [in, out], float8_e4m3fn, columns contiguous."""
        return super().weight.t()

    @property
    def weight_scale(self) -> torch.Tensor:
        """Return its one scale, 0-d, float32."""
        scale: torch.Tensor = getattr(self.experts, f"{self.name}_weight_scale")
        return scale[self.number]

    @property
    def input_scale(self) -> torch.Tensor | None:  # type: ignore[override]
        """Return the scale of activations, float32: the largest of all experts; None without one."""
        scale: torch.Tensor | None = getattr(self.experts, f"{self.name}_input_scale")
        return scale


class Fp8Experts:
    """`QuantisedExperts` of a layer whose experts are Triton's, as in the checkpoint.

    Args:
        scale: name of the scales; see `formats.ExpertFormat`, as for ``block``.
        kernels: vLLM's own of a dense layer, for gate_up and for down; see `formats.dense_kernels`.
        slot: number of the shared expert.
    """

    def __init__(
        self, experts: Any, scale: str, block: tuple[int, int] | None, kernels: list[Any], slot: int
    ) -> None:
        self.experts, self.scale, self.block = experts, scale, block
        kind = TensorSlot if block is None else Slot
        # Of gate_up and of down.
        self.dense = list(zip(kernels, [kind(experts, name, slot) for name in ("w13", "w2")], strict=True))
        if block is None:
            for kernel, layer in self.dense:
                kernel.process_weights_after_loading(layer)  # notes the size, and changes nothing of it

    def weights(self) -> ExpertWeights:
        """Return the experts as the kernels for few tokens read them."""
        first, second = (getattr(self.experts, f"{name}_{self.scale}") for name in ("w13", "w2"))
        if self.block is None:
            # One scale for all rows and columns of an expert.
            first, second = first.view(-1, 1, 1), second.view(-1, 1, 1)
        scales = Scales(first, second, self.block or (0, 0))
        return ExpertWeights(self.experts.w13_weight, self.experts.w2_weight, scales)

    def gate_up(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Multiply [num_tokens, H] with w13 of the shared slot: [num_tokens, 2 * I], in that dtype."""
        return self._apply(0, hidden_states)

    def down(self, inner: torch.Tensor) -> torch.Tensor:
        """Multiply [num_tokens, I] with w2 of the shared slot: [num_tokens, H], in that dtype."""
        return self._apply(1, inner)

    def _apply(self, number: int, states: torch.Tensor) -> torch.Tensor:
        kernel, slot = self.dense[number]
        output: torch.Tensor = kernel.apply_weights(slot, states)
        return output


def warm_up(fused_role: FusedRole, vllm_config: Any) -> None:
    """Compile what `split` needs of DeepGEMM for any number of tokens; vLLM warms up layers that are modules.

    DeepGEMM compiles kernels on first use, which would be while requests wait.
    """
    layer = next(iter(fused_role.layers.values()), None)
    quantised = None if layer is None or layer.execution is None else layer.execution.quantised
    if not isinstance(quantised, Fp8Experts) or "split" not in fused_role.start.plan.modes:
        return
    from vllm import envs

    if envs.VLLM_DEEP_GEMM_WARMUP == "skip":
        return
    from vllm.model_executor.warmup import deep_gemm_warmup

    for kernel, slot in quantised.dense:
        if deep_gemm_warmup._is_deep_gemm_backed_kernel(kernel):
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            deep_gemm_warmup._deepgemm_fp8_gemm_nt_warmup(slot.weight, slot.weight_scale_inv, tokens)
