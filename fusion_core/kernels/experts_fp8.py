"""The experts of few tokens over k+S slots with FP8 weights (e4m3), in the two steps of kernels/experts.py.

Hidden and inner states stay as they are: engines' grouped GEMMs round them to FP8, but with few tokens
nothing is gained by it, and the result is nearer to what the checkpoint says. Weights are multiplied in
float32; a thread adds up the products of a chunk, and multiplies by the chunk's scale once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from . import experts
from .expert_weights import Block, ExpertWeights, Scales, slots_of
from .experts_fp8_kernels import w2_kernel, w13_kernel
from .launch import options

# Most weights that a thread loads at once, 16 bytes: blocks of scales must be whole numbers of them.
CHUNK = 16
# Rows or columns that share a scale where there is one for all.
ALL = 1 << 30
# BLOCK_N, CHUNKS, warps, CHUNK: weights that a thread multiplies and adds up by itself.
Tile = tuple[int, int, int, int]


def w13_tile(tokens: int, hidden: int) -> Tile:
    """Return the tile for w13 [2 * I, H]: the fastest one on an H200."""
    if hidden <= 2048:
        return (2, 64, 1, 16)
    return (1, 64, 1, 16) if tokens == 1 else (1, 128, 2, 16)


def w2_tile(tokens: int, width: int) -> Tile:
    """Return the tile for w2 [H, I]; chunks of 8: a thread loads so many inner states at once."""
    if width <= 128:
        return (2, 32, 1, 8) if tokens <= 2 else (4, 16, 1, 8)
    return (2, 32, 1, 16) if 512 < width <= 1024 else (1, 64, 1, 8)


def early_slots(tokens: int, width: int) -> int:
    """Return of how many slots w2 is loaded before the wait for w13: the fastest number on an H200."""
    if 512 < width <= 1024:
        return 0
    return experts.MANY if tokens == 1 and width <= 512 else 3


def dequantised(weight: torch.Tensor, scale: torch.Tensor, block: Block, halves: int = 1) -> torch.Tensor:
    """Multiply weights [n, out, in] by their scales, in float64.

    Args:
        scale, block: as of `Scales`.
        halves: 2 where the scales of w3 follow those of w1.
    """
    parts = []
    factors = scale.double().expand(-1, halves, -1) if scale.shape[1] < halves else scale.double()
    for part, some in zip(weight.double().chunk(halves, 1), factors.chunk(halves, 1), strict=True):
        out, inner = part.shape[1:]
        tall = some.repeat_interleave(block[0] or out, 1)[:, :out]
        parts.append(part * tall.repeat_interleave(block[1] or inner, 2)[:, :, :inner])
    return torch.cat(parts, 1)


def reference(
    hidden_states: torch.Tensor, routed: ExpertWeights, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """Compute what `small_experts` computes with merged slots, in float64; shapes as there."""
    scales = checked(routed)
    whole = dequantised(routed.w13, scales.w13, scales.block, halves=2)
    return experts.reference(
        hidden_states, whole, dequantised(routed.w2, scales.w2, scales.block), topk_weights, topk_ids
    )


def small_experts(
    hidden_states: torch.Tensor,
    routed: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared: ExpertWeights | None = None,
) -> torch.Tensor:
    """Compute the fused layer's output: sum over j of weight_j · w2_j (SiLU(w1_j x) · (w3_j x)).

    Args:
        routed, shared: with scales; blocks of them have a multiple of `CHUNK` columns. All arguments as of
            `experts.small_experts`.

    Returns:
        [num_tokens, H] in the dtype of ``hidden_states``.

    Raises:
        ValueError: scales and sizes do not fit these kernels.
    """
    tokens, hidden = hidden_states.shape
    width, slots = routed.width, topk_ids.shape[1]
    for weights in (routed, shared):
        if weights is not None:
            checked(weights)
    states = hidden_states.contiguous()
    inner = torch.empty(tokens * slots, width, dtype=states.dtype, device=states.device)
    output = torch.empty_like(states)
    launch_w13(states, routed, shared, topk_ids, inner, w13_tile(tokens, hidden))
    launch_w2(inner, routed, shared, topk_weights, topk_ids, output, w2_tile(tokens, width))
    return output


def checked(weights: ExpertWeights) -> Scales:
    """Return the scales; refuse those of which `small_experts` would read numbers that are not there.

    Raises:
        ValueError: scales and sizes do not fit these kernels.
    """
    scales = weights.scales
    if scales is None:
        raise ValueError("FP8 weights without scales")
    total, hidden, width = weights.w2.shape
    rows, columns = scales.block
    if columns % CHUNK:
        raise ValueError(f"blocks of {columns} columns; the kernel takes multiples of {CHUNK}")
    if hidden % CHUNK or width % CHUNK:
        raise ValueError(f"H {hidden} and I {width} must be multiples of {CHUNK}")
    for name, scale, out, inner, halves in (
        ("w13", scales.w13, width, hidden, 2),
        ("w2", scales.w2, hidden, width, 1),
    ):
        high = halves * -(-out // rows) if rows else halves
        shapes = [(total, high, -(-inner // columns) if columns else 1)]
        if not rows and not columns:
            shapes.append((total, 1, 1))  # one for both halves
        if tuple(scale.shape) not in shapes or scale.dtype != torch.float32:
            raise ValueError(
                f"scales of {name}: {list(scale.shape)} {scale.dtype}, not {list(shapes[0])} float32"
            )
    return scales


def launch_w13(
    states: torch.Tensor,
    routed: ExpertWeights,
    shared: ExpertWeights | None,
    ids: torch.Tensor,
    inner: torch.Tensor,
    tile: Tile,
) -> None:
    """Write SiLU(w1 x) · (w3 x) of every (token, slot) pair into ``inner`` [num_tokens * (k + S), I]."""
    (block_n, chunks, warps, chunk), hidden = tile, states.shape[1]
    chunks = min(chunks, triton.next_power_of_2(hidden // chunk))
    w13_kernel[(inner.shape[0], triton.cdiv(inner.shape[1], block_n))](
        states,
        *_tensors("w13", routed, shared),
        ids,
        inner,
        len(routed.w2),
        **_sizes("w13", routed, shared, ids),
        BLOCK_N=block_n,
        CHUNKS=chunks,
        CHUNK=chunk,
        EVEN=inner.shape[1] % block_n == 0 and hidden % (chunks * chunk) == 0 and _whole(routed, shared),
        num_warps=warps,
        **options(states),
    )


def launch_w2(
    inner: torch.Tensor,
    routed: ExpertWeights,
    shared: ExpertWeights | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
    output: torch.Tensor,
    tile: Tile,
) -> None:
    """Write the weighted sum over a token's slots of w2 · inner into ``output`` [num_tokens, H]."""
    (block_n, chunks, warps, chunk), (hidden, width) = tile, routed.w2.shape[1:]
    chunks = min(chunks, triton.next_power_of_2(width // chunk))
    w2_kernel[(output.shape[0], triton.cdiv(hidden, block_n))](
        inner,
        *_tensors("w2", routed, shared),
        ids,
        weights,
        output,
        len(routed.w2),
        **_sizes("w2", routed, shared, ids),
        EARLY=min(early_slots(len(output), width), ids.shape[1] - _apart(routed, shared)),
        BLOCK_N=block_n,
        CHUNKS=chunks,
        CHUNK=chunk,
        EVEN=hidden % block_n == 0 and width % (chunks * chunk) == 0 and _whole(routed, shared),
        num_warps=warps,
        **options(inner),
    )


def _apart(routed: ExpertWeights, shared: ExpertWeights | None) -> int:
    return 0 if shared is None else slots_of(shared, routed.width)


def _whole(routed: ExpertWeights, shared: ExpertWeights | None) -> bool:
    """Return whether nothing is masked: all experts are here, and the shared one fills its slots."""
    return shared is None or shared.width % routed.width == 0


def _tensors(name: str, routed: ExpertWeights, shared: ExpertWeights | None) -> list[torch.Tensor]:
    """Return weights and scales of the routed experts and of the shared one."""
    return [
        tensor
        for weights in (routed, shared or routed)
        for tensor in (getattr(weights, name), getattr(weights.scales, name))
    ]


def _sizes(
    name: str, routed: ExpertWeights, shared: ExpertWeights | None, ids: torch.Tensor
) -> dict[str, Any]:
    """Return what both kernels are told of the layer."""
    other = shared or routed
    return {
        "SLOTS": ids.shape[1],
        "APART": _apart(routed, shared),
        "HIDDEN": routed.w2.shape[1],
        "WIDTH": routed.width,
        "SHARED_WIDTH": other.width,
        "FORMAT": _format(name, routed),
        "SHARED_FORMAT": _format(name, other),
    }


def _format(name: str, weights: ExpertWeights) -> tuple[int, ...]:
    """Return strides of the weights (expert, row) and of the scales (expert, row, column), and their blocks.

    After those the rows of scales of w1. One scale for all is a block of any size.
    """
    weight: torch.Tensor = getattr(weights, name)
    scales = checked(weights)
    scale: torch.Tensor = getattr(scales, name)
    strides = [step if size > 1 else 0 for step, size in zip(scale.stride(), scale.shape, strict=True)]
    rows, columns = (size or ALL for size in scales.block)
    return (*weight.stride()[:2], *strides, rows, columns, scale.shape[1] // 2)
