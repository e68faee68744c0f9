"""What the arms of a verification share: jobs in, results out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Job = dict[str, Any]
# In the log, before anything of a job, by its number in the process.
BEGUN = "fse_patch: job {number} begins"
BEST = 5  # tokens of each step of an answer whose log-probabilities are compared


class HasRequest(Protocol):
    """What a process is started for."""

    def request(self) -> dict[str, Any]:
        """Return what an arm needs to run the job."""


def measure_head(
    switch: Callable[[str], object],
    score: Callable[[], dict[str, Any]],
    report: Callable[[], list[dict[str, Any]]],
) -> dict[str, Any]:
    """Return the answers with the LM head in 8 bits, and those of its control: all scales are doubled.

    Args:
        score: one prompt at a time, so that the fewest tokens are decoded at once.
        switch: sets the head in every process, as `model_process.head` says.
        report: of every process, what it really ran.
    """
    switch("on")
    answers, workers = score(), report()
    switch("control")
    control = score()
    switch("off")
    return {"head_answers": answers, "head_control": control, "head_workers": workers}


def has_head(workers: list[dict[str, Any]]) -> bool:
    """Return whether a process has an LM head that may run in 8 bits."""
    return any(head["threshold"] for worker in workers for head in worker["lm_heads"])


def run_jobs(request: Path, result: Path, run_job: Callable[[Job], dict[str, Any]]) -> None:
    """Run all jobs; what is done is on disk after each, so a crash loses only its own job.

    Args:
        request: a list of jobs {checkpoint, prompts, new_tokens, engine_args, control_factor}.
        result: gets one entry for each, or {"error": ...}.
    """
    done: list[dict[str, Any]] = []
    for number, job in enumerate(json.loads(request.read_text())):
        print(BEGUN.format(number=number), file=sys.stderr, flush=True)
        try:
            done.append(run_job(job))
        except Exception as error:
            done.append({"error": f"{type(error).__name__}: {error}"})
            print(f"fse_patch: {job['checkpoint']}: {done[-1]['error']}", file=sys.stderr)
        # Renamed into place: a crash while writing must not leave half a file.
        part = result.with_suffix(".part")
        part.write_text(json.dumps(done))
        part.replace(result)
