"""The positive control of `verify`: a factor on the first shared slot of a model's fused layers.

A captured graph holds the addresses of the weights, and no number of the host. So on a GPU the factor goes
into the slot's w2, where every mode, eager or captured, reads it.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from ..adapters.role import BuiltModel
from ..fusion_core.decision.layout import ExpertLayout
from ..fusion_core.forward.router import on_gpu

PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCALES = ("w2_weight_scale", "w2_weight_scale_inv")

# Rows that hold a factor, and what they were before. Weak: a model that is gone needs nothing put back.
_CHANGED: WeakKeyDictionary[BuiltModel, list[tuple[torch.Tensor, torch.Tensor]]] = WeakKeyDictionary()


def slot_rows(experts: torch.nn.Module, layout: ExpertLayout, scales: bool) -> torch.Tensor | None:
    """What the first shared slot's output is proportional to, or None where nothing is known to be.

    Args:
        experts: the fused experts, w2_weight [E + S, ...].
        scales: whether kernels read the experts' scales where they lie; otherwise an engine may have made
            products or other copies of them, which would not change.

    Returns:
        A view [1, ...] of w2, or of its scales [E + S, ...] where w2 is in 8 bits.
    """
    parameters = dict(experts.named_parameters(recurse=False))
    weight = parameters.get("w2_weight")
    if weight is None or "w2_bias" in parameters:  # a bias would stay as it is
        return None
    found = [weight]
    if weight.dtype not in PLAIN:
        in_8_bits = scales and weight.element_size() == 1
        found = [parameters[name] for name in SCALES if in_8_bits and name in parameters]
    # A scale that is an exponent alone cannot be zero.
    if len(found) != 1 or found[0].dtype not in PLAIN:
        return None
    if any(not p.ndim or p.shape[0] != layout.num_experts for p in (weight, *found)):
        return None
    return found[0].data[layout.num_routed : layout.num_routed + 1]


@torch.inference_mode()
def multiply(fusion: BuiltModel, factor: float) -> None:
    """Multiply the first shared slot of every layer by ``factor``; 1.0 puts back what was there, bit by bit.

    Factors do not add up: each call starts from the weights as they were loaded. Where a layer's weights
    cannot be changed, or are in the host's memory, where engines pack them, its router has the factor.
    """
    restore(fusion)
    if factor == 1.0:
        return
    changed = _CHANGED.setdefault(fusion, [])
    for layer, router in fusion.routers.items():
        # Layers with modes run kernels that take scales as they lie.
        rows = slot_rows(fusion.experts[layer], fusion.layout, scales=layer in fusion.executions)
        if rows is None or not on_gpu(rows):
            router.control_factor = factor
            continue
        # The copy is kept before anything changes.
        changed.append((rows, rows.clone()))
        rows.mul_(factor)
    _wait(changed)


@torch.inference_mode()
def restore(fusion: BuiltModel) -> None:
    """Put everything back as it was before `multiply`."""
    for router in fusion.routers.values():
        router.control_factor = 1.0
    # Backwards: layers may share their weights. Forgotten only when all of it is back.
    changed = _CHANGED.get(fusion, [])
    for rows, before in reversed(changed):
        rows.copy_(before)
    _wait(changed)
    _CHANGED.pop(fusion, None)


def in_force(fusion: BuiltModel) -> bool:
    """Whether a factor is on any layer."""
    return fusion in _CHANGED or any(r.control_factor != 1.0 for r in fusion.routers.values())


def _wait(changed: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Until it is done: the model may run on another stream than this one."""
    for device in {rows.device for rows, _ in changed if rows.is_cuda}:
        torch.cuda.synchronize(device)
