"""Modes and faults are forced on a layer for as long as a block of code runs, and put back after it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward.layer import FusedLayer
from fse_patch.fusion_core.forward.mode_registry import MODES
from fse_patch.fusion_core.forward.plan import ModeCounter, ModePlan
from fse_patch.fusion_core.forward.router import SlotAppender

from .moe import moe_spec

MOE = moe_spec(ExpertLayout(4, 2, 2, 8, 4), shared_weight="constant")
PLAN = ModePlan(((4, "small"),), "split", "test")


def layer_of(execution: Any = None) -> FusedLayer:
    router = SlotAppender(3, MOE, ModeCounter())
    return FusedLayer(3, router, torch.nn.Module(), torch.nn.Module(), execution)


def in_modes() -> FusedLayer:
    """A layer whose execution notes what is forced on it; a real one needs Triton."""
    return layer_of(SimpleNamespace(plan=PLAN, forced=None))


def forced(layer: FusedLayer) -> str | None:
    assert layer.execution is not None
    return layer.execution.forced


def test_the_modes_of_a_layer() -> None:
    assert in_modes().modes == ["small", "split"]
    assert layer_of().modes == ["fused"]


@pytest.mark.parametrize("mode", MODES)
def test_any_mode_can_be_forced(mode: str) -> None:
    """Beyond the plan's too: they are measured before there is a plan."""
    layer = in_modes()
    with layer.forced(mode):
        assert forced(layer) == mode
        with layer.forced("fused"):
            assert forced(layer) == "fused"
        assert forced(layer) == mode
    assert forced(layer) is None


def test_a_mode_is_put_back_after_an_error() -> None:
    layer = in_modes()
    with pytest.raises(ZeroDivisionError), layer.forced("split"):
        raise ZeroDivisionError
    assert forced(layer) is None


def test_a_mode_that_a_layer_does_not_have_is_refused() -> None:
    for layer, mode in ((in_modes(), "tiny"), (layer_of(), "small"), (layer_of(), "tiny")):
        ran = False
        with pytest.raises(ValueError, match=f"layer 3 has no mode '{mode}'"), layer.forced(mode):
            ran = True
        assert not ran
    # The control: the one mode of a layer without executions.
    with layer_of().forced("fused"):
        pass


def first_slot(layer: FusedLayer) -> list[float]:
    """Weights of both shared slots of a token."""
    weights, ids = torch.full((1, 2), 0.5), torch.zeros(1, 2, dtype=torch.int32)
    appended, _ = layer.router.append(torch.zeros(1, 8), weights, ids)
    slots: list[float] = appended[0, 2:].tolist()
    return slots


@pytest.mark.parametrize("make", [layer_of, in_modes])
def test_a_factor_is_on_the_first_slot_alone_and_put_back(make: Any) -> None:
    layer = make()
    assert first_slot(layer) == [1.0, 1.0]
    with layer.weighted(0.5):
        assert first_slot(layer) == [0.5, 1.0]
        with layer.weighted(0.0):
            assert first_slot(layer) == [0.0, 1.0]
        assert first_slot(layer) == [0.5, 1.0]
    assert first_slot(layer) == [1.0, 1.0]


def test_a_factor_is_put_back_after_an_error() -> None:
    layer = layer_of()
    with pytest.raises(ZeroDivisionError), layer.weighted(0.5):
        raise ZeroDivisionError
    assert first_slot(layer) == [1.0, 1.0]
