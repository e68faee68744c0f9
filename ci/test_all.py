"""`make test-all`: everything there is to run, in parts that resume.

    python3 ci/test_all.py             every part that has not passed on this tree
    python3 ci/test_all.py PART ...    these parts, whether they passed or not
    python3 ci/test_all.py --list      the names of the parts

A part is one of the checks, the tests that need no engine, the kernels, a sample of mutants, or a group of
tests in one release of an engine. When it ends it leaves a stamp in .cache/test-all: how it ended, and on
which commit and tree. A tree is every file that git does not ignore, as it lies there; what passed is run
again when one of them changes. The last lines are a table of all parts; exit status 0 means that every part
has passed on this tree, or every part that was named.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field

import steps
import testing
from environment import ROOT
from envs import matrix
from steps import Row, Step

STAMPS = ROOT / ".cache" / "test-all"
# The tests of an engine, in groups of some minutes each; every other file of its folder is in "others".
GROUPS = {
    "vllm": {
        "verify": ["test_verify.py", "test_compile_cache.py"],
        "serve": ["test_serve.py", "test_end_to_end.py", "test_update.py", "test_parallel_update.py"],
        "compare": ["test_comparison.py"],
        "faults": ["test_faults.py", "test_canary.py"],
        "parallel": [
            "test_parallel.py",
            "test_lora.py",
            "test_eplb.py",
            "test_own_files.py",
            "test_drafts.py",
        ],
    },
    "sglang": {
        "verify": ["test_verify.py"],
        "serve": ["test_launch.py", "test_end_to_end.py", "test_update.py"],
        "compare": ["test_comparison.py"],
        "faults": ["test_faults.py", "test_canary.py"],
        "parallel": ["test_parallel.py", "test_lora.py", "test_eplb.py", "test_own_files.py"],
    },
}
COUNTED = {"passed": "passed", "failed": "failed|errors?", "skipped": "skipped"}


@dataclass(frozen=True)
class Stamp:
    """How a part ended, and on what."""

    status: int
    seconds: float
    closing: str
    commit: str
    tree: str
    counts: dict[str, int] = field(default_factory=dict)


def name_of(step: Step) -> str:
    """Return the name of a part, as `make test-all PART=` takes it."""
    return step.name.replace(" ", "-")


def parts(rows: list[Row]) -> dict[str, Step]:
    """Return all parts by name."""
    made = [*steps.lint(), steps.core(rows), steps.kernels(rows), steps.mutants()]
    for row in rows:
        if row.get("short"):
            made.append(steps.short(row))
            continue
        # A release that stands on the packages of another shows what is its own.
        marks = "not one_release" if "base" in row else ""
        for group, files in groups(str(row["engine"])).items():
            made.append(steps.of_engine(row, group, files, marks))
    return {name_of(step): step for step in made}


def groups(engine: str) -> dict[str, list[str]]:
    """Return the test files of an engine by group: each file in one, and none left out."""
    folder = ROOT / "tests" / engine
    named = {group: [f"tests/{engine}/{file}" for file in files] for group, files in GROUPS[engine].items()}
    grouped = {file for files in named.values() for file in files}
    files = sorted(f"tests/{engine}/{path.name}" for path in folder.glob("test_*.py"))
    return named | {"others": [file for file in files if file not in grouped]}


def git(*arguments: str) -> str:
    """Return what git says, empty where it has nothing to say."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def tree() -> str:
    """Return a hash of every file that git does not ignore, as it lies there; empty without git."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    total = hashlib.sha256()
    for name in sorted(filter(None, listed.split("\0"))):
        path = ROOT / name
        held = path.read_bytes() if path.is_file() else b""
        total.update(f"{name}\0{path.is_file()}{len(held)}\0".encode() + held)
    return total.hexdigest()[:16] if listed else ""


def commit() -> str:
    """Return the commit, with a plus where files differ from it."""
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain") else "")


def counts(closing: str) -> dict[str, int]:
    """Return tests by how they ended, from pytest's last line; empty for what is none of pytest's."""
    counted = {
        name: sum(int(n) for n in re.findall(rf"(\d+) (?:{words})\b", closing))
        for name, words in COUNTED.items()
    }
    return counted if re.search(r" in [\d.]+s", closing) else {}


def read(name: str) -> Stamp | None:
    """Return the stamp of a part; None where it has none that can be read."""
    try:
        return Stamp(**json.loads((STAMPS / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def passed(name: str, on: str) -> bool:
    """Return whether a part has passed on a tree."""
    stamp = read(name)
    return stamp is not None and stamp.status == 0 and stamp.tree == on != ""


def run(step: Step) -> testing.Result:
    """Run a part, and leave its stamp. One whose files changed while it ran has passed on no tree."""
    (stamp := STAMPS / f"{name_of(step)}.json").unlink(missing_ok=True)
    before = tree()
    result = testing.run(step)
    if testing.INTERRUPTED.is_set():
        return result
    same = before if before == tree() else ""
    left = Stamp(result.status, result.seconds, result.closing, commit(), same, counts(result.closing))
    STAMPS.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(asdict(left), indent=1) + "\n")
    return result


def state(stamp: Stamp | None, on: str) -> str:
    """Return how a part stands on a tree."""
    if stamp is None or stamp.tree != on:
        return "not run"
    return "passed" if stamp.status == 0 else "FAILED"


def table(names: list[str], on: str) -> list[str]:
    """Return a row for each part."""
    lines = [f"{'part':24} {'state':8} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}  commit"]
    for name in names:
        stamp = read(name)
        line = f"{name:24} {state(stamp, on):8}"
        if stamp is not None and stamp.tree == on:
            passed, failed, skipped = (str(stamp.counts.get(word, "")) for word in COUNTED)
            line += f" {passed:>7} {failed:>7} {skipped:>8} {stamp.seconds:8.0f}  {stamp.commit}"
        lines.append(line)
    return lines


def main(arguments: list[str]) -> int:
    """Run what is left, or the parts that are named; returns an exit status."""
    there = parts(matrix()["engines"])
    if arguments == ["--list"]:
        print("\n".join(there))
        return 0
    if unknown := [name for name in arguments if name not in there]:
        print(f"no part {unknown[0]!r}; there are {', '.join(there)}", file=sys.stderr)
        return 2
    asked = arguments or list(there)
    left = [name for name in asked if arguments or not passed(name, tree())]
    print(f"{len(left)} of {len(there)} parts to run", flush=True)
    interrupted = False
    try:
        testing.run_all([there[name] for name in left], run)
    except KeyboardInterrupt:
        interrupted = True
    on = tree()
    print("\nsummary\n" + "\n".join(f"  {line}" for line in table(list(there), on)))
    bad = [name for name in asked if not passed(name, on)]
    print(f"not passed: {', '.join(bad)}" if bad else f"passed: {len(asked)} parts", flush=True)
    return 130 if interrupted else 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
