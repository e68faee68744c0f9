"""Arms of a verification as processes: a crash or a hang costs its own job, and nothing is left running."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fse_patch.fusion_core.decision.layout import ExpertLayout
from fse_patch.lab import arm_process, verify

from .moe import decision

DECISION = decision(ExpertLayout(4, 1, 2, 8, 4))
# Answers each job as its checkpoint's name says; writes after each, as the real one does.
FAKE_ARM = """
import json, os, subprocess, sys, time
from pathlib import Path

request, result = map(Path, sys.argv[1:])
done = []


def child(name):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    Path(os.environ["NOTES"], name).write_text(str(process.pid))


for job in json.loads(request.read_text()):
    name = Path(job["checkpoint"]).name
    print("working on", name, flush=True)
    Path(os.environ["NOTES"], f"{name}.env").write_text(os.environ["FSE_PATCH"])
    if name.startswith("crash"):
        child(name)
        os._exit(7)
    if name.startswith("hang"):
        child(name)
        time.sleep(120)
    if name.startswith("cause"):
        print(os.environ["CAUSE"], flush=True)
    if name.startswith("early"):
        sys.exit(0)
    errors = {"bad": "it burned", "cause": "RuntimeError: failed. See root cause above."}
    done.append({"error": errors[name]} if name in errors else {"name": name, "pid": os.getpid()})
    part = result.with_suffix(".part")
    part.write_text(json.dumps(done))
    part.replace(result)
"""

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


@pytest.fixture
def run(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "fake_arm.py").write_text(FAKE_ARM)
    monkeypatch.setattr(verify, "ARM", "fake_arm")
    own = {"PYTHONPATH": str(tmp_path), "NOTES": str(notes)}

    def run(names: list[str], fused: bool = True, timeout: float = 60.0, **more: Any) -> list[dict[str, Any]]:
        jobs = [verify.VerifyJob(Path(n), (DECISION,), 100, "float32") for n in names]
        return verify.run_arm("vllm", jobs, fused, {**os.environ, **own}, timeout, **more)

    return run


def is_running(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ended(pid: int) -> bool:
    """Whether a process that was killed is gone, which may take a moment."""
    for _ in range(50):
        if not is_running(pid):
            return True
        time.sleep(0.1)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def test_all_jobs_run_in_one_process(run: Run) -> None:
    told: list[str] = []
    results = run(["a", "b", "c"], progress=told.append)
    assert [r["name"] for r in results] == ["a", "b", "c"]
    assert len({r["pid"] for r in results}) == 1
    assert told[0] == "fused vllm: a (1 of 3)"


@pytest.mark.parametrize(
    ("engine", "argument"), [("sglang", "disable_shared_experts_fusion"), ("vllm", None)]
)
def test_stock_runs_without_a_fusion_of_its_own_that_would_be_wrong(
    engine: str, argument: str | None
) -> None:
    apart = replace(DECISION, stored_alike=False)
    job = verify.VerifyJob(Path("a"), (DECISION, apart), 100, "float32", {"tp_size": 2})
    asked = job.of_stock(engine).request()["engine_args"]
    assert asked == {"dtype": "float32", "tp_size": 2, **({argument: True} if argument else {})}
    # What the user asks for goes before, and where both are stored alike nothing changes.
    if argument:
        asked = replace(job, engine_args={argument: False}).of_stock(engine).request()["engine_args"]
        assert asked[argument] is False
    alike = replace(job, decisions=(DECISION,))
    assert alike.of_stock(engine) == alike


@pytest.mark.parametrize(("fused", "value"), [(True, "vllm"), (False, "0")])
def test_the_environment_alone_says_which_arm_it_is(run: Run, notes: Path, fused: bool, value: str) -> None:
    run(["a"], fused=fused)
    assert (notes / "a.env").read_text() == value


def test_a_crash_costs_its_own_job_only(run: Run) -> None:
    told: list[str] = []
    before, crashed, after, last = run(["a", "crash", "b", "c"], progress=told.append)
    assert [before["name"], after["name"], last["name"]] == ["a", "b", "c"]
    assert before["pid"] != after["pid"] == last["pid"]
    assert crashed["error"] == "the fused vllm process ended with status 7"
    assert "working on crash" in crashed["log"]
    assert "log" not in before
    assert "fused vllm: b (3 of 4)" in told


@pytest.mark.parametrize("names", [["crash"], ["crash", "crash2"], ["a", "crash"]], ids=str)
def test_a_crash_in_the_end_or_in_a_row(run: Run, names: list[str]) -> None:
    results = run(names)
    assert ["error" in r for r in results] == [n.startswith("crash") for n in names]


def test_an_arm_that_ends_without_a_word_has_failed(run: Run) -> None:
    early, after = run(["early", "a"], fused=False)
    assert early["error"] == "the stock vllm process ended with status 0"
    assert after["name"] == "a"


def test_an_error_of_a_job_carries_the_log_and_ends_nothing(run: Run) -> None:
    bad, after = run(["bad", "a"])
    assert bad["error"] == "it burned"
    assert "working on bad" in bad["log"]
    assert after["name"] == "a"


def test_an_error_that_hides_its_cause_names_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    far = "\n".join(
        ["fse_patch.errors.AuditError: main model: no slot", *(["..."] * 2 * arm_process.LOG_LINES)]
    )
    monkeypatch.setenv("CAUSE", far)
    failed, after = run(["cause", "a"])
    assert failed["error"] == "AuditError: main model: no slot"
    assert "AuditError" not in failed["log"]  # its end alone
    assert after["name"] == "a"
    # The control: nothing was written.
    monkeypatch.setenv("CAUSE", "...")
    assert run(["cause"])[0]["error"] == "RuntimeError: failed. See root cause above."


@needs_proc
def test_at_the_timeout_the_whole_group_ends(run: Run, notes: Path) -> None:
    begun = time.monotonic()
    done, hanging, after = run(["a", "hang", "b"], timeout=3.0)
    assert time.monotonic() - begun < 30
    assert (done["name"], after["name"]) == ("a", "b")
    assert hanging["error"] == "the fused vllm process was not finished in 3 s; raise --timeout"
    assert ended(int((notes / "hang").read_text()))


@needs_proc
def test_a_crash_leaves_no_child_behind(run: Run, notes: Path) -> None:
    run(["crash"])
    assert ended(int((notes / "crash").read_text()))


@needs_proc
def test_control_a_process_that_runs_is_seen() -> None:
    assert is_running(os.getpid())
    assert not is_running(2**22 + 1)


@needs_proc
def test_an_interrupt_ends_the_arm(run: Run, notes: Path) -> None:
    def interrupted(_: str) -> None:
        for _ in range(100):
            if (notes / "hang").exists():
                raise KeyboardInterrupt
            time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        run(["hang"], progress=interrupted)
    assert ended(int((notes / "hang").read_text()))


def test_verify_judges_each_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def arm(engine: str, jobs: list[Any], fused: bool, *_: Any) -> list[dict[str, Any]]:
        asked.append(fused)
        return [{"error": f"{'fused' if fused else 'stock'} {n}", "log": ""} for n in range(len(jobs))]

    monkeypatch.setattr(verify, "run_arm", arm)
    jobs = [verify.VerifyJob(Path(n), (DECISION,), 100, "float32") for n in "ab"]
    reports = verify.verify(jobs, "vllm", "1.2", env={})
    assert asked == [False, True]
    assert [r["failures"] for r in reports] == [["stock engine: stock 0"], ["stock engine: stock 1"]]
    assert {r["engine_version"] for r in reports} == {"1.2"}
