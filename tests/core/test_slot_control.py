"""The control of `verify` in the weights: graphs see it, in one slot alone, and it is undone bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters.role import FusedRole
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.forward.layer import FusedLayer
from fse_patch.fusion_core.forward.plan import ModeCounter
from fse_patch.fusion_core.forward.router import SlotAppender
from fse_patch.lab import model_process, slot_control

from .moe import Slots, decision, start_of

LAYOUT = ExpertLayout(num_routed=4, num_shared_slots=2, top_k=2, hidden_size=8, moe_intermediate_size=4)
E, SLOT = LAYOUT.num_experts, LAYOUT.num_routed
FP8 = torch.float8_e4m3fn


def experts(**tensors: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return module


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))).add(0.5).to(dtype)


def plain(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    return experts(w13_weight=draw(E, 8, 8, dtype=dtype), w2_weight=draw(E, 8, 4, dtype=dtype))


def in_8_bits(name: str = "w2_weight_scale_inv", *shape: int) -> torch.nn.Module:
    return experts(
        w2_weight=draw(E, 8, 4, dtype=FP8), **{name: draw(*(shape or (E, 2, 1)), dtype=torch.float32)}
    )


def model_of(role: Any, *layers: torch.nn.Module) -> FusedRole:
    made = decision(LAYOUT, shared_weight="constant", layers=tuple(range(len(layers))), role=role)
    model = FusedRole(start_of(made), Slots())
    for number, module in enumerate(layers):
        router = SlotAppender(number, made.moe, ModeCounter())
        model.layers[number] = FusedLayer(number, router, module, torch.nn.Module())
    return model


def experts_of(model: FusedRole) -> list[Any]:
    return [layer.experts for layer in model.layers.values()]


def runs_in_modes(layer: FusedLayer) -> None:
    layer.execution = SimpleNamespace()  # type: ignore[assignment]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the host's memory count as those of a GPU."""
    monkeypatch.setattr(slot_control, "on_gpu", lambda _: True)


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Bytes of each parameter, a row for each of its first dimension."""
    return {
        name: p.data.reshape(len(p), -1).view(torch.uint8).clone() for name, p in module.named_parameters()
    }


def changed(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Experts of each parameter that have other bits than before."""
    now = bits(module)
    found = {n: [e for e in range(len(b)) if not torch.equal(b[e], now[n][e])] for n, b in before.items()}
    return {name: rows for name, rows in found.items() if rows}


