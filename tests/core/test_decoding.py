"""What the arms of an end-to-end measurement do alike, whichever engine they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fse_patch import end_to_end
from fse_patch.adapters import decoding, drawing
from fse_patch.adapters.shared_sets import SharedSets
from fse_patch.errors import FsePatchError


class Slow(decoding.Engine):
    """Prefill takes 7 s, a step 2 ms for each stream."""

    now = 0.0

    def __init__(self, request: decoding.Request) -> None:
        pass

    def ready(self) -> dict[str, Any]:
        return {}

    def generate(self, prompts: list[list[int]], tokens: int) -> Sequence[int]:
        Slow.now += 7.0 + 0.002 * len(prompts) * tokens
        return [prompt[0] % 3 for prompt in prompts]

    def report(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def test_milliseconds_a_step_are_a_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: Slow.now)
    engine = Slow({})
    for streams in end_to_end.STREAMS:
        short, long = (decoding.decode(engine, 1000, streams, tokens) for tokens in (33, 161))
        ms = end_to_end.milliseconds(short["seconds"], long["seconds"], 33, 161)
        assert ms == pytest.approx(2.0 * streams)
        assert long["different_tokens"] == min(streams, 3)
    assert len({tuple(prompt) for prompt in decoding.prompts(64, 1000)}) == 64


def made(first: str) -> torch.nn.Module:
    module = torch.nn.Module()
    for name in (first, "shared"):
        module.add_module(name, torch.nn.Linear(8, 4))
    module.gate = torch.nn.Linear(8, 4)
    module.gate.e_score_correction_bias = torch.nn.Parameter(torch.ones(4))
    module.norm = torch.nn.LayerNorm(4)
    torch.nn.init.constant_(module.norm.weight, 0.5)
    return module


def test_all_arms_draw_the_same_weights() -> None:
    one, other = made("a"), made("b")
    plain = one.get_parameter("a.weight").clone()
    for built in (one, other):
        drawing.spread(built)
    assert torch.equal(one.get_parameter("gate.weight"), other.get_parameter("gate.weight"))
    assert torch.equal(one.get_parameter("a.weight"), plain)
    assert not torch.equal(one.get_parameter("shared.weight"), other.get_parameter("shared.weight"))
    assert not one.get_parameter("gate.e_score_correction_bias").any()


def test_norms_of_glm_alone_become_one() -> None:
    other, glm = made("a"), made("a")
    glm.__class__ = type("Glm4MoeForCausalLM", (torch.nn.Module,), {})
    for model in (other, glm):
        drawing.spread(model)
    assert other.get_parameter("norm.weight").tolist() == [0.5] * 4
    assert glm.get_parameter("norm.weight").tolist() == [1.0] * 4


def method(packs: bool) -> type:
    """A method of an engine that makes weights, and packs them after loading or not."""

    class Method:
        def create_weights(self, layer: Any, num_experts: int) -> None:
            weight = torch.nn.Parameter(torch.empty(num_experts, 4, 2), requires_grad=False)
            layer.register_parameter("w13_weight", weight)
            weight.weight_loader = self  # type: ignore[attr-defined]

        def process_weights_after_loading(self, layer: Any) -> None:
            if packs:
                layer.w13_weight = torch.nn.Parameter(layer.w13_weight.clone(), requires_grad=False)

    return Method


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize(("number", "places"), [(1, [0, 0, 0]), (2, [0, 1, 0]), (5, [0, 1, 2])])
def test_layers_share_sets_in_turn(packs: bool, number: int, places: list[int]) -> None:
    held, sets = method(packs), SharedSets(number)
    sets.wrap(held)
    layers = [torch.nn.Module() for _ in range(3)]
    for layer in layers:
        held().create_weights(layer, num_experts=8)
        assert layer.w13_weight.weight_loader is not None
    other = torch.nn.Module()
    held().create_weights(other, 9)
    for layer in (*layers, other):
        held().process_weights_after_loading(layer)
    pointers = [layer.w13_weight.data_ptr() for layer in layers]
    assert [pointers.index(pointer) for pointer in pointers] == places
    assert other.w13_weight.data_ptr() not in pointers
    assert sets.check() == {"layers": 4, "sets": len(set(places)) + 1}


def test_sets_that_are_not_shared_are_an_error() -> None:
    sets = SharedSets(1)
    with pytest.raises(FsePatchError, match="no layer has the weights"):
        sets.check()
    held = method(packs=False)
    sets.wrap(held)
    layers = [torch.nn.Module() for _ in range(2)]
    for layer in layers:
        held().create_weights(layer, 8)
    sets.check()
    layers[1].w13_weight.data = layers[1].w13_weight.data.clone()
    with pytest.raises(FsePatchError, match="w13_weight of 2 layers lies in 2 places"):
        sets.check()
