"""Faults in the tensors that come from the checkpoint, before they are remapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from fse_patch.fusion_core.weights.remap import Named, Remap, SlotTensor

from .plant import plant

Context = AbstractContextManager[Any]
honest_call = Remap.__call__


def stream(change: Callable[[str, torch.Tensor], Iterable[Named]]) -> Context:
    """Every tensor of the checkpoint is replaced by what ``change`` makes of it, before it is remapped."""

    def changed(self: Remap, weights: Iterable[Named]) -> Iterator[Named | SlotTensor]:
        return honest_call(self, (item for name, tensor in weights for item in change(name, tensor)))

    return patch.object(Remap, "__call__", changed)


def without(part: str) -> Context:
    """Tensors whose name has ``part`` never come."""
    return stream(lambda name, tensor: [] if part in name else [(name, tensor)])


@plant
def nan_in_the_checkpoint(_: str) -> Context:
    def changed(name: str, tensor: torch.Tensor) -> list[Named]:
        if ".shared_expert.up_proj" in name:
            tensor = tensor.clone()
            tensor[0, 0] = float("nan")
        return [(name, tensor)]

    return stream(changed)


@plant
def tensor_missing_from_the_stream(_: str) -> Context:
    return without("layers.1.mlp.shared_expert.up_proj")


@plant
def tensor_twice_in_the_stream(_: str) -> Context:
    return stream(lambda name, tensor: [(name, tensor)] * (2 if "shared_expert.up_proj" in name else 1))


@plant
def scale_nobody_knows(_: str) -> Context:
    def changed(name: str, tensor: torch.Tensor) -> list[Named]:
        extra = [(f"{name}_scale", torch.ones(()))] if "shared_expert.up_proj" in name else []
        return [(name, tensor), *extra]

    return stream(changed)


@plant
def gate_and_up_merged(_: str) -> Context:
    return stream(
        lambda name, tensor: [(name.replace("shared_expert.up_", "shared_expert.gate_up_"), tensor)]
    )


@plant
def shared_gate_missing_from_the_stream(_: str) -> Context:
    return without("shared_expert_gate")


@plant
def router_missing_from_the_stream(_: str) -> Context:
    return without("mlp.gate.weight")


@plant
def routed_expert_missing_from_the_stream(_: str) -> Context:
    return without("experts.3.down_proj")


@plant
def routed_gate_missing_from_the_stream(_: str) -> Context:
    return without("experts.5.up_proj")


@plant
def routed_experts_shifted_by_one(_: str) -> Context:
    def changed(name: str, tensor: torch.Tensor) -> list[Named]:
        for number in range(8):
            if f".experts.{number}." in name:
                return [(name.replace(f".experts.{number}.", f".experts.{(number + 1) % 8}."), tensor)]
        return [(name, tensor)]

    return stream(changed)
