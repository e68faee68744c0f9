"""The canary of a paired role: both of its arms against the checkpoint in float64, where that can be read.

Ours has been compared with the engine's own by then. What this adds is whether the engine itself computes
what the checkpoint says; where it does not, nothing of ours is at fault, and the log says whose it is.
"""

from __future__ import annotations

import logging

import torch

from ..errors import FsePatchError, NoReference
from ..fusion_core.proof.canary import CanaryError, judge, reference
from ..fusion_core.proof.checkpoint_layer import CheckpointLayer
from ..fusion_core.proof.rounding import Served
from .paired import EngineLayer, PairedEngine, PairedRole
from .prove import loaded_tensors

log = logging.getLogger("fse_patch")
PASSED = "passed"


@torch.inference_mode()
def canary(role: PairedRole, number: int, engine: PairedEngine) -> str:
    """Compare one layer with its checkpoint; return `PASSED`, or why nothing can be said or what is off.

    Raises:
        CanaryError: ours is off the checkpoint, and the engine's own is not.
    """
    start, layer = role.start, role.layers[number]
    if role.loads == 0:
        return "not_loaded: no weights came from the checkpoint"
    if engine.processes() > 1:
        return "no_reference: each process has a part of the layer alone"
    moe = start.decision.moe
    declared = start.decision.config
    if start.files is None or declared is None or declared.num_shared_slots is None:
        return "no_reference: the shared expert is no whole number of routed experts wide"
    try:
        tensors = loaded_tensors(start.files, role.name)
        stored = CheckpointLayer(tensors, start.naming, role.name, start.decision.quant_method, number)
        expected = reference(stored, moe, served(layer))
    except NoReference as error:
        return f"no_reference: {error}"
    hidden = expected.hidden.to(layer.read().routed.w13.device)
    off = {}
    with engine.context(len(hidden)):
        logits = layer.engine_logits(hidden)
        for name, arm in (("stock", layer.stock), ("ours", layer.ours)):
            try:
                judge(role.name, number, expected, arm(hidden.clone(), logits.clone()))
            except CanaryError as error:
                off[name] = error
    if "stock" in off:
        why = f"stock is off: {start.decision.engine}'s own layer is not the checkpoint's: {off['stock']}"
        log.warning("%s model: canary: %s", role.name, why)
        return why
    if "ours" in off:
        raise off["ours"]
    return PASSED


def served(layer: EngineLayer) -> Served:
    """Return how an engine rounds what it reads of a layer."""
    now = layer.read()
    device = now.routed.w13.device
    return Served(
        dtype=layer.dtype,
        gate=layer.logits_dtype,
        bias=torch.float32 if now.correction_bias is None else now.correction_bias.dtype,
        shared_gate=layer.dtype if now.shared_gate is None else now.shared_gate.dtype,
        device=device.type,
        # DeepGEMM has them so from compute capability 10 on.
        ue8m0=device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10,
    )


def told(role: PairedRole, number: int, engine: PairedEngine) -> str:
    """Say the same, and let what cannot be read be no fault of a layer that was proved otherwise."""
    try:
        return canary(role, number, engine)
    except CanaryError:
        raise
    except (FsePatchError, OSError) as error:
        return f"no_reference: {' '.join(str(error).split())}"
