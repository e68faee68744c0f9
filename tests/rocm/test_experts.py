"""AITER's fused experts behind our guards, on every profile of the fake, against the unfused formula."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fse_patch.fusion_core.kernels import aiter
from fse_patch.fusion_core.kernels.aiter import AiterCaps
from fse_patch.fusion_core.kernels.aiter_experts import experts_refusal, fused_experts, keep_mark, shuffle

from ..fakes.aiter_kernels import GpuFault
from ..fakes.aiter_profiles import COMING, PROFILES, installed

E, S, H, I = 4, 2, 64, 128  # noqa: E741
TOKENS = 3
ROUNDING = 1e-2


@pytest.fixture(params=PROFILES)
def caps(request: pytest.FixtureRequest) -> Iterator[AiterCaps]:
    with installed(PROFILES[request.param]):
        yield aiter.probe()


def tensor(*shape: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw) / shape[-1] ** 0.5).to(torch.bfloat16)


class Layer:
    """Routed experts and a shared one S times as wide, unfused; and fused, by hand."""

    def __init__(self, width: int = I) -> None:
        self.states = tensor(TOKENS, H, seed=1)
        self.w13, self.w2 = tensor(E, 2 * width, H, seed=2), tensor(E, H, width, seed=3)
        self.gate_up, self.down = tensor(2 * S * width, H, seed=4), tensor(H, S * width, seed=5)
        gate, up = self.gate_up.chunk(2)
        slots13 = [torch.cat([gate[s : s + width], up[s : s + width]]) for s in range(0, S * width, width)]
        slots2 = [self.down[:, s : s + width] for s in range(0, S * width, width)]
        self.fused13 = torch.cat([self.w13, torch.stack(slots13)])
        self.fused2 = torch.cat([self.w2, torch.stack(slots2)])
        self.weights = torch.tensor([[0.7, 0.3, 0.4, 0.4], [0.9, 0.1, 0.5, 0.5], [0.2, 0.8, 0.1, 0.1]])
        self.ids = torch.tensor([[0, 3, E, E + 1], [2, 1, E, E + 1], [3, 0, E, E + 1]], dtype=torch.int32)

    def wanted(self) -> torch.Tensor:
        """routed + weight * shared, the shared expert as one MLP."""
        x, out = self.states.double(), torch.zeros(TOKENS, H, dtype=torch.float64)
        for row in range(TOKENS):
            for column in range(2):
                expert, weight = int(self.ids[row, column]), float(self.weights[row, column])
                out[row] += weight * mlp(x[row], self.w13[expert], self.w2[expert])
            out[row] += float(self.weights[row, 2]) * mlp(x[row], self.gate_up, self.down)
        return out


def mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (gate_up.double() @ x).chunk(2)
    return down.double() @ (torch.nn.functional.silu(gate) * up)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def test_fused_experts_are_the_unfused_formula(caps: AiterCaps) -> None:
    layer = Layer()
    assert experts_refusal(caps, layer.fused13, layer.fused2, E + S) == ""
    w13, w2 = shuffle(caps, layer.fused13, layer.fused2)
    found = fused_experts(caps, layer.states, w13, w2, layer.weights, layer.ids)
    assert off(found, layer.wanted()) < ROUNDING
    # The control: a slot's weight 10 % off.
    layer.weights[:, 2] *= 1.1
    assert (
        off(fused_experts(caps, layer.states, w13, w2, layer.weights, layer.ids), layer.wanted()) > ROUNDING
    )


def test_slots_are_appended_before_the_shuffle(caps: AiterCaps) -> None:
    """Rows that are appended afterwards are read in another order than they lie in."""
    layer = Layer()
    assert "not of 6 experts" in experts_refusal(caps, layer.w13, layer.w2, E + S)
    w13, w2 = shuffle(caps, layer.w13, layer.w2)
    assert "shuffled already" in experts_refusal(caps, w13, w2, E)
    with pytest.raises(ValueError, match="shuffled already"):
        shuffle(caps, w13, w2)
    # The control: slots in the checkpoint's order behind shuffled experts.
    late = [torch.cat([head, tail[E:]]) for head, tail in ((w13, layer.fused13), (w2, layer.fused2))]
    for weight, source in zip(late, (w13, w2), strict=True):
        keep_mark(weight, source)
    assert off(fused_experts(caps, layer.states, *late, layer.weights, layer.ids), layer.wanted()) > 0.1


def test_the_mark_is_kept_and_asked_for(caps: AiterCaps) -> None:
    layer = Layer()
    w13, w2 = shuffle(caps, layer.fused13, layer.fused2)
    lost = torch.nn.Parameter(w13, requires_grad=False)
    with pytest.raises(ValueError, match="not marked as shuffled"):
        fused_experts(caps, layer.states, lost, w2, layer.weights, layer.ids)
    kept = keep_mark(lost, w13)
    assert (
        off(fused_experts(caps, layer.states, kept, w2, layer.weights, layer.ids), layer.wanted()) < ROUNDING
    )
    # The control: without it AITER reads the shuffled weights as they are.
    lost = torch.nn.Parameter(w13, requires_grad=False)
    assert caps.fused_moe is not None
    found = caps.fused_moe(
        layer.states, lost, w2, layer.weights, layer.ids, activation=caps.silu, quant_type=caps.unquantised
    )
    assert off(found, layer.wanted()) > 0.1


def test_columns_of_a_wider_buffer_are_copied(caps: AiterCaps) -> None:
    layer = Layer()
    w13, w2 = shuffle(caps, layer.fused13, layer.fused2)
    weights = torch.cat([layer.weights, torch.ones(TOKENS, 3)], dim=1)[:, :4]
    ids = torch.cat([layer.ids, torch.ones(TOKENS, 3, dtype=torch.int32)], dim=1)[:, :4]
    assert off(fused_experts(caps, layer.states, w13, w2, weights, ids), layer.wanted()) < ROUNDING
    assert caps.fused_moe is not None
    found = caps.fused_moe(
        layer.states, w13, w2, weights, ids, activation=caps.silu, quant_type=caps.unquantised
    )
    assert off(found, layer.wanted()) > 0.1  # control


@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_widths_that_the_kernels_have(caps: AiterCaps, width: int) -> None:
    layer = Layer(width)
    assert experts_refusal(caps, layer.fused13, layer.fused2, E + S) == ""


@pytest.mark.parametrize("width", [96, 320, 704])
def test_widths_that_the_kernels_do_not_have_are_left_to_triton(caps: AiterCaps, width: int) -> None:
    """704: Qwen1.5-MoE's 1408 on two ranks."""
    layer = Layer(width)
    assert "no multiple of" in experts_refusal(caps, layer.fused13, layer.fused2, E + S)
    w13, w2 = shuffle(caps, layer.fused13, layer.fused2)
    with pytest.raises(RuntimeError, match="does not support this GEMM problem"):  # the control
        fused_experts(caps, layer.states, w13, w2, layer.weights, layer.ids)


