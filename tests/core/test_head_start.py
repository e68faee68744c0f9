"""The start of an LM head in 8 bits, in one process and in several; updates; what goes wrong stays stock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch.adapters import graph_timing, head, head_start  # noqa: E402
from fse_patch.adapters.head import Head, format_refusals  # noqa: E402
from fse_patch.errors import FsePatchError  # noqa: E402
from fse_patch.fusion_core.proof import head as proof  # noqa: E402
from fse_patch.fusion_core.quant.int8_groups import Int8Rows  # noqa: E402
from fse_patch.fusion_core.reasons import Reason  # noqa: E402
from fse_patch.settings import Settings  # noqa: E402

from .heads import FEW, NOW, Group, K, N, Own, copied, reason_of, started, weight  # noqa: E402


def test_few_tokens_run_from_the_copy_and_others_do_not() -> None:
    own = Own(weight())
    held = started(own)
    states = torch.randn(FEW + 1, K)
    assert (held.limit, held.told.reason, held.calls) == (FEW, None, {})
    assert torch.equal(own.apply(states), states @ own.weight.T)
    ours = own.apply(states[:FEW])
    assert not torch.equal(ours, states[:FEW] @ own.weight.T)
    assert torch.allclose(ours, states[:FEW] @ own.weight.T, atol=0.02)
    assert own.apply(states[:0]).shape == (0, N)
    assert held.report()["calls"] == {"stock": 2, "int8:g32": 1}


def test_a_second_start_finds_it_there() -> None:
    own = Own(weight())
    assert started(own) is started(own)


def test_costs_over_processes_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # One of them is beyond the vocabulary.
    monkeypatch.setattr(head_start, "_token_ids", lambda _: [*range(0, N, 5), N + 3])
    whole = started(Own(weight()))
    size = N // 4
    shards = Group(4).run(
        lambda rank, engine: started(
            Own(weight()[rank * size : rank * size + size], rank * size, pad=8), engine
        )
    )
    assert {name: cost.states for name, cost in whole.told.costs.items()} == {"random": 256, "text": 103}
    for held in shards:
        assert held.limit == FEW
        for name, cost in whole.told.costs.items():
            assert held.told.costs[name].agreement == cost.agreement
            assert held.told.costs[name].difference == pytest.approx(cost.difference, rel=1e-3)


def test_a_tokenizer_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    assert {*started(Own(weight()), None, NOW, str(tmp_path)).told.costs} == {"random"}


def with_fault(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Int8Rows], None]) -> None:
    honest = head.quantised

    def quantised(matrix: torch.Tensor) -> Int8Rows:
        held = honest(matrix)
        fault(held)
        return held

    monkeypatch.setattr(head, "quantised", quantised)


def doubled(held: Int8Rows) -> None:
    held.scales[100, 1] *= 2


def swapped(held: Int8Rows) -> None:
    for part in (held.values, held.scales):
        part[[5, 100]] = part[[100, 5]]


@pytest.mark.parametrize("fault", [doubled, swapped])
def test_a_fault_is_caught_and_stock_serves(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Int8Rows], None], caplog: Any
) -> None:
    with_fault(monkeypatch, fault)
    own = Own(weight())
    held = started(own)
    assert reason_of(held) == "head.proof"
    assert (held.limit, held.held.nbytes) == (0, 0)
    assert "LM head: not quantised: head.proof: " in caplog.text
    states = torch.randn(2, K)
    assert torch.equal(own.apply(states), states @ own.weight.T)


def test_a_fault_in_one_process_switches_all_off(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Head.fault

    def fault(self: Head, most: int) -> Reason | None:
        if self.own.tokens[1]:
            return Reason("head.proof", "the second process")
        return honest(self, most)

    monkeypatch.setattr(Head, "fault", fault)
    half = N // 2
    both = Group(2).run(
        lambda rank, engine: started(Own(weight()[rank * half : rank * half + half], rank * half), engine)
    )
    assert [(held.limit, reason_of(held)) for held in both] == [(0, "head.proof")] * 2


@pytest.mark.parametrize("place", ["_prepare", "part_of", "_limit"])
def test_an_error_in_one_process_keeps_none_waiting(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    honest, calls = getattr(head_start, place), iter([True, False, True, False])

    def broken(*args: Any) -> Any:
        if next(calls):
            raise RuntimeError("no memory")
        return honest(*args)

    monkeypatch.setattr(head_start, place, broken)
    half = N // 2
    both = Group(2).run(
        lambda rank, engine: started(Own(weight()[rank * half : rank * half + half], rank * half), engine)
    )
    assert [held.limit for held in both] == [0, 0]
    assert all(held.told.reason for held in both)


def test_a_head_that_loses_too_much_is_refused() -> None:
    other = weight()
    other[:, ::32] *= 400
    assert reason_of(started(Own(other))) == "head.inaccurate"


def test_an_engine_that_applies_it_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "apply", lambda self, states: states @ self.weight.T)
    assert reason_of(started(Own(weight()))) == "head.format"


def test_what_is_refused_before_leaves_no_copy() -> None:
    own = Own(weight())
    assert started(own, None, NOW, "", Reason("lora", "adapters")) is None


def test_on_a_cpu_nothing_runs_from_it() -> None:
    assert reason_of(started(Own(weight()), None, Settings())) == "slower.unmeasured"


def test_an_update_is_quantised_again() -> None:
    own = Own(weight())
    held = started(own)
    places = held.held.values.data_ptr(), held.held.scales.data_ptr()
    own.module.weight.weight_loader(own.module.weight, weight(seed=1))
    states = torch.randn(2, K)
    assert places == (held.held.values.data_ptr(), held.held.scales.data_ptr())
    assert torch.allclose(own.apply(states), states @ weight(seed=1).T, atol=0.02)
    assert held.limit == FEW


def test_without_it_the_old_head_would_be_served() -> None:
    """The control of the test above."""
    own = Own(weight())
    held = started(own)
    copied(own.module.weight, weight(seed=1))
    states = torch.randn(2, K)
    assert not torch.allclose(own.apply(states), states @ weight(seed=1).T, atol=0.02)
    held.updated()
    assert torch.allclose(own.apply(states), states @ weight(seed=1).T, atol=0.02)


def test_an_update_that_loses_too_much_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Own(weight())
    held = started(own)
    other = weight(seed=1)
    monkeypatch.setattr(proof, "HEAD_DIFFERENCE", 1e-3)
    own.module.weight.weight_loader(own.module.weight, other)
    assert (held.limit, reason_of(held)) == (0, "head.inaccurate")
    states = torch.randn(2, K)
    assert torch.equal(own.apply(states), states @ other.T)


def test_captured_graphs_would_serve_it() -> None:
    own = Own(weight())
    held = started(own)
    held.captured["int8:g32"] += 1
    with pytest.raises(FsePatchError, match="captured CUDA graphs would serve it"):
        own.module.weight.weight_loader(own.module.weight, weight(seed=1) * torch.nan)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": object()}, "the engine applies it by object: it is quantised already"),
        ({"bias": torch.zeros(N)}, "it has a bias"),
        ({"weight": torch.nn.Parameter(torch.zeros(4, 48), False)}, "groups are of 32 columns"),
        ({"weight": torch.nn.Parameter(torch.zeros(64, 4).T, False)}, "groups are of 32 columns"),
        ({"weight": torch.nn.Parameter(torch.zeros(4, 64).double(), False)}, "torch.float64"),
        ({"weight": torch.nn.Parameter(torch.zeros(4, 64), False)}, "has no loader"),
    ],
)
def test_formats(change: dict[str, Any], said: str) -> None:
    own = Own(weight())
    assert list(format_refusals(own.module)) == []
    for name, value in change.items():
        setattr(own.module, name, value)
    found = list(format_refusals(own.module))
    assert {reason.code for reason in found} == {"head.format"}
    assert any(said in reason.detail for reason in found)


@pytest.mark.parametrize(
    ("stock", "ours", "tokens"), [((3, 3, 3, 3, 3), (1, 2, 2, 4, 4), 4), ((1,) * 5, (2,) * 5, 0)]
)
def test_heads_are_timed_against_each_other(
    monkeypatch: pytest.MonkeyPatch, stock: tuple[int, ...], ours: tuple[int, ...], tokens: int
) -> None:
    held = started(Own(weight()))
    sizes = head_start.SIZES

    def capture(function: Callable[[], Any]) -> float:
        before = held.calls.copy()
        place = sizes.index(len(function()))
        return (ours if held.calls["int8:g32"] > before["int8:g32"] else stock)[place]

    monkeypatch.setattr(head_start, "capture", capture)
    monkeypatch.setattr(graph_timing, "reading", lambda graph, _: float(graph))
    assert head_start.measure(held).tokens == tokens
    assert held.limit == 0
