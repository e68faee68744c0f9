"""One role of one model as an engine builds it: its layers, slots and modes. Knows no engine by name.
One role of one model while an engine loads, updates and runs it. Knows no engine by name.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from .. import settings
from ..errors import AuditError, FsePatchError
from ..fusion_core.checkpoint.naming import TensorNaming
from ..fusion_core.decision.outcome import FusionDecision
from ..fusion_core.forward.plan import ModeCounter, ModePlan
from ..fusion_core.forward.router import SlotAppender
from ..fusion_core.weights.audit import SlotAudit, clear_padding, is_poisoned, marks, poison
from ..fusion_core.weights.remap import Named, Remap, SlotTensor
from ..fusion_core.weights.samples import SlotSample
from .loaded_gates import LoadedGates
from .packing import AsLoaded

if TYPE_CHECKING:
    from ..fusion_core.forward.layer import LayerExecution  # needs Triton

# MERGED adapters/built.py


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


# MERGED adapters/model_fusion.py


log = logging.getLogger("fse_patch")


class ModelFusion(BuiltModel):
    """A fused model: its shared slots are written and audited here, and what was proved of it is noted."""

    def __init__(self, decision: FusionDecision, naming: TensorNaming, checkpoint: Path) -> None:
        super().__init__(decision, naming, checkpoint)
        # Values of the slots that were found as the checkpoint has them, and parameters laid out otherwise.
        self.compared = 0
        self.not_compared: set[str] = set()
        # What `proving.prove` found; the layer that came closest to what is allowed says how far it was off.
        self.canary: dict[str, Any] = {"state": "pending", "layers": [], "deviation": 0.0, "tolerance": 1.0}
        # Why layers could not take their part of the weight update under way.
        self.not_updated: dict[int, str] = {}
        self.gates = LoadedGates(naming, decision.role)
        self._loading = False
        # Whether the first load found the slots poisoned; otherwise the engine has filled and packed them.
        self._fresh: bool | None = None
        self._as_loaded = AsLoaded()

    def load(self, original: Callable[[Iterable[Named]], Any], weights: Iterable[Named]) -> Any:
        """Run the engine's ``load_weights`` on the routed stream; shared slots are written here."""
        if self._loading:
            return original(weights)  # an entry class calls the one it inherits from
        if self._fresh is None:
            self._fresh = any(map(self._is_poisoned, self.experts))
        # Without a checkpoint at the start, the first load may be an update as well.
        update = self.audit.loads > 0 or self._is_collected()
        proved = not update and settings.load().verify != "off"
        sample = SlotSample(self.decision, self.naming, self.routers if proved else ())
        self._loading = True
        try:
            self.audit.begin()
            loaded = original(self._routed_only(sample.tap(weights)))
        finally:
            self._loading = False
        # Kernels may repack after the initial load; only that load's layout is known here.
        if update:
            self.audit.finish([], update)
        else:
            self.audit.finish(self.poisoned, unrouted_layers=self._unrouted())
        if not update:
            # Before the engine processes what it loaded, while the checkpoint's rows and columns are there.
            for layer, experts in self.experts.items():
                parameters = {name: p.data for name, p in experts.named_parameters(recurse=False)}
                found = sample.compare(layer, parameters, *self._share(experts))
                self.compared += found.compared
                self.not_compared |= found.not_compared
            self._as_loaded.note(self._first_slot())
        elif self.canary["state"] != "pending" and not self._is_collected():
            self.check_gates()  # into a model that runs already
        return loaded

    def check_gates(self) -> None:
        """See `LoadedGates.check`; only when the engine is done with what a load has brought."""
        self.refresh_gates()
        self.gates.check(self.routers, self.blocks)

    def _is_collected(self) -> bool:
        """Whether the engine collects what is loaded, to process it later as it did at its start."""
        return any(p.is_meta for n in self.experts for _, p in self._fused_parameters(n))

    def _first_slot(self) -> dict[str, torch.Tensor]:
        """The first shared slot of the first layer, of each parameter."""
        slot, found = self.layout.num_routed, (self._fused_parameters(n) for n in sorted(self.experts)[:1])
        return {name: p.data[slot : slot + 1] if p.ndim else p.data for layer in found for name, p in layer}

    def _routed_only(self, weights: Iterable[Named]) -> Iterator[Named]:
        for item in Remap(self.decision, self.naming, self.routers)(self.gates.watch(weights)):
            if isinstance(item, SlotTensor):
                self._write(item)
            else:
                yield item

    def _write(self, part: SlotTensor) -> None:
        parameter = getattr(self.experts[part.layer], part.parameter, None)
        if parameter is None:
            raise AuditError(f"layer {part.layer}: the fused experts have no parameter {part.parameter}")
        written_in_place = not parameter.is_meta and (self.audit.loads or not self._fresh)
        if written_in_place and not self._as_loaded.holds(self._first_slot()):
            raise FsePatchError(
                f"{self.decision.role} model: load_weights alone cannot update the shared expert: the "
                "experts do not lie in memory as in a checkpoint; use the engine's own reload of weights"
            )
        if not self._take(parameter, part, f"layers.{part.layer}.mlp.experts.{part.parameter}"):
            raise AuditError(f"layer {part.layer}: the engine did not take {part.shard} of slot {part.slot}")
        self.audit.wrote(part)

    @abstractmethod
    def _take(self, parameter: Any, part: SlotTensor, name: str) -> bool:
        """Hand a slot tensor to the engine's weight loader; whether it took it."""

    def proved(self) -> None:
        """The proof ended, and nothing speaks against serving."""
        log.debug("%s model: canary: %s", self.decision.role, self.canary["state"])

    def report(self) -> dict[str, Any]:
        """What this process really did, for `verify` and `status`."""
        return {
            "engine": self.decision.engine,
            "role": self.decision.role,
            "built_layers": sorted(self.routers),
            "fused_layers": self.counter.layers(),
            "calls_by_mode": self.counter.by_mode(),
            "captured_by_mode": self.counter.captured_by_mode(),
            "slots_loaded": self.audit.slots_loaded,
            "loads": self.audit.loads,
            "compared": self.compared,
            "not_compared": sorted(self.not_compared),
            "canary": self.canary,
            "modes": str(self.plan) if self.executions else "",
        }


# The outermost entry class under construction in this context: blocks are inherited by models
# whose loaders nobody remapped, so a block fuses only below a class of the family's list.
ACTIVE: ContextVar[ModelFusion | None] = ContextVar("fse_patch_active", default=None)
# Weak: a model that is gone must not keep its experts in memory.
CONSTRUCTED: WeakSet[ModelFusion] = WeakSet()


def constructed() -> list[ModelFusion]:
    """What lives in this process, the main model first."""
    return sorted(CONSTRUCTED, key=lambda fusion: fusion.decision.role != "main")
