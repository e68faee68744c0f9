"""What the arms of an end-to-end measurement do alike, whichever engine they hold."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fse_patch.errors import FsePatchError
from fse_patch.lab import decode_arm as decoding
from fse_patch.lab import end_to_end, random_weights, readings
from fse_patch.lab.live_arms import ArmError, LiveArms
from fse_patch.lab.sglang import decode_arm as sglang_arm
from fse_patch.lab.shared_sets import SharedSets
from fse_patch.lab.vllm import decode_arm


class Slow(decoding.Engine):
    """Prefill takes 7 s, a step 2 ms for each stream; it tells when steps ended, or not."""

    now = 0.0

    def __init__(self, request: decoding.Request) -> None:
        self.tells = request["tells"]
        self.ended: list[float] = []

    def ready(self) -> dict[str, Any]:
        return {}

    def generate(self, prompts: list[list[int]], tokens: int) -> Sequence[int]:
        self.ended.clear()
        Slow.now += 7.0
        for _ in range(tokens):
            Slow.now += 0.002 * len(prompts)
            self.ended.append(Slow.now)
        return [prompt[0] % 3 for prompt in prompts]

    def reached(self) -> dict[int, float]:
        return {n + 1: when for n, when in enumerate(self.ended)} if self.tells else {}

    def report(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class Alone:
    """One engine in the place of three arms."""

    def __init__(self, engine: Slow) -> None:
        self.engine = engine
        self.asked: list[int] = []

    def ask(self, _: str, question: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(question["tokens"])
        return decoding.decode(self.engine, 1000, question["streams"], question["tokens"], question["tail"])

    def ask_all(self, question: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {"stock": self.ask("stock", question)}


@pytest.mark.parametrize("tells", [True, False])
def test_milliseconds_a_step_have_no_prompt_in_them(monkeypatch: pytest.MonkeyPatch, tells: bool) -> None:
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: Slow.now)
    lengths, streams = readings.Lengths(), end_to_end.STREAMS
    for number in streams:
        alone = Alone(Slow({"tells": tells}))
        arms = cast(LiveArms, alone)
        timed = readings.warm_up(arms, lengths, (number,), lambda _: None)
        assert timed == ({number} if tells else set())
        alone.asked.clear()
        reading = readings.take_reading(arms, lengths, number, number in timed, "stock")
        assert reading["ms"] == pytest.approx(2.0 * number)
        assert reading["different_tokens"] == min(number, 3)
        repeats, long = lengths.repeats_for(number), lengths.long_for(number)
        # A short answer is asked for only where it is needed.
        assert alone.asked == [long] * repeats + [lengths.short] * (0 if tells else repeats)
        # The control: a whole answer has its prompt in it.
        assert reading["long"][0] / long * 1e3 > 1.1 * reading["ms"] or number == 64
    assert len({tuple(prompt) for prompt in decoding.prompts(64, 1000)}) == 64


def test_an_arm_that_tells_no_more_when_its_steps_began_ends_the_run() -> None:
    alone, lengths = Alone(Slow({"tells": True})), readings.Lengths(repeats=1)
    arms, ask = cast(LiveArms, alone), alone.ask
    lost = iter([True, False, True, True, True])

    def forgetful(name: str, question: dict[str, Any]) -> dict[str, Any]:
        return {**ask(name, question), **({"tail": None} if next(lost) else {})}

    alone.ask = forgetful  # type: ignore[method-assign]
    # Once lost, it is asked again: no slope stands beside the other arms' tails.
    assert not readings.take_reading(arms, lengths, 1, True, "fused")["short"]
    with pytest.raises(ArmError, match=r"fused arm: does not tell any more when the last 256 steps began"):
        readings.take_reading(arms, lengths, 1, True, "fused")


def test_vllm_counts_steps_back_from_the_end_of_the_first_answer() -> None:
    engine = object.__new__(decode_arm.Engine)
    # Prompts took two steps, and the second stream came two steps after the first.
    engine.tokens, engine.ended, engine.together = 3, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], 4
    assert engine.reached() == {1: 2.0, 2: 4.0, 3: 8.0}
    engine.tokens = 9
    assert engine.reached() == {6: 1.0, 7: 2.0, 8: 4.0, 9: 8.0}


def test_sglang_notes_what_its_first_stream_had_when_all_ran() -> None:
    engine = object.__new__(sglang_arm.Engine)
    engine.ended = {}
    chunks = [(0, 1), (0, 33), (1, 1), (0, 65), (1, 33), (0, 97), (1, 97)]
    told = [{"index": index, "meta_info": {"completion_tokens": n}, "output_ids": [n]} for index, n in chunks]
    engine.engine = SimpleNamespace(generate=lambda **_: told)
    assert engine.generate([[1], [2]], 97) == [97, 97]
    # With 33 tokens the first stream ran alone.
    assert list(engine.reached()) == [65, 97]


def test_steps_that_were_not_told_are_not_timed() -> None:
    engine = Slow({"tells": True})
    assert decoding.decode(engine, 1000, 1, 5, 4)["tail"] == pytest.approx(0.008)
    assert decoding.decode(engine, 1000, 1, 5, 5)["tail"] is None
    assert decoding.decode(engine, 1000, 1, 5, 0)["tail"] is None


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
        random_weights.spread(built)
    assert torch.equal(one.get_parameter("gate.weight"), other.get_parameter("gate.weight"))
    assert torch.equal(one.get_parameter("a.weight"), plain)
    assert not torch.equal(one.get_parameter("shared.weight"), other.get_parameter("shared.weight"))
    assert not one.get_parameter("gate.e_score_correction_bias").any()


def test_norms_of_glm_alone_become_one() -> None:
    other, glm = made("a"), made("a")
    glm.__class__ = type("Glm4MoeForCausalLM", (torch.nn.Module,), {})
    for model in (other, glm):
        random_weights.spread(model)
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
