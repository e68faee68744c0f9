"""What GLM-4's block multiplies its experts' output by is asked of SGLang itself: it differs by platform."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fse_patch.adapters.sglang.pair import GlmBlock
from fse_patch.fusion_core.forward.plan import ModeCounter

pytestmark = pytest.mark.one_release
SCALE = 2.5


class Part(torch.nn.Module):
    """A module that a paired layer never runs while it asks."""

    def forward(self, *_: Any) -> Any:
        raise AssertionError("the engine's own part has run")


def block(tp_size: int) -> Any:
    """Return a block of SGLang's class with its forward, and without weights."""
    from sglang.srt.models.glm4_moe import Glm4MoeSparseMoeBlock

    made = Glm4MoeSparseMoeBlock.__new__(Glm4MoeSparseMoeBlock)
    torch.nn.Module.__init__(made)
    made.gate, made.topk, made.experts = Part(), Part(), Part()
    made.tp_size, made.routed_scaling_factor = tp_size, SCALE
    return made


def role() -> Any:
    """Return what a layer reads of its role when it is made."""
    layout = SimpleNamespace(hidden_size=16)
    family = SimpleNamespace(shared_module="shared_experts", shared_gate=None)
    moe = SimpleNamespace(layout=layout, routing=SimpleNamespace(routed_scaling_factor=SCALE))
    start = SimpleNamespace(decision=SimpleNamespace(family=family, moe=moe))
    return SimpleNamespace(start=start, counter=ModeCounter())


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(("on_cuda", "expected"), [(False, SCALE), (True, 1.0)])
def test_scale_is_what_the_block_does(on_cuda: bool, expected: float, tp_size: int) -> None:
    from sglang.srt.models import glm4_moe

    with patch.object(glm4_moe, "_is_cuda", on_cuda):
        layer = GlmBlock(1, role(), block(tp_size))
    assert layer.after == expected
    # Both factors of the sum are those of the checkpoint, once the block has done its part.
    scale = layer.scale(torch.zeros(1, 16))
    assert (scale.routed * layer.after, scale.shared * layer.after) == (SCALE, 1.0)
    assert (layer.arm, layer.probing) == ("", False)


def test_control_of_a_block_that_scales_twice() -> None:
    from sglang.srt.models import glm4_moe

    made = block(1)
    own = made.forward_normal
    made.forward_normal = lambda states: own(states) * SCALE
    with patch.object(glm4_moe, "_is_cuda", False):
        assert GlmBlock(1, role(), made).after == SCALE**2
