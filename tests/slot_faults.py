"""Deliberate faults in how shared tensors reach their slots, for both engines: patches to enter or start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from fse_patch.adapters.load import RoleLoader
from fse_patch.fusion_core.weights.remap import Remap, SlotTensor

honest_slots, honest_write = Remap._slots, RoleLoader._write


def changed_slots(change: Callable[[SlotTensor], SlotTensor]) -> Any:
    """Replace every slot tensor of the stream by ``change`` of it."""

    def slots(self: Remap, *args: Any) -> Iterator[SlotTensor]:
        return (change(part) for part in honest_slots(self, *args))

    return patch.object(Remap, "_slots", slots)


def off_by_1_percent(part: SlotTensor) -> SlotTensor:
    first = part.layer == 0 and part.shard == "w2"
    return dataclasses.replace(part, tensor=part.tensor * 1.01) if first else part


def swapped(part: SlotTensor) -> SlotTensor:
    other = {"w1": "w3", "w3": "w1", "w2": "w2"}
    return dataclasses.replace(part, shard=other[part.shard])


def without_down(self: RoleLoader, part: SlotTensor) -> None:
    if part.shard != "w2":
        honest_write(self, part)


def twice(self: RoleLoader, part: SlotTensor) -> None:
    for _ in range(2):
        honest_write(self, part)


def draft_off(self: RoleLoader, part: SlotTensor) -> None:
    """Answers do not show it: the main model checks what a draft says."""
    off = self.role.name == "draft" and part.shard == "w2"
    honest_write(self, dataclasses.replace(part, tensor=part.tensor * 1.5) if off else part)


SLOT_FAULTS: dict[str, Callable[[], Any]] = {
    "shared_weight_1_percent": lambda: changed_slots(off_by_1_percent),
    "gate_and_up_swapped": lambda: changed_slots(swapped),
    "down_proj_dropped": lambda: patch.object(RoleLoader, "_write", without_down),
    "slot_written_twice": lambda: patch.object(RoleLoader, "_write", twice),
    "draft_weight_off": lambda: patch.object(RoleLoader, "_write", draft_off),
}
# Planted by test_faults.py too, with many others in one process: in test_verify.py these are long.
PLANTED_TOO = {"gate_and_up_swapped", "down_proj_dropped", "slot_written_twice"}
# What the proof at start has to see: the answers cannot.
PROVED = {"draft_weight_off"}
