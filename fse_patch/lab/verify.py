"""Stock against fused on the real engine: two processes, the same tokens, one judgement for each job."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..fusion_core.decision.native import gets_wrong
from ..fusion_core.decision.outcome import Merged, Paired
from ..fusion_core.engines import facts_of
from ..fusion_core.proof.compare import Tolerance, answer_steps, difference, noise_of, summary
from ..settings import LM_HEAD
from .arm_process import LOG_LINES, Progress, log_of, run_process
from .cause import with_cause
from .ran_as_decided import by_stage, ran_as_decided
from .verify_head import judge_head

# The module that runs an arm, in the engine's process.
ARM = "fse_patch.lab.{engine}.verify_arm"
PROMPT_LENGTHS = (5, 17, 64, 100)
# A 1 % fault drowns in the rounding of 16 bit; there the control drops the first shared slot.
CONTROL_FACTORS = {"float32": 1.01}
CONTROL_16_BIT = 0.0


@dataclass(frozen=True)
class VerifyJob:
    """One checkpoint to verify, with the decision of each of its roles that the engine will build.

    Args:
        lm_head: FSE_PATCH_LM_HEAD is set: the fused arm has a head in 8 bits.
    """

    checkpoint: Path
    decisions: tuple[Merged | Paired, ...]
    vocab_size: int
    dtype: str
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    new_tokens: int = 12
    lm_head: bool = False

    def request(self) -> dict[str, Any]:
        """Return what an arm needs to run the job."""
        return {
            "checkpoint": str(self.checkpoint),
            "prompts": prompts(self.vocab_size),
            "new_tokens": self.new_tokens,
            "engine_args": {"dtype": self.dtype, **self.engine_args},
            "control_factor": self.control_factor,
        }

    def of_stock(self, engine: str) -> VerifyJob:
        """Return the job as stock can run it: without a fusion of its own that would be wrong here."""
        if not any(gets_wrong({}, decision) for decision in self.decisions):
            return self
        return replace(self, engine_args={**facts_of(engine).lab.apart_arguments, **self.engine_args})

    @property
    def control_factor(self) -> float:
        """Return what the control multiplies the weight of one shared slot by."""
        return CONTROL_FACTORS.get(self.dtype, CONTROL_16_BIT)


def prompts(vocab_size: int, seed: int = 3) -> list[list[int]]:
    """Return random prompts of token ids, the same in every run."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocab_size) for _ in range(n)] for n in PROMPT_LENGTHS]


