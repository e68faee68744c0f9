"""Remap of the weight stream: shared-expert tensors become slot tensors, everything else passes untouched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from ...errors import AuditError
from ..checkpoint.families import Role
from ..checkpoint.naming import ExpertTensor, Projection, TensorNaming
from ..decision.layout import ExpertLayout
from ..evidence.specs import ALL_EXPERTS

Shard = Literal["w1", "w2", "w3"]
SHARD_OF: dict[Projection, Shard] = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class SlotTensor:
    """One tensor for one slot: ``shard`` w1 (gate) or w3 (up) of ``w13``, or w2 (down)."""

    layer: int
    slot: int
    shard: Shard
    suffix: str
    tensor: torch.Tensor

    @property
    def parameter(self) -> str:
        """Return the name of the fused parameter below the layer's experts, e.g. ``w13_weight``."""
        return f"{'w2' if self.shard == 'w2' else 'w13'}_{self.suffix}"


def split(tensor: torch.Tensor, projection: Projection, layout: ExpertLayout) -> list[torch.Tensor]:
    """Split a shared-expert tensor along the intermediate dimension into one part for each slot.

    Gate and up are [S*I, H] and split by rows, down is [H, S*I] and splits by columns; block scales
    split with their blocks. A tensor with no extent along the intermediate dimension (0-d and
    one-element scales, the per-channel scales of down) is the same for every slot.

    Raises:
        AuditError: the intermediate dimension does not divide into S.
    """
    slots = layout.num_shared_slots
    axis = 1 if projection == "down_proj" else 0
    if slots == 1:
        return [tensor]
    if tensor.numel() == 1 or tensor.ndim <= axis or tensor.shape[axis] == 1:
        return [tensor] * slots
    if tensor.shape[axis] % slots:
        raise AuditError(
            f"shared {projection} of shape {list(tensor.shape)} does not split into {slots} slots"
        )
    return list(tensor.chunk(slots, dim=axis))


def gate_and_up(name: str, ref: ExpertTensor, tensor: torch.Tensor) -> list[tuple[Projection, torch.Tensor]]:
    """Cut apart the one tensor [2 * width, H] that an expert may have for gate and up; gate is first.

    Raises:
        AuditError: it is not such a weight.
    """
    if ref.projection != "gate_up_proj":
        return [(ref.projection, tensor)]
    if tensor.ndim != 2 or ref.suffix != "weight" or len(tensor) % 2:
        raise AuditError(f"{name}: gate and up of shape {list(tensor.shape)} are not cut apart")
    gate, up = tensor.chunk(2)
    return [("gate_proj", gate), ("up_proj", up)]


def _apart(ref: ExpertTensor, name: str, tensor: torch.Tensor) -> Iterator[Named]:
    """Pass a routed expert's tensor; gate and up of a single one apart, as every engine takes them."""
    if ref.expert == ALL_EXPERTS:
        yield name, tensor
        return
    for projection, part in gate_and_up(name, ref, tensor):
        yield name.replace(ref.projection, projection), part


class Remap:
    """A remap of one checkpoint for one role; it counts, so that nothing is lost on the way.

    Args:
        layout, role: of the layers that are remapped.
        naming: reads the checkpoint's tensor names.
        layers: the fused layers that this process holds (pipeline stages hold a part of them).
    """

    def __init__(self, layout: ExpertLayout, role: Role, naming: TensorNaming, layers: Iterable[int]) -> None:
        self.layout = layout
        self.role = role
        self.naming = naming
        self.layers = frozenset(layers)
        self.read = self.passed = self.shared = self.emitted = 0
        # Projections among the shared tensors: one that holds gate and up counts twice.
        self._shards = 0

    def __call__(self, stream: Iterable[Named]) -> Iterator[Named | SlotTensor]:
        """Pass (name, tensor) on, or a SlotTensor for each slot in its place; one tensor at a time.

        Raises:
            AuditError: a shared expert's tensor comes twice, does not split, or parts were lost.
        """
        seen: set[ExpertTensor] = set()
        for name, tensor in stream:
            self.read += 1
            ref = self.naming.parse(name)
            if ref is None or ref.role != self.role or ref.layer not in self.layers:
                self.passed += 1
                yield name, tensor
                continue
            if not ref.is_shared:
                self.passed += 1
                yield from _apart(ref, name, tensor)
                continue
            if ref in seen:
                raise AuditError(f"{name}: the checkpoint holds this shared-expert tensor twice")
            seen.add(ref)
            self.shared += 1
            yield from self._slots(ref, name, tensor)
        self._conserve()

    def _slots(self, ref: ExpertTensor, name: str, tensor: torch.Tensor) -> Iterator[SlotTensor]:
        parts = gate_and_up(name, ref, tensor)
        self._shards += len(parts)
        for projection, whole in parts:
            slots = zip(self.layout.shared_slots, split(whole, projection, self.layout), strict=True)
            for slot, part in slots:
                self.emitted += 1
                yield SlotTensor(ref.layer, slot, SHARD_OF[projection], ref.suffix, part)

    def _conserve(self) -> None:
        slots = self.layout.num_shared_slots
        if self.passed + self.shared != self.read or self.emitted != self._shards * slots:
            raise AuditError(
                f"weights were lost in the remap: {self.read} read, {self.passed} passed, "
                f"{self.shared} shared, {self.emitted} slot tensors for {slots} slots"
            )
