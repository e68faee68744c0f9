"""`fse-patch compare` as users run it, and what is left of it when it has ended."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LIMIT = 900.0
GOING = 5.0


def processes() -> dict[int, tuple[int, str]]:
    """All processes that have not ended: their parents and commands."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            words = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if state not in "ZX":
            found[int(folder.name)] = (int(parent), words)
    return found


def listen() -> None:
    """Take signals as a process of a terminal does: those of a shell's background ignore Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def left(mark: str) -> list[str]:
    """The commands of all processes but this one that name a mark."""
    return [words for pid, (_, words) in processes().items() if mark in words and pid != os.getpid()]


class Comparison:
    """One that runs in a process of its own.

    Its temporary files are below ``folder``, and what it finds goes to ``folder / "out"``, which its command
    says too.
    """

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        self.folder, self.out = folder, folder / "out"
        self.noted: set[int] = set()
        (folder / "tmp").mkdir(exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FSE_PATCH")}
        self.process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean, "TMPDIR": str(folder / "tmp"), **env},
            preexec_fn=listen,
        )
        # Where a test fails, its servers would go on.
        atexit.register(self.process.terminate)

    def until(self, words: str) -> None:
        """Wait until it says so."""
        assert self.process.stderr is not None
        told = []
        for line in self.process.stderr:
            told.append(line)
            if words in line:
                return
        raise AssertionError(f"{words}: was not said: {''.join(told)}")

    def note(self) -> set[int]:
        """Remember all its processes: at the end none may be left."""
        there = processes()
        mine = {self.process.pid}
        while more := {pid for pid, (parent, _) in there.items() if parent in mine} - mine:
            mine |= more
        self.noted |= mine
        return mine

    def end(self) -> tuple[int, list[str]]:
        """Its status, and lines of stderr that are no progress; nothing of it may be left."""
        _, told = self.process.communicate(timeout=LIMIT)
        limit = time.monotonic() + GOING
        # What ends by itself, a tracker of resources, may take a moment longer.
        while (still := self.noted & processes().keys()) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not still, [processes().get(pid) for pid in still]
        assert left(str(self.out)) == []
        assert not list((self.folder / "tmp").glob("fse_patch_*"))
        assert not list(self.folder.glob(".out*"))
        return self.process.returncode, [line for line in told.splitlines() if not line.endswith(" ...")]
