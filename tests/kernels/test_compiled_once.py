"""Kernels are compiled at the start alone: what the proof has run is what every number of tokens runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fse_patch.fusion_core.forward.paired import OutputScale
from fse_patch.fusion_core.forward.threshold import SIZES
from fse_patch.fusion_core.kernels import experts, experts_fp8, experts_once, route, router_logits, work_list

from .test_int4_readers import made
from .test_kernels import draw
from .test_paired import DTYPE, GLM, QWEN, E, H, I, held, kernels, layer_of

KERNELS: dict[Any, tuple[str, ...]] = {
    experts: ("_w13", "_w2"),
    experts_fp8: ("w13_kernel", "w2_kernel"),
    experts_once: ("w13_kernel", "w2_kernel"),
    work_list: ("_work",),
    route: ("_route",),
    router_logits: ("_router_logits", "_product"),
}
Variant = tuple[Any, ...]
__all__ = ["kernels"]  # the fixture by which these layers run kernels


class Recorder:
    """Stands for a kernel: notes what Triton would compile for a launch, and launches nothing."""

    def __init__(self, name: str, kernel: Any, seen: set[Variant]) -> None:
        self.name, self.seen = name, seen
        self.parameters = inspect.signature(kernel.fn).parameters
        told = getattr(kernel, "kwargs", None) or vars(kernel)
        self.plain = set(told["do_not_specialize"] or ())

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
            self.seen.add((self.name, *((name, self._kind(name, value)) for name, value in given.items())))

        return launch

    def _kind(self, name: str, value: Any) -> Any:
        """Return what of an argument makes it another kernel."""
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if name not in self.parameters or "constexpr" in str(self.parameters[name].annotation):
            return value  # an option of the launch, or a constant of the kernel
        if isinstance(value, float) or name in self.plain:
            return type(value)
        return value == 1, value % 16 == 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[Variant]:
    """What was launched by now."""
    launched: set[Variant] = set()
    for module, names in KERNELS.items():
        for name in names:
            kernel = getattr(module, name)
            monkeypatch.setattr(module, name, Recorder(f"{module.__name__}.{name}", kernel, launched))
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
    weights = held(family, "plain" if "g32" in routed else routed, shared, width)
    if "g32" in routed:
        weights = replace(weights, routed=made(routed, E, H, I, DTYPE)[0])
    layer = layer_of(weights, QWEN if family == "qwen" else GLM)
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
