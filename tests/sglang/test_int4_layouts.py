"""The readers of 4-bit weights against SGLang's own order of scales and zero points for Marlin."""

from __future__ import annotations

import pytest
import torch

from fse_patch.fusion_core.kernels import int4_reference

from ..kernels import int4

N, K = 128, 256


@pytest.mark.every_release
@pytest.mark.parametrize("group", [32, 128, 256])
def test_marlin_scales_and_zero_points(group: int) -> None:
    from sglang.srt.layers.quantization import marlin_utils

    matrix = int4.drawn((2, N, K), group, True, torch.float16, 3)
    scales, zeros = matrix.scales, matrix.zeros
    assert zeros is not None
    given = scales.transpose(1, 2).contiguous()
    ordered = marlin_utils.marlin_moe_permute_scales(given, K, N, group)
    assert torch.equal(int4_reference.tile_scales(ordered, group == K), scales)
    # As AWQ checkpoints have zero points.
    awq = int4.words(zeros.transpose(1, 2).unflatten(2, (-1, 8))[..., int4.IN_A_WORD].flatten(2))
    points = marlin_utils.moe_awq_to_marlin_zero_points(awq, K // group, N, 4)
    assert torch.equal(int4_reference.tile_zeros(points), zeros)
    # The control: scales of w13 ordered by the width of an expert, as some ways of loading do.
    if group < K:
        wrong = marlin_utils.marlin_moe_permute_scales(given, group, N, group)
        assert not torch.equal(int4_reference.tile_scales(wrong, single=False), scales)
