"""Faults planted in our own code, for both engines: what must stop a model before it is served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch


def changed_slots(change: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    from fse_patch.fusion_core.remap import Remap

    honest = Remap._slots

    def slots(self: Remap, *args: Any) -> Iterator[Any]:
        return (change(part) for part in honest(self, *args))

    return patch.object(Remap, "_slots", slots)


def swapped(part: Any) -> Any:
    other = {"w1": "w3", "w3": "w1", "w2": "w2"}
    return dataclasses.replace(part, shard=other[part.shard])


def a_little_off(part: Any) -> Any:
    return dataclasses.replace(part, tensor=part.tensor * 1.0001)


@contextmanager
def unsampled(fault: AbstractContextManager[Any]) -> Iterator[None]:
    """A fault that the samples of the slots do not see, so that the canary has to."""
    from fse_patch.fusion_core.sample import Found, SlotSample

    with fault, patch.object(SlotSample, "compare", lambda *_: Found()):
        yield


# Faults of the load, which the samples of the slots show before any forward: recipe, and the fault.
MISLOADED: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "shards swapped": ("glm4_moe_scale", lambda: changed_slots(swapped)),
    "values a little off": ("qwen2_moe", lambda: changed_slots(a_little_off)),
}


def appended(change: Callable[[Any, Any], Any]) -> AbstractContextManager[Any]:
    """The slots' weight, made of the right one and the routed experts' weights."""
    from fse_patch.fusion_core import routing

    honest = routing.append_shared_slots

    def append(weights: Any, ids: Any, slots: range, slot_weight: Any) -> Any:
        return honest(weights, ids, slots, change(slot_weight, weights))

    return patch.object(routing, "append_shared_slots", append)


def routed(change: Callable[[Any, Any], Any]) -> AbstractContextManager[Any]:
    """The routed experts' weights, made of the right ones and the spec."""
    from fse_patch.fusion_core import routing

    honest = routing.route

    def route(logits: Any, top_k: int, spec: Any, bias: Any = None) -> Any:
        weights, ids = honest(logits, top_k, spec, bias)
        return change(weights, spec), ids

    return patch.object(routing, "route", route)


@contextmanager
def gate_in_the_softmax() -> Iterator[None]:
    """The shared expert takes part in the routed experts' softmax, and is renormalised with them."""
    from fse_patch.fusion_core import routing

    honest = routing.append_shared_slots

    def append(weights: Any, ids: Any, slots: range, slot_weight: Any) -> Any:
        weights, ids = honest(weights, ids, slots, slot_weight)
        return weights / weights.sum(dim=-1, keepdim=True), ids

    with patch.object(routing, "append_shared_slots", append):
        yield
