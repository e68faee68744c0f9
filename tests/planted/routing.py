"""Faults in the routing itself, where it is ours: in vLLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from fse_patch.fusion_core.forward import router

from .plant import plant

Context = AbstractContextManager[Any]
Pair = tuple[torch.Tensor, torch.Tensor]
honest_route = router.route


def by_route(change: Callable[..., Pair]) -> Context:
    return patch.object(router, "route", change)


@plant
def router_of_another_family(_: str) -> Context:
    def route(logits: Any, top_k: int, spec: Any, bias: Any = None) -> Pair:
        return honest_route(logits, top_k, dataclasses.replace(spec, scoring="softmax"), None)

    return by_route(route)


@plant
def correction_bias_used_as_weight(_: str) -> Context:
    def route(logits: Any, top_k: int, spec: Any, bias: Any = None) -> Pair:
        _, ids = honest_route(logits, top_k, spec, bias)
        weights = (logits.sigmoid() + bias).gather(1, ids.long())
        return weights / weights.sum(dim=1, keepdim=True) * spec.routed_scaling_factor, ids

    return by_route(route)


@plant
def correction_bias_dropped(_: str) -> Context:
    return by_route(lambda logits, top_k, spec, bias=None: honest_route(logits, top_k, spec, bias * 0))


@plant
def groups_ignored(_: str) -> Context:
    def route(logits: Any, top_k: int, spec: Any, bias: Any = None) -> Pair:
        return honest_route(logits, top_k, dataclasses.replace(spec, num_expert_group=1, topk_group=1), bias)

    return by_route(route)


@plant
def softmax_over_the_chosen_only(_: str) -> Context:
    """Renormalised although the model does not."""

    def route(logits: Any, top_k: int, spec: Any, bias: Any = None) -> Pair:
        return honest_route(logits, top_k, dataclasses.replace(spec, renormalize=True), bias)

    return by_route(route)


@plant
def smallest_instead_of_largest(_: str) -> Context:
    return by_route(lambda logits, top_k, spec, bias=None: honest_route(-logits, top_k, spec, bias))


@plant
def fewer_experts_than_decided(_: str) -> Context:
    def route(logits: Any, top_k: int, spec: Any, bias: Any = None) -> Pair:
        weights, ids = honest_route(logits, top_k, spec, bias)
        return torch.cat([weights[:, :-1], weights[:, -1:] * 0], dim=1), ids

    return by_route(route)
