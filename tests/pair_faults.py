"""Deliberate faults in what a paired layer reads, for both engines: patches to enter or start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

# Of a case: the proof is off, and the answers have to show the fault by themselves.
UNPROVED = "unproved_"


def another(layer: Any) -> Any:
    """The other layer of the model in this process."""
    from fse_patch.adapters.paired import constructed

    layers = [held for role in constructed() for held in role.layers.values()]
    return next(held for held in layers if held is not layer)


def taken(cls: Any, **fields: Callable[[Any], Any]) -> Any:
    """Let every layer of an engine's class read some things of another one; all of it is read by then."""
    honest = cls.read

    def read(self: Any) -> Any:
        other = honest(another(self))
        return dataclasses.replace(honest(self), **{name: get(other) for name, get in fields.items()})

    return patch.object(cls, "read", read)


def once(cls: Any) -> Any:
    """Let an update leave what is read as it was loaded first: every address of it is stale then."""
    honest = cls.copy

    def copy(self: Any) -> None:
        if self.copied is None:
            honest(self)

    return patch.object(cls, "copy", copy)


def faults(cls: Any) -> dict[str, Callable[[], Any]]:
    """By name; ``cls`` is the class of an engine's layers."""
    found: dict[str, Callable[[], Any]] = {
        "shared_of_another_layer": lambda: taken(cls, shared=lambda other: other.shared),
        "gate_of_another_layer": lambda: taken(cls, gate=lambda other: other.gate),
        "shared_gate_of_another_layer": lambda: taken(cls, shared_gate=lambda other: other.shared_gate),
    }
    found |= {UNPROVED + name: fault for name, fault in found.items()}
    return found | {"stale_after_an_update": lambda: once(cls)}
