"""The threshold of paired layers: what is measured decides, and nothing slower is taken."""

from __future__ import annotations

import pytest

from fse_patch.fusion_core.forward.plan import ModePlan, always
from fse_patch.fusion_core.forward.threshold import (
    LEAST,
    ROUTINGS,
    SIZES,
    lower_bound,
    merged_gains,
    threshold_of,
)

# Stock over ours on an H200, about.
GAINS = {1: 1.8, 2: 1.6, 4: 1.3, 8: 1.2, 16: 1.1, 32: 1.0, 64: 0.9}
Ratios = dict[tuple[int, str], list[float]]


def ratios(gains: dict[int, float], noise: float = 0.001, **changed: float) -> Ratios:
    """Seven rounds of each size and routing; ``changed``: a factor for a routing."""
    return {
        (size, routing): [gain * changed.get(routing, 1.0) + noise * (n % 3 - 1) for n in range(7)]
        for size, gain in gains.items()
        for routing in ROUTINGS
    }


def test_the_largest_size_that_is_as_fast() -> None:
    found = threshold_of(ratios(GAINS))
    assert found.tokens == 32
    assert set(found.bounds) == {(size, routing) for size in SIZES for routing in ROUTINGS}
    assert all(bound <= GAINS[size] for (size, _), bound in found.bounds.items())


def test_a_slowed_kernel_is_not_taken() -> None:
    assert threshold_of(ratios({size: gain / 2 for size, gain in GAINS.items()})).tokens == 0
    # One size in the middle stops it: graphs of larger sizes are captured too.
    assert threshold_of(ratios(GAINS | {8: 0.95})).tokens == 4
    assert threshold_of(ratios(GAINS | {1: 0.95})).tokens == 0


def test_a_sped_up_stock_switches_ours_off() -> None:
    assert threshold_of(ratios({size: 0.99 for size in SIZES})).tokens == 0  # not slower, and no gain
    assert threshold_of(ratios({size: 1.0 for size in SIZES}, noise=0.004)).tokens == 0
    assert threshold_of(ratios({size: 1.02 for size in SIZES})).tokens == 64


@pytest.mark.parametrize("routing", ROUTINGS)
def test_both_routings_count(routing: str) -> None:
    found = ratios(GAINS)
    for size in SIZES:
        if size > 4:
            found[size, routing] = [0.36] * 7
    assert threshold_of(found).tokens == 4
    del found[4, routing]  # nothing is known of it
    assert threshold_of(found).tokens == 2


def test_noise_is_not_a_gain() -> None:
    assert lower_bound([1.0, 1.0, 1.0]) == 1.0
    assert lower_bound([0.5, 1.5]) < 0.6
    assert lower_bound([5.0]) == lower_bound([]) == 0.0
    noisy = {case: [0.7, 1.35] * 4 for case in ratios(GAINS)}
    assert threshold_of(noisy).tokens == 0
    assert threshold_of({}).tokens == 0


def test_the_bound_is_the_one_that_is_promised() -> None:
    exact = {size: LEAST if size > 1 else 1.2 for size in SIZES}
    assert threshold_of(ratios(exact, noise=0.0)).tokens == 64
    assert threshold_of(ratios(exact | {64: LEAST - 1e-6}, noise=0.0)).tokens == 32


def test_merged_weights_gain_where_fused_runs_beyond_few_tokens() -> None:
    assert merged_gains(always("fused", "a table"))
    assert merged_gains(ModePlan(((16, "small"), (8192, "fused")), "split", "a table"))
    assert not merged_gains(ModePlan(((16, "small"), (64, "fused")), "split", "a table"))
    assert not merged_gains(ModePlan(((16, "small"),), "split", "a table"))


def test_what_they_gain_there_must_be_worth_it() -> None:
    steps = ((16, "small"), (512, "fused"))
    assert merged_gains(ModePlan(steps, "split", "a table", {1: 2.0, 512: 1.02}))
    assert not merged_gains(ModePlan(steps, "split", "a table", {1: 2.0, 512: 1.01}))
    # Nor counts what another mode gains, or what few tokens gain.
    assert not merged_gains(ModePlan(steps, "split", "a table", {1: 2.0, 512: 1.0, 1024: 1.1}))
    assert not merged_gains(ModePlan(((64, "fused"),), "split", "a table", {64: 1.1}))
