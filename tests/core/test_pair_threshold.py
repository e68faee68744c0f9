"""Up to how many tokens a paired role runs: measured, looked up, or not at all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch.adapters import graph_timing, pair_threshold  # noqa: E402
from fse_patch.adapters.pair_threshold import choose, situation  # noqa: E402
from fse_patch.fusion_core.decision.outcome import Paired  # noqa: E402
from fse_patch.fusion_core.forward import measured_cache  # noqa: E402
from fse_patch.fusion_core.forward.threshold import ROUTINGS, SIZES, threshold_of  # noqa: E402

from .paired_roles import PAIRED, Engine, Layer, role_of  # noqa: E402


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
