"""Comparing two runs: NaN never agrees, limits are limits, and a control must be seen."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fse_patch.fusion_core.proof.compare import (
    CONTROL_FACTOR,
    MAX_FLOAT32,
    MEAN_FLOAT32,
    NOISE_FACTOR,
    Difference,
    Tolerance,
    answer_steps,
    difference,
    noise_of,
    summary,
)

NAN, INF = float("nan"), float("inf")
FLOAT32 = Tolerance.for_dtype("float32", Difference(1.0, 1.0, 1))
runs = st.lists(st.lists(st.floats(-50, 0), max_size=4), min_size=1, max_size=4).filter(lambda r: any(r))


def of(mean: float, most: float | None = None) -> Difference:
    return Difference(mean, mean if most is None else most, 10)


@settings(max_examples=100, deadline=None)
@given(runs, st.data())
def test_it_is_the_mean_and_the_largest_difference(one: list[list[float]], data: st.DataObject) -> None:
    other = [[x + data.draw(st.floats(-3, 3)) for x in p] for p in one]
    flat = [abs(a - b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)]
    found = difference(one, other)
    assert found.tokens == len(flat)
    assert found.max == max(flat)
    assert math.isclose(found.mean, math.fsum(flat) / len(flat), rel_tol=1e-9, abs_tol=1e-15)
    same = difference(one, one)
    assert (same.mean, same.max) == (0.0, 0.0)


@settings(max_examples=100, deadline=None)
@given(runs, st.data())
def test_nan_anywhere_never_passes(one: list[list[float]], data: st.DataObject) -> None:
    places = [(i, j) for i, p in enumerate(one) for j in range(len(p))]
    i, j = data.draw(st.sampled_from(places))
    broken = [list(p) for p in one]
    broken[i][j] = NAN
    for pair in ((one, broken), (broken, one), (broken, broken)):
        found = difference(*pair)
        assert math.isnan(found.mean)
        assert math.isnan(found.max)
        assert not FLOAT32.holds(found)
        assert not Tolerance(INF, None, 0.0).holds(found)
        assert not FLOAT32.caught(found)  # a control that is NaN proves nothing
    assert FLOAT32.holds(difference(one, one))  # control


@pytest.mark.parametrize("one", [[[-INF]], [[INF]], [[-1.0, -INF]]], ids=str)
def test_infinity_never_passes(one: list[list[float]]) -> None:
    finite = [[-1.0] * len(p) for p in one]
    assert not FLOAT32.holds(difference(one, finite))
    assert not FLOAT32.holds(difference(one, one))  # both impossible is no agreement


@pytest.mark.parametrize(
    ("one", "other"),
    [([[1.0]], [[1.0, 2.0]]), ([[1.0], [2.0]], [[1.0]]), ([[1.0], []], [[], [1.0]]), ([], []), ([[]], [[]])],
    ids=str,
)
def test_other_tokens_cannot_be_compared(one: list[list[float]], other: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="same tokens"):
        difference(one, other)


def test_float32_limits_do_not_depend_on_noise() -> None:
    assert Tolerance(MEAN_FLOAT32, MAX_FLOAT32, MEAN_FLOAT32) == FLOAT32
    assert MEAN_FLOAT32 <= 5e-6
    assert MAX_FLOAT32 <= 1e-4


def test_the_limits_themselves_hold_and_the_next_number_does_not() -> None:
    def above(x: float) -> float:
        return math.nextafter(x, INF)

    assert FLOAT32.holds(of(MEAN_FLOAT32, MAX_FLOAT32))
    assert not FLOAT32.holds(of(above(MEAN_FLOAT32), MAX_FLOAT32))
    assert not FLOAT32.holds(of(0.0, above(MAX_FLOAT32)))
    assert not FLOAT32.caught(of(MEAN_FLOAT32))
    assert FLOAT32.caught(of(above(MEAN_FLOAT32)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(noise=st.floats(1e-6, 1.0))
def test_16_bit_limits_follow_the_noise(dtype: str, noise: float) -> None:
    limits = Tolerance.for_dtype(dtype, of(noise))
    assert limits.holds(of(NOISE_FACTOR * noise, 1e9))
    assert not limits.holds(of(NOISE_FACTOR * noise * 1.001))
    assert limits.caught(of(CONTROL_FACTOR * noise))
    assert not limits.caught(of(CONTROL_FACTOR * noise * 0.999))
    assert not limits.caught(of(NAN))


def test_without_noise_only_equality_holds() -> None:
    limits = Tolerance.for_dtype("bfloat16", of(0.0))
    assert limits.holds(of(0.0))
    assert not limits.holds(of(1e-12))
    assert not limits.caught(of(0.0))


@pytest.mark.parametrize("noise", [NAN, INF])
def test_noise_that_is_no_number_lets_nothing_pass(noise: float) -> None:
    limits = Tolerance.for_dtype("bfloat16", of(noise))
    for mean in (0.0, 1.0, INF, NAN):
        assert not (limits.holds(of(0.0)) and limits.caught(of(mean)))


def test_few_differences_are_off_by_chance() -> None:
    sixteen = Tolerance.for_dtype("bfloat16", Difference(0.09, 0.0, 100))
    few = [0.41, 0.02, 0.3, 0.09, 0.18]
    assert not sixteen.holds(summary(few))
    assert sixteen.holds_few(few)
    # The controls: as far off in many steps, the same fault in every step, in one, one step, no number.
    assert not sixteen.holds_few(few * 40)
    assert not sixteen.holds_few([0.6, 0.8, 0.5, 1.0, 0.7])
    assert not sixteen.holds_few([0.0, 0.0, 0.0, 0.0, 2.0])
    assert not sixteen.holds_few([0.19])
    assert not sixteen.holds_few([0.1, math.nan, 0.1])
    # In float32 every one counts.
    single = Tolerance.for_dtype("float32", Difference(0.0, 0.0, 100))
    assert not single.holds_few([2e-5, 0.0, 0.0])
    assert single.holds_few([2e-5, 0.0, 0.0, 0.0, 0.0])


def test_a_control_within_the_tolerance_is_not_seen() -> None:
    limits = Tolerance(mean=1.0, max=None, control=0.5)
    assert not limits.caught(of(0.7))
    assert limits.caught(of(1.1))


def test_as_plain_data() -> None:
    assert FLOAT32.to_dict() == {"mean": MEAN_FLOAT32, "max": MAX_FLOAT32, "control": MEAN_FLOAT32}


# One prompt of three tokens: its best tokens in each step, with their log-probabilities.
ANSWER = {
    "greedy": [[5, 6, 7]],
    "greedy_best": [[[(5, -0.1)], [(6, -0.25), (9, -2.0)], [(7, -0.5), (8, -0.75)]]],
}


def answers(**changes: object) -> dict[str, object]:
    return {**ANSWER, **changes}


def test_steps_are_compared_as_far_as_the_context_is_the_same() -> None:
    assert answer_steps(ANSWER, ANSWER) == [[0.0, 0.0]]
    parted = answers(greedy=[[5, 6, 8]])
    assert answer_steps(ANSWER, parted) == [[0.0, 0.0]]
    assert answer_steps(ANSWER, answers(greedy=[[5, 9, 7]])) == [[0.0]]
    assert answer_steps(ANSWER, answers(greedy=[[4, 6, 7]])) == [[]]
    # A token that is none of the other's best is off by what it is above the last of them, at least.
    others = [[[(5, -0.1)], [(9, -0.5), (2, -0.75)], [(7, -0.5)]]]
    assert answer_steps(ANSWER, answers(greedy_best=others)) == [[0.5, 0.0]]
    others = [[[(5, -0.1)], [(9, -0.125), (2, -0.125)], [(7, -0.5)]]]
    assert answer_steps(ANSWER, answers(greedy_best=others)) == [[0.0, 0.0]]
    others = [[[(5, -0.1)], [(9, NAN), (2, -0.75)], [(7, -0.5)]]]
    assert math.isnan(answer_steps(ANSWER, answers(greedy_best=others))[0][0])


@pytest.mark.parametrize(
    "changes",
    [
        {"greedy": [[5, 6, 7], [1]]},
        {"greedy": [[5, 6]]},
        {"greedy_best": []},
        {"greedy_best": [ANSWER["greedy_best"][0][:2]]},
    ],
    ids=str,
)
def test_answers_of_other_lengths_cannot_be_compared(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="zip"):
        answer_steps(ANSWER, answers(**changes))
    with pytest.raises(ValueError, match="zip"):
        answer_steps(answers(**changes), ANSWER)


def test_the_noise_that_counts_is_the_larger_one() -> None:
    stock = {"logprobs": [[-1.0, -2.0]], "rebatched": [[-1.0, -2.25]], "jittered": [[-1.5, -2.5]]}
    noise, means = noise_of(stock)
    # Half of the jitter's, which is 0.5; the other is 0.125.
    assert noise == Difference(0.25, 0.5, 2)
    assert means == {"rebatched": 0.125, "jittered": 0.5}
    del stock["jittered"]
    assert noise_of(stock) == (Difference(0.125, 0.25, 2), {"rebatched": 0.125})
    stock["jittered"] = [[NAN, -2.0]]
    assert math.isnan(noise_of(stock)[0].mean)
