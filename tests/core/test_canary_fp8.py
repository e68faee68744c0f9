"""The canary on FP8 checkpoints: what engines round passes in every way to scale, what is wrong does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.proof.canary import CanaryError, Reference, deviation, judge, reference
from fse_patch.fusion_core.proof.rounding import share_error

from .fp8 import BF16, E4M3, SCHEMES, Kernel, layer, opened, stored, wanted

SIGMOID = RoutingSpec("sigmoid", True, 2.5, 2, 1, True)
# Slots of whole blocks, and one whose blocks are cut off at both edges.
LAYOUTS = (ExpertLayout(6, 2, 3, 96, 32), ExpertLayout(8, 1, 2, 128, 64), ExpertLayout(4, 1, 2, 80, 48))
HOW: dict[str, dict[str, Any]] = {
    "as declared": {},
    "UE8M0": {"power_of_two": True},
    "weights only": {"weight_only": True},
    "two ranks": {"parts": 2},
}


def made(scheme: str, layout: ExpertLayout, routing: RoutingSpec | None, seed: int) -> tuple[Any, ...]:
    """Decision, tensors and what the canary expects."""
    decision = layer(scheme, layout, routing)
    tensors = stored(decision, SCHEMES[scheme], seed)
    with TemporaryDirectory() as folder:
        return decision, tensors, wanted(Path(folder), decision, scheme, tensors, seed)


def used(found: Reference, output: torch.Tensor) -> float:
    """How much of what is allowed an output needs."""
    assert found.share_tolerance is not None
    shares = share_error(output.double() - found.output, found.shared).abs() / found.share_tolerance
    return max(deviation(output, found.output) / found.tolerance, float(shares.max()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_right_is_stopped(scheme: str) -> None:
    worst = dict.fromkeys(HOW, 0.0)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(st.sampled_from(LAYOUTS), st.sampled_from([None, SIGMOID]), st.integers(0, 2**20))
    def draw(layout: ExpertLayout, routing: RoutingSpec | None, seed: int) -> None:
        decision, tensors, found = made(scheme, layout, routing, seed)
        assert found.tolerance < 0.4
        for name, how in HOW.items():
            output = Kernel(decision, scheme, tensors, **how).forward(found.hidden)
            judge("main", 1, found, output)
            if found.share_tolerance is not None:
                worst[name] = max(worst[name], used(found, output))

    draw()
    print(f"{scheme}: of what is allowed, right layers need", {n: round(w, 2) for n, w in worst.items()})


def test_weights_whose_scales_become_powers_of_two_are_allowed_where_kernels_do_that() -> None:
    """As DeepGEMM holds them on Blackwell; elsewhere such weights would be somebody's mistake."""
    used_there, stopped = [], 0
    for seed in range(8):
        decision = layer("block", LAYOUTS[1])
        tensors = stored(decision, SCHEMES["block"], seed)
        kernel = Kernel(decision, "block", tensors, power_of_two=True)
        kernel.weights_in_powers_of_two = True
        with TemporaryDirectory() as folder:
            held = opened(Path(folder), decision, "block", tensors)
            there = reference(held, decision.moe, dataclasses.replace(BF16, ue8m0=True), seed)
            here = reference(held, decision.moe, BF16, seed)
        output = kernel.forward(there.hidden)
        judge("main", 1, there, output)
        used_there.append(used(there, output))
        stopped += used(here, output) > 1
    print(
        f"of what is allowed there {max(used_there):.2f} is needed; {stopped} of 8 would be stopped elsewhere"
    )
    assert max(used_there) < 0.6


Fault = Callable[[Kernel, str, int], None]
SCALE, FIRST = "scale", 4


def swap(held: dict[Any, torch.Tensor], one: Any, other: Any) -> None:
    held[one], held[other] = held[other], held[one]


def wrong_slot(kernel: Kernel, scale: str, slot: int) -> None:
    """A routed expert's weights and scales in the shared slot."""
    for key in [key for key in kernel.held if key[0] == slot]:
        kernel.held[key] = kernel.held[(0, *key[1:])]


def swapped(kernel: Kernel, scale: str, slot: int) -> None:
    for suffix in ("weight", scale):
        swap(kernel.held, (slot, "w1", suffix), (slot, "w3", suffix))


def stale_scale(kernel: Kernel, scale: str, slot: int) -> None:
    """As it was before the load: ones."""
    for shard in ("w1", "w2", "w3"):
        kernel.held[slot, shard, scale] = torch.ones_like(kernel.held[slot, shard, scale])


