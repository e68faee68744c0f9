"""Layouts of 4-bit weights: what the readers unpack is what was packed, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fse_patch.fusion_core.kernels import experts, experts_fp8
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights
from fse_patch.fusion_core.kernels.int4 import Layout

from .int4 import Matrix, drawn, packed, read

# Layout, columns of a group, whether there are zero points, and whether Humming packed these.
HELD = {
    "marlin g128": (Layout.MARLIN_TILE, 128, False, False),
    "marlin g32": (Layout.MARLIN_TILE, 32, False, False),
    "marlin channel": (Layout.MARLIN_TILE, 0, False, False),
    "awq g128": (Layout.MARLIN_TILE, 128, True, False),
    "awq channel": (Layout.MARLIN_TILE, 4096, True, False),
    "humming g128": (Layout.MARLIN_TILE, 128, False, True),
    "humming channel": (Layout.MARLIN_TILE, 0, False, True),
    "humming awq g64": (Layout.MARLIN_TILE, 64, True, True),
    "bytes g32": (Layout.PACKED_BYTES, 32, False, False),
    "bytes awq g128": (Layout.PACKED_BYTES, 128, True, False),
}


def made(
    how: str,
    count: int,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    harm: Callable[[Matrix, Matrix], None] | None = None,
) -> tuple[ExpertWeights, Matrix, Matrix]:
    """Experts in a layout, harmed before they are packed; and w13 and w2 as they were packed."""
    layout, group, zeros, humming = HELD[how]
    w13 = drawn((count, 2 * width, hidden), group, zeros, dtype, 5)
    w2 = drawn((count, hidden, width), group, zeros, dtype, 6)
    if harm is not None:
        harm(w13, w2)
    return packed(w13, w2, layout, group, humming), w13, w2


def alike(one: Matrix, other: Matrix) -> bool:
    """Whether numbers, scales and zero points are the same."""
    if one.zeros is not None and (other.zeros is None or not torch.equal(one.zeros, other.zeros)):
        return False
    return torch.equal(one.numbers, other.numbers) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("how", HELD)
def test_what_was_packed_is_read(how: str) -> None:
    weights, w13, w2 = made(how, 3, 256, 128, torch.bfloat16)
    assert (weights.count, weights.hidden, weights.width) == (3, 256, 128)
    for name, matrix in (("w13", w13), ("w2", w2)):
        assert alike(read(weights, name), matrix)
    # A product over the numbers as read, against one over the weights as drawn.
    states = torch.randn(256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    states = states.to(w13.numbers.device)
    wanted = w13.exactly() @ states
    assert float((read(weights, "w13").exactly() @ states - wanted).norm() / wanted.norm()) < 1e-13


@pytest.mark.parametrize("how", HELD)
def test_one_bit_is_seen(how: str) -> None:
    weights, _, w2 = made(how, 2, 128, 64, torch.float16)
    changed = weights.w2.clone()
    changed[1, 2, 3] ^= 1
    assert not alike(read(replace(weights, w2=changed), "w2"), w2)
    int4 = weights.int4
    assert int4 is not None
    moved = replace(int4, w2=int4.w2.roll(1, 2 if int4.tiles else 1))
    assert not alike(read(replace(weights, int4=moved), "w2"), w2)
    if int4.w2_zeros is not None:
        points = int4.w2_zeros.clone()
        points[0, 0, 0] ^= 16
        assert not alike(read(replace(weights, int4=replace(int4, w2_zeros=points)), "w2"), w2)


def test_zero_points_of_humming_are_not_those_of_marlin() -> None:
    weights, w13, _ = made("humming awq g64", 2, 128, 64, torch.float16)
    int4 = weights.int4
    assert int4 is not None
    assert not alike(read(replace(weights, int4=replace(int4, humming=False)), "w13"), w13)


def test_scales_of_one_group_are_not_in_the_order_of_marlin_where_humming_packed_them() -> None:
    weights, w13, w2 = made("humming g128", 2, 256, 128, torch.float16)
    int4 = weights.int4
    assert int4 is not None
    otherwise = replace(weights, int4=replace(int4, humming=False))
    assert alike(read(otherwise, "w13"), w13)
    assert not alike(read(otherwise, "w2"), w2)


def test_kernels_for_plain_weights_refuse_others() -> None:
    weights, _, _ = made("bytes g32", 2, 128, 64, torch.float16)
    states, ids = torch.zeros(1, 128, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.int32)
    for kernel, words in ((experts.small_experts, "plain"), (experts_fp8.small_experts, "without scales")):
        with pytest.raises(ValueError, match=words):
            kernel(states, weights, torch.ones(1, 1), ids)


def test_what_does_not_fit_is_refused() -> None:
    weights, _, _ = made("awq g128", 2, 256, 128, torch.float16)
    int4 = weights.int4
    assert int4 is not None
    assert int4.w13_zeros is not None
    for changed, words in (
        ({"w13": weights.w13[:, :-1]}, "w13 "),
        ({"w2": weights.w2.long()}, "torch.int64"),
        ({"int4": replace(int4, group=48)}, "groups of 48"),
        ({"int4": replace(int4, group=64)}, "w13 scales"),
        ({"int4": replace(int4, w2=int4.w2.int())}, "w2 scales"),
        ({"int4": replace(int4, w13_zeros=int4.w13_zeros[..., :-1])}, "w13 zeros"),
        ({"int4": replace(int4, w13=int4.w13.repeat_interleave(2, 2)[..., ::2])}, "strides"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(weights, **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiples of 64"):
        made("bytes g32", 2, 96, 32, torch.float16)