def test_other_dtypes_are_left_to_triton(caps: AiterCaps) -> None:
    layer = Layer()
    assert experts_refusal(caps, layer.fused13.float(), layer.fused2.float(), E + S)
    assert experts_refusal(caps, layer.fused13, layer.fused2.half(), E + S)
    assert (
        experts_refusal(AiterCaps("it is not there"), layer.fused13, layer.fused2, E + S) == "it is not there"
    )


def test_a_top_k_of_other_dtypes_is_refused(caps: AiterCaps) -> None:
    layer = Layer()
    w13, w2 = shuffle(caps, layer.fused13, layer.fused2)
    for weights, ids in (
        (layer.weights.double(), layer.ids),
        (layer.weights, layer.ids.long()),
        (layer.weights[:, :2], layer.ids),
    ):
        with pytest.raises(ValueError, match="top-k is"):
            fused_experts(caps, layer.states, w13, w2, weights, ids)


def test_keywords_that_a_release_does_not_know() -> None:
    layer = Layer()
    for name in PROFILES:
        with installed(PROFILES[name]):
            caps = aiter.probe()
            w13, w2 = shuffle(caps, layer.fused13, layer.fused2)

            def run(
                caps: AiterCaps = caps, w13: torch.Tensor = w13, w2: torch.Tensor = w2, **options: object
            ) -> float:
                found = fused_experts(caps, layer.states, w13, w2, layer.weights, layer.ids, **options)
                return off(found, layer.wanted())

            assert run(no_combine=False, output=None, hidden_pad=0) < ROUNDING
            knows = all(keyword in caps.moe_arguments for keyword in COMING)
            assert knows == (name == "newest")
            if not knows:
                with pytest.raises(ValueError, match="has no no_combine"):
                    run(no_combine=True)
                with pytest.raises(TypeError):  # the control
                    caps.fused_moe(layer.states, w13, w2, layer.weights, layer.ids, no_combine=True)  # type: ignore[misc]


def test_counts_and_maps_that_mean_something_else(caps: AiterCaps) -> None:
    """vllm-project/vllm#53261 passed a count for each expert, #49758 and #47158 an expert map for a mask."""
    layer = Layer()
    w13, w2 = shuffle(caps, layer.fused13, layer.fused2)
    counts = torch.ones(E + S, dtype=torch.int32)
    mapping = torch.tensor([0, 1, -1, -1, 2, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="one number of rows"):
        fused_experts(caps, layer.states, w13, w2, layer.weights, layer.ids, num_local_tokens=counts)
    with pytest.raises(ValueError, match="no expert map"):
        fused_experts(caps, layer.states, w13, w2, layer.weights, layer.ids, expert_mask=mapping)


def test_padded_rows_reach_no_kernel(caps: AiterCaps) -> None:
    """ROCm/aiter#4636, vllm-project/vllm#57036: a negative id is an address."""
    layer = Layer()
    w13, w2 = shuffle(caps, layer.fused13, layer.fused2)
    layer.ids[1, :2] = -1
    weights, ids = aiter.without_padding(layer.weights, layer.ids, 2)
    found = fused_experts(caps, layer.states, w13, w2, weights, ids)
    assert found[1].tolist() == [0.0] * H
    assert bool((found[0] != 0).any())
    with pytest.raises(GpuFault):  # the control
        fused_experts(caps, layer.states, w13, w2, layer.weights, layer.ids)
