"""What is measured of a block, its rows and its errors against float64: on the CPU, with toy blocks."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters import tuned_configs
from fse_patch.cli.bench import wrong
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import MoeSpec, RoutingSpec
from fse_patch.fusion_core.forward.mode_registry import MODES
from fse_patch.lab import bench
from fse_patch.lab.timing import floor_seconds

TOKENS, HIDDEN, EXPERTS, TOP_K = bench.ERROR_TOKENS, 256, 64, 4
LAYOUT = ExpertLayout(EXPERTS, 1, TOP_K, HIDDEN, 32)


class Stock:
    """Doubles its states, a little off, and says what it was given."""

    def __init__(self, seed: int) -> None:
        self.gate = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        draw = torch.Generator().manual_seed(seed)
        self.gate.weight.data = torch.randn(EXPERTS, HIDDEN, generator=draw) * 0.1
        self.given: list[torch.Tensor] = []

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        self.given.append(states)
        return 2 * states * 1.001


class Layer:
    """Runs in the mode that is forced."""

    execution = object()

    def __init__(self) -> None:
        self.mode, self.weight = "", 1.0

    @contextmanager
    def forced(self, mode: str) -> Any:
        self.mode = mode
        yield

    @contextmanager
    def weighted(self, weight: float) -> Any:
        self.weight = weight
        yield
        self.weight = 1.0


NO_SHARED_GATE = SimpleNamespace(family=SimpleNamespace(shared_gate=None))


def pair_of(broken: str = "") -> Any:
    """Blocks that double their states; a broken mode of them computes one of several equal tokens alone."""
    layer = Layer()

    def fused(states: torch.Tensor) -> torch.Tensor:
        out = 2 * states * layer.weight
        if layer.mode == broken:
            for token in range(1, len(states)):
                if (states[:token] == states[token]).all(1).any():
                    out[token] = 0
        return out

    return SimpleNamespace(
        layout=LAYOUT,
        native=False,
        itemsize=2,
        decision=SimpleNamespace(moe=MoeSpec(LAYOUT, RoutingSpec("softmax", True), "one", (0, 1))),
        stock=[Stock(seed) for seed in range(2)],
        fused=[fused] * 2,
        fused_role=SimpleNamespace(layers={0: layer}, start=SimpleNamespace(naming=NO_SHARED_GATE)),
        forward_context=lambda tokens: nullcontext(),
    )


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    def reference(pair: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
        return states, 2 * states.double(), torch.rand(TOKENS)

    monkeypatch.setattr(bench, "reference", reference)


@pytest.mark.usefixtures("doubled")
def test_every_mode_is_compared_over_different_and_over_equal_tokens() -> None:
    off = bench.errors(pair_of(), seeds=3)
    assert set(off) == {"tokens", "stock", "control", *MODES}
    assert off["tokens"] == [TOKENS] * 6
    assert {len(values) for values in off.values()} == {6}
    assert max(off["small"]) < min(off["stock"]) < 0.002 < 0.4 < min(off["control"])
    assert wrong(off) == []


@pytest.mark.usefixtures("doubled")
def test_a_mode_that_is_wrong_for_equal_tokens_is_seen() -> None:
    off = bench.errors(pair_of("small"), seeds=3)
    assert [value > 0.5 for value in off["small"]] == [False, True] * 3
    (failure,) = wrong(off)
    assert failure.startswith("small: ")


def test_the_reference_is_the_sum_over_the_chosen_experts_and_the_shared_slot() -> None:
    pair, draw = pair_of(), torch.Generator().manual_seed(0)
    weights = {
        (expert, name): torch.randn(shape, generator=draw, dtype=torch.float64)
        for expert in range(EXPERTS + 1)
        for name, shape in (("w13", (64, HIDDEN)), ("w2", (HIDDEN, 32)))
    }
    pair.exact = lambda expert, name: weights[expert, name]
    states, expected, shares = bench.reference(pair, 0)
    assert (states.shape, states.dtype, expected.dtype) == ((TOKENS, HIDDEN), torch.bfloat16, torch.float64)
    state = states[3].double()
    best = (pair.stock[0].gate.weight.double() @ state).topk(TOP_K)
    share = [*best.values.softmax(0).tolist(), 1.0]
    out = torch.zeros(HIDDEN, dtype=torch.float64)
    part = out
    for expert, weight in zip([*best.indices.tolist(), EXPERTS], share, strict=True):
        one, up = (weights[expert, "w13"] @ state).chunk(2)
        part = weight * (weights[expert, "w2"] @ (torch.nn.functional.silu(one) * up))
        out = out + part
    assert torch.allclose(expected[3], out)
    assert torch.allclose(shares[3], part.norm() / out.norm())


@pytest.mark.parametrize("name", ["even", "alike"])
def test_a_row_has_the_floor_of_the_experts_that_its_states_choose(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "capture", lambda call: call)
    monkeypatch.setattr(bench, "in_turn", lambda graphs, rounds: {arm: [2e-6] * rounds for arm in graphs})
    monkeypatch.setattr(tuned_configs, "LOOKED_UP", {EXPERTS: "none", EXPERTS + 1: "none"})
    pair = pair_of()
    row = bench._measure(pair, 8, name, 5)
    assert (row["tokens"], row["routing"], row["stock_us"]) == (8, name, 1.0)
    assert (row["valid"], row["small_ratio"], row["fused_table"]) == (True, 1.0, "none")
    chosen = []
    for block in pair.stock:
        assert len({*map(id, block.given)}) == 1
        ids = (block.given[0].float() @ block.gate.weight.T).topk(TOP_K).indices
        chosen.append(len(ids.unique()))
        assert len(block.given[0].unique(dim=0)) == (1 if name == "alike" else 8)
    assert chosen == [TOP_K] * 2 if name == "alike" else min(chosen) > 2 * TOP_K
    # Blocks have states of their own.
    assert not torch.equal(pair.stock[0].given[0], pair.stock[1].given[0])
    assert row["floor_us"] == pytest.approx(floor_seconds(LAYOUT, 1, sum(chosen) / 2, EXPERTS) * 1e6)
