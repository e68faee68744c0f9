"""Fused experts by AITER's `fused_moe`: what it takes, how weights are laid out for it, and the call."""

from __future__ import annotations

from typing import Any

import torch

from .aiter import SHUFFLE_COLUMNS, SHUFFLE_ROWS, AiterCaps

MARK = "is_shuffled"


def alignment(intermediate_size: int) -> int:
    """Return what an expert's intermediate width has to be a multiple of for CK's two-stage kernels.

    Up to 192 they have tiles of 64, from there on one of 128; another width ends in "device_gemm with the
    specified compilation parameters does not support this GEMM problem".
    """
    return 64 if intermediate_size <= 192 else 128


def experts_refusal(caps: AiterCaps, w13: torch.Tensor, w2: torch.Tensor, num_experts: int) -> str:
    """Say why `fused_moe` cannot run a layer, or "": the engine's Triton kernels run it then.

    Args:
        w13: [E+S, 2I, H], gate rows before up rows; w2: [E+S, H, I]. Neither shuffled.
        num_experts: E+S. The slots have to be in place before anything is shuffled.
    """
    if caps.fused_moe is None or caps.shuffle_weight is None:
        return caps.why or "it is not to be used"
    if w13.dtype not in (torch.bfloat16, torch.float16) or w2.dtype != w13.dtype:
        return f"weights are {w13.dtype} and {w2.dtype}; bfloat16 and float16 are known to be right"
    hidden, width = w2.shape[1], w2.shape[2]
    if list(w13.shape) != [num_experts, 2 * width, hidden] or w2.shape[0] != num_experts:
        return f"weights are {list(w13.shape)} and {list(w2.shape)}, not of {num_experts} experts"
    if width % alignment(width):
        return f"intermediate width {width} is no multiple of {alignment(width)}"
    if hidden % SHUFFLE_COLUMNS or (2 * width) % SHUFFLE_ROWS:
        return f"hidden size {hidden} is no multiple of {SHUFFLE_COLUMNS}"
    if getattr(w13, MARK, False) or getattr(w2, MARK, False):
        return "the weights are shuffled already"
    return ""


def shuffle(caps: AiterCaps, w13: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put both weights into the layout of the kernels, marked so.

    AITER reads the layout off the attribute ``is_shuffled`` of the object that it gets; views and
    torch.nn.Parameter lose it, and `keep_mark` gives it back.

    Args:
        w13, w2: [E+S, 2I, H] and [E+S, H, I], bfloat16 or float16, as `experts_refusal` lets pass.

    Returns:
        Both, of the same shapes and dtypes.

    Raises:
        ValueError: one is shuffled already: twice is another layout.
    """
    assert caps.shuffle_weight is not None
    if getattr(w13, MARK, False) or getattr(w2, MARK, False):
        raise ValueError("the weights are shuffled already")
    shuffled = caps.shuffle_weight(w13), caps.shuffle_weight(w2)
    for weight in shuffled:
        setattr(weight, MARK, True)
    return shuffled


def keep_mark(made: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Give ``made``, a parameter or another view of all of ``source``, its mark."""
    setattr(made, MARK, getattr(source, MARK, False))
    return made


def fused_experts(
    caps: AiterCaps,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Compute the sum over columns j of weights[:, j] · w2 (SiLU(w1 x) · (w3 x)) of expert ids[:, j].

    Args:
        hidden_states: [num_tokens, H], of the weights' dtype.
        w13, w2: from `shuffle`.
        weights: [num_tokens, k+S] float32; ids: int32, in range(E+S).
        options: by keyword; those that this release does not know are left out if they are None or False.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.

    Raises:
        ValueError: a tensor is not as the kernels take it, or an option is not known.
    """
    assert caps.fused_moe is not None
    if not (getattr(w13, MARK, False) and getattr(w2, MARK, False)):
        raise ValueError("the weights are not marked as shuffled; they may be read in another layout")
    if weights.dtype != torch.float32 or ids.dtype != torch.int32 or weights.shape != ids.shape:
        raise ValueError(f"top-k is {weights.dtype} {list(weights.shape)} and {ids.dtype} {list(ids.shape)}")
    if options.get("expert_mask") is not None:
        raise ValueError("experts on other ranks are not supported: their mask is no expert map")
    counts = options.get("num_local_tokens")
    if counts is not None and counts.numel() != 1:
        raise ValueError("num_local_tokens is one number of rows, not a count for each expert")
    known = {name: value for name, value in options.items() if name in caps.moe_arguments}
    if unknown := [n for n, value in options.items() if n not in known and value not in (None, False)]:
        raise ValueError(f"this AITER's fused_moe has no {', '.join(unknown)}")
    # Its sorting reads both flat, so columns of a wider buffer would be other tokens' experts.
    return caps.fused_moe(
        hidden_states,
        w13,
        w2,
        weights.contiguous(),
        ids.contiguous(),
        activation=caps.silu,
        quant_type=caps.unquantised,
        **known,
    )
