"""Rows of the loaded slots against the checkpoint's files, bit by bit, in every layer.

Another way round than the stream: the file says what a slot's row must be, whatever carried it there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from ..errors import AuditError
from .decision import FusionDecision
from .naming import Projection, TensorNaming
from .remap import SHARD_OF
from .tensors import CheckpointTensors

# Rows of each projection of a slot: the first, the last, and one in between.
BETWEEN = 1


class SlotSamples:
    """Compares the shared slots of one role, on one rank of tensor parallelism.

    Args:
        rank, ranks: of the processes that share each slot; each holds its part of the intermediate width.
    """

    def __init__(
        self,
        tensors: CheckpointTensors,
        naming: TensorNaming,
        decision: FusionDecision,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        assert decision.layout is not None
        self.tensors, self.role, self.layout = tensors, decision.role, decision.layout
        self.rank, self.ranks = rank, ranks
        self.names: dict[tuple[int, Projection], str] = {}
        for name in tensors.names():
            ref = naming.parse(name)
            if ref is not None and ref.is_shared and ref.role == decision.role and ref.suffix == "weight":
                self.names[ref.layer, ref.projection] = name

    def compare(self, layer: int, w13: torch.Tensor, w2: torch.Tensor) -> bool:
        """Whether the slots of a layer could be compared; no, where they do not lie as in a checkpoint.

        Args:
            w13, w2: the fused parameters, [E+S, 2*I/ranks, H] and [E+S, H, I/ranks].

        Raises:
            AuditError: a row of a slot is not what the checkpoint's file says.
        """
        layout = self.layout
        width = layout.moe_intermediate_size // self.ranks
        shapes = (layout.num_experts, 2 * width, layout.hidden_size), (
            layout.num_experts,
            layout.hidden_size,
            width,
        )
        known = all((layer, projection) in self.names for projection in SHARD_OF)
        if not known or (tuple(w13.shape), tuple(w2.shape)) != shapes or w13.dtype != w2.dtype:
            return False
        for part, slot in enumerate(layout.shared_slots):
            start = part * layout.moe_intermediate_size + self.rank * width
            for row in _rows(width, layer):
                self._same(layer, slot, "gate_proj", start + row, w13[slot, row])
                self._same(layer, slot, "up_proj", start + row, w13[slot, width + row])
            for row in _rows(layout.hidden_size, layer):
                self._same(layer, slot, "down_proj", row, w2[slot, row], slice(start, start + width))
        return True

    def _same(
        self,
        layer: int,
        slot: int,
        projection: Projection,
        row: int,
        held: torch.Tensor,
        columns: slice = slice(None),
    ) -> None:
        said = self.tensors.read(self.names[layer, projection], row)[columns].to(held.dtype)
        if not torch.equal(said.view(torch.uint8), held.to("cpu").contiguous().view(torch.uint8)):
            raise AuditError(
                f"{self.role} model: layer {layer} slot {slot} does not hold what the checkpoint says: "
                f"{self.names[layer, projection]}, row {row}; the model is not served"
            )


def _rows(count: int, seed: int) -> Iterator[int]:
    draw = random.Random(seed)
    yield from sorted({0, count - 1, *(draw.randrange(count) for _ in range(BETWEEN))})
