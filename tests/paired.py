"""What the tests of both engines say of paired runs."""

from __future__ import annotations

from typing import Any

from .running import Case, Runs

# Every call runs paired; and only where few tokens are decoded.
ALL, FEW = 4096, 4
LIMIT = 5e-6
FAULTS = ["shared_of_another_layer", "gate_of_another_layer", "shared_gate_of_another_layer"]


def environment(threshold: int, verify: str = "sample") -> dict[str, str]:
    return {
        "FSE_PATCH_LAYOUT": "paired",
        "FSE_PATCH_CPU_THRESHOLD": str(threshold),
        "FSE_PATCH_VERIFY": verify,
    }


# By layout: the environment that asks for it.
LAYOUTS: dict[str, dict[str, str]] = {"merged": {}, "paired": environment(ALL)}


class PairedRuns:
    """Runs of one engine: stock once, paired with each threshold."""

    def __init__(self, runs: Runs, asked: set[str], env: dict[str, str]) -> None:
        self.runs, self.asked, self.env = runs, asked, env
        self.done: dict[tuple[str, int], dict[str, Any]] = {}

    def results(self, cases: list[Case], threshold: int, fused: bool = True) -> dict[str, Any]:
        """Results of one arm, by case name; of the cases that a test asks for, all at once."""
        key = (",".join(case.name for case in cases), threshold if fused else 0)
        if key not in self.done:
            env = self.env | environment(threshold)
            wanted = [case for case in cases if case.name in self.asked]
            self.done[key] = self.runs.arm(wanted, fused, env)
        return self.done[key]


def role_of(result: dict[str, Any], name: str = "main") -> dict[str, Any]:
    assert "error" not in result, f"{result['error']}\n{result['log']}"
    (role,) = [role for role in result["workers"][0]["roles"] if role["role"] == name]
    found: dict[str, Any] = role
    return found


def check_all_tokens(report: dict[str, Any]) -> None:
    """Every token ran paired, and answers as in stock."""
    assert report["failures"] == []
    assert report["mean_abs_logprob_diff"] <= LIMIT
    assert report["max_abs_logprob_diff"] <= 1e-4
    assert report["mean_abs_logprob_diff"] > 0  # it is not stock's own code that ran
    assert report["greedy_tokens_equal"]
    (role,) = [role for role in report["roles"] if role["role"] == "main"]
    assert (role["weight_layout"], set(role["calls_by_mode"])) == ("paired", {"paired"})
    assert role["paired"]["proof"]["canary"] == "passed"


def check_few_tokens(report: dict[str, Any], stock: dict[str, Any], ours: dict[str, Any]) -> None:
    """Decoding ran paired; what is above the threshold has the same bits as in stock."""
    assert report["failures"] == []
    assert ours["logprobs"] == stock["logprobs"]
    calls = role_of(ours)["calls_by_mode"]
    assert calls["paired"] > calls["stock"] > 0
    assert report["mean_abs_answer_diff"] <= LIMIT
    # The control sits in the answers: one shared weight times 1.01.
    assert report["control_diff"] > report["tolerance"]["mean"]


def check_caught(stock: dict[str, Any], ours: dict[str, Any]) -> None:
    """The proof has switched the pass off, and stock served."""
    role = role_of(ours)
    assert (role["paired"]["threshold"], role["paired"]["reason"]) == (0, "proof.failed")
    assert set(role["calls_by_mode"]) == {"stock"}
    for key in ("logprobs", "greedy", "rebatched"):
        assert ours[key] == stock[key]
