"""`make mutants`: changes the core in small ways, one at a time, and counts the changes that a test notices.

    python ci/mutants.py                            every mutant
    python ci/mutants.py --sample 200 --seed 1      so many of them; the same ones for the same seed
    python ci/mutants.py --only 'decision/*'        those of some files
    python ci/mutants.py --keep                     after a change of tests: those that were missed, again

A mutant is a function with one change: another operator, number, text or argument. mutmut makes them, in a
copy of the project (ci/mutants_stage.py), and runs the tests that call the function, the fast ones first,
until one fails. What ended is not run again while no file changes; with --keep, what was caught is not, until
its function changes. ci/mutants.yaml holds the settings. Mutants that mean the same as the original stand in
tests/core/equal_mutants.yaml, each with why. Such a mutant is in no sample.

Exit status 1: fewer are caught than `at_least` says, or an explanation no longer holds.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from mutants_read import (
    NOT_RUN,
    BadEntryError,
    Identity,
    Mutant,
    forget_missed,
    read_codes,
    read_explained,
    read_mutants,
    sample,
    table,
)
from mutants_stage import EQUAL, MADE, STAGE, left_out, stage

SETTINGS = Path(__file__).with_name("mutants.yaml")
LOG = STAGE / "log"
HEARTBEAT = 30
# What `mutmut run` begins with: the names of the mutants are needed before it is told which ones to run.
MAKE = "from mutmut import __main__ as m; m.copy_src_dir(); m.copy_also_copy_files(); m.create_mutants(1)"


def run_in_stage(command: list[str], progress: set[str]) -> int:
    """Run a command in the copy, its output in a log; say now and then how many mutants have ended."""
    environment = os.environ | {
        # The first is what the tests import; the second has the plugin that sorts them.
        "PYTHONPATH": os.pathsep.join([str(MADE), str(STAGE / "ci")]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with LOG.open("a") as out:
        process = subprocess.Popen(
            command, cwd=STAGE, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
        begun = time.monotonic()
        try:
            while True:
                try:
                    return process.wait(HEARTBEAT)
                except subprocess.TimeoutExpired:
                    if progress:
                        codes = {
                            name: code for file in read_codes(MADE).values() for name, code in file.items()
                        }
                        done = sum(codes[name] is not None for name in progress)
                        seconds = time.monotonic() - begun
                        print(f"{seconds:6.0f} s  {done} of {len(progress)} mutants", flush=True)
        except BaseException:
            process.terminate()
            process.wait()
            raise


def choose(mutants: list[Mutant], explained: set[Identity], options: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that are asked for."""
    mutants = [m for m in mutants if any(fnmatch.fnmatch(m.file, only) for only in options.only)]
    if options.sample is None:
        return mutants
    return sample([m for m in mutants if m.identity not in explained], options.sample, options.seed)


def stale(explained: Iterable[Identity], mutants: list[Mutant]) -> list[Identity]:
    """Return what is explained and is no mutant."""
    there = {mutant.identity for mutant in mutants}
    return [identity for identity in explained if identity not in there]


def report(chosen: list[Mutant], explained: dict[Identity, str], at_least: float) -> int:
    """Print a table by file and what was missed; returns an exit status."""
    missed = [m for m in chosen if not m.caught]
    for mutant in missed:
        if mutant.identity not in explained:
            print(f"\n{mutant.state}: {mutant.file}, {mutant.function}\n{mutant.diff}")
    print("\n" + "\n".join(table(chosen, explained)))
    left = [m for m in chosen if m.caught or m.identity not in explained]
    caught = sum(m.caught for m in left)
    rate = caught / len(left) if left else 1.0
    not_equal = [m for m in chosen if m.caught and m.identity in explained]
    for mutant in not_equal:
        print(f"explained as equal, but a test notices it: {mutant.file}, {mutant.function}: {mutant.mutant}")
    print(f"{caught} of {len(left)} mutants caught: {100 * rate:.1f} %, {100 * at_least:.0f} % are asked for")
    return 1 if rate < at_least or not_equal else 0


def run(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Make the mutants, run those that are asked for, and report."""
    explained = read_explained(EQUAL)
    if stage(settings, options.keep) and options.keep:
        forget_missed(MADE)
    if run_in_stage([sys.executable, "-c", MAKE], set()):
        return failed("no mutants were made")
    everything = read_mutants(MADE)
    there = {m.identity for m in everything}
    if stale := [key for key in explained if key not in there]:
        for file, function, line, mutant in stale:
            print(
                f"{EQUAL.name}: no such mutant: {file}, {function}: {line!r} -> {mutant!r}", file=sys.stderr
            )
        return 1
    chosen = choose(everything, set(explained), options)
    if not chosen:
        print(f"no mutants of {' '.join(options.only)}", file=sys.stderr)
        return 2
    names = {m.name for m in chosen}
    waiting = {m.name for m in chosen if m.state == NOT_RUN}
    print(f"{len(chosen)} of {len(everything)} mutants, {len(waiting)} of them to run", flush=True)
    if waiting:
        all_of_them = waiting == {m.name for m in everything if m.state == NOT_RUN}
        mutmut = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", str(options.jobs)]
        if run_in_stage([*mutmut, *([] if all_of_them else sorted(waiting))], waiting):
            # It does not say which test failed.
            tests = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "mutants_order", *settings["tests"]]
            without = run_in_stage([*tests, *left_out(settings)], set())
            return failed("a test fails without any mutant" if without else "mutmut failed")
    chosen = [m for m in read_mutants(MADE) if m.name in names]
    if any(m.state == NOT_RUN for m in chosen):
        return failed("not every mutant was run")
    return report(chosen, explained, settings["at_least"])


def failed(words: str) -> int:
    """Print what happened and the end of the log; returns an exit status."""
    lines = LOG.read_text(errors="replace").replace("\r", "\n").splitlines()
    print("\n".join(f"    | {line}" for line in lines[-40:]), file=sys.stderr)
    print(f"{words} (all of the log: {LOG})", file=sys.stderr)
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="so many mutants, and not all")
    parser.add_argument("--seed", default="1", help="which ones (default: 1)")
    parser.add_argument("--only", action="append", help="of these files: a pattern, below fusion_core")
    parser.add_argument("--keep", action="store_true", help="keep what was caught before files changed")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (default: 1)")
    options = parser.parse_args(arguments)
    options.only = [f"fusion_core/{only}" for only in options.only or ["*"]]
    try:
        return run(options, yaml.safe_load(SETTINGS.read_text(encoding="utf-8")))
    except BadEntryError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
