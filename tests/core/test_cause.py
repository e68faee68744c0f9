"""The first cause of a failed engine, in logs as engines write them."""

from __future__ import annotations

from typing import Any

import pytest

from fse_patch.lab.cause import first_cause, is_follow_up, with_cause
from fse_patch.lab.verify import log_of
from fse_patch.lab.verify_arm import BEGUN

CORE = "(EngineCore pid=71) ERROR 11-29 20:04:05 [core.py:1186] "
VLLM_END = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
VLLM = f"""\
(EngineCore pid=71) INFO 11-29 20:04:01 [cpu_worker.py:120] vllm, main model: shared expert fused
{CORE}EngineCore failed to start.
{CORE}Traceback (most recent call last):
{CORE}  File "core.py", line 1160, in run_engine_core
{CORE}    engine_core = EngineCoreProc(*args, **kwargs)
{CORE}  File "load.py", line 94, in _fill
{CORE}fse_patch.errors.AuditError: main model: 1 shared slot tensors never written: layer 0 w2
(EngineCore pid=71) Process EngineCore:
(EngineCore pid=71) Traceback (most recent call last):
(EngineCore pid=71)   File "process.py", line 314, in _bootstrap
(EngineCore pid=71) fse_patch.errors.AuditError: main model: 1 shared slot tensors never written: layer 0 w2
[rank0]:[W1129 20:04:05.1 ProcessGroup.cpp:1] Warning: destroy_process_group() was not called
Traceback (most recent call last):
  File "verify_arm.py", line 26, in run_jobs
{VLLM_END}
fse_patch: tiny: {VLLM_END}
"""
SLOT = "AuditError: main model: 1 shared slot tensors never written: layer 0 w2"
SGLANG = """\
[2026-11-29 20:05:01] sglang, main model: shared expert fused: 2 sparse layers
[2026-11-29 20:05:03] Scheduler hit an exception: Traceback (most recent call last):
  File "scheduler.py", line 5841, in run_scheduler_process
    scheduler = Scheduler(
  File "canary.py", line 201, in judge
fse_patch.fusion_core.proof.canary.CanaryError: main model: layer 1 is 0.3 off (1e-06 allowed)

[2026-11-29 20:05:03] Received sigquit from a child process. It usually means the child failed.
"""
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
    "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.",
    "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9).",
    "RuntimeError: Initialization failed. Please see the error messages above.",
    "EOFError",
    "the fused sglang process ended with status -9",
]


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (VLLM, SLOT),
        (SGLANG, "CanaryError: main model: layer 1 is 0.3 off (1e-06 allowed)"),
        (CHAIN, "KeyError: 'layers.0.mlp.experts.gate_up_proj'"),
        (f"CRITICAL 2026-11-29 [fse_patch 71] the model is not served: {SLOT}\nKilled", SLOT),
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
    others = "\n".join(line for line in VLLM.splitlines() if "fse_patch.errors" not in line)
    assert first_cause(tried + others) == "ImportError: no such kernel"
    assert first_cause(others) == ""


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
    log = f"start\n{first}\n{SGLANG}{second}\n{VLLM}"
    causes: list[Any] = [first_cause(log_of(number, log)) for number in (0, 1)]
    assert causes == ["CanaryError: main model: layer 1 is 0.3 off (1e-06 allowed)", SLOT]
    # An arm that does not tell its jobs apart.
    assert log_of(1, VLLM) == VLLM
