"""The LM head in 8 bits, judged: answers of the whole engine with it on, against stock's, and a control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fusion_core.proof.compare import HEAD_DIFFERENCE, Difference, Tolerance, answer_steps, summary

# The control moves answers by at least so many times what the head does.
CONTROL_FACTOR = 10.0


def judge_head(
    stock: Mapping[str, Any], fused: Mapping[str, Any], tolerance: Tolerance
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what is reported of the head, None where it was not asked for, and in words why it did not pass.

    Args:
        stock, fused: results of the arms.
        tolerance: of the arms with the engine's own head.
    """
    held = [head for heads in fused.get("lm_heads", ()) for head in heads]
    if not held:
        return None, []
    first = {
        key: held[0][key] for key in ("format", "threshold", "threshold_from", "cost", "reason", "detail")
    }
    refused = [
        f"LM head: refused: {head['reason']}: {head['detail']}" for head in held if not head["threshold"]
    ]
    if "head_answers" not in fused:
        return first, list(dict.fromkeys(refused))
    per_answer = answer_steps(stock, fused["head_answers"])
    answers, control = _mean(per_answer), _mean(answer_steps(stock, fused["head_control"]))
    limit = HEAD_DIFFERENCE + tolerance.mean
    calls = [head["calls"].get(head["format"], 0) for w in fused["head_workers"] for head in w["lm_heads"]]
    failures = list(dict.fromkeys(refused))
    if not answers.mean <= limit:
        failures.append(
            f"LM head: log-probabilities of answers differ by {answers.mean:.3g}; {limit:.3g} is allowed"
        )
    if not control.mean > max(limit, CONTROL_FACTOR * answers.mean):
        failures.append(f"LM head: the control (scales doubled) was not seen: {control.mean:.3g}")
    if (differ := per_answer.count([])) > len(per_answer) / 2:
        failures.append(f"LM head: {differ} of {len(per_answer)} answers differ from their first token on")
    if not all(calls):
        failures.append("LM head: a process never ran it in 8 bits")
    told = {
        **first,
        "answer_tokens": answers.tokens,
        "mean_abs_answer_diff": answers.mean,
        "max_abs_answer_diff": answers.max,
        "control_diff": control.mean,
        "limit": limit,
        "calls": calls,
    }
    return told, failures


def _mean(per_answer: list[list[float]]) -> Difference:
    return summary([step for steps in per_answer for step in steps])
