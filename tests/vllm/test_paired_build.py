"""A block that vLLM builds in another way than is known is served by vLLM, and no fault of the start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters.paired import PairedRole
from fse_patch.adapters.vllm.pair import pair_block

pytestmark = pytest.mark.one_release


def role_of() -> PairedRole:
    """Return a role of one sparse layer, as far as one is asked that is built."""
    moe = SimpleNamespace(layers=(1,), routing=None)
    return PairedRole(SimpleNamespace(decision=SimpleNamespace(moe=moe, role="main")))  # type: ignore[arg-type]


def block(**parts: Any) -> Any:
    """Return a block around vLLM's runner of that layer, of which these parts alone are there."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runner = MoERunner.__new__(MoERunner)
    torch.nn.Module.__init__(runner)
    vars(runner).update({"layer_name": "model.layers.1.mlp.experts", **parts})
    return SimpleNamespace(experts=runner)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({}, "AttributeError"),
        ({"_shared_experts": None}, "vLLM has built no shared expert beside its experts"),
    ],
)
def test_a_runner_without_a_part_is_left_to_vllm(parts: dict[str, Any], why: str) -> None:
    made, role = block(**parts), role_of()
    pair_block(role, made)
    assert not role.layers
    assert why in role.unbuilt
    assert "_forward_impl" not in vars(made.experts)


def test_the_control_is_taken_in() -> None:
    made, role = block(_shared_experts=SimpleNamespace()), role_of()
    pair_block(role, made)
    assert list(role.layers) == [1]
    assert role.unbuilt == ""
    assert "_forward_impl" in vars(made.experts)
