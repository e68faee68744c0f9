"""What w2's kernel does before it waits for w13's: the same numbers, from weights asked for early."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fse_patch.fusion_core.kernels import experts, experts_fp8

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
    monkeypatch.setattr(kernels, "early_slots", lambda *_: 0)
    before = kernels.small_experts(states, routed_, weights, ids, shared)
    monkeypatch.setattr(kernels, "early_slots", lambda *_: 2)
    assert torch.equal(kernels.small_experts(states, routed_, weights, ids, shared), before)
    # The control: what is early counts.
    weights[:, 1] *= 1.5
    assert not torch.equal(kernels.small_experts(states, routed_, weights, ids, shared), before)
