"""Deliberate faults, and clean models: nothing wrong gets as far as serving, and nothing right is stopped.

`make test-all` runs all of tests/planted/faults.yaml, as `make test-faults` does; `make test` a sample.
"""

from __future__ import annotations

import pytest

from ..planted import clean, suite
from ..running import Checkpoints, asked
from .cases import NEWEST, NEWEST_ONLY

ENGINE = "vllm"


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = Checkpoints(tmp_path_factory.mktemp("checkpoints"), ENGINE)
    return clean.run(ENGINE, made, tmp_path_factory.mktemp("faults"), asked(request))


@pytest.mark.parametrize("fault", suite.faults(ENGINE))
def test_is_caught_before_a_token_is_served(outcomes: dict[str, str], fault: suite.Fault) -> None:
    outcome = outcomes[fault.id]
    assert outcome, f"{fault.what}: this model would be served"
    assert fault.catches(outcome), f"caught otherwise than by {fault.defence}: {outcome}"


@pytest.mark.parametrize("name", clean.models(() if NEWEST else NEWEST_ONLY))
def test_what_is_right_is_served(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == ""
