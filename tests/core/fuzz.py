"""Random checkpoints and policies through the decision, until time or cases run out.

    python -m tests.core.fuzz [--cases N] [--seconds S] [--seed TEXT] [--jobs J]

A case fails if anything but an FsePatchError of one line comes out, if it takes LIMIT seconds of the
processor, or if a role fuses that the oracle says must not; the oracle shares no code with the decision. A
failure prints how to see it again. Exit status: 0 none, 1 one or more.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fse_patch.cli.plan import plan_report
from fse_patch.errors import FsePatchError
from fse_patch.fusion_core.checkpoint.families import Role
from fse_patch.fusion_core.checkpoint.weight_files import AUTO
from fse_patch.fusion_core.decision import decide
from fse_patch.fusion_core.decision.explain import explain
from fse_patch.fusion_core.decision.outcome import Merged, MoeSpec
from fse_patch.fusion_core.decision.policy import Policy
from fse_patch.fusion_core.decision.policy_file import load_policy
from fse_patch.fusion_core.evidence.gather import read_evidence
from fse_patch.patches import ENGINES

from .checkpoints import write_checkpoint, write_shard
from .fuzz_cases import Case, layers_in, make
from .fuzz_files import FileSet, write_files
from .fuzz_oracle import loaded_files, reasons_not_to_fuse
from .outcomes import code

LIMIT = 5.0
# Cases that one process takes at once, and seconds between two lines of progress.
BATCH, HEARTBEAT = 2000, 30
_SHARED_MEMORY = Path("/dev/shm")


class _Hangs(BaseException):
    """Not an Exception: nothing on the way may swallow it."""


@dataclass
class Result:
    """What became of the cases of one run: outcomes by reason code, and failures in words."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        self.cases += other.cases
        self.outcomes += other.outcomes
        self.failures += other.failures


class Runner:
    """Runs cases in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.default = load_policy()
        self.policies: dict[str, Policy] = {}

    def run(self, case: Case) -> str:
        """The main model's reason code, or "error".

        Raises:
            AssertionError: the case fused and must not have, or an error has more than one line.
        """
        self._write(case)
        try:
            policy = self._policy(case)
        except FsePatchError as error:
            return _one_line(error)
        # What an engine loads is its own business where there are several files.
        outcomes = [self._run(case, engine, policy) for engine in (ENGINES if case.files else ENGINES[:1])]
        return outcomes[0]

    def _run(self, case: Case, engine: str, policy: Policy) -> str:
        load_format = case.files.load_format if case.files else AUTO
        try:
            evidence = read_evidence(self.folder, engine, load_format)
            roles: tuple[Role, ...] = tuple(evidence.roles) or ("main",)
            decisions = {r: decide.decide_evidence(evidence, engine, r, policy) for r in roles}
            json.dumps([plan_report(d) for d in decisions.values()])
            json.dumps(explain(evidence, "sglang", "main", policy))
        except FsePatchError as error:
            return _one_line(error)
        for role, decision in decisions.items():
            detail = decision.to_dict()["detail"]
            assert len(detail.splitlines()) == 1, f"a detail of two lines: {detail!r}"
            if isinstance(decision, Merged):
                self._check(case, engine, role)
        if case.pairs is not None and case.policy is None and "main" in decisions:
            pairs = isinstance(decisions["main"].pairing, MoeSpec)
            assert pairs == case.pairs, f"main {'pairs' if pairs else 'does not pair'}"
        return code(decisions["main"])

    def _check(self, case: Case, engine: str, role: Role) -> None:
        assert not (case.forbidden and role == "main"), f"{role} fuses: {case.forbidden}"
        if case.files is not None:
            return self._check_files(case, case.files, engine, role)
        # Flipped bytes are not in what the oracle sees; layers that became dense are not the decision's.
        if case.tensors and not case.raw and layers_in(case.config) == case.layers:
            wrong = reasons_not_to_fuse(case.config, case.tensors, role == "draft")
            assert not wrong, f"{role} fuses: {wrong}"
        return None

    def _check_files(self, case: Case, files: FileSet[Any], engine: str, role: Role) -> None:
        """Hold a decision to fuse against the tensors that the engine's loader would read."""
        names = loaded_files(files, engine, case.config)
        assert names is not None, f"{role} fuses: {engine} loads nothing from there, or what has no headers"
        tensors: dict[str, Any] = {}
        for name in names:
            twice = tensors.keys() & files.tensors[name].keys()
            assert not twice, f"{role} fuses: {engine} loads {min(twice)} twice"
            tensors |= files.tensors[name]
        if layers_in(case.config) == case.layers:
            wrong = reasons_not_to_fuse(case.config, tensors, role == "draft", engine)
            assert not wrong, f"{role} fuses in {engine}: {wrong}"

    def _policy(self, case: Case) -> Policy:
        if case.policy is None:
            return self.default
        known = self.policies.get(case.policy)
        if known is None:
            path = self.folder / "own.yaml"
            path.write_text(case.policy, encoding="utf-8", errors="replace")
            known = load_policy(path)
            if len(self.policies) < 8:
                self.policies[case.policy] = known
        return known

    def _write(self, case: Case) -> None:
        for old in self.folder.iterdir():
            old.unlink()
        write_checkpoint(self.folder, case.config, None if case.files else case.tensors)
        if case.files is not None:
            write_files(self.folder, case.files, write_shard)
        if case.modelopt is not None:
            content = {"quantization": case.modelopt}
            (self.folder / "hf_quant_config.json").write_text(json.dumps(content))
        for name, place, byte in case.raw:
            path = self.folder / name
            with path.open("r+b") as file:
                length = path.stat().st_size
                if name.endswith("safetensors"):
                    # A byte of the length itself may have been replaced before.
                    length = min(length, int.from_bytes(file.read(8), "little") + 8)
                file.seek(int(place * length))
                file.write(bytes([byte]))


