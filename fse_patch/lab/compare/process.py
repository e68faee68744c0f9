"""A process of ours that may have many children: it ends with us, whatever ends us."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from ...errors import EngineError, FsePatchError
from .. import arm_process
from ..cause import with_cause

PARTING = 15.0  # seconds in which a process may end its children itself
GOING = 20.0  # seconds that a killed process may take to go
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Child:
    """A process in a session of its own, and all that it starts: begins on entry, ended on exit.

    Args:
        name: in words, for messages.
        words: of the command.
        env: all of its environment.
        log: file that gets what it prints.
    """

    def __init__(self, name: str, words: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name, self.words, self.env, self.log_file = name, words, env, log
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def log(self) -> str:
        """Return what it has printed so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    @property
    def status(self) -> int | None:
        """Return its exit status, None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def wait(self, seconds: float) -> bool:
        """Wait for its end, so long at most; return whether it has ended."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def check(self) -> None:
        """Look whether it still runs.

        Raises:
            EngineError: it has ended; the text has the cause, as its log tells it.
        """
        if self.status is not None:
            raise EngineError(self.ending())

    def ending(self) -> str:
        """Say how it ended, and why."""
        return with_cause(f"{self.name}: ended with status {self.status}", self.log)

    def _start(self) -> None:
        with self.log_file.open("wb") as sink, held_back():
            try:
                self.process = subprocess.Popen(
                    list(self.words),
                    env=dict(self.env),
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise FsePatchError(f"{self.name}: {self.words[0]}: {error.strerror}") from None

    def _end(self) -> None:
        if self.process is None:
            return
        try:
            if self.process.poll() is None:
                self.process.terminate()
                self.wait(PARTING)
        finally:
            arm_process.end(self.process)
            end_session(self.process.pid)


def end_session(session: int) -> None:
    """End what is left of a session, and wait until it is gone: it may hold the memory of a device."""
    limit = time.monotonic() + GOING
    while (left := _of_session(session)) and time.monotonic() < limit:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _of_session(session: int) -> list[int]:
    """Return the processes of a session; those that have ended, and nobody has asked for, do not count."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # Behind the name, which may hold anything: state, parent, group, session.
            state, _, _, of = file.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(of) == session and state not in "ZX":
                found.append(int(file.parent.name))
    return found


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let signals that end us wait, while a process is made that nobody knows of yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {n: signal.signal(n, note) for n in ENDING if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in arrived[:1]:
            os.kill(os.getpid(), one)
