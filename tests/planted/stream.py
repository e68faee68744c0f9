"""Faults between the checkpoint and the loader: in the weight stream and in its remap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from fse_patch.fusion_core.checkpoint.naming import TensorNaming
from fse_patch.fusion_core.weights import remap
from fse_patch.fusion_core.weights.remap import Remap, SlotTensor

from .plant import plant

Context = AbstractContextManager[Any]
honest_slots, honest_parse = Remap._slots, TensorNaming.parse


def slots(change: Callable[[SlotTensor, Any], Iterable[SlotTensor]]) -> Context:
    """Every slot tensor is replaced by what ``change`` makes of it and of the layout."""

    def changed(self: Remap, *args: Any) -> Iterator[SlotTensor]:
        for part in honest_slots(self, *args):
            yield from change(part, self.layout)

    return patch.object(Remap, "_slots", changed)


def values(
    change: Callable[[torch.Tensor], torch.Tensor], shard: str = "w2", layer: int | None = None
) -> Context:
    """The values of one shard are changed, in all layers or in one."""

    def changed(part: SlotTensor, _: Any) -> list[SlotTensor]:
        hit = part.shard == shard and layer in (None, part.layer)
        return [dataclasses.replace(part, tensor=change(part.tensor)) if hit else part]

    return slots(changed)


@plant
def down_not_sent(_: str) -> Context:
    return slots(lambda part, _: [] if part.shard == "w2" else [part])


@plant
def one_slot_of_four_not_sent(_: str) -> Context:
    return slots(lambda part, layout: [] if part.slot == layout.num_routed + 2 else [part])


@plant
def layer_not_sent(_: str) -> Context:
    return slots(lambda part, _: [] if part.layer == 1 else [part])


@plant
def slot_sent_twice(_: str) -> Context:
    return slots(lambda part, _: [part, part])


@plant
def gate_and_up_swapped(_: str) -> Context:
    other: dict[str, Any] = {"w1": "w3", "w3": "w1", "w2": "w2"}
    return slots(lambda part, _: [dataclasses.replace(part, shard=other[part.shard])])


@plant
def gate_sent_as_up_too(_: str) -> Context:
    held: dict[tuple[int, int, str], torch.Tensor] = {}

    def changed(part: SlotTensor, _: Any) -> Iterator[SlotTensor]:
        held[part.layer, part.slot, part.shard] = part.tensor
        gate = held.get((part.layer, part.slot, "w1"))
        # Checkpoints come in any order: what comes first stands for both.
        if part.shard != "w2":
            first = gate if gate is not None else part.tensor
            part = dataclasses.replace(part, tensor=first)
        yield part

    return slots(changed)


@plant
def down_transposed(_: str) -> Context:
    """H = I in this checkpoint, so every shape fits."""
    return values(lambda tensor: tensor.T.contiguous())


@plant
def down_transposed_not_square(_: str) -> Context:
    return values(lambda tensor: tensor.T.contiguous())


@plant
def slots_one_too_low(_: str) -> Context:
    return slots(lambda part, _: [dataclasses.replace(part, slot=part.slot - 1)])


@plant
def slots_one_too_high(_: str) -> Context:
    return slots(lambda part, _: [dataclasses.replace(part, slot=part.slot + 1)])


@plant
def layers_permuted(_: str) -> Context:
    """Layers are crossed on the way: 0 is 1, 1 is 0."""
    return slots(lambda part, _: [dataclasses.replace(part, layer=1 - part.layer)])


@plant
def down_parts_in_another_order(_: str) -> Context:
    """Gate and up lie as they should, the columns of down in the slots next to theirs."""

    def changed(part: SlotTensor, layout: Any) -> list[SlotTensor]:
        place = (part.slot - layout.num_routed + 1) % layout.num_shared_slots
        return [dataclasses.replace(part, slot=layout.num_routed + place) if part.shard == "w2" else part]

    return slots(changed)


@plant
def gate_parts_reversed(_: str) -> Context:
    def changed(part: SlotTensor, layout: Any) -> list[SlotTensor]:
        mirrored = layout.num_routed + layout.num_experts - 1 - part.slot
        return [dataclasses.replace(part, slot=mirrored) if part.shard == "w1" else part]

    return slots(changed)


@plant
def down_split_in_strides(_: str) -> Context:
    """Every S-th column goes to a slot instead of each S-th part."""
    honest = remap.split

    def split(tensor: torch.Tensor, projection: Any, layout: Any) -> list[torch.Tensor]:
        if projection != "down_proj":
            return honest(tensor, projection, layout)
        return [tensor[:, i :: layout.num_shared_slots] for i in range(layout.num_shared_slots)]

    return patch.object(remap, "split", split)


@plant
def down_one_percent_off(_: str) -> Context:
    return values(lambda tensor: tensor * 1.01)


@plant
def down_one_percent_off_in_the_last_layer(_: str) -> Context:
    return values(lambda tensor: tensor * 1.01, layer=1)


@plant
def up_is_zero(_: str) -> Context:
    return values(torch.zeros_like, "w3")


@plant
def down_negated(_: str) -> Context:
    return values(torch.neg)


@plant
def rounded_to_bfloat16(_: str) -> Context:
    return values(lambda tensor: tensor.to(torch.bfloat16).to(tensor.dtype))


@plant
def rounded_to_float8(_: str) -> Context:
    return values(lambda tensor: tensor.to(torch.float8_e4m3fn).to(tensor.dtype), "w1")


@plant
def one_element_changed(_: str) -> Context:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[0, 0] += 1.0
        return tensor

    return values(changed)


@plant
def lost_between_remap_and_engine(_: str) -> Context:
    """The remap itself forgets a slot, and its own count tells."""

    def changed(self: Remap, *args: Any) -> Iterator[SlotTensor]:
        parts = honest_slots(self, *args)
        yield next(parts)

    return patch.object(Remap, "_slots", changed)


@plant
def layer_not_remapped(_: str) -> Context:
    """A layer is built fused, and its shared tensors go the unfused way."""
    honest = Remap.__init__

    def init(self: Remap, layout: Any, role: Any, naming: Any, layers: Any) -> None:
        honest(self, layout, role, naming, [n for n in layers if n != 1])

    return patch.object(Remap, "__init__", init)


@plant
def draft_taken_for_main(_: str) -> Context:
    """Names are read without their role: the draft's layer 0 is the main model's."""

    def parse(self: TensorNaming, name: str) -> Any:
        found = honest_parse(self, name)
        return found and dataclasses.replace(found, role="main")

    return patch.object(TensorNaming, "parse", parse)


@plant
def slot_written_over_its_neighbour(_: str) -> Context:
    """One slot is written twice and another never, so that the number of tensors is right."""

    def changed(part: SlotTensor, layout: Any) -> list[SlotTensor]:
        second = part.slot == layout.num_routed + 1
        return [dataclasses.replace(part, slot=layout.num_routed) if second else part]

    return slots(changed)
