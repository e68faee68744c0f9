"""A linear layer as an LM head, and processes that share its rows, for tests of its start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from fse_patch.adapters import head_start
from fse_patch.adapters.head import EngineHead, Head, of_weight
from fse_patch.fusion_core.reasons import Reason
from fse_patch.settings import Settings

N, K, FEW = 512, 64, 4
NOW = Settings(cpu_threshold=FEW)


class Group:
    """Processes as threads; `gather` waits for all of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.values: list[Any] = [None] * size

    def member(self, rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
            return found

        return SimpleNamespace(gather=gather)

    def run(self, start: Callable[[int, Any], Any]) -> list[Any]:
        found: list[Any] = [None] * self.size

        def work(rank: int) -> None:
            found[rank] = start(rank, self.member(rank))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return found


def copied(weight: Any, loaded: torch.Tensor) -> None:
    weight.data.copy_(loaded)


class Own(EngineHead):
    """A linear layer, and the method that is patched."""

    def __init__(self, weight: torch.Tensor, first: int = 0, pad: int = 0) -> None:
        rows = torch.cat([weight, torch.zeros(pad, weight.shape[1], dtype=weight.dtype)])
        parameter: Any = torch.nn.Parameter(rows.clone(), requires_grad=False)
        parameter.weight_loader = copied
        held = SimpleNamespace(num_org_elements=len(weight), org_vocab_start_index=first)
        self.module = SimpleNamespace(
            weight=parameter, quant_method=UnquantizedLinearMethod(), bias=None, shard_indices=held
        )

    def apply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        served = of_weight(self.module)
        logits = None if served is None else served.logits(hidden_states)
        return hidden_states @ self.weight.T if logits is None else logits


class UnquantizedLinearMethod:
    """Applies a weight as it is; named as in the engines."""


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.02


def started(own: Own, engine: Any = None, now: Settings = NOW, model: str = "", *reasons: Reason) -> Any:
    head_start.start_head(own, reasons, engine or Group(1).member(0), now, model)
    return of_weight(own.module)


def reason_of(held: Head) -> str:
    assert held.told.reason is not None
    return held.told.reason.code
