"""The pass over routed and shared experts, against sums over experts written out one by one in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights, Scales, slots_of  # noqa: E402
from fse_patch.fusion_core.kernels.pass_reference import dense, experts_once  # noqa: E402

E, K, H, I, T = 6, 2, 24, 16, 5  # noqa: E741


def mlp(x, w13, w2):  # type: ignore[no-untyped-def]
    half = len(w13) // 2
    return w2 @ (torch.nn.functional.silu(w13[:half] @ x) * (w13[half:] @ x))


def drawn(shared_width: int, seed: int = 0):  # type: ignore[no-untyped-def]
    draw = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    routed = ExpertWeights(made(E, 2 * I, H), made(E, H, I))
    # Rows with a stride of their own, as in a larger tensor.
    w13, w2 = made(1, 2 * shared_width, H + 8)[..., :H], made(1, H, shared_width + 8)[..., :shared_width]
    shared = ExpertWeights(w13, w2)
    slots = slots_of(shared, I)
    ids = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(T)]).int()
    ids = torch.cat([ids, torch.arange(E, E + slots).int().expand(T, slots)], 1)
    weights = torch.rand(T, K + slots, generator=draw, dtype=torch.float64)
    weights[:, K:] = weights[:, K : K + 1]
    return made(T, H), routed, weights, ids, shared


@pytest.mark.parametrize("width", [I, 4 * I, I // 2, 2 * I + 3])
def test_it_is_the_sum_of_experts(width: int) -> None:
    states, routed, weights, ids, shared = drawn(width)
    out = experts_once(states, routed, weights, ids, shared)
    for token in range(T):
        expected = weights[token, K] * mlp(states[token], shared.w13[0], shared.w2[0])
        for column in range(K):
            expert = ids[token, column]
            expected = expected + weights[token, column] * mlp(
                states[token], routed.w13[expert], routed.w2[expert]
            )
        assert torch.allclose(out[token], expected, rtol=1e-12)


def test_pairs_that_are_not_here_are_left_out() -> None:
    states, routed, weights, ids, shared = drawn(I)
    gone = torch.where(ids == ids[0, 0], -1, ids)
    silent = torch.where(ids == ids[0, 0], torch.zeros_like(weights), weights)
    assert torch.allclose(
        experts_once(states, routed, weights, gone, shared), experts_once(states, routed, silent, ids, shared)
    )
    # The control: they would have counted.
    assert not torch.allclose(
        experts_once(states, routed, weights, gone, shared),
        experts_once(states, routed, weights, ids, shared),
    )


@pytest.mark.parametrize("block", [(8, 8), (0, 0), (1, 0)])
def test_scales_are_applied_and_formats_may_differ(block: tuple[int, int]) -> None:
    states, routed, weights, ids, shared = drawn(2 * I)
    rows, columns = block

    def scales_of(w: torch.Tensor) -> torch.Tensor:
        shape = (-(-w.shape[-2] // rows) if rows else 1, -(-w.shape[-1] // columns) if columns else 1)
        return torch.rand(*w.shape[:-2], *shape, dtype=torch.float64) + 0.5

    s1, s3, s2 = scales_of(routed.w13[:, :I]), scales_of(routed.w13[:, I:]), scales_of(routed.w2)
    scaled = replace(routed, scales=Scales(torch.cat([s1, s3], dim=1), s2, block))
    w13, w2 = zip(*(dense(scaled, torch.float64, e) for e in range(E)), strict=True)
    plain = ExpertWeights(torch.stack(w13), torch.stack(w2))
    # One element of each part, by hand.
    row, column = (3 // rows if rows else 0), (5 // columns if columns else 0)
    assert torch.isclose(plain.w13[1, 3, 5], routed.w13[1, 3, 5] * s1[1, row, column])
    assert torch.isclose(plain.w13[1, I + 3, 5], routed.w13[1, I + 3, 5] * s3[1, row, column])
    assert torch.isclose(plain.w2[1, 3, 5], routed.w2[1, 3, 5] * s2[1, row, column])
    assert torch.equal(
        experts_once(states, scaled, weights, ids, shared), experts_once(states, plain, weights, ids, shared)
    )
