"""The servers of a comparison: started in turn from one launch command, or running already."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from ...errors import EngineError, FsePatchError
from ...fusion_core.engines import Launch, facts_of
from ...launch.command import PLUGIN, parts_of
from ...settings import ENABLE
from . import http
from .process import Child

POLL = 0.3  # seconds between looks at a server that starts
HOST = "127.0.0.1"
# What holds in every server, where the user has not said otherwise.
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Args:
        check: raises an EngineError where its process has ended.
        log: returns what it has printed; "" of one that we did not start.
        start_seconds: None of one that we did not start.
    """

    url: str
    check: Callable[[], None]
    log: Callable[[], str]
    start_seconds: float | None


def launch_words(engine: str, words: Sequence[str], fused: bool, port: int) -> list[str]:
    """Return the command of one server: the given one, patched or not, on a port of loopback."""
    launch = facts_of(engine).launch
    assert launch is not None, "the command was read"
    parts = parts_of(engine, words)
    command = _command(launch, parts.command, fused)
    start = list(parts.start)
    if command.startswith("-"):
        # A program of its own, as `sglang serve`, is no Python that could run a module.
        rest = command.split()
        start = start if parts.command.startswith("-") else [*start[:-1], sys.executable]
    else:
        rest = command.split()[1:]
    return [*start, *rest, *parts.arguments, "--host", HOST, "--port", str(port)]


def _command(launch: Launch, given: str, fused: bool) -> str:
    """Return which of the engine's commands starts it: some need no FSE_PATCH, and stock none of those."""
    if not launch.switched_on_by:
        return given
    if fused:
        return launch.switched_on_by[0]
    return launch.commands[0] if given in launch.switched_on_by else given


def environment_of(
    engine: str, words: Sequence[str], fused: bool, around: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of one server: ours, that of its command, and FSE_PATCH.

    The engine's own programs are looked for beside this Python first. Where the engine adds pages only for
    plugins that are named, all that it would load are named: so the server can say whether it is fused.
    """
    own, facts = dict(parts_of(engine, words).environment), facts_of(engine)
    measured = facts.launch.bench.server if facts.launch and facts.launch.bench else {}
    environment = {**QUIET, **measured, **around, **own, ENABLE: engine if fused else "0"}
    found = environment.get("PATH", os.defpath)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found])
    plugins = facts.plugins
    if plugins.pages and plugins.variable not in {**around, **own}:
        groups = entry_points()
        prefix = plugins.pages.partition(".")[0] + "."
        others = {
            entry.name
            for group in groups.groups
            if group.startswith(prefix) and group != plugins.pages
            for entry in groups.select(group=group)
        }
        environment[plugins.variable] = ",".join(sorted({PLUGIN, *others}))
    return environment


def check_port(port: int) -> None:
    """Look whether a server could have a port of loopback.

    Raises:
        FsePatchError: it is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise FsePatchError(f"port {port} is in use; give another --port, or none") from None


@contextmanager
def started(
    name: str, words: Sequence[str], env: Mapping[str, str], port: int, log: Path, limit: float
) -> Iterator[Running]:
    """Start a server, wait until it is ready, and end it afterwards.

    Args:
        limit: seconds that it may take to be ready.

    Raises:
        FsePatchError: the port is in use, or there is no such program.
        EngineError: it ended, or was not ready in time.
    """
    check_port(port)
    url, begun = f"http://{HOST}:{port}", time.monotonic()
    with Child(f"{name} server", words, env, log) as child:
        while not http.is_up(url):
            child.check()
            if time.monotonic() - begun > limit:
                raise EngineError(f"{name} server: not ready in {limit:g} s; give a longer --timeout")
            child.wait(POLL)
        child.check()
        yield Running(url, child.check, lambda: child.log, time.monotonic() - begun)


@contextmanager
def given(name: str, url: str) -> Iterator[Running]:
    """Take a server that runs already; it is not ours to end.

    Raises:
        EngineError: it is not ready.
    """

    def check() -> None:
        if not http.is_up(url):
            raise EngineError(f"{name} server: {url}: does not answer")

    check()
    yield Running(url, check, lambda: "", None)