def _one_line(error: FsePatchError) -> str:
    assert "\n" not in str(error), f"an error of two lines: {error}"
    return "error"


def fuzz(cases: int, seconds: float, seed: str, stop: bool = False) -> Result:
    """Run up to ``cases`` cases for up to ``seconds``; a case depends on ``seed`` and its number alone.

    ``stop`` ends the run at the first failure.
    """
    result = Result()
    base = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    end = time.monotonic() + seconds
    before = signal.getsignal(signal.SIGALRM)
    try:
        with tempfile.TemporaryDirectory(dir=base) as folder:
            runner = Runner(Path(folder))
            for number in range(cases):
                if time.monotonic() > end or (stop and result.failures):
                    break
                _one(runner, f"{seed}-{number}", result)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return result


def _one(runner: Runner, name: str, result: Result) -> None:
    case = make(random.Random(name))
    _watch()
    try:
        outcome = runner.run(case)
    except _Hangs:
        outcome = "failed"
        result.failures.append(f"{name}: took longer than {LIMIT} s")
    except Exception:
        outcome = "failed"
        result.failures.append(f"{name}: {traceback.format_exc()}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    result.cases += 1
    result.outcomes[outcome] += 1


def _watch() -> None:
    """End what uses LIMIT seconds of the processor, or lets a dozen times as many pass."""
    used, begun = time.process_time(), time.monotonic()

    def look(_: int, __: FrameType | None) -> None:
        # A busy machine may stop us for seconds; that is no hang.
        if time.process_time() - used >= LIMIT or time.monotonic() - begun >= 12 * LIMIT:
            raise _Hangs
        signal.setitimer(signal.ITIMER_REAL, LIMIT)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--case", help="run one case by its name, as a failure prints it, and show it")
    given = parser.parse_args(arguments)
    if given.case is not None:
        print(make(random.Random(given.case)))
        alone = fuzz_one(given.case)
        for failure in alone.failures:
            print(_told(failure))
        return _report(alone, 0.0)
    start = time.monotonic()
    total = Result()
    batches = [min(BATCH, given.cases - begun) for begun in range(0, given.cases, BATCH)]
    with ProcessPoolExecutor(given.jobs) as pool:
        jobs = [
            pool.submit(_batch, cases, start + given.seconds, f"{given.seed}.{number}")
            for number, cases in enumerate(batches)
        ]
        said = start
        for job in as_completed(jobs):
            done = job.result()
            total.add(done)
            for failure in done.failures[:5]:
                print(_told(failure), flush=True)
            if time.monotonic() - said >= HEARTBEAT:
                said = time.monotonic()
                rate = total.cases / (said - start)
                print(f"  {total.cases} cases, {rate:.0f} a second, {len(total.failures)} failed", flush=True)
    return _report(total, time.monotonic() - start)


def _batch(cases: int, end: float, seed: str) -> Result:
    return fuzz(cases, end - time.monotonic(), seed)


def fuzz_one(name: str) -> Result:
    """Run one case by its name."""
    result = Result()
    with tempfile.TemporaryDirectory() as folder:
        _one(Runner(Path(folder)), name, result)
    return result


def _told(failure: str) -> str:
    return f"FAILED {failure}\n  again: python -m tests.core.fuzz --case {failure.partition(':')[0]}"


def _report(result: Result, seconds: float) -> int:
    rate = f", {result.cases / seconds:.0f} a second" if seconds else ""
    print(f"{result.cases} cases in {seconds:.0f} s{rate}; {len(result.failures)} failed")
    outcomes: dict[str, Any] = dict(result.outcomes.most_common())
    print("  " + ", ".join(f"{name} {count}" for name, count in outcomes.items()))
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
