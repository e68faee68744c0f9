"""What AITER's kernels do with the memory that they are given, in torch on the CPU.

Strides that a release ignores are ignored, a wrong dtype is read as the right one, and an argument that the
real one aborts on aborts. The first argument is the release.
"""

from __future__ import annotations

from typing import Any

import torch


class Abort(BaseException):
    """The process would be gone: no caller can catch this and go on."""


class GpuFault(BaseException):
    """An address outside of the tensor."""


def check(holds: bool, words: str) -> None:
    """AITER_CHECK: std::abort, unless a module sets that it may throw."""
    if not holds:
        raise Abort(words)


def memory(
    tensor: torch.Tensor, dtype: torch.dtype, size: tuple[int, int], stride: tuple[int, int]
) -> torch.Tensor:
    """A tensor's memory from its first element on, as a kernel reads it: in its own dtype and strides."""
    last = (size[0] - 1) * stride[0] + (size[1] - 1) * stride[1] + 1
    start = tensor.storage_offset() * tensor.element_size() // dtype.itemsize
    if (start + last) * dtype.itemsize > tensor.untyped_storage().nbytes():
        raise GpuFault("outside of the buffer")
    return torch.empty(0, dtype=dtype).set_(tensor.untyped_storage(), start, size, stride)


def typed(profile: Any, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """`data_ptr<T>` raises for another dtype; pointers since v0.1.19 do not."""
    if tensor.dtype != dtype and not profile.reinterprets:
        raise RuntimeError(f"expected scalar type {dtype} but found {tensor.dtype}")


def topk_softmax(
    profile: Any, weights: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor,
    renormalize: bool, shared: int = 0, scoring: str = "",
) -> None:  # fmt: skip
    """csrc/kernels/topk_softmax_kernels.cu"""
    from .aiter_profiles import SIGNATURES

    seven = len(SIGNATURES["states"][profile.state]["topk_softmax"]["parameters"]) == 7
    tokens, experts = logits.shape[0], logits.shape[-1] - shared
    top_k = (ids if seven else weights).shape[-1]
    fast = experts & (experts - 1) == 0 and experts <= 512
    check(logits.dtype in (torch.float32, torch.float16, torch.bfloat16), "logits")
    for tensor, dtype in ((weights, torch.float32), (ids, torch.int32), (rows, torch.int32)):
        typed(profile, tensor, dtype)
    if fast and shared:
        check(scoring == "sigmoid", "Unsupported scoring function")
        check(shared in (1, 2, 4, 8), "Unsupported num_shared_experts")
    strided = profile.strides == "all" or (profile.strides == "powers of two" and fast)
    read = (logits.stride(0), 1) if strided else (experts, 1)
    score = memory(logits, logits.dtype, (tokens, experts), read).float()
    pitch = (weights.stride(0), ids.stride(0)) if strided else (top_k, top_k)
    out = memory(weights, torch.float32, (tokens, top_k), (pitch[0], 1))
    chosen = memory(ids, torch.int32, (tokens, top_k), (pitch[1], 1))
    # NaN is larger than nothing: such a row takes the first expert each time.
    p = score.softmax(dim=-1)
    order = p.nan_to_num(nan=-1.0).argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    order = order.masked_fill(p.isnan().any(dim=-1, keepdim=True), 0)
    best = p.gather(1, order)
    out.copy_(best / best.sum(dim=-1, keepdim=True) if renormalize else best)
    chosen.copy_(order.int())
    # Written row by row without gaps, whatever its stride.
    memory(rows, torch.int32, (1, tokens * top_k), (0, 1)).copy_(torch.arange(tokens * top_k).int())
    if shared and scoring == "sigmoid":
        gates = memory(logits, logits.dtype, (tokens, experts + shared), (read[0] if strided else experts, 1))
        wide = memory(weights, torch.float32, (tokens, top_k + shared), (pitch[0], 1))
        wide[:, top_k:] = gates[:, experts:].float().sigmoid()


def not_run(profile: Any, *_: Any) -> None:
    """There, with its signature; nothing of ours calls it."""
    raise NotImplementedError


def biased_grouped_topk(
    profile: Any, logits: torch.Tensor, bias: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor,
    groups: int, top_groups: int, renormalize: bool, scale: float = 1.0,
) -> None:  # fmt: skip
    """csrc/kernels/topk_softmax_kernels_group.cu"""
    tokens, experts = logits.shape
    top_k = ids.shape[-1]
    check(groups in (1, 2, 4, 8) and experts % groups == 0, "num_expert_group")
    check(top_k <= 64, "topk")
    typed(profile, weights, torch.float32)
    typed(profile, ids, torch.int32)
    pitch = (logits.stride(0), 1) if profile.grouped_strides else (experts, 1)
    score = memory(logits, logits.dtype, (tokens, experts), pitch).float().sigmoid()
    # Read in the logits' dtype, whatever it is stored as.
    choice = score + memory(bias, logits.dtype, (1, experts), (0, 1)).float()
    if groups > 1:
        in_groups = choice.unflatten(1, (groups, -1))
        kept = in_groups.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        dropped = torch.ones(tokens, groups, dtype=torch.bool).scatter(1, kept, False)
        choice = in_groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
    order = choice.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    best = score.gather(1, order)
    # One stride for both outputs.
    stride = (ids.stride(0), 1)
    divided = best / best.sum(dim=-1, keepdim=True) if renormalize else best
    memory(weights, torch.float32, (tokens, top_k), stride).copy_(divided * scale)
    memory(ids, torch.int32, (tokens, top_k), stride).copy_(order.int())


def shuffle_weight(profile: Any, x: torch.Tensor, layout: Any = (16, 16), *_: Any) -> torch.Tensor:
    """aiter/ops/shuffle.py: tiles of 16 rows and 32 columns, 16 bytes at a time."""
    rows, block, pack = layout[0], 2 * layout[1], 16 // x.element_size()
    assert x.shape[-2] % rows == 0
    assert x.shape[-1] % block == 0
    tiles = x.reshape(-1, x.shape[-2] // rows, rows, x.shape[-1] // block, block // pack, pack)
    out = tiles.permute(0, 1, 3, 4, 2, 5).reshape(x.shape).clone()
    out.is_shuffled = True  # type: ignore[attr-defined]
    return out


def plain(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a kernel sees it: by its attribute alone."""
    if not getattr(weight, "is_shuffled", False):
        return weight
    pack = 16 // weight.element_size()
    tiles = weight.reshape(-1, weight.shape[-2] // 16, weight.shape[-1] // 32, 32 // pack, 16, pack)
    return tiles.permute(0, 1, 4, 2, 3, 5).reshape(weight.shape)


def fused_moe(
    profile: Any, states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor,
    ids: torch.Tensor, expert_mask: Any = None, activation: Any = None, quant_type: Any = None, *rest: Any,
) -> torch.Tensor:  # fmt: skip
    """aiter/fused_moe.py, unquantised: sorting reads the top-k flat, then two grouped GEMMs."""
    tokens, columns = ids.shape
    experts, width = w1.shape[0], w2.shape[2]
    if (activation.value, quant_type.value) != (0, 0) or expert_mask is not None:
        raise NotImplementedError("SiLU without quantisation or experts on other ranks")
    check(states.dtype in (torch.bfloat16, torch.float16), "Invalid dtype")
    if width % (64 if width <= 192 else 128):
        raise RuntimeError(
            "wrong! device_gemm with the specified compilation parameters does not support this GEMM problem"
        )
    typed(profile, weights, torch.float32)
    typed(profile, ids, torch.int32)
    flat_ids = memory(ids, torch.int32, (tokens, columns), (columns, 1))
    flat_weights = memory(weights, torch.float32, (tokens, columns), (columns, 1))
    if bool((flat_ids < 0).any()) or bool((flat_ids >= experts).any()):
        raise GpuFault("an id is no expert")
    w13, down = plain(w1).double(), plain(w2).double()
    out = torch.zeros(tokens, w2.shape[1], dtype=torch.float64)
    for row in range(tokens):
        for column in range(columns):
            expert = int(flat_ids[row, column])
            gate, up = (w13[expert] @ states[row].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            out[row] += flat_weights[row, column].double() * (down[expert] @ inner)
    return out.to(states.dtype)
