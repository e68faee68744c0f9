"""Faults in the k+S weights and ids that a layer runs with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from fse_patch.fusion_core.forward.router import SlotAppender

from .plant import adapter, plant

Context = AbstractContextManager[Any]
Pair = tuple[torch.Tensor, torch.Tensor]
honest_append = SlotAppender.append
honest_init = SlotAppender.__init__


def appended(change: Callable[[SlotAppender, torch.Tensor, torch.Tensor], Pair]) -> Context:
    """``change`` of the k+S weights and ids that a layer runs with."""

    def append(self: SlotAppender, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Pair:
        return change(self, *honest_append(self, hidden, weights, ids))

    return patch.object(SlotAppender, "append", append)


def slot_weight(change: Callable[[SlotAppender, torch.Tensor], torch.Tensor]) -> Context:
    """``change`` of the shared slots' weights."""

    def changed(self: SlotAppender, weights: torch.Tensor, ids: torch.Tensor) -> Pair:
        k = self.layout.top_k
        return torch.cat([weights[:, :k], change(self, weights[:, k:])], dim=1), ids

    return appended(changed)


def slot_ids(change: Callable[[SlotAppender, torch.Tensor], torch.Tensor]) -> Context:
    """``change`` of the shared slots' ids."""

    def changed(self: SlotAppender, weights: torch.Tensor, ids: torch.Tensor) -> Pair:
        k = self.layout.top_k
        return weights, torch.cat([ids[:, :k], change(self, ids[:, k:])], dim=1).contiguous()

    return appended(changed)


def scale_of(self: SlotAppender) -> float:
    return 2.5  # of the recipes with a scale


@plant
def shared_weight_scaled_too(_: str) -> Context:
    return slot_weight(lambda self, weights: weights * scale_of(self))


@plant
def shared_weight_divided_by_the_scale(_: str) -> Context:
    return slot_weight(lambda self, weights: weights / scale_of(self))


@plant
def shared_weight_one_percent_off(_: str) -> Context:
    return slot_weight(lambda self, weights: weights * 1.01)


@plant
def shared_weight_split_over_the_slots(_: str) -> Context:
    return slot_weight(lambda self, weights: weights / self.layout.num_shared_slots)


