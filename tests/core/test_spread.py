"""Whole experts spread over processes: each token's shared slots are on one of them, and none is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fse_patch.adapters.vllm.spread import add_slots
from fse_patch.fusion_core.kernels.routing_reference import append_shared_slots

E, S, K, H, WIDTH, TOKENS = 6, 2, 2, 8, 4, 11
RANKS = (2, 3)


def manager(ranks: int, rank: int) -> Any:
    """vLLM's map of experts as it makes it: experts in order, evenly."""
    held = E // ranks
    local = torch.full((E,), -1, dtype=torch.int32)
    local[rank * held : (rank + 1) * held] = torch.arange(held, dtype=torch.int32)
    return SimpleNamespace(
        _expert_map=local,
        expert_map=local,
        _local_num_experts=held,
        local_num_experts=held,
        global_num_experts=E,
        ep_size=ranks,
        ep_rank=rank,
    )


def experts_of(weights: torch.Tensor, states: torch.Tensor, local: torch.Tensor, top: Any) -> torch.Tensor:
    """Run a process's experts, [rows, H, H] each one matrix, and leave out what the map gives -1."""
    scores, ids = top
    out = torch.zeros_like(states)
    for token in range(len(states)):
        for score, place in zip(scores[token], local[ids[token].long()], strict=True):
            if place >= 0:
                out[token] += score * (weights[place] @ states[token])
    return out


@pytest.mark.parametrize("ranks", RANKS)
def test_the_sum_over_processes_is_that_of_one(ranks: int) -> None:
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(E + S, H, H, generator=draw, dtype=torch.float64)
    states = torch.randn(TOKENS, H, generator=draw, dtype=torch.float64)
    scores = torch.rand(TOKENS, K, generator=draw, dtype=torch.float64)
    ids = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(TOKENS)]).int()
    gate = torch.rand(TOKENS, 1, generator=draw, dtype=torch.float64)
    alone = append_shared_slots(scores, ids, range(E, E + S), gate)
    expected = experts_of(weights, states, torch.arange(E + S), alone)
    top = append_shared_slots(scores, ids, range(E, E + S), gate, ranks)
    total, halved, maps = torch.zeros_like(states), torch.zeros_like(states), []
    for rank in range(ranks):
        held, config = manager(ranks, rank), SimpleNamespace(num_experts=E, num_local_experts=E // ranks)
        assert add_slots(held, config, S) == rank * S
        assert (config.num_experts, config.num_local_experts) == (E + ranks * S, E // ranks + S)
        assert held.global_num_experts == config.num_experts
        mine = torch.cat([weights[rank * (E // ranks) : (rank + 1) * (E // ranks)], weights[E:]])
        total += experts_of(mine, states, held._expert_map, top)
        maps.append(held._expert_map)
        doubled = held._expert_map.clone()
        doubled[E:] = torch.arange(E // ranks, E // ranks + S).repeat(ranks)
        halved += experts_of(mine, states, doubled, top)
    torch.testing.assert_close(total, expected)
    # The control: with the slots on every process they are counted more than once.
    assert (halved - expected).norm() > 0.1 * expected.norm()
    # Each slot id is on one process.
    assert ((torch.stack(maps) >= 0).sum(0) == 1).all()


def test_token_i_takes_the_slots_of_process_i_mod_ranks() -> None:
    weights, ids = torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int32)
    found = append_shared_slots(weights, ids, range(8, 10), 1.0, 2)[1]
    assert found.tolist() == [[0, 8, 9], [0, 10, 11], [0, 8, 9], [0, 10, 11], [0, 8, 9]]
    assert found.dtype == torch.int32
    assert append_shared_slots(weights, ids, range(8, 10), 1.0)[1].tolist() == [[0, 8, 9]] * 5
