"""Formats of experts whose layers can run in several modes, and which of its kernels vLLM picks for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...fusion_core.checkpoint.config import UNQUANTISED
from ...fusion_core.decision.outcome import Merged

# vLLM's kernels of dense FP8 layers that take a slot of the experts as it lies in memory; a word for each.
DENSE = {
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel": "flashinfer-deepgemm",
    "DeepGemmFp8BlockScaledMMKernel": "deepgemm",
    "CutlassFp8BlockScaledMMKernel": "cutlass",
    "TritonFp8BlockScaledMMKernel": "triton",
    "CutlassFP8ScaledMMLinearKernel": "cutlass",
}
# What vLLM asks its FP8 backends for: the key of the weights, those of activations, the parameters of scales.
FP8: dict[str, tuple[str, dict[str, str], str]] = {
    "fp8-block": ("kFp8Static128BlockSym", {"dynamic": "kFp8Dynamic128Sym"}, "weight_scale_inv"),
    "fp8-tensor": (
        "kFp8StaticTensorSym",
        {"dynamic": "kFp8DynamicTensorSym", "static": "kFp8StaticTensorSym"},
        "weight_scale",
    ),
}
UNKNOWN = "unknown"


@dataclass(frozen=True)
class ExpertFormat:
    """How experts are stored, and who computes with them.

    Args:
        quant: the word for it in tuned tables.
        grouped: a FusedMoEConfig -> the backend that vLLM picks for experts like these, lower case.
        scale: name of the experts' scales behind "w13_" and "w2_"; "" where they are plain.
        block: rows and columns of a weight that share a scale; None for all of them.
        dense: the method of vLLM's dense layers of this format; None where they are plain.
    """

    quant: str
    grouped: Callable[[Any], str]
    scale: str = ""
    block: tuple[int, int] | None = None
    dense: Callable[[], Any] | None = None


def format_here(decision: Merged, vllm_config: Any) -> ExpertFormat | None:
    """Return the format of a role's experts; None off CUDA, where layers run in one mode."""
    from vllm.platforms import current_platform

    return format_of(decision, vllm_config) if current_platform.is_cuda() else None


def format_of(decision: Merged, vllm_config: Any) -> ExpertFormat | None:
    """Return the format of a decision's layers, or None where such layers run in one mode."""
    if decision.quant_method == UNQUANTISED:
        return ExpertFormat(UNQUANTISED, _unquantised)
    config, form = vllm_config.quant_config, ",".join(decision.formats)
    if decision.quant_method != "fp8" or form not in FP8 or config.get_name() != "fp8":
        return None
    weights, activations, scale = FP8[form]
    block = config.weight_block_size
    width = decision.moe.layout.moe_intermediate_size // vllm_config.parallel_config.tensor_parallel_size
    # From 0.29 on vLLM then cuts the blocks smaller, or pads the experts: the scales are not as declared.
    if block and any(width % size for size in block):
        return None

    def method() -> Any:
        from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod

        return Fp8LinearMethod(config)

    def grouped(moe_config: Any) -> str:
        from vllm.model_executor.layers.fused_moe.oracle.fp8 import select_fp8_moe_backend
        from vllm.model_executor.layers.quantization.utils import quant_utils

        keys = weights, activations[config.activation_scheme]
        picked, _ = select_fp8_moe_backend(moe_config, *(getattr(quant_utils, key) for key in keys))
        return str(picked.name).lower()

    detail = f"{block[0]}x{block[1]}" if block else config.activation_scheme
    return ExpertFormat(f"{form} {detail}", grouped, scale, tuple(block) if block else None, method)


def _unquantised(config: Any) -> str:
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend

    return str(select_unquantized_moe_backend(config)[0].name).lower()


def dense_kernels(form: ExpertFormat, hidden: int, width: int) -> list[Any]:
    """Return vLLM's kernels for a dense MLP of this format, as stock's shared expert gets them.

    Those of gate_up, then of down.

    Needs vLLM's current config and torch's default dtype, as while a model is built.
    """
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel

    assert form.dense is not None
    method = form.dense()
    return [
        init_fp8_linear_kernel(
            activation_quant_key=method.activation_quant_key,
            weight_quant_key=method.weight_quant_key,
            weight_shape=shape,
            input_dtype=method.input_dtype,
            out_dtype=method.out_dtype,
            module_name=type(method).__name__,
        )
        for shape in ((2 * width, hidden), (hidden, width))
    ]


def dense_word(form: ExpertFormat, hidden: int, width: int) -> str:
    """Return the word for those kernels, `UNKNOWN` for one not of `DENSE`; "" where layers are plain."""
    if form.dense is None:
        return ""
    words = {DENSE.get(type(kernel).__name__, UNKNOWN) for kernel in dense_kernels(form, hidden, width)}
    return UNKNOWN if UNKNOWN in words else ",".join(sorted(words))