def shifted_scale(kernel: Kernel, scale: str, slot: int) -> None:
    """Every scale one block, or one row, further."""
    for shard in ("w1", "w2", "w3"):
        kernel.held[slot, shard, scale] = kernel.held[slot, shard, scale].roll(1, 0)


def one_stale_block(kernel: Kernel, scale: str, slot: int) -> None:
    kernel.held[slot, "w2", scale][0] = 1.0


def scale_of_another(kernel: Kernel, scale: str, slot: int) -> None:
    for shard in ("w1", "w2", "w3"):
        kernel.held[slot, shard, scale] = kernel.held[0, shard, scale]


def weighed(factor: float) -> Fault:
    def plant(kernel: Kernel, scale: str, slot: int) -> None:
        kernel.slot_factor = factor

    return plant


def dropped_slot(kernel: Kernel, scale: str, slot: int) -> None:
    kernel.held[slot, "w2", "weight"] = torch.zeros_like(kernel.held[slot, "w2", "weight"].float()).to(E4M3)


def renormalised(kernel: Kernel, scale: str, slot: int) -> None:
    """The slot counted among the weights that add up to one."""
    kernel.weighed = lambda weights: weights / (weights.sum(dim=1, keepdim=True) + 0.5)
    kernel.slot_factor = 1 / 1.5


FAULTS: dict[str, Fault] = {
    "wrong slot": wrong_slot,
    "w1 and w3 swapped": swapped,
    "scale missing": stale_scale,
    "slot weight +25 %": weighed(1.25),
    "slot weight -25 %": weighed(0.75),
    "shared dropped": weighed(0.0),
    "shared twice": weighed(2.0),
    "slot renormalised": renormalised,
    "one slot dropped": dropped_slot,
}
# What only schemes with several scales a weight can get wrong, and what changes a scale by 25 % and more.
SCALES: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "shifted scales": (shifted_scale, ("block", "channel")),
    "one stale scale": (one_stale_block, ("block", "channel")),
    "scale of another expert": (scale_of_another, ("block", "tensor", "tensor, static", "channel")),
}
CASES = [(fault, scheme) for fault in FAULTS for scheme in SCHEMES]
CASES += [(fault, scheme) for fault, (_, schemes) in SCALES.items() for scheme in schemes]


@pytest.mark.parametrize(("fault", "scheme"), CASES)
def test_what_is_wrong_is_not_served(fault: str, scheme: str) -> None:
    plant = FAULTS[fault] if fault in FAULTS else SCALES[fault][0]
    layout = ExpertLayout(FIRST, 2, 2, 96, 32)
    decision, tensors, found = made(scheme, layout, RoutingSpec("softmax", True), 0)
    kernel = Kernel(decision, scheme, tensors)
    judge("main", 1, found, kernel.forward(found.hidden))
    plant(kernel, SCHEMES[scheme].name, FIRST + 1)
    with pytest.raises(CanaryError, match="canary: layer 1"):
        judge("main", 1, found, kernel.forward(found.hidden))


def test_a_scale_that_reached_one_slot_of_two_is_seen() -> None:
    """A 0-d scale belongs into every slot: the second one keeps what the allocation had."""
    decision, tensors, found = made("tensor", ExpertLayout(FIRST, 2, 2, 96, 32), None, 3)
    kernel = Kernel(decision, "tensor", tensors)
    assert kernel.held[FIRST, "w2", "weight_scale"].ndim == 0
    kernel.held[FIRST + 1, "w2", "weight_scale"] = torch.ones(())
    with pytest.raises(CanaryError):
        judge("main", 1, found, kernel.forward(found.hidden))


def test_the_smallest_error_of_the_slot_weight_that_is_seen() -> None:
    """Nearer to a real layer's size; in the norm of the output it drowns in what FP8 does to activations."""
    layout = ExpertLayout(12, 1, 10, 1024, 256)
    for seed in range(2):
        decision, tensors, found = made("block", layout, RoutingSpec("softmax", True), seed)
        kernel = Kernel(decision, "block", tensors)
        judge("main", 1, found, kernel.forward(found.hidden))
        smallest: dict[str, int] = {}
        for percent in (2, 3, 4, 6, 8, 12, 16, 25, 40):
            kernel.slot_factor = 1 + percent / 100
            output = kernel.forward(found.hidden)
            if deviation(output, found.output) > found.tolerance:
                smallest.setdefault("by the norm", percent)
            try:
                judge("main", 1, found, output)
            except CanaryError:
                smallest.setdefault("at all", percent)
        print(f"slot weight off by so many percent is seen: {smallest}; {found.tolerance:.2g} allowed")
        assert smallest["at all"] <= 6
        assert smallest["by the norm"] >= 2 * smallest["at all"]
