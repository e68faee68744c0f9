"""The readers of 4-bit weights against vLLM's own repacking for Marlin."""

from __future__ import annotations

import pytest
import torch

from fse_patch.fusion_core.kernels import int4_reference

from ..kernels import int4

N, K = 128, 256


@pytest.mark.every_release
@pytest.mark.parametrize("group", [32, 128, 256])
def test_marlin_tiles(group: int) -> None:
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test

    matrix = int4.drawn((1, N, K), group, True, torch.float16, 3)
    numbers, scales, zeros = matrix.numbers, matrix.scales, matrix.zeros
    assert zeros is not None
    order = marlin_utils_test.get_weight_perm(4)
    weight = marlin_utils_test.marlin_weights(numbers[0].t().int(), K, N, 4, order)
    assert torch.equal(int4_reference.tile_numbers(weight[None]), numbers)
    ordered = marlin_utils.marlin_permute_scales(scales[0].t().contiguous(), K, N, group)
    assert torch.equal(int4_reference.tile_scales(ordered[None], group == K), scales)
    # As AWQ checkpoints have zero points.
    awq = int4.words(zeros[0].t().unflatten(1, (-1, 8))[..., int4.IN_A_WORD].flatten(1))
    points = marlin_utils.awq_to_marlin_zero_points(awq, K // group, N, 4)
    assert torch.equal(int4_reference.tile_zeros(points[None]), zeros)
    # The control: repacked for activations of 8 bits, which is another layout.
    other = marlin_utils_test.get_weight_perm(4, is_a_8bit=True)
    weight = marlin_utils_test.marlin_weights(numbers[0].t().int(), K, N, 4, other, is_a_8bit=True)
    assert not torch.equal(int4_reference.tile_numbers(weight.view(1, K // 16, 2 * N)), numbers)
