"""A paired role of two layers, and the engine that it is in, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from fse_patch import settings  # noqa: E402
from fse_patch.adapters.paired import EngineLayer, PairedEngine, PairedLoader, PairedRole  # noqa: E402
from fse_patch.adapters.start import PairedStart  # noqa: E402
from fse_patch.fusion_core.decision.outcome import Paired, paired  # noqa: E402
from fse_patch.fusion_core.forward.paired import OutputScale, PairedWeights  # noqa: E402

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
        role.take(number, lambda number=number: Layer(number, role))  # type: ignore[misc]
    return role


def thresholds(role: PairedRole) -> set[int]:
    return {layer.layer.threshold for layer in role.layers.values()}


def load(role: PairedRole) -> None:
    PairedLoader(role).load(list, [])
