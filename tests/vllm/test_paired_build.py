"""A block that vLLM builds in another way than is known is served by vLLM, and no fault of the start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fse_patch.adapters.paired import PairedRole
from fse_patch.adapters.vllm.pair import pair_block
from fse_patch.fusion_core.forward.plan import ModeCounter

pytestmark = pytest.mark.one_release


def role_of() -> PairedRole:
    """Return a role of one sparse layer, as far as one is asked that is built."""
    moe = SimpleNamespace(layers=(1,), routing=None)
    role = PairedRole(SimpleNamespace(decision=SimpleNamespace(moe=moe, role="main")))  # type: ignore[arg-type]
    role.counter = ModeCounter()
    return role


def block(**runner: Any) -> Any:
    """Return a block around a runner of that layer with these parts."""
    return SimpleNamespace(experts=SimpleNamespace(layer_name="model.layers.1.mlp.experts", **runner))


def test_a_runner_without_a_part_is_left_to_vllm() -> None:
    def stock(*_: Any) -> None:
        raise AssertionError

    for made, why in (
        (block(_forward_impl=stock), "AttributeError"),
        (
            block(_forward_impl=stock, _shared_experts=None),
            "vLLM has built no shared expert beside its experts",
        ),
    ):
        role = role_of()
        pair_block(role, made)
        assert not role.layers
        assert why in role.unbuilt
        assert made.experts._forward_impl is stock


def test_the_control_is_taken_in() -> None:
    made, role = block(_forward_impl=print, _shared_experts=SimpleNamespace()), role_of()
    pair_block(role, made)
    assert list(role.layers) == [1]
    assert role.unbuilt == ""
    assert made.experts._forward_impl is not print
