"""A paired layer by its kernels against the same in torch: gates, scales, widths, experts elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.forward import paired, paired_pass
from fse_patch.fusion_core.forward.paired import OutputScale, PairedLayer, PairedWeights
from fse_patch.fusion_core.forward.plan import ModeCounter
from fse_patch.fusion_core.kernels import router_logits
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights

from ..core.moe import moe_spec
from .formats import experts_in
from .test_kernels import DEVICE, draw, off
from .test_shared_apart import weights_in

DTYPE = torch.bfloat16
H, I, E, K = 128, 64, 6, 2  # noqa: E741
QWEN = RoutingSpec("softmax", True)
GLM = RoutingSpec("sigmoid", True, 2.5, has_correction_bias=True)
# Rounding of inner states and output to bfloat16.
ALLOWED = 0.02


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels wherever these tests run; on a CPU in Triton's interpreter."""
    for module in (paired, paired_pass):
        monkeypatch.setattr(module, "on_gpu", lambda _: True)


def held(family: str, routed: str = "plain", shared: str = "plain", width: int = I) -> PairedWeights:
    qwen = family == "qwen"
    return PairedWeights(
        routed=experts_in(routed, E, H, I),
        shared=weights_in(shared, 1, H, width, 7)[0],
        gate=draw(E, H, seed=9, dtype=DTYPE if qwen else torch.float32, scale=0.3),
        shared_gate=draw(1, H, seed=10, dtype=DTYPE, scale=0.3) if qwen else None,
        correction_bias=None if qwen else draw(E, seed=11, dtype=torch.float32, scale=0.1),
    )


def layer_of(weights: PairedWeights, spec: RoutingSpec) -> PairedLayer:
    slots = len(weights.slots)
    moe = moe_spec(ExpertLayout(E, slots, K, H, I), spec, "sigmoid_gate" if spec is QWEN else "constant")
    return PairedLayer(0, moe, lambda: weights, ModeCounter())


def given_logits(tokens: int) -> torch.Tensor:
    """Logits with clear choices."""
    order = torch.stack(
        [torch.randperm(E, generator=torch.Generator().manual_seed(n)) for n in range(tokens)]
    )
    return (order.float() * 0.7).to(DEVICE)


def deviation(layer: PairedLayer, tokens: int, scale: OutputScale = OutputScale()) -> float:  # noqa: B008
    states, logits = draw(tokens, H, seed=4, dtype=DTYPE), given_logits(tokens)
    zeros = torch.full_like(states, float("nan"))
    with layer.given(logits):
        out = layer(states, states, scale, zeros)
    assert out.dtype == DTYPE
    assert not zeros.any()
    return off(out, layer.exact(states, logits, scale))


@pytest.mark.parametrize("tokens", [1, 3, 9, 17])
@pytest.mark.parametrize(("routed", "shared"), [("plain", "plain"), ("block", "plain"), ("block", "block")])
def test_formats(routed: str, shared: str, tokens: int) -> None:
    assert deviation(layer_of(held("qwen", routed, shared), QWEN), tokens) <= ALLOWED


@pytest.mark.parametrize(
    ("how", "tokens"), [("marlin g32", 1), ("awq g128", 9), ("humming awq g64", 3), ("bytes g32", 3)]
)
def test_4_bits(how: str, tokens: int) -> None:
    """As few tokens as one go through the kernels that read such experts; the control: a word of another."""
    weights = held("qwen", how)
    layer = layer_of(weights, QWEN)
    assert deviation(layer, tokens) <= ALLOWED
    exact = layer.exact
    four = weights.routed
    layer.read = lambda: replace(weights, routed=replace(four, w2=four.w2.roll(1, 0)))
    states, logits = draw(tokens, H, seed=4, dtype=DTYPE), given_logits(tokens)
    wrong = exact(states, logits, OutputScale())
    layer.read = lambda: weights
    assert off(wrong, exact(states, logits, OutputScale())) > ALLOWED


@pytest.mark.parametrize("width", [4 * I, 2 * I + 32])
def test_wide_shared_experts(width: int) -> None:
    assert deviation(layer_of(held("qwen", width=width), QWEN), 3) <= ALLOWED


@pytest.mark.parametrize("scale", [OutputScale(2.5), OutputScale(1.0, 1 / 2.5)])
def test_scales(scale: OutputScale) -> None:
    layer = layer_of(held("glm"), GLM)
    assert deviation(layer, 3, scale) <= ALLOWED
    layer.control_factor = 1.5
    assert deviation(layer, 3, scale) > 2 * ALLOWED


def test_experts_that_are_elsewhere() -> None:
    whole = held("qwen")
    half = slice(E // 2, E)
    numbers = torch.full((E,), -1, dtype=torch.int32)
    numbers[half] = torch.arange(E - E // 2, dtype=torch.int32)
    part = replace(
        whole,
        routed=ExpertWeights(whole.routed.w13[half], whole.routed.w2[half]),
        expert_map=numbers.to(DEVICE),
    )
    assert deviation(layer_of(part, QWEN), 5) <= ALLOWED


def test_slots_that_are_merged_already() -> None:
    weights = held("qwen")
    assert weights.shared is not None
    w13 = torch.cat([weights.routed.w13, weights.shared.w13])
    w2 = torch.cat([weights.routed.w2, weights.shared.w2])
    merged = replace(weights, routed=ExpertWeights(w13, w2), shared=None, merged_slots=1)
    assert deviation(layer_of(merged, QWEN), 3) <= ALLOWED


def test_logits_that_are_handed_in() -> None:
    weights = replace(held("qwen"), gate=None)
    assert deviation(layer_of(weights, QWEN), 3) <= ALLOWED


@pytest.mark.parametrize("tokens", [3, 17])
def test_rows_of_a_gate_in_memory_of_their_own(tokens: int) -> None:
    states = draw(tokens, H, seed=4, dtype=DTYPE)
    gate, further = (draw(rows, H, seed=rows, dtype=DTYPE, scale=0.3) for rows in (11, 1))
    exact = router_logits.reference(states, gate, further)
    assert off(router_logits.router_logits(states, gate, further), exact) <= ALLOWED
    # The control: another row in the last column.
    wrong = router_logits.router_logits(states, gate, gate[:1].contiguous())
    assert off(wrong[:, -1], exact[:, -1]) > ALLOWED


def test_its_own_logits() -> None:
    weights, states = held("qwen"), draw(3, H, seed=4, dtype=DTYPE)
    layer = layer_of(weights, QWEN)
    ours: Any = layer.router_logits(weights, states)
    assert weights.gate is not None
    assert off(ours, states.double() @ weights.gate.double().T) <= ALLOWED
