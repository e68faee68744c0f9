"""The positive control of `verify`: a factor on the first shared slot of a model's fused or paired layers.

A captured graph holds the addresses of the weights, and no number of the host. So on a GPU the factor goes
into the slot's w2, where every mode, eager or captured, reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch

from ..adapters.paired import PairedRole
from ..adapters.role import FusedRole
from ..fusion_core.decision.layout import ExpertLayout
from ..fusion_core.forward.paired import PairedWeights
from ..fusion_core.forward.router import on_gpu

PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCALES = ("w2_weight_scale", "w2_weight_scale_inv")

# How to put back what holds a factor. Weak: a model that is gone needs nothing put back.
_IN_FORCE: WeakKeyDictionary[FusedRole | PairedRole, ExitStack] = WeakKeyDictionary()


def slot_rows(experts: torch.nn.Module, layout: ExpertLayout, scales: bool, rows: int) -> torch.Tensor | None:
    """Return what the first shared slot's output is proportional to, or None where nothing is known to be.

    Args:
        experts: the fused experts, w2_weight [rows, ...].
        scales: whether kernels read the experts' scales where they lie; otherwise an engine may have made
            products or other copies of them, which would not change.
        rows: of the experts that this process holds, its slots among them.

    Returns:
        A view [1, ...] of w2, or of its scales [E + S, ...] where w2 is in 8 bits.
    """
    parameters = dict(experts.named_parameters(recurse=False))
    weight = parameters.get("w2_weight")
    if weight is None or "w2_bias" in parameters:  # a bias would stay as it is
        return None
    factors = [weight]
    if weight.dtype not in PLAIN:
        in_8_bits = scales and weight.element_size() == 1
        factors = [parameters[name] for name in SCALES if in_8_bits and name in parameters]
    # A scale that is an exponent alone cannot be zero.
    if len(factors) != 1 or factors[0].dtype not in PLAIN:
        return None
    if any(not p.ndim or p.shape[0] != rows for p in (weight, *factors)):
        return None
    first = rows - layout.num_shared_slots
    return factors[0].data[first : first + 1]


def pair_rows(held: PairedWeights) -> torch.Tensor | None:
    """Return the same of a paired layer: a view of w2 or of its scales, or None for weights of 4 bits.

    Where all slots of a shared expert have one scale, that is all of them.
    """
    weights, rows = (held.routed, held.slots.start) if held.shared is None else (held.shared, 0)
    if weights.int4 is not None:
        return None
    factors = (weights.w2 if weights.scales is None else weights.scales.w2)[rows : rows + 1]
    columns = factors.shape[-1] * held.routed.width // weights.width
    return factors[..., : max(columns, 1)]


@torch.inference_mode()
def multiply(role: FusedRole | PairedRole, factor: float) -> None:
    """Multiply the first shared slot of every layer by ``factor``; 1.0 puts back what was there, bit by bit.

    Factors do not add up: each call starts from the weights as they were loaded. Where a layer's weights
    cannot be changed, or are in the host's memory, where engines pack them, the layer itself has the factor.
    A paired layer's weights are the engine's: with many tokens its own forward has the factor too.
    """
    restore(role)
    if factor == 1.0:
        return
    stack = _IN_FORCE.setdefault(role, ExitStack())
    for rows, weighted in _slots(role):
        if rows is not None and on_gpu(rows):
            stack.enter_context(_times(rows, factor))
        else:
            stack.enter_context(weighted(factor))


def _slots(
    role: FusedRole | PairedRole,
) -> Iterator[tuple[torch.Tensor | None, Callable[[float], AbstractContextManager[None]]]]:
    """Yield of each layer what holds its first shared slot, and what gives the layer itself the factor."""
    if isinstance(role, PairedRole):
        for held in role.layers.values():
            yield pair_rows(held.read()), held.layer.weighted
        return
    for layer in role.layers.values():
        # Layers with modes run kernels that take scales as they lie.
        count, scales = role.engine.rows(role.layout, layer.experts), layer.execution is not None
        yield slot_rows(layer.experts, role.layout, scales, count), layer.weighted


@torch.inference_mode()
def restore(role: FusedRole | PairedRole) -> None:
    """Put everything back as it was before `multiply`: the last layer first, as layers may share weights."""
    if (stack := _IN_FORCE.get(role)) is not None:
        stack.close()
        del _IN_FORCE[role]


def in_force(role: FusedRole | PairedRole) -> bool:
    """Return whether a factor is on any layer."""
    return role in _IN_FORCE


@contextmanager
def _times(rows: torch.Tensor, factor: float) -> Iterator[None]:
    """Multiply ``rows`` by ``factor``, and put them back."""
    before = rows.clone()
    rows.mul_(factor)
    _wait(rows)
    try:
        yield
    finally:
        rows.copy_(before)
        _wait(rows)


def _wait(rows: torch.Tensor) -> None:
    """Wait until it is done: the model may run on another stream than this one."""
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)
