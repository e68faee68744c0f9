"""The canary's verdict word by word, its limits to the last digit, and how far a router's errors reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fse_patch.fusion_core.decision.outcome import RoutingSpec
from fse_patch.fusion_core.proof.canary import CanaryError, Reference, _steepness, deviation, judge

E4M3 = torch.float8_e4m3fn
# Two tokens; the shared expert makes the second number of each.
OUTPUT = torch.tensor([[4.0, 3.0], [0.0, 2.0]], dtype=torch.float64)
SHARED = torch.tensor([[0.0, 3.0], [0.0, 2.0]], dtype=torch.float64)
EXPECTED = Reference(OUTPUT.float(), OUTPUT, SHARED, 0.5, torch.tensor([0.5, 0.25], dtype=torch.float64))
WHOLE_ALONE = replace(EXPECTED, share_tolerance=None)
WHERE = "draft model: canary: layer 3"


def changed(*factors: float) -> torch.Tensor:
    """The output with these times the shared part of each token."""
    return OUTPUT + SHARED * (torch.tensor(factors, dtype=torch.float64)[:, None] - 1)


def test_an_output_of_another_shape() -> None:
    with pytest.raises(CanaryError) as error:
        judge("draft", 3, EXPECTED, OUTPUT[:1])
    assert str(error.value) == "draft model: layer 3 gives [1, 2]; the model is not served"


@pytest.mark.parametrize("expected", [EXPECTED, WHOLE_ALONE])
def test_an_output_that_is_off(expected: Reference) -> None:
    # The limit itself is allowed.
    assert judge("draft", 3, WHOLE_ALONE, changed(1, 1.5)) == 0.5
    with pytest.raises(CanaryError) as error:
        judge("draft", 3, expected, changed(1, 1.75))
    assert str(error.value) == (
        f"{WHERE} is 0.75 off what the checkpoint says, relative to its output; 0.5 is allowed; the model is "
        "not served"
    )


def test_a_shared_part_that_is_off() -> None:
    assert judge("draft", 3, EXPECTED, changed(1.5, 1.25)) == pytest.approx(0.3)
    with pytest.raises(CanaryError) as error:
        judge("draft", 3, EXPECTED, changed(1.5, 1.375))
    assert str(error.value) == (
        f"{WHERE} has 1.38 times the shared expert's part, 0.25 is allowed; the model is not served"
    )
    with pytest.raises(CanaryError, match=r"has 0\.625 times the shared expert's part"):
        judge("draft", 3, EXPECTED, changed(1, 0.625))
    # The control: where the whole tells as much, the share is not asked.
    assert judge("draft", 3, WHOLE_ALONE, changed(1.5, 1.375)) == 0.375


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, E4M3])
def test_an_output_of_any_dtype(dtype: torch.dtype) -> None:
    assert judge("draft", 3, EXPECTED, OUTPUT.to(dtype)) == 0
    with pytest.raises(CanaryError, match=r"has 0\.5 times the shared expert's part, 0\.25 is allowed"):
        judge("draft", 3, EXPECTED, changed(1, 0.5).to(dtype))


def test_the_deviation_is_of_the_worst_token() -> None:
    assert deviation(changed(1, 1.5), OUTPUT) == 0.5
    assert deviation(torch.tensor([[4.0, 4.0], [0.0, 2.0]]), OUTPUT) == 0.2


@pytest.mark.parametrize(
    ("spec", "steepness"),
    [
        (RoutingSpec("softmax", True), 1.0),
        (RoutingSpec("softmax", True, 1.0, 4, 2), 1.0),
        (RoutingSpec("sigmoid", True), 0.25),
        (RoutingSpec("sigmoid", True, 1.0, 4, 4), 0.25),
        (RoutingSpec("sigmoid", True, 1.0, 4, 3), 0.5),
    ],
)
def test_how_much_of_a_logits_error_reaches_the_choice(spec: RoutingSpec, steepness: float) -> None:
    assert _steepness(spec) == steepness
