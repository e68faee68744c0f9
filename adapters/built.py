"""One role of one model as an engine builds it: its layers, slots and modes. Knows no engine by name."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import FsePatchError
from ..fusion_core.audit import SlotAudit, clear_padding, is_poisoned, marks, poison
from ..fusion_core.decision import FusionDecision
from ..fusion_core.dispatch import ModeCounter, ModePlan
from ..fusion_core.naming import TensorNaming
from ..fusion_core.routing import SlotAppender

if TYPE_CHECKING:
    from ..fusion_core.execution import LayerExecution  # needs Triton

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
WEIGHT = re.compile(r"(?:w13|w2)_(.+)")


class BuiltModel(ABC):
    """The fused layers of one role in this process: what constructor, loader and router of it share."""

    # Whether the shared slots are built and loaded by us; otherwise the engine fuses by itself.
    built_here = True

    def __init__(self, decision: FusionDecision, naming: TensorNaming, checkpoint: Path) -> None:
        assert decision.layout is not None
        self.decision = decision
        self.layout = decision.layout
        self.naming = naming
        self.checkpoint = checkpoint
        self.counter = ModeCounter()
        self.audit = SlotAudit(decision.role)
        self.routers: dict[int, SlotAppender] = {}
        self.experts: dict[int, torch.nn.Module] = {}
        self.blocks: dict[int, torch.nn.Module] = {}
        # Which mode runs for how many tokens, and the layers that run by it; on a CPU there are none.
        self.plan: ModePlan | None = None
        self.executions: dict[int, LayerExecution] = {}
        # Layer whose block is under construction and still holds its unfused shared MLP.
        self.unstripped: int | None = None

    def layer_of(self, prefix: str) -> int | None:
        """The fused layer that a module prefix lies in, or None."""
        match = LAYER.search(prefix)
        layer = int(match[1]) if match else -1
        return layer if layer in self.decision.fused_layers else None

    def add_layer(self, layer: int, router: SlotAppender, experts: torch.nn.Module) -> None:
        """A fused layer was built: poison its shared slots and expect them to be written."""
        if layer in self.routers:
            raise FsePatchError(f"layer {layer} of the {self.decision.role} model was built twice")
        # A loader that nobody hooked must not lead to a server that nobody proved.
        router.closed = (
            f"{self.decision.role} model: layer {layer} runs before `prove` had it; the model is not served"
        )
        self.routers[layer] = router
        self.experts[layer] = experts
        suffixes = set()
        for name, parameter in self._fused_parameters(layer):
            if parameter.ndim and parameter.shape[0] == self.layout.num_routed:
                raise FsePatchError(
                    f"layer {layer}: {name} has rows for {parameter.shape[0]} experts, and "
                    f"{self.layout.num_experts} were decided"
                )
            poison(parameter.data[self.layout.num_routed :])
            for elements in marks(parameter.data):
                poison(elements)
            suffixes.add(name)
        slots = {n: p.data[self.layout.num_routed :] for n, p in experts.named_parameters(recurse=False)}
        clear_padding(slots, self.layout.moe_intermediate_size // self._share(experts)[1])
        self.audit.expect(layer, self.layout.shared_slots, suffixes)

    def refresh_gates(self) -> None:
        """See `GateRows.refresh`; whether or not anything is proved about them."""
        for execution in self.executions.values():
            if execution.gate is not None:
                execution.gate.refresh()

    def open(self) -> None:
        """Let the layers run: what is to be proved about them is, or is about to be."""
        self.refresh_gates()
        for router in self.routers.values():
            router.closed = ""

    @property
    def poisoned(self) -> list[int]:
        """Layers in whose slots unwritten values are left."""
        return [layer for layer in sorted(self.experts) if self._is_poisoned(layer)]

    def _unrouted(self) -> list[int]:
        """Layers in which an expert was not written."""
        found = ((n, p.data) for n in sorted(self.experts) for _, p in self._fused_parameters(n))
        return sorted({n for n, experts in found if any(map(is_poisoned, marks(experts)))})

    def _is_poisoned(self, layer: int) -> bool:
        rows = slice(self.layout.num_routed, None)
        return any(is_poisoned(p.data[rows]) for _, p in self._fused_parameters(layer))

    def _fused_parameters(self, layer: int) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.experts[layer].named_parameters(recurse=False):
            if match := WEIGHT.fullmatch(name):
                yield match[1], parameter

    @abstractmethod
    def _share(self, experts: torch.nn.Module) -> tuple[int, int]:
        """Which part of each expert this process holds, and of how many."""
