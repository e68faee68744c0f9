"""States that a router sends where the named routing says: on the CPU, with random gates."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from fse_patch.cli import bench, tune
from fse_patch.cli.bench import DEFAULT_ROUTINGS, Routings
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.fusion_core.decision.outcome import MoeSpec, RoutingSpec
from fse_patch.lab import plots
from fse_patch.lab.routings import GROUP, ROUTINGS, Router, for_tokens, named

EXPERTS, HIDDEN, TOP_K, TOKENS = 64, 256, 4, 512
SOFTMAX = RoutingSpec("softmax", renormalize=True)
SIGMOID = RoutingSpec("sigmoid", renormalize=True, has_correction_bias=True)
SPECS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def block(spec: RoutingSpec, hidden: int) -> Any:
    draw = torch.Generator().manual_seed(0)
    gate = torch.nn.Linear(hidden, EXPERTS, bias=False)
    # Logits as large as those of the measured shapes.
    gate.weight.data = (torch.randn(EXPERTS, hidden, generator=draw) * 1.5 / hidden**0.5).bfloat16()
    if spec.has_correction_bias:
        gate.e_score_correction_bias = torch.nn.Parameter(torch.randn(EXPERTS, generator=draw) * 0.05)
    return SimpleNamespace(gate=gate)


def router(spec: RoutingSpec, hidden: int = HIDDEN) -> Router:
    moe = MoeSpec(ExpertLayout(EXPERTS, 1, TOP_K, hidden, 32), spec, "one", (0,))
    return Router.of(block(spec, hidden), moe)


def states(name: str, router: Router, tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    return ROUTINGS[name].states(router, tokens, torch.Generator().manual_seed(seed))


def chosen(router: Router, states: torch.Tensor) -> torch.Tensor:
    return router.route(router.logits(states))[1].sort(1).values


def busiest(router: Router, states: torch.Tensor) -> float:
    """The part of all choices that the four most frequent experts have."""
    counts = chosen(router, states).flatten().bincount(minlength=EXPERTS)
    return float(counts.topk(4).values.sum() / counts.sum())


@spec
def test_states_choose_exactly_the_experts_that_they_are_steered_to(spec: RoutingSpec) -> None:
    one = router(spec)
    draw = torch.Generator().manual_seed(5)
    wanted = torch.rand(TOKENS, EXPERTS, generator=draw).topk(TOP_K).indices
    random = states("even", one)
    steered = one.steered(random, wanted)
    assert torch.equal(chosen(one, steered), wanted.sort(1).values.int())
    # Rounding of the logits, as engines have them, changes nothing.
    logits = one.logits(steered).bfloat16()
    assert torch.equal(one.route(logits)[1].sort(1).values, wanted.sort(1).values.int())
    # About the size of random states; the control: those choose other experts.
    sizes = steered.float().norm(dim=1) / HIDDEN**0.5
    assert 0.7 < float(sizes.min()) < float(sizes.max()) < 1.4
    assert not torch.equal(chosen(one, random), wanted.sort(1).values.int())


@spec
def test_zipf_is_skewed_and_even_is_not(spec: RoutingSpec) -> None:
    one = router(spec)
    assert busiest(one, states("zipf", one)) > 0.3
    assert busiest(one, states("even", one)) < 0.25
    # Which experts are frequent is drawn: other blocks have others.
    frequent = {
        int(chosen(one, states("zipf", one, seed=seed)).flatten().bincount().argmax()) for seed in range(4)
    }
    assert len(frequent) > 1


def test_zipf_draws_by_one_over_the_rank() -> None:
    one = router(SOFTMAX)
    single = Router(one.gate, None, 1, SOFTMAX)
    counts = chosen(single, states("zipf", single, 8192)).flatten().bincount(minlength=EXPERTS)
    often = counts.sort(descending=True).values / counts.sum()
    expected = 1 / torch.arange(1, EXPERTS + 1)
    assert torch.allclose(often[:8], (expected / expected.sum())[:8], rtol=0.15)


@spec
def test_alike_and_groups_repeat_states(spec: RoutingSpec) -> None:
    one = router(spec)
    alike = states("alike", one, 10)
    assert (alike == alike[0]).all()
    assert one.distinct(alike) == TOP_K
    groups = states("groups", one, 10)
    assert [int((groups == row).all(1).sum()) for row in groups] == [4] * 8 + [2] * 2
    assert len(groups.unique(dim=0)) == -(-10 // GROUP)
    # The control: even states differ, and more experts are chosen.
    even = states("even", one, 10)
    assert len(even.unique(dim=0)) == 10
    assert TOP_K < one.distinct(groups) < one.distinct(even) <= 10 * TOP_K


@pytest.mark.parametrize("name", ROUTINGS)
def test_states_are_as_a_block_takes_them(name: str) -> None:
    one = router(SIGMOID)
    made = states(name, one, 5)
    assert (made.shape, made.dtype, made.is_contiguous()) == ((5, HIDDEN), torch.bfloat16, True)
    assert torch.equal(made, states(name, one, 5))
    assert not torch.equal(made, states(name, one, 5, seed=2))


def test_routing_that_cannot_be_had_is_an_error_in_words() -> None:
    in_groups = RoutingSpec("sigmoid", True, num_expert_group=8, topk_group=1, has_correction_bias=True)
    for one in (router(in_groups), router(SOFTMAX, hidden=EXPERTS // 2)):
        with pytest.raises(FsePatchError, match="no states found"):
            states("zipf", one)


def test_names() -> None:
    assert named("alike, even") == ["even", "alike"]
    assert named(",".join(ROUTINGS)) == list(ROUTINGS)
    for text, wrong in (("even,odd", "odd"), ("", "")):
        with pytest.raises(FsePatchError, match=f"unknown routing '{wrong}'; use some of even, zipf"):
            named(text)
    assert named(DEFAULT_ROUTINGS) == ["even", "alike"]


def test_with_one_token_there_is_nothing_to_be_alike() -> None:
    for asked in (["even", "alike"], ["alike"], list(ROUTINGS)):
        assert for_tokens(asked, 1) == ["even"]
        assert for_tokens(asked, 2) == asked


def test_the_option_names_every_routing() -> None:
    (option,) = get_args(Routings)[1:]
    assert option.help.endswith(f": {', '.join(ROUTINGS)}.")
    for command in (bench.command, tune.command):
        assert inspect.signature(command, eval_str=True).parameters["routings"].annotation == Routings


def test_every_routing_has_a_line_of_its_own_in_pictures() -> None:
    assert set(plots.LINES) == set(ROUTINGS)
    assert len(set(plots.LINES.values())) == len(ROUTINGS)
