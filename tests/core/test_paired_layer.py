"""A paired layer and its proof: against a layer that is written out here, with faults that must be caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch.adapters.expert_reading import Unreadable, experts_of  # noqa: E402
from fse_patch.fusion_core.decision.layout import ExpertLayout  # noqa: E402
from fse_patch.fusion_core.decision.outcome import RoutingSpec  # noqa: E402
from fse_patch.fusion_core.forward.paired import OutputScale, PairedLayer, PairedWeights  # noqa: E402
from fse_patch.fusion_core.forward.plan import ModeCounter  # noqa: E402
from fse_patch.fusion_core.kernels.expert_weights import ExpertWeights  # noqa: E402
from fse_patch.fusion_core.proof.paired import (  # noqa: E402
    CHOSEN,
    LEFT,
    Errors,
    errors_of,
    fault,
    gate_fault,
    inputs_of,
)

from .moe import moe_spec  # noqa: E402

E, K, H, I, T = 8, 2, 32, 16, 5  # noqa: E741
LAYOUT = ExpertLayout(E, 2, K, H, I)
GLM = RoutingSpec("sigmoid", True, 2.5, has_correction_bias=True)


def drawn(seed: int = 0, gated: bool = True, dtype: Any = torch.float64) -> PairedWeights:
    draw = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) / 4

    return PairedWeights(
        routed=ExpertWeights(made(E, 2 * I, H), made(E, H, I)),
        shared=ExpertWeights(made(1, 4 * I, H), made(1, H, 2 * I)),
        gate=made(E, H),
        shared_gate=made(1, H) if gated else None,
        correction_bias=None if gated else made(E) / 10,
    )


def layer_of(held: PairedWeights, gated: bool = True) -> PairedLayer:
    spec = RoutingSpec("softmax", True) if gated else GLM
    moe = moe_spec(LAYOUT, spec, "sigmoid_gate" if gated else "constant")
    return PairedLayer(3, moe, lambda: held, ModeCounter())


def mlp(x: Any, weights: ExpertWeights, expert: int = 0) -> Any:
    w13, w2 = weights.w13[expert], weights.w2[expert]
    half = len(w13) // 2
    return w2 @ (torch.nn.functional.silu(w13[:half] @ x) * (w13[half:] @ x))


def by_hand(held: PairedWeights, states: Any, scale: float = 1.0) -> Any:
    out = []
    for x in states:
        if held.shared_gate is not None:
            p = torch.softmax(held.gate @ x, 0)
            chosen = p.topk(K).indices.tolist()
            weights = [p[e] / p[chosen].sum() for e in chosen]
            net = torch.sigmoid(held.shared_gate[0] @ x)
        else:
            s = torch.sigmoid(held.gate @ x)
            chosen = (s + held.correction_bias).topk(K).indices.tolist()
            weights, net = [scale * s[e] / s[chosen].sum() for e in chosen], 1.0
        routed = sum(w * mlp(x, held.routed, e) for w, e in zip(weights, chosen, strict=True))
        out.append(routed + net * mlp(x, held.shared))
    return torch.stack(out)


def states_of(seed: int = 7) -> Any:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_gated_layer_is_what_is_written_here() -> None:
    held, states = drawn(), states_of()
    out = layer_of(held)(states, states, OutputScale())
    assert torch.allclose(out, by_hand(held, states), rtol=1e-10)
    assert torch.allclose(layer_of(held).exact(states, states @ held.gate.T, OutputScale()), out, rtol=1e-10)
    # The control: another layer's gate, and another's shared expert.
    other = drawn(1)
    for wrong in (
        replace(held, gate=other.gate),
        replace(held, shared_gate=other.shared_gate),
        replace(held, shared=other.shared),
    ):
        assert not torch.allclose(layer_of(wrong)(states, states, OutputScale()), out, rtol=1e-3)


def test_scales_that_an_engine_applies_afterwards_are_taken_out() -> None:
    held, states = drawn(gated=False), states_of()
    expected = by_hand(held, states, 2.5)
    layer = layer_of(held, gated=False)
    assert torch.allclose(layer(states, states, OutputScale(2.5)), expected, rtol=1e-10)
    assert torch.allclose(layer(states, states, OutputScale(1.0, 1 / 2.5)) * 2.5, expected, rtol=1e-10)


def test_logits_may_be_handed_in_or_given() -> None:
    held, states = drawn(), states_of()
    handed = layer_of(replace(held, gate=None))
    logits = states @ held.gate.T
    expected = layer_of(held)(states, states, OutputScale())
    assert torch.equal(handed(states, logits, OutputScale()), expected)
    layer = layer_of(held)
    with layer.given(logits.flip(1)):
        other = layer(states, states, OutputScale())
    assert torch.equal(other, handed(states, logits.flip(1), OutputScale()))
    assert torch.equal(layer(states, states, OutputScale()), expected)


def test_processes_that_share_experts_out_sum_to_the_whole() -> None:
    held, states = drawn(), states_of()
    whole = layer_of(held)(states, states, OutputScale())
    parts, wrong = [], []
    for rank in (0, 1):
        mine = slice(rank * E // 2, (rank + 1) * E // 2)
        numbers = torch.full((E,), -1, dtype=torch.int32)
        numbers[mine] = torch.arange(E // 2, dtype=torch.int32)
        # The shared expert is cut along its width, as in tensor parallelism.
        half = slice(rank * I, (rank + 1) * I)
        w13 = held.shared.w13[0]
        w13 = torch.cat([w13[: 2 * I][half], w13[2 * I :][half]])
        shared = ExpertWeights(w13[None], held.shared.w2[:, :, half])
        part = replace(
            held,
            routed=ExpertWeights(held.routed.w13[mine], held.routed.w2[mine]),
            shared=shared,
            expert_map=numbers,
        )
        parts.append(layer_of(part)(states, states, OutputScale()))
        # A pair that is counted in both processes.
        twice = replace(part, expert_map=torch.arange(E, dtype=torch.int32) % (E // 2))
        wrong.append(layer_of(twice)(states, states, OutputScale()))
    assert torch.allclose(sum(parts), whole, rtol=1e-10)
    assert not torch.allclose(sum(wrong), whole, rtol=1e-3)
    # Each process sees it by itself.
    found = errors_of(wrong[0], parts[0], parts[0])
    assert "off the engine's own output" in fault(found, torch.float32, False)


def test_slots_that_are_merged_already_are_read_as_such() -> None:
    held, states = drawn(), states_of()
    expected = layer_of(held)(states, states, OutputScale())
    w13, w2 = held.shared.w13[0], held.shared.w2[0]
    slots13 = [torch.cat([w13[: 2 * I][s], w13[2 * I :][s]]) for s in (slice(0, I), slice(I, 2 * I))]
    slots2 = [w2[:, :I], w2[:, I:]]
    routed = ExpertWeights(
        torch.cat([held.routed.w13, torch.stack(slots13)]), torch.cat([held.routed.w2, torch.stack(slots2)])
    )
    merged = replace(held, routed=routed, shared=None, merged_slots=2)
    assert torch.allclose(layer_of(merged)(states, states, OutputScale()), expected, rtol=1e-10)


def test_the_threshold_decides_by_the_number_of_tokens() -> None:
    layer = layer_of(drawn())
    assert not layer.runs(torch.zeros(1, H))
    layer.threshold = 4
    assert [layer.runs(torch.zeros(n, H)) for n in (0, 1, 4, 5)] == [False, True, True, False]
    for tokens in (1, 4, 5):
        layer.count(torch.zeros(tokens, H))
    assert layer.counter.by_mode() == {"paired": 2, "stock": 1}
    assert layer.counter.layers("paired") == layer.counter.layers() == [3]


@pytest.mark.parametrize("routing", ["even", "alike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_of_a_proof_are_clear_in_any_dtype(routing: str, dtype: Any) -> None:
    inputs = inputs_of(LAYOUT, 4, routing, dtype, dtype, torch.device("cpu"))
    best = inputs.logits.float().sort(dim=1, descending=True).values
    assert (best[:, K - 1] >= CHOSEN).all()
    assert (best[:, K] <= LEFT).all()
    chosen = {tuple(sorted(row.tolist())) for row in inputs.logits.topk(K).indices}
    assert len(chosen) == (1 if routing == "alike" else 4)


def test_a_proof_sees_faults_and_lets_rounding_pass() -> None:
    held, states = drawn(dtype=torch.bfloat16), states_of().bfloat16()
    layer = layer_of(held)
    logits = states.float() @ held.gate.float().T
    reference = layer.exact(states, logits, OutputScale())
    ours = reference.bfloat16()
    stock = (reference * (1 + 4e-3 * torch.randn(reference.shape))).bfloat16()
    assert fault(errors_of(ours, stock, reference), torch.bfloat16, False) == ""
    # In FP8 stock is far off by itself, which must not hide what we do wrong.
    coarse = reference * (1 + 6e-2 * torch.randn(reference.shape))
    assert fault(errors_of(ours, coarse, reference), torch.bfloat16, True) == ""
    block = held.shared.w2.clone()
    block[0, :4, :4] *= 2
    swapped = held.shared.w13.clone()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    for w13, w2, words in ((held.shared.w13, block, "off float32"), (swapped, held.shared.w2, "off")):
        with (bad := layer_of(replace(held, shared=ExpertWeights(w13, w2)))).given(logits):
            off = bad(states, states, OutputScale())
        assert words in fault(errors_of(off, coarse, reference), torch.bfloat16, True)


def test_no_number_is_no_pass() -> None:
    good = torch.ones(2, 4)
    for bad in (torch.full((2, 4), torch.nan), torch.full((2, 4), torch.inf)):
        assert fault(errors_of(bad, good, good), torch.float32, False)
    assert fault(Errors(float("nan"), 0.0, 0.0), torch.float32, False)


def test_a_gate_of_another_layer_is_seen() -> None:
    states = states_of().float()
    gate, other = drawn(0).gate.float(), drawn(1).gate.float()
    assert gate_fault(states @ gate.T, states @ gate.T) == ""
    assert "of the engine's gate" in gate_fault(states @ other.T, states @ gate.T)


def test_weights_are_read_as_they_lie_or_not_at_all() -> None:
    w13, w2 = torch.zeros(E, 2 * I, H), torch.zeros(E, H, I)
    assert experts_of(w13, w2).scales is None
    assert experts_of(w13[0], w2[0]).width == I
    for bad, words in (
        ((w13[:, :-1], w2), "are not"),
        ((w13.transpose(1, 2).contiguous().transpose(1, 2), w2), "stride"),
        ((torch.zeros(0, 2 * I, H), torch.zeros(0, H, I)), "empty"),
        ((w13.to("meta"), w2.to("meta")), "empty"),
        ((w13.to(torch.int8), w2.to(torch.int8)), "int8"),
        ((w13, w2, (torch.ones(E), torch.ones(E))), "have scales"),
    ):
        with pytest.raises(Unreadable, match=words):
            experts_of(*bad)


def test_scales_of_every_kind_are_read() -> None:
    fp8 = torch.float8_e4m3fn
    w13, w2 = torch.zeros(E, 2 * I, H).to(fp8), torch.zeros(E, H, I).to(fp8)
    block = experts_of(w13, w2, (torch.ones(E, 4, 4), torch.ones(E, 4, 2)), (8, 8))
    assert PairedWeights(block, None).formats == ("float8_e4m3fn 8x8", "")
    # Transposed by an engine, as DeepGEMM wants them: strides are no matter.
    turned = torch.ones(E, 4, 4).transpose(1, 2)
    assert experts_of(w13, w2, (turned, torch.ones(E, 4, 2)), (8, 8)).scales.w13.stride() == turned.stride()
    channel = experts_of(w13, w2, (torch.ones(E, 2 * I, 1), torch.ones(E, H, 1)))
    assert channel.scales.block == (1, 0)
    tensor = experts_of(w13, w2, (torch.ones(E), torch.ones(E)))
    assert (tensor.scales.block, tensor.scales.w13.shape) == ((0, 0), (E, 1, 1))
    shared = experts_of(w13[0], w2[0], (torch.tensor(1.0), torch.tensor(1.0)))
    assert shared.scales.w13.shape == (1, 1, 1)
    for scales, words in (
        ((None, None), "no scales"),
        ((torch.ones(E, 4, 4).half(), torch.ones(E, 4, 2)), "float16"),
        ((torch.ones(E, 3, 4), torch.ones(E, 4, 2)), "in blocks"),
    ):
        with pytest.raises(Unreadable, match=words):
            experts_of(w13, w2, scales, (8, 8))
