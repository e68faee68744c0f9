"""One role of one SGLang model while it is built, loaded and run.
A role that SGLang builds and loads fused by itself, and to which a table adds modes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ...errors import FsePatchError
from ...fusion_core.checkpoint.naming import TensorNaming
from ...fusion_core.decision.outcome import FusionDecision
from ...fusion_core.forward.router import FusedRouter, SlotAppender
from ...fusion_core.kernels.aiter import without_padding
from ...fusion_core.weights.remap import Named, SlotTensor
from .. import role
from . import native
from .check import check_native, shared_gate

# MERGED adapters/sglang/fusion.py


class ModelFusion(role.ModelFusion):
    """Numbers layers and writes slots as SGLang does."""

    def __init__(self, decision: FusionDecision, naming: TensorNaming, checkpoint: Path) -> None:
        super().__init__(decision, naming, checkpoint)
        # The layer whose block is under construction, and its experts.
        self.building: tuple[int, torch.nn.Module] | None = None

    def layer_at(self, index: int) -> int | None:
        """The fused layer that the engine calls ``index``, or None. A draft counts its layers from 0."""
        layers = self.decision.fused_layers
        if self.decision.role == "draft":
            return layers[index] if index < len(layers) else None
        return index if index in layers else None

    def refresh_gates(self) -> None:
        """See `BuiltModel.refresh_gates`."""
        super().refresh_gates()
        # GLM's gate keeps a float32 copy from its first call on: it must be neither of a graph nor stale.
        for layer in self.executions:
            gate: Any = self.blocks[layer].gate
            if (held := getattr(gate, "_weight_fp32", None)) is not None:
                held.copy_(gate.weight.data)
            elif hasattr(gate, "_weight_fp32"):
                gate._weight_fp32 = gate.weight.data.float()

    def _take(self, parameter: Any, part: SlotTensor, name: str) -> bool:
        # It returns nothing; what it leaves out shows as poison.
        parameter.weight_loader(parameter, part.tensor, name, shard_id=part.shard, expert_id=part.slot)
        return True

    def _share(self, experts: Any) -> tuple[int, int]:
        return int(experts.moe_tp_rank), int(experts.moe_tp_size)


class PastModes:
    """Forward pre-hook of experts whose block runs in modes, which call their kernels and not them.

    Whoever else calls them has a top-k without the shared slots, and would leave the shared expert out.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(
        self, experts: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args[0] if args else kwargs["hidden_states"]):
            raise FsePatchError(f"layer {self.layer}: SGLang runs its experts past the modes of their block")
        return args, kwargs


class AppendHook:
    """Forward pre-hook of the fused experts: the engine's top-k goes in with the shared slots appended."""

    def __init__(self, appender: SlotAppender) -> None:
        self.appender = appender
        # Rows that pad a batch must leave the layer as 0 there, as the engine's own slots do.
        self.padding = native.platform() == "rocm"

    def __call__(
        self, experts: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(("hidden_states", "topk_output"), args, strict=False)), **kwargs}
        topk = given["topk_output"]
        # Without the slots the shared expert would be left out in silence.
        if topk.format.name != "STANDARD" or len(topk) != 3:
            raise FsePatchError(
                f"layer {self.appender.layer}: the engine's top-k came as {type(topk).__name__}; "
                "only the standard one has room for the shared slots"
            )
        weights, ids = self.appender.append(given["hidden_states"], topk.topk_weights, topk.topk_ids)
        if self.padding:
            weights, ids = without_padding(weights, ids, self.appender.layout.top_k)
        given["topk_output"] = topk._replace(topk_weights=weights, topk_ids=ids)
        return (), given


# MERGED adapters/sglang/native_fusion.py


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
        from .run import BlockModes, attach, execution_of, runs_modes

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
