"""Blocks as SGLang builds them: what GLM-4's multiplies by is asked of it; an unknown one stays SGLang's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fse_patch.adapters.paired import PairedRole
from fse_patch.adapters.sglang.pair import GlmBlock, pair_block

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


def role() -> PairedRole:
    """Return a role of one sparse layer, as far as one is asked that is built."""
    layout = SimpleNamespace(hidden_size=16)
    family = SimpleNamespace(shared_module="shared_experts", shared_gate=None)
    routing = SimpleNamespace(routed_scaling_factor=SCALE)
    moe = SimpleNamespace(layout=layout, routing=routing, layers=(1,))
    decision = SimpleNamespace(family=family, moe=moe, role="main")
    return PairedRole(SimpleNamespace(decision=decision))  # type: ignore[arg-type]


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


@pytest.mark.parametrize("missing", ["topk", "experts", "forward_normal"])
def test_a_block_without_a_part_is_left_to_sglang(missing: str) -> None:
    made, taken = block(1), role()
    if missing == "forward_normal":
        made.forward_normal = None
    else:
        delattr(made, missing)
    pair_block(taken, made, 1)
    assert not taken.layers
    assert taken.unbuilt.startswith("layer 1 is not built in the way that is known")
    # What was replaced by then lets SGLang's own run.
    with pytest.raises(AssertionError, match="the engine's own part has run"):
        made.gate(torch.zeros(1, 16))
    # The control.
    pair_block(other := role(), block(1), 1)
    assert list(other.layers) == [1]
