"""The canary in the process that holds a model: after its first load, before anything is served."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from .. import metrics, settings
from ..errors import AuditError, NoReference
from ..fusion_core.checkpoint.config import UNQUANTISED
from ..fusion_core.checkpoint.tensors import CheckpointTensors
from ..fusion_core.proof.canary import CanaryError, judge, reference
from ..fusion_core.proof.checkpoint_layer import CheckpointLayer
from ..fusion_core.proof.rounding import Served
from .role import ModelFusion

log = logging.getLogger("fse_patch")


class Prover(ABC):
    """How an engine runs one of its blocks, outside of serving."""

    @abstractmethod
    def forward(self, block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """The block's output for ``hidden_states``, as this process has it."""

    @abstractmethod
    def parts(self, block: Any) -> int:
        """How many processes share each expert."""

    @abstractmethod
    def all_reduce(self, states: torch.Tensor) -> torch.Tensor:
        """The sum over those processes."""

    def output(self, block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """The whole output. Some blocks leave the sum over processes to the layer around them."""
        with torch.no_grad():
            states = self.forward(block, hidden_states.clone())
            if (parts := self.parts(block)) == 1:
                return states
            total = self.all_reduce(states.clone())
        summed_already = (total - parts * states).norm() <= 0.01 * total.norm()
        return states if summed_already else total


def prove(fusion: ModelFusion, dtype: torch.dtype, prover: Prover) -> None:
    """Compare fused layers with their checkpoint, as FSE_PATCH_VERIFY says, once for a model.

    Raises:
        CanaryError: a layer does not compute what the checkpoint says, or is quantised and cannot be
            compared; the model must not be served.
    """
    if fusion.canary["state"] == "pending":
        fusion.open()
        _prove(fusion, dtype, prover)
        fusion.proved()
        metrics.publish()


def _prove(fusion: ModelFusion, dtype: torch.dtype, prover: Prover) -> None:
    role, chosen = fusion.decision.role, settings.load().verify
    if fusion.audit.loads == 0:
        if fusion.poisoned:
            raise AuditError(
                f"{role} model: the shared slots of layers {fusion.poisoned} were never loaded: the model's "
                "load_weights is not the patched one any more; the model is not served"
            )
        fusion.canary["state"] = "not_loaded"
        log.warning("%s model: canary: not_loaded: no weights came from the checkpoint", role)
        return
    if chosen == "off":
        fusion.canary["state"] = "off"
        log.warning("%s model: canary: switched off by %s", role, settings.VERIFY)
        return
    fusion.check_gates()
    layers = sorted(fusion.blocks)
    start, tensors = time.perf_counter(), None
    for layer in layers if chosen == "all" else layers[:1]:
        try:
            tensors = tensors or CheckpointTensors(fusion.checkpoint)
            found, allowed = _prove_layer(fusion, layer, dtype, prover, tensors)
        except NoReference as error:
            fusion.canary |= {"state": "no_reference", "detail": str(error)}
            if fusion.decision.quant_method != UNQUANTISED and not settings.load().allow_unproven:
                raise CanaryError(
                    f"{role} model: canary: layer {layer} cannot be proved: {error}; the model is not served "
                    f"({settings.ALLOW_UNPROVEN}=1 serves it unproved)"
                ) from None
            log.warning("%s model: canary: layer %d: %s", role, layer, error)
            return
        fusion.canary["layers"].append(layer)
        if found / allowed >= fusion.canary["deviation"] / fusion.canary["tolerance"]:
            fusion.canary |= {"deviation": found, "tolerance": allowed}
    seconds = time.perf_counter() - start
    fusion.canary |= {"state": "passed", "seconds": round(seconds, 3)}
    log.info(
        "%s model: canary: %d of %d fused layers are as in the checkpoint, %.2g off (%.2g allowed), %.2f s",
        role,
        len(fusion.canary["layers"]),
        len(layers),
        fusion.canary["deviation"],
        fusion.canary["tolerance"],
        seconds,
    )


def _prove_layer(
    fusion: ModelFusion, layer: int, dtype: torch.dtype, prover: Prover, tensors: CheckpointTensors
) -> tuple[float, float]:
    """Its deviation, and what was allowed."""
    block: Any = fusion.blocks[layer]
    decision = fusion.decision
    gate, shared_gate = block.gate, getattr(block, "shared_expert_gate", None)
    bias = getattr(gate, "e_score_correction_bias", None)
    device = next(fusion.experts[layer].parameters()).device
    served = Served(
        dtype=dtype,
        gate=gate.weight.dtype,
        bias=torch.float32 if bias is None else bias.dtype,
        shared_gate=dtype if shared_gate is None else shared_gate.weight.dtype,
        device=device.type,
        # DeepGEMM has them so from compute capability 10 on.
        ue8m0=device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10,
    )
    wanted = reference(CheckpointLayer(tensors, fusion.naming, decision, layer), decision, served)
    hidden = wanted.hidden.to(device)
    found = [judge(decision.role, layer, wanted, o) for o in _outputs(fusion, layer, block, hidden, prover)]
    fusion.counter.reset()  # this was no call of the model
    return max(found), wanted.tolerance


def _outputs(
    fusion: ModelFusion, layer: int, block: Any, hidden: torch.Tensor, prover: Prover
) -> Iterator[torch.Tensor]:
    """What the block gives in every mode that it may run in."""
    execution = fusion.executions.get(layer)
    if execution is None:
        yield prover.output(block, hidden)
        return
    try:
        for mode in sorted(execution.plan.modes):
            execution.forced = mode
            yield prover.output(block, hidden)
    finally:
        execution.forced = None
