"""Proof that every shared slot was written, once, before anything is served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...errors import AuditError
from .remap import Shard, SlotTensor

Key = tuple[int, int, Shard, str]


def poison(rows: torch.Tensor) -> None:
    """Fill slot rows with NaN, so that a part which nothing writes cannot pass for a weight.

    Integer tensors and dtypes without NaN stay as they are: coverage alone guards them.
    """
    if rows.is_floating_point() and not rows.is_meta:
        if rows.element_size() == 1:
            # NaN is another byte in each 8-bit format.
            nan = torch.full((1,), float("nan"), device="cpu").to(rows.dtype)
            rows.view(torch.uint8).fill_(int(nan.view(torch.uint8)))
        else:
            rows.fill_(float("nan"))


def clear_padding(slots: Mapping[str, torch.Tensor], width: int) -> None:
    """Set to zero what kernels want and no checkpoint has, as the engine does itself later.

    Args:
        slots: slot rows by parameter; of ``w13_weight`` [S, 2 * padded, H] and ``w2_weight`` [S, H, padded].
        width: intermediate width that this process holds of a slot; more than that is padding.
    """
    w13, w2 = slots.get("w13_weight"), slots.get("w2_weight")
    if w13 is None or w2 is None or w13.ndim != 3 or w2.ndim != 3 or w13.shape[1] != 2 * w2.shape[2]:
        return
    for shard in w13.chunk(2, dim=1):
        shard[:, width:] = 0
    w2[:, :, width:] = 0


def is_poisoned(rows: torch.Tensor) -> bool:
    """Return whether any element of the slot rows is NaN."""
    if not rows.is_floating_point() or rows.is_meta:
        return False
    return bool(torch.isnan(rows.float() if rows.element_size() == 1 else rows).any())


def marks(experts: torch.Tensor) -> list[torch.Tensor]:
    """Return views of single elements, to poison and look at: an expert that never came shows.

    Args:
        experts: w13 [E, 2 * I, H] or w2 [E, H, I].

    Returns:
        One element of w1 and w3, or two of w2, of every expert: views [E]. Empty where the tensor has not the
        three dimensions of plain weights.
    """
    return [] if experts.ndim != 3 else [experts[:, row, 0] for row in {0, experts.shape[1] // 2}]


@dataclass
class SlotAudit:
    """Coverage of the shared slots of one role in this process.

    Enforced until a load has passed, but for weight updates, which may be partial: of those it only
    counts. ``loads`` are those that passed.
    """

    role: str
    expected: set[Key] = field(default_factory=set)
    written: Counter[Key] = field(default_factory=Counter)
    covered: set[Key] = field(default_factory=set)
    loads: int = 0

    def expect(self, layer: int, slots: range, suffixes: set[str]) -> None:
        """Expect w1, w2 and w3 of every slot of ``layer``, with every parameter suffix it has."""
        shards: tuple[Shard, ...] = ("w1", "w2", "w3")
        self.expected |= {(layer, s, shard, x) for s in slots for shard in shards for x in suffixes}

    def begin(self) -> None:
        """Note that a load starts."""
        self.written.clear()

    def wrote(self, part: SlotTensor) -> None:
        """Note that one slot tensor was accepted by the engine's weight loader."""
        key = part.layer, part.slot, part.shard, part.suffix
        self.written[key] += 1
        self.covered.add(key)

    @property
    def slots_loaded(self) -> int:
        """Count the slots of which every part was written, by whichever load."""
        slots = {key[:2] for key in self.expected}
        return len(slots - {key[:2] for key in self.expected - self.covered})

    def finish(
        self, poisoned_layers: list[int], update: bool = False, unrouted_layers: Sequence[int] = ()
    ) -> None:
        """Check a load that ended; after the first that passed, every load is an update.

        Raises:
            AuditError: it was not an update and a part is missing, was written twice, was not expected,
                or poison is left in a layer, in its shared slots or its routed experts.
        """
        if self.loads or update:
            self.loads += 1
            return
        problems = (
            ("never written", self.expected - set(self.written)),
            ("written more than once", {key for key, times in self.written.items() if times > 1}),
            ("not expected", set(self.written) - self.expected),
        )
        for what, keys in problems:
            if keys:
                layer, slot, shard, suffix = min(keys)
                raise AuditError(
                    f"{self.role} model: {len(keys)} shared slot tensors {what}, first: layer {layer} "
                    f"slot {slot} {shard}_{suffix}; the model is not served"
                )
        if poisoned_layers:
            raise AuditError(
                f"{self.role} model: unwritten values are left in the shared slots of layers "
                f"{poisoned_layers}; the model is not served"
            )
        if unrouted_layers:
            raise AuditError(
                f"{self.role} model: routed experts of layers {list(unrouted_layers)} were never written; "
                "the model is not served"
            )
        self.loads = 1