def factors(model: FusedRole) -> list[float]:
    return [layer.router.control_factor for layer in model.layers.values()]


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("factor", [0.0, 1.01, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_shared_slot_of_w2_alone_and_back(factor: float, dtype: torch.dtype) -> None:
    model = model_of("main", plain(dtype), plain(dtype))
    before = [bits(module) for module in experts_of(model)]
    wanted = experts_of(model)[0].w2_weight.data[SLOT] * factor
    slot_control.multiply(model, factor)
    for module, held in zip(experts_of(model), before, strict=True):
        assert changed(module, held) == {"w2_weight": [SLOT]}
    torch.testing.assert_close(experts_of(model)[0].w2_weight.data[SLOT], wanted, rtol=0, atol=0)
    # Never both: the factor would be squared.
    assert factors(model) == [1.0, 1.0]
    # Factors do not add up, so the second one starts from what was loaded.
    slot_control.multiply(model, 0.5)
    slot_control.multiply(model, factor)
    torch.testing.assert_close(experts_of(model)[0].w2_weight.data[SLOT], wanted, rtol=0, atol=0)
    assert slot_control.in_force(model)
    slot_control.multiply(model, 1.0)
    assert not slot_control.in_force(model)
    for module, held in zip(experts_of(model), before, strict=True):
        assert changed(module, held) == {}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    "module",
    [in_8_bits(), in_8_bits("w2_weight_scale", E), in_8_bits("w2_weight_scale", E, 8, 1)],
    ids=["blocks", "tensors", "channels"],
)
def test_in_8_bits_the_scales_have_the_factor(module: torch.nn.Module) -> None:
    model = model_of("main", module)
    before, (name,) = bits(module), [n for n, _ in module.named_parameters() if "scale" in n]
    # Kernels that may have copies of the scales: the router has the factor.
    slot_control.multiply(model, 0.0)
    assert (changed(module, before), factors(model)) == ({}, [0.0])
    runs_in_modes(model.layers[0])
    slot_control.multiply(model, 0.0)
    assert (changed(module, before), factors(model)) == ({name: [SLOT]}, [1.0])
    slot_control.multiply(model, 1.0)
    assert (changed(module, before), factors(model)) == ({}, [1.0])


UNSUITABLE: dict[str, Callable[[], torch.nn.Module]] = {
    "packed, one dimension": lambda: experts(w2_weight=draw(E * 32)),
    "no shared slots": lambda: experts(w2_weight=draw(SLOT, 8, 4)),
    "a bias": lambda: experts(w2_weight=draw(E, 8, 4), w2_bias=draw(E, 8)),
    "4 bits": lambda: experts(
        w2_weight=torch.zeros(E, 8, 2, dtype=torch.int32), w2_weight_scale=draw(E, 8, 1)
    ),
    "no scales": lambda: experts(w2_weight=draw(E, 8, 4, dtype=FP8)),
    "one scale of all": lambda: in_8_bits("w2_weight_scale", 1),
    "another layout of scales": lambda: in_8_bits("w2_weight_scale", 2, E),
    "exponents as scales": lambda: experts(
        w2_weight=draw(E, 8, 4, dtype=FP8),
        w2_weight_scale=torch.full((E, 8, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    ),
    "other names": lambda: experts(w2_qweight=draw(E, 8, 4)),
}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("kind", UNSUITABLE)
def test_what_cannot_be_changed_leaves_it_to_the_router(kind: str) -> None:
    module = UNSUITABLE[kind]()
    assert slot_control.slot_rows(module, LAYOUT, True, LAYOUT.num_experts) is None
    # Beside a layer that can be changed: each has the factor once.
    model = model_of("main", module, plain())
    runs_in_modes(model.layers[0])
    before = [bits(m) for m in experts_of(model)]
    slot_control.multiply(model, 0.0)
    assert [changed(m, b) for m, b in zip(experts_of(model), before, strict=True)] == [
        {}, {"w2_weight": [SLOT]},
    ]  # fmt: skip
    assert factors(model) == [0.0, 1.0]
    slot_control.multiply(model, 1.0)
    assert factors(model) == [1.0, 1.0]
    assert changed(experts_of(model)[1], before[1]) == {}


def test_on_a_cpu_the_router_has_it() -> None:
    model = model_of("main", plain())
    before = bits(experts_of(model)[0])
    slot_control.multiply(model, 0.0)
    assert (changed(experts_of(model)[0], before), factors(model)) == ({}, [0.0])
    slot_control.multiply(model, 1.0)
    assert factors(model) == [1.0]


class Graph:
    """Stands for a captured graph of a layer: the addresses of the weights, numbers as they were."""

    def __init__(self, model: FusedRole) -> None:
        self.w2, self.factor = experts_of(model)[0].w2_weight.data, factors(model)[0]

    def replay(self, states: torch.Tensor) -> torch.Tensor:
        return torch.stack([states @ w2.T for w2 in self.w2[SLOT:].float()]) * self.factor


@pytest.mark.usefixtures("on_gpu")
def test_a_captured_graph_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    main, draft = model_of("main", plain()), model_of("draft", plain())
    monkeypatch.setattr(model_process, "constructed", lambda: [main, draft])
    graph, states = Graph(main), draw(3, 4, dtype=torch.float32)
    honest, of_draft = graph.replay(states), bits(experts_of(draft)[0])
    model_process.control(0.0)
    assert not graph.replay(states)[0].any()
    assert torch.equal(graph.replay(states)[1], honest[1])
    assert changed(experts_of(draft)[0], of_draft) == {}
    model_process.control(1.0)
    assert torch.equal(graph.replay(states), honest)
    # The control: a number of the host is not seen.
    main.layers[0].router.control_factor = 0.0
    assert torch.equal(graph.replay(states), honest)


@pytest.mark.parametrize("in_weights", [True, False])
def test_the_yardstick_is_not_measured_with_the_control(
    monkeypatch: pytest.MonkeyPatch, in_weights: bool
) -> None:
    main = model_of("main", plain())
    monkeypatch.setattr(slot_control, "on_gpu", lambda _: in_weights)
    monkeypatch.setattr(model_process, "constructed", lambda: [main])
    model_process.jitter([], 0)
    model_process.control(0.0)
    with pytest.raises(FsePatchError, match="must be undone"):
        model_process.jitter([], 0)
    model_process.control(1.0)
    model_process.jitter([], 0)


@pytest.mark.usefixtures("on_gpu")
def test_a_control_that_broke_off_is_undone_and_until_then_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("main", plain(), plain())
    before = [bits(module) for module in experts_of(model)]
    with monkeypatch.context() as patch:
        patch.delattr(model.layers[1], "experts")
        with pytest.raises(AttributeError):
            slot_control.multiply(model, 0.0)
    assert slot_control.in_force(model)
    assert changed(experts_of(model)[0], before[0]) == {"w2_weight": [SLOT]}
    slot_control.multiply(model, 1.0)
    assert not slot_control.in_force(model)
    assert [changed(m, b) for m, b in zip(experts_of(model), before, strict=True)] == [{}, {}]


@pytest.mark.usefixtures("on_gpu")
def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = plain()
    model, before = model_of("main", module), bits(module)
    slot_control.multiply(model, 0.0)
    assert changed(module, before) == {"w2_weight": [SLOT]}
    slot_control.multiply(model, 1.0)
    assert changed(module, before) == {}
