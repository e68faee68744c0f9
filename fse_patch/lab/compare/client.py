"""The engine's own bench client: how fast a server answers so many streams at a time."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import FsePatchError
from ...fusion_core.engines import Bench, facts_of
from ..cause import first_cause
from .process import Child
from .servers import QUIET, Running
from .steps import phase_of

POLL = 0.3  # seconds between looks at client and server
# What is kept of a result. Milliseconds are medians: to the first token, and of each one after it.
KEPT = {
    "output_throughput": "tokens_per_second",
    "request_throughput": "requests_per_second",
    "median_ttft_ms": "first_token_ms",
    "median_tpot_ms": "token_ms",
    "duration": "seconds",
}
Level = dict[str, float]


@dataclass(frozen=True)
class Load:
    """What a server is asked: random prompts, answers of one length.

    Args:
        streams: numbers of requests that are under way at a time.
        rounds: requests of each stream.
        input, output: tokens of a prompt, and of an answer.
        limit: seconds for one number of streams.
    """

    streams: tuple[int, ...]
    rounds: int
    input: int
    output: int
    limit: float


def find(engine: str) -> Bench:
    """Return the engine's client.

    Raises:
        FsePatchError: the engine is not installed here, or has none.
    """
    facts = facts_of(engine)
    bench = facts.launch.bench if facts.launch is not None else None
    spec = find_spec(facts.import_name)
    if spec is None or not spec.submodule_search_locations:
        raise FsePatchError(f"{engine} is not installed here: install fse-patch into its environment")
    root = Path(next(iter(spec.submodule_search_locations)))
    if bench is None or not (root / bench.file).is_file():
        raise FsePatchError(f"{engine}: this installation has no bench client ({bench and bench.file})")
    return bench


def try_out(engine: str, bench: Bench, folder: Path) -> None:
    """Let the client print its help: what it lacks is better known before a server has started.

    Raises:
        FsePatchError: it cannot run here.
    """
    words = bench.words.split()
    own = next(n for n, word in enumerate([*words, "--"]) if word.startswith("--") or "{" in word)
    command = [sys.executable, *words[:own], "--help"]
    with Child(f"{engine} bench client", command, environment("", os.environ), folder / "help.log") as client:
        while not client.wait(POLL):
            pass
        if client.status != 0:
            raise _failed(client)


def _failed(client: Child) -> FsePatchError:
    cause = first_cause(client.log) or _last_line(client.log)
    return FsePatchError(f"{client.name}: ended with status {client.status}: {cause}")


def words_of(bench: Bench, **values: Any) -> list[str]:
    """Return the command of the client."""
    return [sys.executable, *(word.format(**values) for word in bench.words.split())]


def run(
    engine: str,
    bench: Bench,
    server: Running,
    checkpoint: Path,
    model: str,
    load: Load,
    streams: int,
    folder: Path,
    key: str,
) -> Level:
    """Measure one number of streams; keys as the values of `KEPT`.

    Every number of streams has prompts of its own, the same in each server.

    Args:
        model: as the server calls it.
        folder: gets the client's files.

    Raises:
        EngineError: the server ended.
        FsePatchError: the client failed, was not done in time, or requests failed.
    """
    requests = streams * load.rounds
    asked = {"input": load.input, "output": load.output, "requests": requests, "streams": streams}
    place = {"url": server.url, "checkpoint": checkpoint, "model": model, "folder": folder}
    name = f"{engine} bench client, {phase_of(streams)}"
    result, log = folder / f"{streams}.json", folder / f"{streams}.log"
    command = words_of(bench, **asked, **place, seed=streams, file=result.name)
    with Child(name, command, environment(key, os.environ), log) as client:
        end = time.monotonic() + load.limit
        while not client.wait(POLL):
            server.check()
            if time.monotonic() > end:
                raise FsePatchError(f"{name}: not done in {load.limit:g} s; give a longer --timeout")
        server.check()
        if client.status != 0 or not result.is_file():
            raise _failed(client)
    return read(result, name, requests)


def environment(key: str, around: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a client: it looks nothing up, and is not patched."""
    mine = {name: value for name, value in around.items() if not name.startswith("FSE_PATCH")}
    return {**mine, **QUIET, **({"OPENAI_API_KEY": key} if key else {})}


def read(path: Path, name: str, requests: int) -> Level:
    """Return what a client has written.

    Raises:
        FsePatchError: it is not as expected, or requests failed.
    """
    try:
        told = json.loads(path.read_text())
        done = int(told["completed"])
        level = {ours: float(told[theirs]) for theirs, ours in KEPT.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FsePatchError(f"{name}: its result cannot be read: {error!r}") from None
    if done != requests:
        # As the client notes them: a traceback each, empty where a request did not fail.
        causes = [_last_line(str(error)) for error in told.get("errors") or () if error]
        why = f": {causes[0]}" if causes else ""
        raise FsePatchError(f"{name}: {requests - done} of {requests} requests failed{why}")
    return level


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "it said nothing")
