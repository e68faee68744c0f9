"""The judgement of a verification: it passes when all is right, and each thing that is wrong fails it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.lab.ran_as_decided import ran_as_decided
from fse_patch.lab.verify import PROMPT_LENGTHS, VerifyJob, judge, prompts

from .moe import decision

Arm = dict[str, Any]
LAYOUT = ExpertLayout(4, 2, 2, 8, 4)
MAIN = decision(LAYOUT, layers=(0, 2))
DRAFT = decision(LAYOUT, layers=(0,), role="draft")
LOGPROBS = [[-1.0, -2.0], [-3.0, -0.5, -0.25]]


def job(dtype: str = "float32", drafts: bool = False) -> VerifyJob:
    return VerifyJob(Path("model"), (MAIN, DRAFT) if drafts else (MAIN,), 100, dtype)


def shifted(by: float, logprobs: list[list[float]] = LOGPROBS) -> list[list[float]]:
    return [[x + by for x in p] for p in logprobs]


def role_report(decided: Any, **changes: Any) -> dict[str, Any]:
    layers = list(decided.moe.layers)
    return {
        "role": decided.role,
        "built_layers": layers,
        "fused_layers": layers,
        "calls_by_mode": {"fused": 7 * len(layers)},
        "captured_by_mode": {"fused": len(layers)},
        "slots_loaded": 2 * len(layers),
        "loads": 1,
        **changes,
    }


def arm(fused: bool, by: float = 0.0, workers: int = 2, drafts: bool = False, dtype: str = "float32") -> Arm:
    """What an arm leaves when all is right."""
    roles = [role_report(d) for d in ((MAIN, DRAFT) if drafts else (MAIN,))] if fused else []
    result = {
        "dtype": dtype,
        "logprobs": shifted(by),
        "rebatched": shifted(by),
        "greedy": [[1, 2], [3, 4]],
        "greedy_best": [[[(1, -1.0 + by)], [(2, -2.0 + by), (9, -3.0)]], [[(3, -1.5)], [(4, -0.5 + by)]]],
        "workers": [{"pid": 11 + n, "roles": copy.deepcopy(roles)} for n in range(workers)],
        "control": shifted(by + (0.01 if fused else 0.0)),
    }
    return result | ({"jittered": shifted(by + 1e-4)} if dtype != "float32" else {})


def test_a_run_that_is_right_passes() -> None:
    report = judge(job(), arm(False), arm(True, 1e-6))
    assert report["failures"] == []
    assert report["passed"] is True
    assert report["worker_pids"] == [11, 12]
    assert report["fused_layers"] == [0, 2]
    assert report["calls_by_mode"] == {"fused": 14}
    assert report["captured_by_mode"] == {"fused": 2}
    assert report["slots_loaded"] == 4
    assert report["environment"] == {}
    assert report["tokens"] == 5
    assert report["greedy_tokens_equal"] is True
    assert report["answer_tokens"] == 2
    assert report["mean_abs_answer_diff"] == pytest.approx(1e-6)
    assert report["mean_abs_logprob_diff"] == pytest.approx(1e-6)
    assert report["control_diff"] == pytest.approx(0.010001)


def test_a_report_says_what_both_arms_ran_with() -> None:
    changed = {"A_VARIABLE": "0"}
    report = judge(job(), {**arm(False), "environment": changed}, arm(True))
    assert report["environment"] == changed


def test_a_draft_that_is_right_passes() -> None:
    report = judge(job(drafts=True), arm(False), arm(True, drafts=True))
    assert report["failures"] == []
    assert [r["role"] for r in report["roles"]] == ["main", "draft"]
    assert report["slots_loaded"] == 4  # the main model's


def each_role(arm: Arm, number: int | None = None, name: str = "main") -> list[dict[str, Any]]:
    """The reports of a role in all workers, or in one."""
    workers = arm["workers"] if number is None else [arm["workers"][number]]
    return [role for worker in workers for role in worker["roles"] if role["role"] == name]


def never_fired(stock: Arm, fused: Arm) -> None:
    for worker in fused["workers"]:
        worker["roles"] = []


def one_worker_not_fused(stock: Arm, fused: Arm) -> None:
    fused["workers"][1]["roles"] = []


def built_and_never_ran(stock: Arm, fused: Arm) -> None:
    for role in each_role(fused):
        role["fused_layers"], role["calls_by_mode"] = [], {}


def a_layer_less(stock: Arm, fused: Arm) -> None:
    each_role(fused, 1)[0]["fused_layers"] = [0]


def another_layer(stock: Arm, fused: Arm) -> None:
    each_role(fused, 0)[0]["fused_layers"] = [0, 1]


def a_layer_more(stock: Arm, fused: Arm) -> None:
    each_role(fused, 0)[0]["fused_layers"] = [0, 1, 2]


def a_slot_less(stock: Arm, fused: Arm) -> None:
    each_role(fused, 1)[0]["slots_loaded"] = 3


def a_slot_more(stock: Arm, fused: Arm) -> None:
    each_role(fused, 1)[0]["slots_loaded"] = 5


def no_draft(stock: Arm, fused: Arm) -> None:
    fused["workers"][0]["roles"].pop()


def draft_unloaded(stock: Arm, fused: Arm) -> None:
    each_role(fused, 0, "draft")[0]["slots_loaded"] = 0


def draft_unproved(stock: Arm, fused: Arm) -> None:
    each_role(fused, 1, "draft")[0]["canary"] = {"state": "pending"}


def stock_is_fused(stock: Arm, fused: Arm) -> None:
    stock["workers"][1]["roles"] = [role_report(MAIN)]


def no_workers(stock: Arm, fused: Arm) -> None:
    fused["workers"] = []


def stock_without_workers(stock: Arm, fused: Arm) -> None:
    stock["workers"] = []


def control_without_effect(stock: Arm, fused: Arm) -> None:
    fused["control"] = shifted(1e-6)


def control_at_the_limit(stock: Arm, fused: Arm) -> None:
    fused["control"] = shifted(4.9e-6)


def control_is_nan(stock: Arm, fused: Arm) -> None:
    fused["control"] = shifted(float("nan"))


def too_far(stock: Arm, fused: Arm) -> None:
    fused["logprobs"] = shifted(5.1e-6)


def one_token_too_far(stock: Arm, fused: Arm) -> None:
    stock["logprobs"] = stock["rebatched"] = [[-1.0] * 100]
    fused["control"] = [[-1.1] * 100]
    fused["logprobs"] = [[-1.0] * 99 + [-1.00011]]


def a_nan_token(stock: Arm, fused: Arm) -> None:
    fused["logprobs"][1][2] = float("nan")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (never_fired, "was not fused"),
        (one_worker_not_fused, "process 12: was not fused"),
        (built_and_never_ran, "layers [] ran fused, [0, 2] were decided"),
        (a_layer_less, "process 12: layers [0] ran fused"),
        (another_layer, "process 11: layers [0, 1] ran fused"),
        (a_layer_more, "process 11: layers [0, 1, 2] ran fused"),
        (a_slot_less, "3 of 4 shared slots"),
        (a_slot_more, "5 of 4 shared slots"),
        (no_draft, "draft model, process 11: was not fused"),
        (draft_unloaded, "draft model, process 11: 0 of 2 shared slots"),
        (draft_unproved, "draft model, process 12: was not compared with its checkpoint"),
        (stock_is_fused, "stock arm was not stock"),
        (no_workers, "no worker"),
        (stock_without_workers, "no worker"),
        (control_without_effect, "the control"),
        (control_at_the_limit, "the control"),
        (control_is_nan, "the control"),
        (too_far, "log-probabilities differ"),
        (one_token_too_far, "log-probabilities differ"),
        (a_nan_token, "log-probabilities differ"),
    ],
)
def test_a_fault_fails_it(fault: Callable[[Arm, Arm], None], words: str) -> None:
    stock, fused = arm(False, drafts=True), arm(True, drafts=True)
    assert judge(job(drafts=True), stock, fused)["passed"]
    fault(stock, fused)
    report = judge(job(drafts=True), stock, fused)
    assert report["passed"] is False
    assert any(words in failure for failure in report["failures"]), report["failures"]


def test_the_refusal_of_a_worker_is_told() -> None:
    fused = arm(True, workers=1)
    fused["workers"][0] |= {
        "roles": [],
        "refused": [
            {"role": "draft", "reason": "lora", "detail": "not this one"},
            {"role": "main", "reason": "slower.unmeasured", "detail": "never measured"},
        ],
    }
    (problem,) = ran_as_decided(MAIN, fused["workers"])
    assert problem == "main model, process 11: was not fused: slower.unmeasured: never measured"


@pytest.mark.parametrize("name", ["stock", "fused"])
def test_an_arm_that_failed_is_named_with_its_log(name: str) -> None:
    arms = {"stock": arm(False), "fused": arm(True)}
    arms[name] = {"error": "it burned", "log": "line 1\nline 2"}
    report = judge(job(), arms["stock"], arms["fused"])
    assert report["passed"] is False
    assert report["failures"] == [f"{name} engine: it burned"]
    assert report["log"] == "line 1\nline 2"


def test_16_bit_is_measured_by_the_noise_of_stock() -> None:
    # Half of what one more rounding does, where other batches do nothing.
    stock = arm(False, dtype="bfloat16")
    fused = arm(True, 0.9e-4, dtype="bfloat16")
    report = judge(job("bfloat16"), stock, fused)
    assert report["failures"] == []
    assert report["stock_noise"] == pytest.approx(0.5e-4)
    assert report["stock_noises"] == {"rebatched": 0.0, "jittered": pytest.approx(1e-4)}
    assert not judge(job("bfloat16"), stock, arm(True, 1.1e-4, dtype="bfloat16"))["passed"]
    fused["control"] = shifted(4e-4)
    assert not judge(job("bfloat16"), stock, fused)["passed"]
    # Of both the larger is the yardstick.
    for batches, noise in ((1e-5, 0.5e-4), (2e-4, 2e-4)):
        stock["rebatched"] = shifted(batches)
        assert judge(job("bfloat16"), stock, fused)["stock_noise"] == pytest.approx(noise)


def answers(*changes: tuple[int, list[int], list[list[tuple[int, float]]]]) -> list[str]:
    """What is wrong with a fused arm whose answers of these numbers are these tokens and best ones."""
    fused = arm(True, dtype="bfloat16")
    for number, tokens, best in changes:
        fused["greedy"][number], fused["greedy_best"][number] = tokens, best
    found: list[str] = judge(job("bfloat16"), arm(False, dtype="bfloat16"), fused)["failures"]
    return found


def test_steps_of_an_answer_are_compared_by_the_token_that_stock_took() -> None:
    first = [(3, -1.5)]
    assert answers((1, [3, 4], [first, [(4, -0.5 - 5e-4)]])) == [
        "log-probabilities of answers differ by 0.00025 (mean of 2)"
    ]
    # Tokens that part in a near tie: stock's is hardly less likely. The rest is another text.
    assert answers((1, [3, 5], [first, [(5, -0.49), (4, -0.5)]])) == []
    # Each has a best token as likely as the other's, and gives the other's 2 nats less.
    assert answers((1, [3, 5], [first, [(5, -0.5), (4, -2.5)]])) == [
        "log-probabilities of answers differ by 1 (mean of 2)"
    ]
    # Stock's token is none of fused's best: at least so far off.
    assert answers((1, [3, 5], [first, [(5, -0.5), (6, -1.5)]])) == [
        "log-probabilities of answers differ by 0.5 (mean of 2)"
    ]
    nan = float("nan")
    for best in ([(4, nan)], [(5, nan), (6, -1.0)], [(5, -1.0), (6, nan)]):
        assert answers((1, [3, best[0][0]], [first, best])) == [
            "log-probabilities of answers differ by nan (mean of 2)"
        ]


def test_an_answer_that_differs_from_its_first_token_on_has_no_steps() -> None:
    other = [[(7, -1.0)], [(4, -9.0)]]
    assert answers((1, [7, 4], other)) == []
    assert answers((0, [7, 4], other), (1, [7, 4], other)) == [
        "2 of 2 answers differ from their first token on"
    ]


@pytest.mark.parametrize("name", ["rebatched", "jittered"])
def test_a_yardstick_that_is_no_number_lets_nothing_pass(name: str) -> None:
    stock = {**arm(False, dtype="bfloat16"), name: shifted(float("nan"))}
    assert not judge(job("bfloat16"), stock, arm(True, dtype="bfloat16"))["passed"]


def test_float32_takes_no_noise_for_a_tolerance() -> None:
    stock, fused = arm(False), arm(True, 1e-4)
    stock["rebatched"] = shifted(1.0)
    assert not judge(job(), stock, fused)["passed"]


def test_the_control_of_a_job() -> None:
    assert job().control_factor == 1.01
    assert job("bfloat16").control_factor == 0.0
    assert job().request()["control_factor"] == 1.01


def test_prompts_are_the_same_in_every_run() -> None:
    assert prompts(100) == prompts(100) != prompts(100, seed=4)
    assert [len(p) for p in prompts(64)] == list(PROMPT_LENGTHS)
    assert all(0 <= token < 64 for p in prompts(64) for token in p)


def test_engine_arguments_may_replace_the_dtype() -> None:
    wanted = VerifyJob(Path("m"), (MAIN,), 100, "float32", {"dtype": "bfloat16", "seed": 1})
    assert wanted.request()["engine_args"] == {"dtype": "bfloat16", "seed": 1}
