"""One role of one model in this process: the layers that an engine builds fused. Knows no engine by name."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch

from ..errors import FsePatchError
from ..fusion_core.checkpoint.families import Role
from ..fusion_core.decision.layout import ExpertLayout
from ..fusion_core.forward.layer import FusedLayer
from ..fusion_core.forward.plan import ModeCounter
from ..fusion_core.weights.audit import SlotAudit, clear_padding, is_poisoned, marks, poison
from .loaded import HeldTensor, Loaded, Proof
from .loaded_gates import LoadedGates
from .start import Start

WEIGHT = re.compile(r"(?:w13|w2)_(.+)")


class EngineSlots(ABC):
    """What differs between engines in how they number layers and fill experts."""

    @abstractmethod
    def number_at(self, start: Start, place: Any) -> int | None:
        """Return a layer as checkpoints number it, at an engine's own name or number of it, or None."""

    def layer_at(self, start: Start, place: Any) -> int | None:
        """Return the same, None where it is no layer of ``start.moe``."""
        number = self.number_at(start, place)
        return number if number in start.moe.layers else None

    @abstractmethod
    def take(self, parameter: Any, part: Any, name: str) -> bool:
        """Hand a `SlotTensor` to the engine's weight loader of ``parameter``; return whether it took it."""

    def id_of(self, experts: torch.nn.Module, slot: int) -> int:
        """Return the engine's number of a slot of this process, E + j by the layout."""
        return slot

    @abstractmethod
    def share(self, experts: Any) -> tuple[int, int]:
        """Return which part of each expert this process holds, and of how many."""

    def rows(self, layout: ExpertLayout, experts: torch.nn.Module) -> int:
        """Return how many experts this process holds: its routed ones, and the shared slots behind them."""
        return layout.num_experts

    @abstractmethod
    def refresh(self, layer: FusedLayer) -> None:
        """Bring copies that the engine keeps of a layer's gates up to date."""


