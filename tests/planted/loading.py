"""Faults in what takes the slots: the engine's weight loader, and whoever writes after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any
from unittest.mock import patch

from fse_patch.adapters.load import RoleLoader
from fse_patch.fusion_core.weights.remap import SlotTensor

from .plant import adapter, plant

Context = AbstractContextManager[Any]


def take(change: Callable[[Any, Any, SlotTensor], SlotTensor | None]) -> Callable[[str], Context]:
    """What the engine's weight loader is given, after the audit's part of the work; None: nothing."""

    def context(engine: str) -> Context:
        cls = adapter(engine, "role").Slots
        honest = cls.take

        def changed(self: Any, parameter: Any, part: SlotTensor, name: str) -> bool:
            given = change(self, parameter, part)
            return True if given is None else honest(self, parameter, given, name)

        return patch.object(cls, "take", changed)

    return context


@plant
def loader_does_nothing(engine: str) -> Context:
    return take(lambda self, parameter, part: None)(engine)


@plant
def loader_fills_a_half(engine: str) -> Context:
    def half(self: Any, parameter: Any, part: SlotTensor) -> None:
        # Into the upper half of the rows, as a loader does that has the width of another model.
        rows = parameter.data[part.slot]
        rows[: rows.shape[0] // 2] = 0.0

    return take(half)(engine)


@plant
def loader_writes_the_neighbour(engine: str) -> Context:
    return take(lambda self, parameter, part: dataclasses.replace(part, slot=part.slot - 1))(engine)


@plant
def loader_reads_nothing(_: str) -> Context:
    """An engine that decides to load nothing."""
    honest = RoleLoader.load

    def load(self: Any, original: Any, weights: Any) -> Any:
        return honest(self, lambda stream: set(), weights)

    return patch.object(RoleLoader, "load", load)


@plant
def loader_stops_early(_: str) -> Context:
    """As islice of the stream: the rest is never asked for, and no count at its end is made."""
    honest = RoleLoader.load

    def load(self: Any, original: Any, weights: Any) -> Any:
        return honest(self, lambda stream: original(islice(stream, 20)), weights)

    return patch.object(RoleLoader, "load", load)


def after_loading(change: Callable[[Any], None]) -> Context:
    """Done to the role when the loader and the audit are through."""
    honest = RoleLoader.load

    def load(self: Any, original: Any, weights: Any) -> Any:
        loaded = honest(self, original, weights)
        change(self.role)
        return loaded

    return patch.object(RoleLoader, "load", load)


@plant
def slot_overwritten_by_a_routed_expert(_: str) -> Context:
    def change(role: Any) -> None:
        for layer in role.layers.values():
            layer.experts.w2_weight.data[role.layout.num_routed] = layer.experts.w2_weight.data[0]

    return after_loading(change)


@plant
def routed_expert_overwritten_by_the_slot(_: str) -> Context:
    def change(role: Any) -> None:
        for layer in role.layers.values():
            rows, slot = layer.experts.w13_weight.data, role.layout.num_routed
            rows[slot - 1] = rows[slot]

    return after_loading(change)


@plant
def slot_poisoned_after_the_audit(_: str) -> Context:
    def change(role: Any) -> None:
        for layer in role.layers.values():
            layer.experts.w13_weight.data[role.layout.num_routed :] = float("nan")

    return after_loading(change)
