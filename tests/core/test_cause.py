"""The first cause of a failed engine, in logs as engines write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fse_patch.lab.cause import first_cause, is_follow_up, with_cause
from fse_patch.lab.verify import log_of
from fse_patch.lab.verify_arm import BEGUN

LOGS = Path(__file__).parent / "logs"
# What `verify` was told by engines whose slots were filled in part. A job's error, and how a process ended.
VLLM, SGLANG = ((LOGS / f"{name}.txt").read_text() for name in ("vllm-0.32.0", "sglang-0.5.20"))
VLLM_END = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
SLOT = (
    "AuditError: main model: 2 shared slot tensors never written, first: layer 0 slot 8 w2_weight; "
    "the model is not served"
)
# What another project's code raises, within what is tried first and with what follows from it.
CHAIN = """\
(Worker_TP1 pid=5) ERROR 11-29 20:06:00 [executor.py:870] Traceback (most recent call last):
(Worker_TP1 pid=5) ERROR 11-29 20:06:00 [executor.py:870]   File "utils.py", line 9, in load
(Worker_TP0 pid=4) INFO 11-29 20:06:00 [weights.py:1] Loading took 2 s
(Worker_TP1 pid=5) ERROR 11-29 20:06:00 [executor.py:870] KeyError: 'layers.0.mlp.experts.gate_up_proj'
(Worker_TP1 pid=5)
(Worker_TP1 pid=5) During handling of the above exception, another exception occurred:
(Worker_TP1 pid=5)
(Worker_TP1 pid=5) Traceback (most recent call last):
(Worker_TP1 pid=5)   File "utils.py", line 12, in load
(Worker_TP1 pid=5) ValueError: the checkpoint cannot be loaded
(EngineCore pid=3) Traceback (most recent call last):
(EngineCore pid=3)   File "executor.py", line 446, in get_response
(EngineCore pid=3) RuntimeError: Worker failed with 'x', please check the stack trace above for the root cause
"""
FOLLOW_UPS = [
    VLLM_END,
    "RuntimeError: Worker failed with 'x', please check the stack trace above for the root cause",
    "Exception: WorkerProc initialization failed due to an exception in a background process. "
    "See stack trace for root cause.",
    "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.",
    "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9).",
    "RuntimeError: Initialization failed. Please see the error messages above.",
    "EOFError",
    "the fused sglang process ended with status -9",
]


def others(log: str) -> str:
    """A log in which the engine's own code has raised the error, and not ours."""
    kept = (line for line in log.splitlines() if " stopped: " not in line)
    return "\n".join(kept).replace(f"fse_patch.errors.{SLOT}", "KeyError: 'experts.8.w2'")


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (VLLM, SLOT),
        (SGLANG, SLOT),
        (others(VLLM), "KeyError: 'experts.8.w2'"),
        (others(SGLANG), "KeyError: 'experts.8.w2'"),
        (CHAIN, "KeyError: 'layers.0.mlp.experts.gate_up_proj'"),
        (f"CRITICAL 2026-11-29 [fse_patch 71] stopped: {SLOT}\nKilled", SLOT),
        ("", ""),
        ("all is well: no Error\nfse_patch: tiny: nothing", ""),
        ("Traceback (most recent call last):\n  File x\n", ""),
        ("Traceback (most recent call last):\n  File x\nAssertionError\n", "AssertionError"),
    ],
)
def test_the_first_cause_is_found(log: str, cause: str) -> None:
    assert first_cause(log) == cause


def test_an_error_of_ours_comes_before_those_of_others() -> None:
    """An engine tries things, and prints what it has caught; ours end it."""
    tried = "Traceback (most recent call last):\n  File x\nImportError: no such kernel\n"
    assert first_cause(tried + VLLM) == SLOT
    # The controls: without ours, and where all that there is follows from what nobody wrote.
    assert first_cause(tried + others(VLLM)) == "ImportError: no such kernel"
    assert first_cause("\n".join(others(VLLM).splitlines()[-32:])) == ""


def test_what_an_engine_warns_of_has_not_ended_it() -> None:
    place = "(MainProcess pid=9) WARNING 11-30 01:33:16 [base.py:380] "
    warned = [
        f"{place}Traceback (most recent call last):",
        f"{place}  File x",
        f"{place}ValueError: no tokenizer",
    ]
    assert first_cause("\n".join(warned)) == ""
    assert first_cause("\n".join([*warned, others(SGLANG)])) == "KeyError: 'experts.8.w2'"
    # The control.
    assert first_cause("\n".join(warned).replace("WARNING", "ERROR")) == "ValueError: no tokenizer"


@pytest.mark.parametrize("error", FOLLOW_UPS)
def test_an_error_that_follows_from_another_is_replaced(error: str) -> None:
    assert is_follow_up(error)
    named = with_cause(error, VLLM)
    assert SLOT in named
    assert (named == SLOT) == ("ended with status" not in error)
    assert with_cause(error, "nothing was written") == error


def test_an_error_that_says_what_it_is_stays() -> None:
    for error in ("ValueError: prompts are too long", "KeyError: 'experts'", SLOT):
        assert not is_follow_up(error)
        assert with_cause(error, SGLANG) == error


def test_the_log_of_one_job_is_looked_at() -> None:
    first, second = BEGUN.format(number=0), BEGUN.format(number=1)
    assert first in VLLM
    log = f"start\n{first}\n{others(SGLANG)}{second}\n{CHAIN}"
    causes: list[Any] = [first_cause(log_of(number, log)) for number in (0, 1)]
    assert causes == ["KeyError: 'experts.8.w2'", "KeyError: 'layers.0.mlp.experts.gate_up_proj'"]
    # An arm that does not tell its jobs apart.
    assert log_of(1, CHAIN) == CHAIN
