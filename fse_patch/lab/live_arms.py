"""The processes of an end-to-end measurement: an engine each, alive side by side, asked one at a time."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import FsePatchError
from ..fusion_core.engines import facts_of
from ..settings import ENABLE
from . import arm_process
from .cause import with_cause

# The second stock says how far a figure may be trusted.
ARMS = ("stock", "fused", "again")
# The module that runs an arm, in the engine's process.
ARM = "fse_patch.lab.{engine}.decode_arm"
POLL = 0.2  # seconds between looks at the processes
PARTING = 20.0  # seconds that an arm has to end its engine
Answer = dict[str, Any]


class ArmError(FsePatchError):
    """An arm failed, died or was silent; ``log`` is the end of what it said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class LiveArms:
    """An engine for each arm: they start on entry, all at once, and their processes end on exit.

    Args:
        engine: its name.
        request: what each arm gets, as of `decode_arm.Engine`.
        env: environment of the arms; FSE_PATCH is set here.
        limit: seconds that an answer may take.
        first: the arm that is ready before the others start: it measures at its start. "": none.
    """

    def __init__(
        self, engine: str, request: Mapping[str, Any], env: Mapping[str, str], limit: float, first: str = ""
    ) -> None:
        self.engine, self.request, self.env, self.limit = engine, request, env, limit
        self.first = first
        self._ready: dict[str, Answer] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="fse_patch_")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._connections: dict[str, Connection] = {}

    def __enter__(self) -> LiveArms:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._part()
        self._end()

    def ask(self, name: str, question: Mapping[str, Any]) -> Answer:
        """Return the answer of one arm, while the others wait.

        Raises:
            ArmError: any arm died, or this one failed or was silent for ``limit`` seconds.
        """
        self._send(name, question)
        return self.answer(name)

    def ask_all(self, question: Mapping[str, Any]) -> dict[str, Answer]:
        """Return the answers of all arms, which work at the same time; raises as `ask`."""
        for name in ARMS:
            self._send(name, question)
        return self.answers()

    def answers(self, tell: Callable[[str, Answer], None] = lambda *_: None) -> dict[str, Answer]:
        """Return what each arm says next, and call ``tell`` with it; raises as `ask`."""
        end = time.monotonic() + self.limit
        answers = {}
        for name in ARMS:
            answers[name] = self._ready.pop(name, {}) or self.answer(name, end)
            tell(name, answers[name])
        return answers

    def answer(self, name: str, end: float | None = None) -> Answer:
        """Return what an arm says next, until ``end`` of the monotonic clock; raises as `ask`."""
        end = time.monotonic() + self.limit if end is None else end
        connection = self._connections[name]
        while True:
            try:
                if connection.poll(POLL):
                    answer: Answer = connection.recv()
                    break
            except (EOFError, OSError):
                raise self._died(name) from None
            self._check(name, end)
        if "error" in answer:
            raise self._failed(name, answer["error"])
        return answer

    def _send(self, name: str, question: Mapping[str, Any]) -> None:
        try:
            self._connections[name].send(dict(question))
        except OSError:
            raise self._died(name) from None

    def _start(self) -> None:
        folder = Path(self._folder.name)
        authkey = secrets.token_bytes(16)
        arrived = self._connections
        with Listener(str(folder / "s"), "AF_UNIX", len(ARMS), authkey) as listener:
            asked = {**self.request, "address": listener.address, "authkey": authkey.hex()}
            threading.Thread(target=accept, args=(listener, arrived), daemon=True).start()
            for name in sorted(ARMS, key=lambda name: name != self.first):
                file = folder / f"{name}.json"
                file.write_text(json.dumps({**asked, "name": name}))
                with self._log(name).open("wb") as sink:
                    self._processes[name] = subprocess.Popen(
                        [sys.executable, "-m", ARM.format(engine=self.engine), str(file)],
                        env=self._environment(name),
                        stdout=sink,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                if name == self.first:
                    self._wait_for(name)
                    self._ready[name] = self.answer(name)
            self._wait_for(*ARMS)

    def _wait_for(self, *names: str) -> None:
        """Wait until these have connected."""
        end = time.monotonic() + self.limit
        while missing := [name for name in names if name not in self._connections]:
            self._check(missing[0], end)
            time.sleep(POLL)

    def _environment(self, name: str) -> dict[str, str]:
        lab = facts_of(self.engine).lab
        environment = {**lab.environment, **self.env}
        environment[ENABLE] = self.engine if name == "fused" else "0"
        if (cache := lab.compile_cache) is not None and name == "again":
            # It compiles what stock compiles, at the same time: they must not write the same files.
            root = environment.get(cache.variable) or os.path.expanduser(cache.folder)
            environment[cache.variable] = os.path.join(root, "fse_patch_again")
        return environment

    def _check(self, waited_for: str, end: float) -> None:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise self._died(name)
        if time.monotonic() > end:
            raise ArmError(
                f"{waited_for} arm: silent for {self.limit:.0f} s; give a longer --timeout if it needs it",
                self._tail(waited_for),
            )

    def _died(self, name: str) -> ArmError:
        """Return what to say of an arm that is gone: its own last words, where it left some."""
        connection, process = self._connections.get(name), self._processes[name]
        try:
            while connection is not None and connection.poll(0):
                if "error" in (answer := connection.recv()):
                    return self._failed(name, answer["error"])
        except (EOFError, OSError):
            pass
        try:
            process.wait(PARTING)
        except subprocess.TimeoutExpired:
            return ArmError(f"{name} arm: closed its connection", self._tail(name))
        return self._failed(name, f"ended with status {process.returncode}")

    def _failed(self, name: str, error: str) -> ArmError:
        log = self._log(name).read_text(errors="replace")
        return ArmError(f"{name} arm: {with_cause(error, log)}", self._tail(name))

    def _log(self, name: str) -> Path:
        return Path(self._folder.name) / f"{name}.log"

    def _tail(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-arm_process.LOG_LINES :])

    def _part(self) -> None:
        """Let engines end by themselves, for a while."""
        end = time.monotonic() + PARTING
        for connection in self._connections.values():
            try:
                connection.send({"do": "end"})
            except OSError:
                continue
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue

    def _end(self) -> None:
        for process in self._processes.values():
            arm_process.end(process)
        for connection in self._connections.values():
            connection.close()
        self._folder.cleanup()


def accept(listener: Listener, arrived: dict[str, Connection]) -> None:
    """Take in the arms that connect, each by the name that it gives."""
    while len(arrived) < len(ARMS):
        try:
            connection = listener.accept()
            name = connection.recv()
        except Exception:  # a stranger, or the listener was closed and its socket is gone
            if not os.path.exists(str(listener.address)):
                return
            continue
        arrived[name] = connection


def wrong_states(ready: Mapping[str, Mapping[str, Any]], layers: Sequence[int]) -> list[str]:
    """Return what arms are otherwise than they should be: fused in all ``layers``, or stock."""
    problems = []
    for name, answer in ready.items():
        roles = [role for role in answer["roles"] if role["role"] == "main"]
        if name != "fused":
            problems += [f"{name} arm: is not stock"] if roles else []
        elif not roles:
            why = "; ".join(f"{d['reason']}: {d['detail']}" for d in answer["refused"]) or "no reason given"
            problems.append(f"fused arm: is stock: {why}")
        elif (built := roles[0]["built_layers"]) != list(layers):
            problems.append(f"fused arm: layers {built} are fused, {list(layers)} were decided")
    return problems
