"""The canary on FP8 checkpoints: what engines round passes in every way to scale, what is wrong does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fse_patch.fusion_core.canary import CanaryError, Reference, deviation, judge, reference, share_error
from fse_patch.fusion_core.decision import RoutingSpec
from fse_patch.fusion_core.dequant import CheckpointLayer, InputRounding, NoReference, multiply
from fse_patch.fusion_core.families import family_of
from fse_patch.fusion_core.layout import ExpertLayout
from fse_patch.fusion_core.naming import TensorNaming
from fse_patch.fusion_core.tensors import CheckpointTensors

from .fp8 import BF16, E4M3, MLP, SCHEMES, Kernel, Tensors, layer, opened, stored, wanted

SIGMOID = RoutingSpec("sigmoid", True, 2.5, 2, 1, True)
# Slots of whole blocks, and one whose blocks are cut off at both edges.
LAYOUTS = (ExpertLayout(6, 2, 3, 96, 32), ExpertLayout(8, 1, 2, 128, 64), ExpertLayout(4, 1, 2, 80, 48))
HOW: dict[str, dict[str, bool]] = {
    "as declared": {},
    "UE8M0": {"power_of_two": True},
    "weights only": {"weight_only": True},
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
    """At the size of a real layer; in the norm of the output it drowns in what FP8 does to activations."""
    layout = ExpertLayout(12, 1, 10, 1024, 256)
    seen, norms = [], []
    for seed in range(2):
        decision, tensors, found = made("block", layout, RoutingSpec("softmax", True), seed)
        kernel = Kernel(decision, "block", tensors)
        judge("main", 1, found, kernel.forward(found.hidden))
        for percent in (2, 3, 4, 6, 8, 12, 16, 25):
            kernel.slot_factor = 1 + percent / 100
            output = kernel.forward(found.hidden)
            norms += [percent] if deviation(output, found.output) > found.tolerance else []
            try:
                judge("main", 1, found, output)
            except CanaryError:
                seen.append(percent)
                break
        print(f"slot weight off by {seen[-1]} % is seen; output allowed {found.tolerance:.2g} off")
    assert max(seen) <= 6
    assert not norms, "the norm alone would do, and the share of the shared expert need not be compared"


def test_scales_are_spread_as_the_definition_says() -> None:
    draw = torch.Generator().manual_seed(5)
    for out, inner, rows, columns in ((96, 80, 32, 32), (70, 33, 32, 16), (5, 7, 1, 0), (5, 7, 0, 0)):
        shape = [-(-out // (rows or out)), -(-inner // (columns or inner))]
        weight = torch.randn(out, inner, generator=draw, dtype=torch.float64)
        scale = torch.rand(shape, generator=draw, dtype=torch.float64)
        expected = [
            [
                float(weight[i, j] * scale[i // rows if rows else 0, j // columns if columns else 0])
                for j in range(inner)
            ]
            for i in range(out)
        ]
        assert multiply(weight, scale, (rows, columns)).tolist() == expected
    with pytest.raises(NoReference, match="scales for 96 x 80"):
        multiply(torch.ones(96, 80), torch.ones(3, 2), (32, 32))


@pytest.mark.parametrize("rounding", [(1, 0), (1, 16), (0, 0)])
def test_activations_are_rounded_by_their_own_scale(rounding: tuple[int, int]) -> None:
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = InputRounding(*rounding)(rows)
    size = rounding[1] or 40
    for i in range(3):
        for start in range(0, 40, size):
            part = rows[i, start : start + size]
            largest = (part if rounding[0] else rows).abs().max()
            # Three bits behind the leading one: half a step is 1/16 of it.
            off = (found[i, start : start + size] - part).abs() - part.abs() / 16 - largest / 448 * 2**-10
            assert float(off.max()) <= 1e-12
    assert 0.01 < deviation(found, rows) < 0.04
    assert float(InputRounding(0, 0, 0.5 / 448)(torch.ones(1, 4, dtype=torch.float64)).max()) == 0.5


Change = Callable[[Tensors], None]


def extra(tensors: Tensors) -> None:
    tensors[f"{MLP}experts.0.up_proj.weight_scale_2"] = torch.ones(1)


def without_scale(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        del tensors[name]


def other_blocks(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = tensors[name][:1]


def plain_experts(tensors: Tensors) -> None:
    for name in [name for name in tensors if tensors[name].dtype == E4M3]:
        tensors[name] = tensors[name].float()


def fp8_gate(tensors: Tensors) -> None:
    tensors[f"{MLP}gate.weight"] = tensors[f"{MLP}gate.weight"].to(E4M3)


@pytest.mark.parametrize("change", [extra, without_scale, other_blocks, plain_experts, fp8_gate])
def test_what_is_stored_otherwise_has_no_reference(tmp_path: Path, change: Change) -> None:
    decision = layer("block", LAYOUTS[1])
    tensors = stored(decision, SCHEMES["block"], 0)
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    wanted(tmp_path / "before", decision, "block", tensors)
    change(tensors)
    with pytest.raises(NoReference):
        wanted(tmp_path / "after", decision, "block", tensors)


def test_scales_that_random_tokens_do_not_fit_have_no_reference(tmp_path: Path) -> None:
    """Otherwise the tolerance would let everything pass."""
    decision = layer("tensor, static", LAYOUTS[1])
    tensors = stored(decision, SCHEMES["tensor, static"], 0)
    for name in [name for name in tensors if name.endswith("down_proj.input_scale")]:
        tensors[name] = tensors[name] / 50
    with pytest.raises(NoReference, match="rounding to FP8 alone may change"):
        wanted(tmp_path, decision, "tensor, static", tensors)


@pytest.mark.parametrize("method", ["awq", "modelopt", "something"])
def test_other_formats_have_no_reference(tmp_path: Path, method: str) -> None:
    decision = layer("block", LAYOUTS[1])
    opened(tmp_path, decision, "block", stored(decision, SCHEMES["block"], 0))
    section = {"quant_method": method, "bits": 4, "group_size": 32, "quant_algo": "NVFP4"}
    if method == "awq":
        del section["quant_algo"]
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2_moe", "quantization_config": section})
    )
    family = family_of("qwen2_moe")
    assert family is not None

    def read() -> None:
        held = CheckpointLayer(CheckpointTensors(tmp_path), TensorNaming(family, 2), decision, 1)
        reference(held, decision, BF16)

    with pytest.raises(NoReference):
        read()
