"""Samples of the shared experts as the checkpoint streams them, looked for in the slots after the load.

Bit by bit, and reckoned from the checkpoint's own rows and columns: nothing of the remap is used. A part in
the wrong slot, shard, row or column, transposed or changed on its way shows without a forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import AuditError
from .decision import FusionDecision
from .naming import Projection, TensorNaming
from .remap import Named

# Values of each projection that go to each slot.
VALUES = 64


@dataclass(frozen=True)
class _Sample:
    """Values of one projection: where along the intermediate width, where along the hidden size, and what."""

    projection: Projection
    inner: torch.Tensor
    outer: torch.Tensor
    values: torch.Tensor


class SlotSample:
    """Samples of one load.

    Args:
        decision: the role's decision.
        naming: reads the checkpoint's tensor names.
        layers: the fused layers that this process holds.
    """

    def __init__(self, decision: FusionDecision, naming: TensorNaming, layers: Iterable[int]) -> None:
        assert decision.layout is not None
        self.layout = decision.layout
        self.role = decision.role
        self.naming = naming
        self.layers = frozenset(layers)
        self._samples: dict[int, list[_Sample]] = {}

    def tap(self, stream: Iterable[Named]) -> Iterator[Named]:
        """The stream as it is; what is a plain weight of a shared expert is sampled on its way."""
        for name, tensor in stream:
            ref = self.naming.parse(name)
            wanted = ref is not None and ref.is_shared and ref.role == self.role and ref.layer in self.layers
            if wanted and ref is not None and ref.suffix == "weight" and tensor.is_floating_point():
                self._note(ref.layer, ref.projection, tensor)
            yield name, tensor

    def _note(self, layer: int, projection: Projection, tensor: torch.Tensor) -> None:
        width, hidden = self.layout.shared_intermediate_size, self.layout.hidden_size
        down = projection == "down_proj"
        if list(tensor.shape) != ([hidden, width] if down else [width, hidden]):
            return  # a size that does not fit is the remap's to refuse
        count = VALUES * self.layout.num_shared_slots
        draw = torch.Generator("cpu").manual_seed(layer)
        # Evenly along the width, so that every slot and every part of it for a process gets its share.
        inner = (torch.arange(count, device="cpu") * width) // count
        outer = torch.randint(hidden, (count,), generator=draw, device="cpu")
        rows, columns = (outer, inner) if down else (inner, outer)
        values = tensor[rows.to(tensor.device), columns.to(tensor.device)].to("cpu")
        self._samples.setdefault(layer, []).append(_Sample(projection, inner, outer, values))

    def compare(self, layer: int, parameters: Mapping[str, torch.Tensor], rank: int, parts: int = 0) -> int:
        """Look for a layer's samples in its slots.

        Args:
            parameters: ``w13_weight`` and ``w2_weight`` of the fused experts, as they were just loaded.
            rank: which part of the intermediate width this process holds, where it holds a part.
            parts: of how many parts; 0: as the parameters look. Wider ones end in padding.

        Returns:
            How many values were compared; 0 where the engine has another layout than the checkpoint's.

        Raises:
            AuditError: a value is not what the checkpoint has.
        """
        width, hidden = self.layout.moe_intermediate_size, self.layout.hidden_size
        w13, w2 = parameters.get("w13_weight"), parameters.get("w2_weight")
        if w13 is None or w2 is None or w2.ndim != 3 or w13.is_meta:
            return 0
        padded, total = w2.shape[2], self.layout.num_experts
        held = width // parts if parts else padded
        shapes = [[total, 2 * padded, hidden], [total, hidden, padded]]
        if [list(w13.shape), list(w2.shape)] != shapes or width % held or padded < held:
            return 0
        compared = 0
        for sample in self._samples.get(layer, ()):
            mine = (sample.inner % width) // held == (rank if held < width else 0)
            slots = self.layout.num_routed + sample.inner[mine] // width
            inner, outer = sample.inner[mine] % width % held, sample.outer[mine]
            if sample.projection == "down_proj":
                found = w2[slots.to(w2.device), outer.to(w2.device), inner.to(w2.device)]
            else:
                inner = inner + (padded if sample.projection == "up_proj" else 0)
                found = w13[slots.to(w13.device), inner.to(w13.device), outer.to(w13.device)]
            # In float32, because 8-bit formats do not compare.
            wanted = sample.values[mine].to(found.dtype).float()
            differing = found.to("cpu").float() != wanted
            if bool(differing.any()):
                first = int(slots[differing][0])
                raise AuditError(
                    f"{self.role} model: layer {layer} slot {first}: {int(differing.sum())} of {len(found)} "
                    f"sampled values of {sample.projection} are not the checkpoint's; the model is not served"
                )
            compared += len(found)
        return compared
