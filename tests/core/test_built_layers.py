"""Layers that an engine has built otherwise than the checkpoint is: it would be wrong without us too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fse_patch.adapters.check import check_complete
from fse_patch.adapters.role import FusedRole, building
from fse_patch.adapters.sglang import build as sglang
from fse_patch.adapters.sglang.role import Slots as SglangSlots
from fse_patch.adapters.vllm import build as vllm
from fse_patch.adapters.vllm.role import Slots as VllmSlots
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.families import Role
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward.layer import FusedLayer
from fse_patch.fusion_core.forward.router import SlotAppender

from .moe import decision, start_of

E, H, I = 3, 8, 4  # noqa: E741
LAYOUT = ExpertLayout(E, 1, 2, H, I)
Build = Callable[[int], object]


class FusedMoE(torch.nn.Module):
    """Experts of either engine, which take what they are built with."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


class Shared(torch.nn.Module):
    expert_gate: Any = None


def by_vllm(layer: int) -> object:
    factory = vllm.layer_factory(lambda **kwargs: FusedMoE())
    return factory(prefix=f"model.layers.{layer}.mlp.experts", shared_experts=Shared())


def by_sglang(layer: int) -> object:
    return sglang.build_experts(FusedMoE, layer_id=layer)


def role_of(slots: Any, role: Role = "main", stored: tuple[int, ...] = (1,)) -> FusedRole:
    """A role of which layer 1 fuses."""
    made = replace(decision(LAYOUT, layers=(1,), role=role), stored_layers=stored)
    return FusedRole(start_of(made), slots)


ENGINES = pytest.mark.parametrize(("slots", "build"), [(VllmSlots(), by_vllm), (SglangSlots(), by_sglang)])


def fused(role: FusedRole) -> None:
    """Layer 1, as its block leaves it."""
    router = SlotAppender(1, role.start.moe, role.counter, lambda states: states[:, :1])
    role.layers[1] = FusedLayer(1, router, FusedMoE(), torch.nn.Module())


@ENGINES
def test_experts_without_weights_stop_the_model(slots: Any, build: Build) -> None:
    role = role_of(slots)
    fused(role)
    with building(role):
        build(0)
        build(2)
    for all_here in (True, False):
        with pytest.raises(FsePatchError) as caught:
            check_complete(role, all_here)
        assert "main model: vllm has built layers [0, 2] with experts, and the checkpoint" in str(
            caught.value
        )
        assert "unpatched too, it would answer from weights that were never loaded" in str(caught.value)


@ENGINES
def test_experts_that_the_checkpoint_has_are_built_as_the_engine_likes(slots: Any, build: Build) -> None:
    role = role_of(slots, stored=(0, 1))
    fused(role)
    with building(role):
        build(0)
    check_complete(role, all_here=True)


@ENGINES
def test_a_dense_layer_of_experts_stops_the_model(slots: Any, build: Build) -> None:
    role = role_of(slots)
    with pytest.raises(FsePatchError) as caught:
        check_complete(role, all_here=True)
    words = (
        "main model: layers [1] were decided to fuse and did not; vllm has built layers [1] without experts"
    )
    assert str(caught.value) == words
    # On another stage of a pipeline; and built in the engine's own way.
    check_complete(role, all_here=False)
    role.unfused.add(1)
    with pytest.raises(FsePatchError, match=r"fuse and did not$"):
        check_complete(role, all_here=True)


def test_a_draft_of_sglang_counts_its_layers_from_0() -> None:
    role = role_of(SglangSlots(), "draft")
    fused(role)
    with building(role):
        by_sglang(4)
    assert role.unfused == set()
    check_complete(role, all_here=True)
    # The control: vLLM's layers have the checkpoint's numbers.
    other = role_of(VllmSlots(), "draft")
    fused(other)
    with building(other):
        by_vllm(4)
    with pytest.raises(FsePatchError, match=r"has built layers \[4\] with experts"):
        check_complete(other, all_here=True)


def test_nothing_is_noted_of_experts_outside_of_layers() -> None:
    role = role_of(VllmSlots())
    with building(role):
        vllm.layer_factory(lambda **kwargs: FusedMoE())(prefix="model.experts")
    assert role.unfused == set()
