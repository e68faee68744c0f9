"""The shared expert read where it is: of any width, in a format of its own, with strides of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fse_patch.fusion_core.kernels import experts, experts_fp8
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights, Scales, slots_of
from fse_patch.fusion_core.kernels.experts_once import experts_once

from .test_experts_once import BLOCKS, exact, routed, scaled
from .test_kernels import DEVICE, draw, off

# Tokens, H, I, E, k, width of the shared expert: as wide, four times as wide, and with a rest.
SHAPES = [(1, 256, 128, 5, 2, 128), (3, 64, 32, 6, 2, 128), (2, 64, 64, 6, 2, 144)]
if DEVICE == "cuda":
    SHAPES += [(1, 2048, 512, 512, 10, 512), (8, 2048, 512, 512, 10, 512), (16, 2048, 1408, 60, 4, 5632)]
FORMATS = ("plain", "block", "channel", "tensor")
# By whether routed and shared experts are plain; the pass that reads each expert once takes all others.
KERNELS: dict[str, dict[tuple[bool, bool], Any]] = {
    "once": {},
    "small": {(True, True): experts.small_experts, (False, False): experts_fp8.small_experts},
}


def weights_in(
    how: str, count: int, hidden: int, width: int, seed: int
) -> tuple[ExpertWeights, ExpertWeights]:
    """Weights in a format, strided as engines leave them, and the same exactly, in float64."""
    w13 = draw(count, 2 * width, hidden, seed=seed, scale=0.05)
    w2 = draw(count, hidden, width, seed=seed + 1, scale=0.05)
    if how == "plain":
        w13, w2 = w13.bfloat16(), w2.bfloat16()
        return ExpertWeights(w13, w2), ExpertWeights(w13.double(), w2.double())
    block = BLOCKS[how]
    (w13, s13), (w2, s2) = scaled(w13, block, 2), scaled(w2, block, 1)
    whole = ExpertWeights(exact(w13, s13, block, 2), exact(w2, s2, block, 1))
    # Rows of more than are used, and scales by columns, as DeepGEMM has them.
    w2 = torch.nn.functional.pad(w2.view(torch.uint8), (0, 32)).view(torch.float8_e4m3fn)[..., :width]
    s13, s2 = (scale.transpose(1, 2).contiguous().transpose(1, 2) for scale in (s13, s2))
    return ExpertWeights(w13, w2, Scales(s13, s2, block)), whole


def expected(
    states: torch.Tensor,
    routed_: ExpertWeights,
    shared: ExpertWeights,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """The layer's output in float64, the shared expert whole."""
    count = len(routed_.w2)
    slots = slots_of(shared, routed_.width)
    top_k = ids.shape[1] - slots
    kept = torch.where(ids[:, :top_k] < 0, 0.0, weights[:, :top_k])
    out = experts.reference(states, routed_.w13, routed_.w2, kept, ids[:, :top_k].clamp(min=0))
    none = torch.zeros(len(states), 1, dtype=torch.int32, device=states.device)
    assert (ids[:, top_k:] == torch.arange(count, count + slots, device=ids.device)).all()
    return out + experts.reference(states, shared.w13, shared.w2, weights[:, top_k : top_k + 1], none)


@pytest.mark.parametrize(("kind", "how"), [("alike", "once"), ("even", "small")])
@pytest.mark.parametrize(
    ("routed_format", "shared_format"),
    [(how, how) for how in FORMATS] + [("block", "plain"), ("plain", "block"), ("channel", "block")],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shared_expert_apart(
    shape: tuple[int, ...], routed_format: str, shared_format: str, kind: str, how: str
) -> None:
    tokens, hidden, width, count, top_k, shared_width = shape
    states = draw(tokens, hidden, seed=4, dtype=torch.bfloat16)
    routed_, exactly = weights_in(routed_format, count, hidden, width, 5)
    shared, shared_exactly = weights_in(shared_format, 1, hidden, shared_width, 7)
    slots = slots_of(shared, width)
    assert slots == -(-shared_width // width)
    ids = routed(kind, tokens, count, top_k, slots)
    weights = draw(tokens, top_k + slots, seed=9).sigmoid()
    weights[:, top_k:] = weights[:, top_k : top_k + 1]
    # An expert of the last token is elsewhere.
    ids[-1, 0] = -1
    kernel = KERNELS[how].get((routed_format == "plain", shared_format == "plain"), experts_once)
    got = kernel(states, routed_, weights, ids, shared)
    limit = 0.005 if DEVICE == "cuda" else 0.012
    assert off(got, expected(states, exactly, shared_exactly, weights, ids)) < limit
    # The control: the shared expert weighs a little more in one token.
    weights[0, top_k:] *= 1.2
    right = expected(states, exactly, shared_exactly, weights, ids)
    assert off(got[:1], right[:1]) > limit


def test_the_same_bits_as_in_one_tensor() -> None:
    states = draw(3, 128, seed=4, dtype=torch.bfloat16)
    both, _ = weights_in("plain", 7, 128, 64, 5)
    ids = routed("even", 3, 6, 2, 1)
    weights = draw(3, 3, seed=9).sigmoid()
    merged = experts_once(states, both, weights, ids)
    apart = [ExpertWeights(both.w13[part], both.w2[part]) for part in (slice(6), slice(6, 7))]
    assert torch.equal(experts_once(states, apart[0], weights, ids, apart[1]), merged)
    # The control: another shared expert.
    other = ExpertWeights(both.w13[5:6], both.w2[5:6])
    assert not torch.equal(experts_once(states, apart[0], weights, ids, other), merged)


def test_weights_that_do_not_fit_are_refused() -> None:
    plain, _ = weights_in("plain", 3, 128, 64, 5)
    with pytest.raises(ValueError, match="w13 is"):
        ExpertWeights(plain.w13[:, 1:], plain.w2)
    with pytest.raises(ValueError, match="contiguous"):
        ExpertWeights(plain.w13, plain.w2.transpose(1, 2).contiguous().transpose(1, 2))
    states, ids = draw(1, 128, seed=1, dtype=torch.bfloat16), routed("even", 1, 3, 1, 1)
    with pytest.raises(ValueError, match="of the shared expert"):
        experts_once(states, plain, draw(1, 2, seed=1), ids, plain)
