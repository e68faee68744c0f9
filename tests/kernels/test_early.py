"""What w2's kernel does before it waits for w13's: the same numbers, from weights asked for early."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fse_patch.fusion_core.kernels import experts, experts_fp8
from fse_patch.fusion_core.kernels.expert_weights import CACHED, asked_ahead

from .test_experts_once import routed
from .test_kernels import draw
from .test_shared_apart import weights_in

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 2, 128, 64, 6, 3


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("kernels", "how"), [(experts, "plain"), (experts_fp8, "block")])
def test_early_weights_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, kernels: Any, how: str, apart: bool
) -> None:
    states = draw(TOKENS, HIDDEN, seed=4, dtype=torch.bfloat16)
    routed_, _ = weights_in(how, EXPERTS + (not apart), HIDDEN, WIDTH, 5)
    shared = weights_in(how, 1, HIDDEN, WIDTH, 7)[0] if apart else None
    ids = routed("even", TOKENS, EXPERTS, TOP_K, 1)
    weights = draw(TOKENS, TOP_K + 1, seed=9).sigmoid()
    if apart:
        ids[-1, 0] = -1  # an expert that is elsewhere
    before = kernels.small_experts(states, routed_, weights, ids, shared)
    w13, w2 = (
        kernels.w13_tile(HIDDEN, WIDTH) if how == "plain" else kernels.w13_tile(HIDDEN),
        kernels.w2_tile(WIDTH),
    )
    monkeypatch.setattr(kernels, "w13_tile", lambda *_: (*w13[:-1], True))
    monkeypatch.setattr(kernels, "w2_tile", lambda _: (*w2[:-1], 2))
    assert torch.equal(kernels.small_experts(states, routed_, weights, ids, shared), before)
    # The control: what is early counts.
    weights[:, 1] *= 1.5
    assert not torch.equal(kernels.small_experts(states, routed_, weights, ids, shared), before)


def test_what_is_asked_ahead() -> None:
    routed_, _ = weights_in("plain", 4, 128, 64, 5)
    nothing = (0, 0, 0)
    asked = asked_ahead(routed_, None, 8, 16, True)
    assert asked["AHEAD"] == (128 * 64, 8 * 64, 8 * 64 * 2) == asked["SHARED_AHEAD"]
    assert set(asked_ahead(routed_, None, 8, 16, False).values()) == {nothing}
    # More than the cache keeps, and parts that are no whole rows.
    assert asked_ahead(routed_, None, CACHED // (128 * 64 * 2) + 1, 16, True)["AHEAD"] == nothing
    assert asked_ahead(routed_, None, 8, 24, True)["AHEAD"] == nothing
    # A shared expert of another width is left to w2's kernel.
    wide, _ = weights_in("plain", 1, 128, 96, 5)
    assert asked_ahead(routed_, wide, 8, 16, True) == {"AHEAD": asked["AHEAD"], "SHARED_AHEAD": nothing}
