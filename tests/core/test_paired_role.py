"""A paired role from its load to its record: proof, threshold, updates, and what switches it off."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch import runtime, settings  # noqa: E402
from fse_patch.adapters import graph_timing, pair_threshold  # noqa: E402
from fse_patch.adapters.expert_reading import Unreadable  # noqa: E402
from fse_patch.adapters.pair_proof import start_roles  # noqa: E402
from fse_patch.adapters.pair_threshold import choose, situation  # noqa: E402
from fse_patch.adapters.paired import EngineLayer, PairedEngine, PairedLoader, PairedRole  # noqa: E402
from fse_patch.adapters.start import PairedStart, Settled, laid_out  # noqa: E402
from fse_patch.errors import FsePatchError  # noqa: E402
from fse_patch.fusion_core.decision.outcome import Paired, Stock, paired  # noqa: E402
from fse_patch.fusion_core.forward import measured_cache  # noqa: E402
from fse_patch.fusion_core.forward.paired import OutputScale, PairedWeights  # noqa: E402
from fse_patch.fusion_core.forward.plan import always  # noqa: E402
from fse_patch.fusion_core.forward.threshold import ROUTINGS, SIZES, threshold_of  # noqa: E402
from fse_patch.fusion_core.reasons import Reason  # noqa: E402

from .moe import decision, naming_of  # noqa: E402
from .test_paired_layer import LAYOUT, drawn, layer_of  # noqa: E402

MERGED = replace(decision(LAYOUT, layers=(0, 1)), pairing=decision(LAYOUT, layers=(0, 1)).moe)
PAIRED = paired(MERGED)


class Layer(EngineLayer):
    """An engine whose own forward is a layer that keeps tensors of its own."""

    def __init__(self, number: int, role: PairedRole) -> None:
        super().__init__(number, role)
        self.held = drawn(number, dtype=torch.float32)
        self.engine_held = self.held
        self.copies = 0

    def read(self) -> PairedWeights:
        return self.held

    def parameters(self) -> Iterable[Any]:
        return ()

    def in_memory(self) -> PairedWeights:
        raise AssertionError

    def copy(self) -> None:
        self.copies += 1

    def stock(self, hidden_states: Any, logits: Any) -> Any:
        own = layer_of(self.engine_held)
        with own.given(logits):
            return own(hidden_states, logits, OutputScale())

    def ours(self, hidden_states: Any, logits: Any) -> Any:
        with self.layer.given(logits):
            return self.layer(hidden_states, logits, OutputScale())

    def scale(self, hidden_states: Any) -> OutputScale:
        return OutputScale()

    def gates(self, hidden_states: Any) -> Iterable[tuple[Any, Any]]:
        yield hidden_states @ self.read().gate.T, hidden_states @ self.engine_held.gate.T

    def engine_logits(self, hidden_states: Any) -> Any:
        return hidden_states @ self.engine_held.gate.T

    dtype = torch.float32
    logits_dtype = torch.float32
    backend = "triton"


class Engine(PairedEngine):
    """One process, and perhaps others with it."""

    def __init__(self, *others: Any) -> None:
        self.others = list(others)
        self.gathered = 0

    @contextmanager
    def context(self, num_tokens: int) -> Iterator[None]:
        yield

    def group(self) -> Any:
        raise NotImplementedError

    def gather(self, value: Any) -> list[Any]:
        self.gathered += 1
        return [value, *(other for other in self.others if type(other) is type(value))]

    def processes(self) -> int:
        return 1

    def release(self) -> str:
        return "1.0"


def role_of(**changes: Any) -> PairedRole:
    assert isinstance(PAIRED, Paired)
    effective = settings.Settings(**{"cpu_threshold": 4, "verify": "all", **changes})
    role = PairedRole(PairedStart(PAIRED, effective, naming_of("qwen2_moe", 2)))
    for number in (0, 1):
        role.add(number, Layer(number, role))
    return role


def thresholds(role: PairedRole) -> set[int]:
    return {layer.layer.threshold for layer in role.layers.values()}


def load(role: PairedRole) -> None:
    PairedLoader(role).load(list, [])


def test_nothing_runs_before_it_is_proved_then_up_to_the_threshold(caplog: Any) -> None:
    role = role_of()
    load(role)
    assert [layer.copies for layer in role.layers.values()] == [1, 1]
    assert thresholds(role) == {0}
    with caplog.at_level(logging.INFO, "fse_patch"):
        start_roles([role], Engine())
    assert thresholds(role) == {4}
    told = role.report()
    assert (told["weight_layout"], told["fused_layers"]) == ("paired", [])
    assert told["paired"]["proof"]["state"] == "passed"
    assert told["paired"]["proof"]["layers"] == [0, 1]
    assert told["paired"]["threshold_from"] == settings.CPU_THRESHOLD
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO]
    assert "shared expert paired up to 4 tokens" in line
    # Once a role.
    engine = Engine()
    start_roles([role], engine)
    assert engine.gathered == 0


def faulty(fault: str) -> PairedRole:
    role = role_of()
    first: Any = role.layers[0]
    other = drawn(9, dtype=torch.float32)
    if fault == "wrong shared pointer":
        first.held = replace(first.held, shared=other.shared)
    elif fault == "gate of another layer":
        first.held = replace(first.held, gate=other.gate)
    elif fault == "shared gate of another layer":
        first.held = replace(first.held, shared_gate=other.shared_gate)
    elif fault == "pair counted twice":
        first.held = replace(first.held, expert_map=torch.arange(8, dtype=torch.int32) % 4)
    return role


@pytest.mark.parametrize(
    "fault",
    ["wrong shared pointer", "gate of another layer", "shared gate of another layer", "pair counted twice"],
)
def test_a_fault_switches_the_pass_off_and_stock_serves(fault: str, caplog: Any) -> None:
    role = faulty(fault)
    load(role)
    start_roles([role], Engine())
    assert thresholds(role) == {0}
    assert role.loaded is not None
    assert (role.loaded.proof.state, role.loaded.reason.code) == ("failed", "proof.failed")  # type: ignore[union-attr]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "not paired: proof.failed: layer 0" in warning
    assert any(d["reason"] == "proof.failed" for d in runtime.decisions())


def test_a_layout_that_cannot_be_read_switches_it_off() -> None:
    role = role_of()

    def unreadable() -> PairedWeights:
        raise Unreadable("packed")

    role.layers[1].layer.read = unreadable
    role.layers[1].read = unreadable  # type: ignore[method-assign]
    start_roles([role], Engine())
    assert thresholds(role) == {0}
    assert role.loaded.reason == Reason("backend.layout", "packed")  # type: ignore[union-attr]


def test_a_role_without_layers_says_so(caplog: Any) -> None:
    role = role_of()
    role.layers.clear()
    start_roles([role], Engine())
    assert role.loaded.reason.code == "backend.layout"  # type: ignore[union-attr]
    assert "no layer was built" in caplog.text


def test_an_update_after_which_nothing_can_be_read_switches_it_off() -> None:
    role = role_of()
    load(role)
    start_roles([role], Engine())

    def unreadable() -> PairedWeights:
        raise Unreadable("packed")

    role.layers[1].read = unreadable  # type: ignore[method-assign]
    load(role)
    assert thresholds(role) == {0}
    assert role.loaded.reason == Reason("backend.layout", "after an update: packed")  # type: ignore[union-attr]


def test_one_process_that_fails_switches_all_off() -> None:
    from fse_patch.adapters.loaded_pairs import PairProof

    role = role_of()
    start_roles([role], Engine(PairProof("failed", detail="somewhere else")))
    assert thresholds(role) == {0}
    assert role.loaded.reason.detail == "in another process: somewhere else"  # type: ignore[union-attr]


def test_the_smallest_threshold_of_all_processes_holds() -> None:
    role = role_of()
    start_roles([role], Engine(pair_threshold.Chosen(2, "measured")))
    assert thresholds(role) == {2}


def test_strict_stops_where_a_proof_fails() -> None:
    role = faulty("wrong shared pointer")
    role.start = replace(role.start, settings=replace(role.start.settings, strict=True))
    with pytest.raises(SystemExit) as stopped:
        start_roles([role], Engine())
    assert stopped.value.code == 3


def test_an_update_is_looked_at_and_proved_anew() -> None:
    role = role_of()
    load(role)
    start_roles([role], Engine())
    before = role.loaded
    for layer in role.layers.values():
        layer.held = layer.engine_held = drawn(20, dtype=torch.float32)  # type: ignore[attr-defined]
    load(role)
    assert thresholds(role) == {4}
    assert role.loaded is not None
    assert role.loaded.loads == 2
    assert role.loaded.layers[0].addresses != before.layers[0].addresses  # type: ignore[union-attr]


def test_a_stale_address_after_an_update_is_caught(caplog: Any) -> None:
    role = role_of()
    load(role)
    start_roles([role], Engine())
    for layer in role.layers.values():
        layer.engine_held = drawn(20, dtype=torch.float32)  # type: ignore[attr-defined]
    load(role)
    assert thresholds(role) == {0}
    assert role.loaded.reason.code == "proof.failed"  # type: ignore[union-attr]
    assert "after an update" in caplog.text


def test_graphs_that_hold_an_address_refuse_an_update_that_moves_it() -> None:
    role = role_of()
    load(role)
    start_roles([role], Engine())
    for layer in role.layers.values():
        layer.layer.captured = layer.read().addresses
    load(role)  # the same addresses: fine
    for layer in role.layers.values():
        layer.held = layer.engine_held = drawn(20, dtype=torch.float32)  # type: ignore[attr-defined]
    with pytest.raises(FsePatchError, match="captured CUDA graphs read the old ones"):
        load(role)


def test_a_layer_is_built_once() -> None:
    role = role_of()
    with pytest.raises(FsePatchError, match="built twice"):
        role.add(0, role.layers[0])


LORA = Reason("lora", "a test")


@pytest.mark.parametrize(
    ("layout", "plan", "refused", "expected"),
    [
        ("merged", always("split", "t"), False, "Merged"),
        ("paired", always("fused", "t"), False, "Paired"),
        ("paired", always("fused", "t"), True, "Stock"),
        ("auto", always("fused", "t"), False, "Merged"),  # gains beyond few tokens
        ("auto", always("split", "t"), False, "Paired"),
        ("auto", always("split", "t"), True, "Merged"),
    ],
)
def test_which_layout_is_taken(layout: str, plan: Any, refused: bool, expected: str) -> None:
    settled = Settled(MERGED, plan=plan)
    effective = settings.Settings(layout=layout)
    outcome = laid_out(settled, effective, lambda _: iter([LORA] if refused else []))
    assert type(outcome.decision).__name__ == expected
    assert (outcome.plan is plan) == (expected == "Merged")
    if expected == "Stock":
        assert outcome.decision.reason == LORA  # type: ignore[union-attr]


@pytest.mark.parametrize(("layout", "expected"), [("merged", Stock), ("auto", Paired), ("paired", Paired)])
def test_what_does_not_merge_may_pair(layout: str, expected: type) -> None:
    settled = Settled(MERGED.refused(Reason("quant.unproven", "a test")))
    outcome = laid_out(settled, settings.Settings(layout=layout), lambda _: iter(()))
    assert isinstance(outcome.decision, expected)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, gains: dict[int, float]) -> list[int]:
    """Let thresholds be chosen as on a GPU, where stock over ours is ``gains`` by size."""
    measured: list[int] = []

    def measure(role: Any, engine: Any) -> Any:
        measured.append(1)
        return threshold_of({(size, r): [gain] * 5 for size, gain in gains.items() for r in ROUTINGS})

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(pair_threshold, "_driver", lambda: "1")
    monkeypatch.setattr(pair_threshold, "measure", measure)
    return measured


@pytest.mark.parametrize(
    ("factor", "tokens"),
    [(1.0, 16), (0.5, 0)],  # as measured; a kernel that takes twice as long, or stock in half the time
)
def test_what_is_measured_is_what_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factor: float, tokens: int
) -> None:
    gains = {size: factor * (1.5 if size <= 16 else 0.9) for size in SIZES}
    measured = on_a_gpu(monkeypatch, gains)
    role = role_of(cpu_threshold=0, cache=str(tmp_path))
    chosen = choose(role, Engine())
    assert (chosen.tokens, chosen.source) == (tokens, "measured")
    assert (chosen.reason is None) == (tokens > 0)
    if chosen.reason is not None:
        assert chosen.reason.code == "slower.measured"
    # The next start looks it up.
    again = choose(role_of(cpu_threshold=0, cache=str(tmp_path)), Engine())
    assert (again.tokens, again.source, len(measured)) == (tokens, "cache", 1)
    always_anew = choose(role_of(cpu_threshold=0, cache=str(tmp_path), measure="always"), Engine())
    assert (always_anew.source, len(measured)) == ("measured", 2)


def test_without_measurement_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = on_a_gpu(monkeypatch, {size: 2.0 for size in SIZES})
    off = {"cpu_threshold": 0, "cache": str(tmp_path), "measure": "off"}
    chosen = choose(role_of(**off), Engine())
    assert (chosen.tokens, measured) == (0, [])
    assert chosen.reason is not None
    assert chosen.reason.code == "slower.unmeasured"
    assert choose(role_of(**off, allow_unmeasured=True), Engine()).tokens == 16
    # What was measured before counts.
    role = role_of(**off)
    assert isinstance(PAIRED, Paired)
    measured_cache.keep(tmp_path, situation(PAIRED, role.layers[0], Engine()), 8, {})
    assert choose(role, Engine()).tokens == 8


class Slowed(Layer):
    """A layer whose arms take as long as is said, in seconds."""

    stock_seconds = ours_seconds = 0.002

    def stock(self, hidden_states: Any, logits: Any) -> Any:
        time.sleep(self.stock_seconds)

    def ours(self, hidden_states: Any, logits: Any) -> Any:
        self.layer.captured = (1,)  # as while a graph is captured
        time.sleep(self.ours_seconds)


def timed(graph: Any, replays: int) -> float:
    """One replay of what stands for a graph."""
    begun = time.perf_counter()
    graph()
    return time.perf_counter() - begun


@pytest.mark.parametrize(
    ("stock", "ours", "tokens"),
    [
        (0.006, 0.002, 2),
        (0.002, 0.004, 0),  # a slowed kernel is not taken
        (0.001, 0.002, 0),  # a sped-up stock switches ours off
    ],
)
def test_arms_are_timed_against_each_other(
    monkeypatch: pytest.MonkeyPatch, stock: float, ours: float, tokens: int
) -> None:
    monkeypatch.setattr(pair_threshold, "SIZES", (1, 2))
    monkeypatch.setattr(pair_threshold, "capture", lambda function: function)
    monkeypatch.setattr(graph_timing, "reading", timed)
    role = role_of()
    for number, layer in ((n, Slowed(n, role)) for n in (0, 1)):
        layer.stock_seconds, layer.ours_seconds = stock, ours
        role.layers[number] = layer
    found = pair_threshold.measure(role, Engine())
    assert found.tokens == tokens
    assert found.bounds[1, "even"] > 0
    # Graphs of a measurement bind nobody.
    assert {layer.layer.captured for layer in role.layers.values()} == {None}
