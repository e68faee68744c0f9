"""Experts with slots that are built a second time for one layer: no block of theirs would be proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fse_patch.adapters.role import FusedRole, building
from fse_patch.adapters.sglang import build as sglang
from fse_patch.adapters.vllm import build as vllm
from fse_patch.adapters.vllm.role import Slots as VllmSlots
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward.layer import FusedLayer
from fse_patch.fusion_core.forward.router import SlotAppender

from .moe import Slots, decision, start_of

E, H, I = 3, 8, 4  # noqa: E741
MADE = decision(ExpertLayout(E, 1, 2, H, I), layers=(0,))
SIZES = {"num_experts": E, "top_k": 2, "hidden_size": H, "intermediate_size": I}


class FusedMoE(torch.nn.Module):
    """Experts of either engine, which take what they are built with."""

    def __init__(self, num_experts: int = E, **kwargs: Any) -> None:
        super().__init__()
        self.w2_weight = torch.nn.Parameter(torch.zeros(num_experts, H, I), requires_grad=False)


class VllmOnOneDevice(VllmSlots):
    def share(self, experts: Any) -> tuple[int, int]:
        return 0, 1


def in_vllm() -> tuple[FusedRole, Callable[[], Any]]:
    """The layer factory of vLLM, and a block around what it makes."""
    factory = vllm.layer_factory(lambda **kwargs: FusedMoE(kwargs["num_experts"]))
    shared = torch.nn.Module()
    shared.expert_gate = lambda states: (states[:, :1], None)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared_expert = shared
            self.experts = factory(prefix="model.layers.0.mlp", shared_experts=shared, **SIZES)

    Block.__init__ = vllm.block_init(Block.__init__)  # type: ignore[method-assign]
    return FusedRole(start_of(MADE), VllmOnOneDevice()), Block


def in_sglang() -> tuple[FusedRole, Callable[[], Any]]:
    """The experts of SGLang, as soon as their block is one of the role's layers."""
    role = FusedRole(start_of(MADE), Slots())

    def build() -> None:
        experts = sglang.build_experts(FusedMoE, layer_id=0, **SIZES)
        router = SlotAppender(0, MADE.moe, role.counter, lambda states: states[:, :1])
        role.add_layer(FusedLayer(0, router, experts, torch.nn.Module()))

    return role, build


@pytest.mark.parametrize("engine", [in_vllm, in_sglang])
def test_experts_are_built_once(engine: Callable[[], tuple[FusedRole, Callable[[], Any]]]) -> None:
    role, build = engine()
    with building(role):
        build()
        # The control: once is right.
        assert (role.unfinished, sorted(role.layers)) == (set(), [0])
        with pytest.raises(FsePatchError, match="layer 0 of the main model was built twice"):
            build()
    # Where nothing fuses, the engine builds as it likes.
    assert in_vllm()[1]().shared_expert is not None
