"""Kernels are compiled at the start alone: what the proof has run is what every number of tokens runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from fse_patch.fusion_core.forward.paired import OutputScale
from fse_patch.fusion_core.forward.threshold import SIZES
from fse_patch.fusion_core.kernels import work_list

from .launches import CONSTANT, StandIn, stand_ins
from .test_kernels import draw
from .test_paired import DTYPE, GLM, QWEN, H, I, held, kernels, layer_of

Variant = tuple[Any, ...]
__all__ = ["kernels"]  # the fixture by which these layers run kernels


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[Variant]:
    """What was launched by now: of each launch all that makes a kernel another one."""
    launched: set[Variant] = set()

    def take(stand_in: StandIn, given: dict[str, Any]) -> None:
        kinds = ((name, value, stand_in.kind(name, value)) for name, value in given.items())
        launched.add(
            (
                stand_in.name,
                *((name, value if kind in (CONSTANT, None) else kind) for name, value, kind in kinds),
            )
        )

    for module, name, stand_in in list(stand_ins(take)):
        monkeypatch.setattr(module, name, stand_in)
    return launched


def run(layer: Any, sizes: Iterable[int]) -> None:
    for tokens in sizes:
        states = draw(tokens, H, seed=4, dtype=DTYPE)
        layer(states, states, OutputScale(), torch.empty_like(states))


@pytest.mark.parametrize("family", ["qwen", "glm"])
@pytest.mark.parametrize(
    ("routed", "shared", "width"),
    [
        ("plain", "plain", I),
        ("plain", "plain", 4 * I),
        ("block", "block", I),
        ("block", "plain", I),
        ("marlin g32", "plain", I),
    ],
)
def test_no_number_of_tokens_needs_another_kernel(
    family: str, routed: str, shared: str, width: int, seen: set[Variant]
) -> None:
    layer = layer_of(held(family, routed, shared, width), QWEN if family == "qwen" else GLM)
    run(layer, SIZES)
    proved = set(seen)
    assert len(proved) > 4
    run(layer, range(1, SIZES[-1] + 1))
    assert seen == proved


def test_a_kernel_for_each_number_of_tokens_is_seen(
    seen: set[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: lists with room for just their tokens, as they once were."""
    layer = layer_of(held("qwen", "block", "plain"), QWEN)
    run(layer, SIZES)
    proved = set(seen)
    monkeypatch.setattr(work_list.triton, "next_power_of_2", lambda number: number)
    run(layer, [*SIZES, 5])
    assert seen > proved
