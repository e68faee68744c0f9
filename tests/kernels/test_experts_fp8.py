"""The FP8 experts of few tokens against float64 of the dequantised weights."""

from __future__ import annotations

import pytest
import torch

from fse_patch.fusion_core.kernels import experts_fp8
from fse_patch.fusion_core.kernels.expert_weights import Block, ExpertWeights, Scales

from .test_kernels import DEVICE, chosen, draw, off

BLOCK = (128, 128)
# Tokens, H, I, E, k, S; then the block of a scale, 0 for all rows or columns.
SHAPES = [
    (2, 256, 128, 3, 2, 1, BLOCK),
    (1, 256, 256, 3, 2, 1, BLOCK),
    (2, 176, 80, 5, 2, 1, (64, 32)),  # partial blocks at the end of rows and columns
    (2, 96, 48, 5, 2, 1, (16, 48)),
    (3, 96, 48, 6, 3, 1, (1, 0)),  # a scale for each row
    (2, 128, 48, 5, 2, 1, (0, 0)),
]
if DEVICE == "cuda":
    SHAPES += [
        (1, 2048, 512, 512, 10, 1, BLOCK),
        (4, 4096, 128, 512, 10, 1, BLOCK),
        (2, 4096, 1408, 128, 8, 1, BLOCK),
        (3, 2048, 512, 256, 8, 1, (0, 0)),
    ]
else:
    SHAPES += [(1, 4096, 16, 2, 1, 1, BLOCK), (1, 16, 1408, 1, 1, 1, BLOCK)]


def drawn(shape: tuple[int, ...], block: Block, halves: int, seed: int) -> list[torch.Tensor]:
    """FP8 weights [n, out, in] with scales that differ from block to block."""
    total, out, inner = shape
    noise = torch.empty(shape, device=DEVICE).normal_(generator=torch.Generator(DEVICE).manual_seed(seed))
    weight = noise.mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    rows, columns = block[0] or out // halves, block[1] or inner
    # One scale for all is one for both halves, as engines keep it.
    high = halves * -(-out // halves // rows) if block[0] else 1
    return [weight, draw(total, high, -(-inner // columns), seed=seed + 1).abs().add(0.3) * 5e-4]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_experts_with_fp8_weights(
    shape: tuple[int, int, int, int, int, int, Block],
) -> None:
    tokens, hidden, width, routed, top_k, slots, block = shape
    states = draw(tokens, hidden, seed=4, dtype=torch.bfloat16)
    w13, w13_scale = drawn((routed + slots, 2 * width, hidden), block, 2, 5)
    w2, w2_scale = drawn((routed + slots, hidden, width), block, 1, 7)
    for scale in (w13_scale, w2_scale):
        scale[-1] += 5e-4  # the last slot counts, whichever experts are chosen beside it
    ids = chosen(tokens, routed, top_k)
    ids = torch.cat([ids, torch.arange(routed, routed + slots).expand(tokens, slots)], 1).int().to(DEVICE)
    weights = draw(tokens, top_k + slots, seed=9).sigmoid()
    held = ExpertWeights(w13, w2, Scales(w13_scale, w2_scale, block))
    got = experts_fp8.small_experts(states, held, weights, ids)

    def wanted(one: torch.Tensor, two: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        used = ids.long().unique()
        place = torch.searchsorted(used, ids.long())
        some = ExpertWeights(w13[used], w2[used], Scales(one[used], two[used], block))
        return experts_fp8.reference(states, some, share, place)

    limit = 8e-3
    assert off(got, wanted(w13_scale, w2_scale, weights)) < limit
    # The controls: scales of the neighbouring block, of rows and of columns; half of the last slot's weight.
    for scale in (0, 1):
        for axis in range(0 if any(block) else 1, w13_scale.ndim):
            both = [w13_scale, w2_scale]
            if both[scale].shape[axis] > 1:
                both[scale] = both[scale].roll(1, axis)
                assert off(got, wanted(*both, weights)) > 2 * limit
    wrong = weights.clone()
    wrong[:, -1] *= 0.5
    assert off(got, wanted(w13_scale, w2_scale, wrong)) > 2 * limit


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter has no NaN in float8")
def test_a_weight_that_is_no_number_stays_one() -> None:
    states = draw(1, 128, seed=4, dtype=torch.bfloat16)
    w13, w13_scale = drawn((2, 256, 128), BLOCK, 2, 5)
    w2, w2_scale = drawn((2, 128, 128), BLOCK, 1, 7)
    ids = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    weights = torch.ones(1, 2, device=DEVICE)
    w2.view(torch.uint8)[1, 0, 0] = 0x7F
    held = ExpertWeights(w13, w2, Scales(w13_scale, w2_scale, BLOCK))
    got = experts_fp8.small_experts(states, held, weights, ids)
    assert bool(got[0, 0].isnan())
    assert bool(got[0, 1:].isfinite().all())


@pytest.mark.parametrize("fault", ["scale shape", "scale dtype", "width", "columns"])
def test_what_does_not_fit_is_refused(fault: str) -> None:
    block = (128, 40) if fault == "columns" else BLOCK
    width = 120 if fault == "width" else 128
    w13, w13_scale = drawn((2, 2 * width, 128), block, 2, 5)
    w2, w2_scale = drawn((2, 128, width), block, 1, 7)
    if fault == "scale shape":
        w13_scale = w13_scale[:, :1]
    if fault == "scale dtype":
        w2_scale = w2_scale.double()
    with pytest.raises(ValueError, match=r"scales of|multiple"):
        experts_fp8.checked(ExpertWeights(w13, w2, Scales(w13_scale, w2_scale, block)))