def run_arm(
    engine: str,
    jobs: list[VerifyJob],
    fused: bool,
    env: Mapping[str, str],
    timeout: float,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """Run one arm over all jobs, in one process as long as it lives.

    A job whose process crashed or ran out of time has {"error", "log"}; the jobs after it run in a new one.
    """
    arm = "fused" if fused else "stock"
    done: list[dict[str, Any]] = []
    while len(done) < len(jobs):
        left = [job if fused else job.of_stock(engine) for job in jobs[len(done) :]]

        def tell(running: int, left: list[VerifyJob] = left) -> None:
            number = len(jobs) - len(left) + running + 1
            progress(f"{arm} {engine}: {left[running].checkpoint.name} ({number} of {len(jobs)})")

        results, log, ending = run_process(engine, left, fused, env, timeout, tell, ARM)
        if len(done) + len(results) < len(jobs):
            results.append({"error": f"the {arm} {engine} process {ending}"})
        for number, entry in enumerate(results):
            if "error" in entry:
                entry["error"] = with_cause(entry["error"], log_of(number, log))
                entry["log"] = "\n".join(log.splitlines()[-LOG_LINES:])
        done += results
    return done


def verify(
    jobs: list[VerifyJob],
    engine: str,
    engine_version: str,
    env: Mapping[str, str] | None = None,
    timeout: float = 1800.0,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """Run all jobs in the stock and in the fused engine and judge each.

    Args:
        engine_version: goes into the reports.
        env: environment of both arms, default this process's.
        timeout: seconds for one arm over all jobs.
        progress: is told in a line what runs.

    Returns:
        A report for each job, with the keys that the README lists.
    """
    environment = dict(os.environ if env is None else env)
    stock = run_arm(engine, jobs, False, environment, timeout, progress)
    fused = run_arm(engine, jobs, True, environment, timeout, progress)
    head = {"engine": engine, "engine_version": engine_version}
    return [{**head, **judge(job, a, b)} for job, a, b in zip(jobs, stock, fused, strict=True)]


def judge(job: VerifyJob, stock: dict[str, Any], fused: dict[str, Any]) -> dict[str, Any]:
    """Compare the arms of one job. ``failures`` says in words why it did not pass."""
    report: dict[str, Any] = {"checkpoint": str(job.checkpoint), "passed": False}
    for name, arm in (("stock", stock), ("fused", fused)):
        if "error" in arm:
            failures = [f"{name} engine: {arm['error']}"]
            return {**report, "ended": name, "failures": failures, "log": arm.get("log", "")}
    logprobs = difference(stock["logprobs"], fused["logprobs"])
    noise, noises = noise_of(stock)
    control = difference(stock["logprobs"], fused["control"])
    if any(role.get("weight_layout") == "paired" for w in fused["workers"] for role in w["roles"]):
        # Where prompts are many tokens, the engine's own layers run them, and answers alone show a fault.
        steps_with_fault = answer_steps(stock, fused["control_answers"])
        in_answers = summary([step for steps in steps_with_fault for step in steps])
        control = max(control, in_answers, key=lambda seen: seen.mean)
    tolerance = Tolerance.for_dtype(stock["dtype"], noise)
    per_answer = answer_steps(stock, fused)
    steps = [step for each in per_answer for step in each]
    answers = summary(steps)
    failures = (
        [] if tolerance.holds(logprobs) else [f"log-probabilities differ by {logprobs.mean:.3g} (mean)"]
    )
    # Greedy answers part after few steps: a mean of so few is off by chance.
    if not tolerance.holds_few(steps):
        failures.append(
            f"log-probabilities of answers differ by {answers.mean:.3g} (mean of {answers.tokens})"
        )
    if (differ := per_answer.count([])) > len(per_answer) / 2:
        failures.append(f"{differ} of {len(per_answer)} answers differ from their first token on")
    if not tolerance.caught(control):
        failures.append(
            f"the control (one slot weight x {job.control_factor}) was not seen: {control.mean:.3g}"
        )
    head, wrong = judge_head(stock, fused, tolerance)
    failures += wrong
    if job.lm_head and head is None:
        failures.append(f"{LM_HEAD} is set, and no process has a head of its own")
    if any(worker["roles"] for worker in stock["workers"]):
        failures.append("the stock arm was not stock")
    if not (stock["workers"] and fused["workers"]):
        failures.append("no worker told what it ran")
    for decision in job.decisions:
        failures += ran_as_decided(decision, fused["workers"])
    refused = [entry for worker in fused["workers"][:1] for entry in worker.get("refused", ())]
    if any(entry["role"] == decision.role for entry in refused for decision in job.decisions):
        # Nothing was fused: what the comparison says of it is noise beside the reason.
        failures = [f"{r['role']} model: refused: {r['reason']}: {r['detail']}" for r in refused]
    main = [role for worker in fused["workers"] for role in worker["roles"] if role["role"] == "main"]
    # One process of each pipeline stage: those that share its layers have loaded the same.
    firsts = [workers[0]["roles"] for workers in by_stage(fused["workers"]).values()]
    slots = sum(role["slots_loaded"] for roles in firsts for role in roles if role["role"] == "main")
    return {
        **report,
        "dtype": stock["dtype"],
        # What both arms ran with, and the user's engine may not.
        "environment": stock.get("environment", {}),
        "worker_pids": [worker["pid"] for worker in fused["workers"]],
        "fused_layers": sorted({layer for role in main for layer in role["fused_layers"]}),
        "calls_by_mode": main[0]["calls_by_mode"] if main else {},
        "captured_by_mode": main[0]["captured_by_mode"] if main else {},
        "slots_loaded": slots,
        "tokens": logprobs.tokens,
        "mean_abs_logprob_diff": logprobs.mean,
        "max_abs_logprob_diff": logprobs.max,
        "stock_noise": noise.mean,
        "stock_noises": noises,
        "answer_tokens": answers.tokens,
        "mean_abs_answer_diff": answers.mean,
        "max_abs_answer_diff": answers.max,
        "greedy_tokens_equal": stock["greedy"] == fused["greedy"],
        "control_diff": control.mean,
        "control_factor": job.control_factor,
        "tolerance": tolerance.to_dict(),
        # Answers with the LM head in 8 bits; everything above is with the engine's own.
        "lm_head": head,
        "roles": fused["workers"][0]["roles"] if fused["workers"] else [],
        # What the engine's own configuration refused, though the checkpoint fuses.
        "refused": refused,
        # Kernels that stand-ins ran in their place: the proof does not cover them.
        "replaced_operations": sorted(
            {op for worker in fused["workers"] for op in worker.get("replaced_operations", ())}
        ),
        "failures": failures,
        "passed": not failures,
    }
