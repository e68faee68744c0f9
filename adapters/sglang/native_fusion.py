"""A role that SGLang builds and loads fused by itself, and to which a table adds modes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from ...errors import FsePatchError
from ...fusion_core.remap import Named
from ...fusion_core.routing import FusedRouter
from .fusion import ModelFusion
from .handshake import check_native, shared_gate

log = logging.getLogger("fse_patch")

# States of the canary after which weights of a checkpoint would be served on trust.
UNPROVED = ("off", "no_reference")


class NativeFusion(ModelFusion):
    """Layout and loading are SGLang's; its decision is refused as ``upstream.already``."""

    built_here = False

    def layer_at(self, index: int) -> int | None:
        """See `ModelFusion.layer_at`; the decision fuses no layer, and is about all of them."""
        layers = self.decision.moe_layers
        if self.decision.role == "draft":
            return layers[index] if index < len(layers) else None
        return index if index in layers else None

    def adopt(self, block: Any) -> None:
        """A block was built: give it its modes, where it is what is known.

        A block that is not stays SGLang's own, and the log says so.
        """
        from .forward import attach, runs_modes
        from .modes import BlockModes, execution_of

        layer = self.layer_at(block.layer_id)
        if layer is None or not runs_modes(block):
            return
        bias = getattr(block.gate, "e_score_correction_bias", None)
        try:
            check_native(self, layer, block)
            router = FusedRouter(layer, self.decision, self.counter, shared_gate(block), bias)
            execution = execution_of(self, block, router)
        except (AttributeError, FsePatchError) as error:
            log.warning("%s model: layer %d stays as SGLang has it: %s", self.decision.role, layer, error)
            return
        router.closed = f"layer {layer} was not proved yet"
        self.routers[layer], self.experts[layer], self.blocks[layer] = router, block.experts, block
        self.executions[layer] = execution
        attach(block, BlockModes(execution, native=True))

    def load(self, original: Callable[[Iterable[Named]], Any], weights: Iterable[Named]) -> Any:
        """Run SGLang's ``load_weights`` as it is; the gates are compared with what passes."""
        if self._loading:
            return original(weights)
        self._loading = True
        try:
            loaded = original(self.gates.watch(weights))
        finally:
            self._loading = False
        self.audit.loads += 1
        if self.canary["state"] != "pending":
            self.check_gates()  # into a model that runs already
        return loaded

    def proved(self) -> None:
        """Without a proof layers stay as SGLang has them: its own forward is right without us."""
        if self.canary["state"] not in UNPROVED:
            return
        for layer, router in self.routers.items():
            router.closed = f"layer {layer} was not proved"
        log.warning("%s model: not proved: its layers stay as SGLang has them", self.decision.role)

    def report(self) -> dict[str, Any]:
        """See `ModelFusion.report`."""
        return {**super().report(), "native": True}