class FusedRole:
    """The fused layers of one role: what constructor, loader, router and proof of it share."""

    def __init__(self, start: Start, engine: EngineSlots) -> None:
        self.start = start
        self.engine = engine
        self.layers: dict[int, FusedLayer] = {}
        # Layers whose experts were built with slots: each must become one of ``layers``.
        self.begun: set[int] = set()
        # Layers that the engine has built with experts, without slots.
        self.unfused: set[int] = set()
        self.counter = ModeCounter()
        self.audit = SlotAudit(start.decision.role)
        self.gates = LoadedGates(start.naming, start.decision.role)
        # Values of the slots that were seen to be the checkpoint's, and parameters laid out otherwise.
        self.compared = 0
        self.not_compared: set[str] = set()
        # Why layers could not take their part of the weight update under way.
        self.not_updated: dict[int, str] = {}
        # None until weights are in memory and proved as far as they can be.
        self.loaded: Loaded | None = None

    @property
    def name(self) -> Role:
        """Return "main" or "draft"."""
        return self.start.decision.role

    @property
    def layout(self) -> ExpertLayout:
        """Return the slots of each layer."""
        return self.start.moe.layout

    def layer_at(self, place: Any) -> int | None:
        """Return the layer at an engine's own name or number of it, or None where it does not fuse."""
        return self.engine.layer_at(self.start, place)

    def leave(self, place: Any) -> None:
        """Note that the engine builds experts of a layer in its own way, at its own name or number of it."""
        number = self.engine.number_at(self.start, place)
        if number is not None:
            self.unfused.add(number)

    def begin(self, number: int) -> None:
        """Note that the experts of a layer were built with slots: its block is to become one of ``layers``.

        Raises:
            FsePatchError: it was built before.
        """
        if number in self.layers:
            raise FsePatchError(f"layer {number} of the {self.name} model was built twice")
        self.begun.add(number)

    def add_layer(self, layer: FusedLayer) -> None:
        """Take in a layer that was built: poison its shared slots and expect them to be written.

        Raises:
            FsePatchError: it was built twice, or without room for the slots.
        """
        if layer.number in self.layers:
            raise FsePatchError(f"layer {layer.number} of the {self.name} model was built twice")
        # A loader that nobody hooked must not lead to a server that nobody proved.
        layer.router.closed = (
            f"{self.name} model: layer {layer.number} runs before `prove` had it; the model is not served"
        )
        self.layers[layer.number] = layer
        if self.start.merged:
            self._poison(layer)

    def _poison(self, layer: FusedLayer) -> None:
        rows, suffixes = self.engine.rows(self.layout, layer.experts), set()
        first = rows - self.layout.num_shared_slots
        for name, parameter in _weights(layer):
            if parameter.ndim and parameter.shape[0] == first:
                raise FsePatchError(
                    f"layer {layer.number}: {name} has rows for {parameter.shape[0]} experts, and "
                    f"{rows} were decided"
                )
            poison(parameter.data[first:])
            for elements in marks(parameter.data):
                poison(elements)
            suffixes.add(name)
        slots = {n: p.data[first:] for n, p in layer.experts.named_parameters(recurse=False)}
        _, parts = self.engine.share(layer.experts)
        clear_padding(slots, self.layout.moe_intermediate_size // parts)
        self.audit.expect(layer.number, self.layout.shared_slots, suffixes)

    @property
    def unfinished(self) -> set[int]:
        """Return layers whose experts have slots, and whose block never came."""
        return self.begun - self.layers.keys()

    @property
    def poisoned(self) -> list[int]:
        """Return layers in whose slots unwritten values are left."""
        rows = slice(-self.layout.num_shared_slots, None)
        return [
            number
            for number, layer in sorted(self.layers.items())
            if any(is_poisoned(parameter.data[rows]) for _, parameter in _weights(layer))
        ]

    @property
    def unrouted(self) -> list[int]:
        """Return layers in which a routed expert was not written."""
        return [
            number
            for number, layer in sorted(self.layers.items())
            if any(is_poisoned(element) for _, p in _weights(layer) for element in marks(p.data))
        ]

    @property
    def is_collected(self) -> bool:
        """Return whether the engine collects what is loaded, to process it later as it did at its start."""
        return any(p.is_meta for layer in self.layers.values() for _, p in _weights(layer))

    def first_slot(self) -> dict[str, torch.Tensor]:
        """Return the first shared slot [1, ...] of the first layer, of each parameter in its dtype."""
        slot = self.layout.num_shared_slots
        first = [layer for _, layer in sorted(self.layers.items())[:1]]
        return {
            name: p.data[-slot:][:1] if p.ndim else p.data for layer in first for name, p in _weights(layer)
        }

    def refresh_gates(self) -> None:
        """Let every mode read the gates that the modules have now."""
        for layer in self.layers.values():
            if layer.execution is not None:
                if layer.execution.gate is not None:
                    layer.execution.gate.refresh()
                self.engine.refresh(layer)

    def open(self) -> None:
        """Let the layers run: what is to be proved about them is, or is about to be."""
        self.refresh_gates()
        for layer in self.layers.values():
            layer.router.closed = ""

    def check_gates(self) -> None:
        """Compare the gates with those that were loaded; only when the engine is done with a load.

        Raises:
            AuditError: a router calls another gate than the one that was loaded.
        """
        self.refresh_gates()
        self.gates.check(self.layers)

    def record(self, proof: Proof) -> None:
        """Make the record of what is in memory now."""
        experts = {
            number: {name: HeldTensor.of(p) for name, p in layer.experts.named_parameters(recurse=False)}
            for number, layer in self.layers.items()
        }
        self.loaded = Loaded(proof, self.audit.loads, self.audit.slots_loaded, experts)

    def updated(self) -> None:
        """Check and record what an update of a running model has brought.

        Raises:
            AuditError: a router calls another gate than the one that was loaded.
        """
        self.check_gates()
        if self.loaded is not None:
            self.record(self.loaded.proof)

    def report(self) -> dict[str, Any]:
        """Return what this process really did, for `verify` and `status`."""
        has_modes = any(layer.execution for layer in self.layers.values())
        told = {
            "engine": self.start.decision.engine,
            "role": self.name,
            "built_layers": sorted(self.layers),
            "fused_layers": self.counter.layers(),
            "calls_by_mode": self.counter.by_mode(),
            "captured_by_mode": self.counter.captured_by_mode(),
            "slots_loaded": self.audit.slots_loaded,
            "loads": self.audit.loads,
            "compared": self.compared,
            "not_compared": sorted(self.not_compared),
            "canary": (Proof() if self.loaded is None else self.loaded.proof).to_dict(),
            "modes": str(self.start.plan) if has_modes else "",
        }
        return told if self.start.merged else {**told, "native": True}


def _weights(layer: FusedLayer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield parameters of the experts by their suffix: "weight", "weight_scale_inv", ..."""
    for name, parameter in layer.experts.named_parameters(recurse=False):
        if match := WEIGHT.fullmatch(name):
            yield match[1], parameter


# The outermost entry class under construction in this context: blocks are inherited by models
# whose loaders nobody remapped, so a block fuses only below a class of the family's list.
ACTIVE: ContextVar[FusedRole | None] = ContextVar("fse_patch_active", default=None)
# Weak: a model that is gone must not keep its experts in memory.
CONSTRUCTED: WeakSet[FusedRole] = WeakSet()


@contextmanager
def building(fused_role: FusedRole | None) -> Iterator[None]:
    """Build blocks of ``fused_role``, or of none, in this context."""
    token = ACTIVE.set(fused_role)
    try:
        yield
    finally:
        ACTIVE.reset(token)


def constructed() -> list[FusedRole]:
    """Return what lives in this process, the main model first."""
    return sorted(CONSTRUCTED, key=lambda fused_role: fused_role.name != "main")