@plant
def shared_weight_of_the_first_slot_only(_: str) -> Context:
    def change(_: SlotAppender, weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([weights[:, :1], torch.zeros_like(weights[:, 1:])], dim=1)

    return slot_weight(change)


@plant
def shared_gate_without_sigmoid(_: str) -> Context:
    return slot_weight(lambda self, weights: weights.logit())


@plant
def shared_gate_with_two_sigmoids(_: str) -> Context:
    return slot_weight(lambda self, weights: weights.sigmoid())


@plant
def shared_gate_ignored(_: str) -> Context:
    return slot_weight(lambda self, weights: torch.ones_like(weights))


@plant
def shared_gate_of_the_token_before(_: str) -> Context:
    return slot_weight(lambda self, weights: weights.roll(1, 0))


@plant
def shared_gate_inside_the_softmax(_: str) -> Context:
    """The shared slot competes with the routed experts, as a router over E+1 lets it."""

    def change(self: SlotAppender, weights: torch.Tensor, ids: torch.Tensor) -> Pair:
        k = self.layout.top_k
        logits = torch.cat([weights[:, :k].log(), weights[:, k:].logit()], dim=1)
        return logits.softmax(dim=1).to(weights.dtype), ids

    return appended(change)


@plant
def shared_weight_renormalised_with_the_others(_: str) -> Context:
    return appended(lambda self, weights, ids: (weights / weights.sum(dim=1, keepdim=True), ids))


@plant
def slot_ids_one_too_low(_: str) -> Context:
    return slot_ids(lambda self, ids: ids - 1)


@plant
def slot_ids_of_the_first_experts(_: str) -> Context:
    """Numbered from 0 within the shared slots."""
    return slot_ids(lambda self, ids: ids - self.layout.num_routed)


@plant
def first_slot_repeated(_: str) -> Context:
    return slot_ids(lambda self, ids: ids[:, :1].expand_as(ids))


@plant
def slots_not_appended(_: str) -> Context:
    return appended(
        lambda self, weights, ids: (
            weights[:, : self.layout.top_k].contiguous(),
            ids[:, : self.layout.top_k].contiguous(),
        )
    )


@plant
def slots_appended_twice(_: str) -> Context:
    def change(self: SlotAppender, weights: torch.Tensor, ids: torch.Tensor) -> Pair:
        k = self.layout.top_k
        return torch.cat([weights, weights[:, k:]], dim=1), torch.cat([ids, ids[:, k:]], dim=1)

    return appended(change)


@plant
def slot_in_the_place_of_the_last_expert(_: str) -> Context:
    """k columns where k+S belong: the least of the routed experts makes room."""

    def change(self: SlotAppender, weights: torch.Tensor, ids: torch.Tensor) -> Pair:
        keep = [i for i in range(weights.shape[1]) if i != self.layout.top_k - 1]
        return weights[:, keep].contiguous(), ids[:, keep].contiguous()

    return appended(change)


@plant
def routed_ids_shifted_by_the_slots(_: str) -> Context:
    """As if the shared slots came first."""

    def change(self: SlotAppender, weights: torch.Tensor, ids: torch.Tensor) -> Pair:
        k, slots = self.layout.top_k, self.layout.num_shared_slots
        routed = (ids[:, :k] + slots) % self.layout.num_routed
        return weights, torch.cat([routed, ids[:, k:]], dim=1)

    return appended(change)


@plant
def weights_paired_with_other_ids(_: str) -> Context:
    def change(self: SlotAppender, weights: torch.Tensor, ids: torch.Tensor) -> Pair:
        k = self.layout.top_k
        return torch.cat([weights[:, :k].flip(1), weights[:, k:]], dim=1), ids

    return appended(change)


def routed(change: Callable[[torch.Tensor, SlotAppender], torch.Tensor]) -> Context:
    """``change`` of the routed weights that the slots are appended to."""

    def append(self: SlotAppender, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Pair:
        return honest_append(self, hidden, change(weights, self), ids)

    return patch.object(SlotAppender, "append", append)


@plant
def routed_scale_applied_twice(_: str) -> Context:
    return routed(lambda weights, self: weights * scale_of(self))


@plant
def routed_scale_missing(_: str) -> Context:
    return routed(lambda weights, self: weights / scale_of(self))


@plant
def routed_weights_renormalised(_: str) -> Context:
    """Of a model that does not renormalise."""
    return routed(lambda weights, self: weights / weights.sum(dim=1, keepdim=True))


@plant
def routed_weights_not_renormalised(_: str) -> Context:
    """Of a model that does: a number below 1 is left of their sum."""
    return routed(lambda weights, self: weights * 0.9)


@plant
def output_scale_forgotten(engine: str) -> Context:
    """The engine scales the layer's output, and the shared slot's share is not divided by it."""
    if engine == "sglang":
        return patch.object(adapter(engine, "build"), "output_scale", lambda *_: 1.0)
    return nullcontext()


@plant
def stale_gate(_: str) -> Context:
    """A copy of the gate is made when a layer first runs; loads after it are not seen."""

    def init(self: SlotAppender, *args: Any, **kwargs: Any) -> None:
        honest_init(self, *args, **kwargs)
        live, kept = self.shared_gate, {}

        def gate(hidden: torch.Tensor) -> torch.Tensor:
            if "rows" not in kept:
                assert live is not None
                kept["rows"] = live(torch.eye(hidden.shape[1], dtype=hidden.dtype)).T.clone()
            return hidden @ kept["rows"].T

        self.shared_gate = gate

    return patch.object(SlotAppender, "__init__", init)
