"""The canary in the process that holds a model: after its first load, before anything is served."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from typing import Any, cast

import torch

from .. import runtime, settings
from ..errors import AuditError, NoReference
from ..fusion_core.checkpoint.config import UNQUANTISED
from ..fusion_core.checkpoint.tensors import CheckpointTensors
from ..fusion_core.checkpoint.weight_files import CheckpointFiles
from ..fusion_core.decision.outcome import MoeSpec
from ..fusion_core.forward.layer import FusedLayer
from ..fusion_core.proof.canary import CanaryError, Reference, judge, reference
from ..fusion_core.proof.checkpoint_layer import CheckpointLayer
from ..fusion_core.proof.rounding import Served
from .loaded import Proof
from .role import FusedRole
from .stop import stop_told

log = logging.getLogger("fse_patch")
# States of the proof after which weights of a checkpoint would be served on trust.
UNPROVED = ("off", "no_reference")


class Prover(ABC):
    """How an engine runs one of its blocks, outside of serving."""

    @abstractmethod
    def forward(self, block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the block's output for ``hidden_states``, both [num_tokens, H] and of the model's dtype."""

    @abstractmethod
    def parts(self, block: Any) -> int:
        """Return how many processes share each expert."""

    @abstractmethod
    def all_reduce(self, states: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``states`` [num_tokens, H] over those processes, in their dtype."""

    def output(self, block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the whole output [num_tokens, H]. Some blocks leave the sum to the layer around them."""
        with torch.no_grad():
            states = self.forward(block, hidden_states.clone())
            if (parts := self.parts(block)) == 1:
                return states
            total = self.all_reduce(states.clone())
        summed_already = (total - parts * states).norm() <= 0.01 * total.norm()
        return states if summed_already else total

    def everywhere(self, block: Any, here: bool, like: torch.Tensor) -> bool:
        """Tell whether something holds in all processes that share the block; all of them ask at this point.

        Args:
            like: [num_tokens, H], on the block's device.
        """
        if (parts := self.parts(block)) == 1:
            return here
        held = self.all_reduce(torch.full_like(like, float(here)))
        return bool(held.min() == parts)


@stop_told()
def prove(fused_role: FusedRole, dtype: torch.dtype, prover: Prover) -> None:
    """Compare fused layers with their checkpoint, as FSE_PATCH_VERIFY says, once for a model.

    Raises:
        CanaryError: a layer does not compute what the checkpoint says, or is quantised and cannot be
            compared; the model must not be served.
    """
    if fused_role.loaded is not None:
        return
    fused_role.open()
    proof = _prove(fused_role, dtype, prover)
    fused_role.record(proof)
    log.debug("%s model: canary: %s", fused_role.name, proof.state)
    if not fused_role.start.merged and proof.state in UNPROVED:
        # The engine's own forward is right without us.
        for number, layer in fused_role.layers.items():
            layer.router.closed = f"layer {number} was not proved"
        log.warning("%s model: not proved: its layers stay as the engine has them", fused_role.name)
    runtime.changed()


def _prove(fused_role: FusedRole, dtype: torch.dtype, prover: Prover) -> Proof:
    name, effective = fused_role.name, fused_role.start.settings
    if fused_role.audit.loads == 0:
        if fused_role.poisoned:
            raise AuditError(
                f"{name} model: the shared slots of layers {fused_role.poisoned} were never loaded: "
                "the model's load_weights is not the patched one any more; the model is not served"
            )
        log.warning("%s model: canary: not_loaded: no weights came from the checkpoint", name)
        return Proof("not_loaded")
    if effective.verify == "off":
        log.warning("%s model: canary: switched off by %s", name, settings.VERIFY)
        return Proof("off")
    fused_role.check_gates()
    numbers = sorted(fused_role.layers)
    begun, tensors = time.perf_counter(), None
    layers: list[int] = []
    # Of the layer that came closest to what is allowed.
    deviation, tolerance = 0.0, 1.0
    for number in numbers if effective.verify == "all" else numbers[:1]:
        try:
            layer = fused_role.layers[number]
            expected, tensors = _expected(fused_role, layer, dtype, prover, tensors)
            off, allowed = _prove_layer(fused_role, layer, prover, expected)
        except NoReference as error:
            quantised = fused_role.start.decision.quant_method != UNQUANTISED
            if quantised and not effective.allow_unproven:
                raise CanaryError(
                    f"{name} model: canary: layer {number} cannot be proved: {error}; "
                    f"the model is not served ({settings.ALLOW_UNPROVEN}=1 serves it unproved)"
                ) from None
            log.warning("%s model: canary: layer %d: %s", name, number, error)
            return Proof("no_reference", tuple(layers), deviation, tolerance, detail=str(error))
        layers.append(number)
        if off / allowed >= deviation / tolerance:
            deviation, tolerance = off, allowed
    seconds = time.perf_counter() - begun
    log.info(
        "%s model: canary: %d of %d fused layers are as in the checkpoint, %.2g off (%.2g allowed), %.2f s",
        name,
        len(layers),
        len(numbers),
        deviation,
        tolerance,
        seconds,
    )
    return Proof("passed", tuple(layers), deviation, tolerance, seconds)


def loaded_tensors(files: CheckpointFiles, role: str) -> CheckpointTensors:
    """Open the files that the engine has loaded.

    Raises:
        NoReference: they are gone by now.
        AuditError: they are not those that were decided on.
    """
    source = files.source.loaded()
    if gone := next((name for name in files.names if source.local(name) is None), None):
        raise NoReference(f"{source.where(gone)} is gone: it has no safetensors files to compare with")
    tensors = CheckpointTensors(source, files.names)
    if tensors.digest != files.digest:
        raise AuditError(
            f"{role} model: the files of {source.label} changed after it was decided on; "
            "the model is not served; start again"
        )
    return tensors


def _expected(
    fused_role: FusedRole,
    layer: FusedLayer,
    dtype: torch.dtype,
    prover: Prover,
    tensors: CheckpointTensors | None,
) -> tuple[Reference, CheckpointTensors]:
    """Return what the checkpoint says of a layer, and the open checkpoint.

    Raises:
        NoReference: it cannot be read, in this process or in another: none may wait for one that gave up.
    """
    found, missing = None, NoReference("another process has nothing to compare with")
    try:
        tensors = tensors or loaded_tensors(fused_role.start.files, fused_role.name)
        found = reference(*_stored(fused_role, layer, dtype, tensors))
    except NoReference as error:
        missing = error
    device = next(layer.experts.parameters()).device
    like = torch.zeros(1, fused_role.layout.hidden_size, dtype=dtype, device=device)
    if not prover.everywhere(layer.block, found is not None, like) or found is None or tensors is None:
        raise missing
    return found, tensors


def _stored(
    fused_role: FusedRole, layer: FusedLayer, dtype: torch.dtype, tensors: CheckpointTensors
) -> tuple[CheckpointLayer, MoeSpec, Served]:
    start, block = fused_role.start, layer.block
    gate, name = cast(Any, block).gate, start.naming.family.shared_gate
    shared_gate = None if name is None else getattr(block, name, None)
    bias = getattr(gate, "e_score_correction_bias", None)
    device = next(layer.experts.parameters()).device
    served = Served(
        dtype=dtype,
        gate=gate.weight.dtype,
        bias=torch.float32 if bias is None else bias.dtype,
        shared_gate=dtype if shared_gate is None else shared_gate.weight.dtype,
        device=device.type,
        # DeepGEMM has them so from compute capability 10 on.
        ue8m0=device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10,
    )
    stored = CheckpointLayer(
        tensors, start.naming, start.decision.role, start.decision.quant_method, layer.number
    )
    return stored, start.moe, served


def _prove_layer(
    fused_role: FusedRole, layer: FusedLayer, prover: Prover, expected: Reference
) -> tuple[float, float]:
    """Return how far a layer is off, and what was allowed."""
    start, block = fused_role.start, layer.block
    hidden = expected.hidden.to(next(layer.experts.parameters()).device)
    deviations = []
    for mode in layer.modes:
        with layer.forced(mode):
            output = prover.output(block, hidden)
        deviations.append(judge(start.decision.role, layer.number, expected, output))
    fused_role.counter.reset()  # this was no call of the model
    return max(deviations), expected.tolerance
