"""Where SGLang keeps experts twice and maps their numbers, nothing is appended: the model stays SGLang's."""

from __future__ import annotations

import pytest

from ..running import Case
from .conftest import Runs

# A CPU's SGLang has no load balancer, but the mapping that one changes.
TWICE = {"ep_num_redundant_experts": 2, "ep_dispatch_algorithm": "dynamic"}


@pytest.mark.long
def test_nothing_is_appended_beside_the_mapping(runs: Runs) -> None:
    case = Case("qwen2_moe", engine_args=TWICE)
    stock, ours = (runs.arm([case], fused, {})[case.name] for fused in (False, True))
    for result in (stock, ours):
        assert "error" not in result, f"{result['error']}\n{result['log']}"
    (worker,) = ours["workers"]
    assert worker["roles"] == []
    assert [refused["reason"] for refused in worker["refused"]] == ["parallel.eplb"]
    for answers in ("logprobs", "greedy", "rebatched"):
        assert ours[answers] == stock[answers]
    # The control: without the refusal a slot would get the number of a copy; the build stops then.
    anyway = Case("qwen2_moe", engine_args=TWICE, fault="balanced_anyway")
    (stopped,) = runs.arm([anyway], True, {}).values()
    assert "num_experts=10, expected 8" in stopped["error"], stopped
