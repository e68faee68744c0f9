"""Decode steps of the real engine, end to end: stock, fused and stock again, alive on one device."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FsePatchError
from ..settings import LAYOUT
from . import csv_file
from .arm_process import Progress
from .decode_arm import PROMPT
from .live_arms import ARMS, Answer, ArmError, LiveArms, wrong_states
from .readings import Lengths, Reading, take_round, warm_up
from .timing import is_quiet, ratio

STREAMS = (1, 2, 4, 8, 16, 64)
# Of a row, see `rows`.
COLUMNS = [
    *("streams", "rounds", *(f"{name}_ms" for name in ARMS)),
    *("ratio", "lower", "again", "valid", "different_tokens"),
]


@dataclass(frozen=True)
class Job:
    """What to measure.

    Args:
        checkpoint: folder with a config.json; weights are random.
        engine: its name.
        layers: MoE layers that were decided to fuse.
        vocab: number of token ids.
        streams: numbers of prompts that are answered at once.
        rounds: readings of each arm for each number of streams.
        sets: layers share so many sets of routed experts in turn; 0: each has its own.
        engine_args: over the arms' own defaults.
        seconds: no round but the first begins later than this after the start.
        limit: seconds that an engine may take to start or to answer.
    """

    checkpoint: Path
    engine: str
    layers: tuple[int, ...]
    vocab: int
    streams: tuple[int, ...] = STREAMS
    rounds: int = 7
    sets: int = 0
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = math.inf
    limit: float = 900.0
    lengths: Lengths = field(default_factory=Lengths)

    def request(self) -> dict[str, Any]:
        """Return what an arm needs to start, as of `decode_arm.Engine`."""
        return {
            "checkpoint": str(self.checkpoint),
            "engine_args": dict(self.engine_args),
            "streams": list(self.streams),
            "total_tokens": max(n * (PROMPT + self.lengths.long_for(n)) for n in self.streams),
            "sets": self.sets,
            "vocab": self.vocab,
        }


@dataclass
class Measured:
    """What was measured: of each arm what it said at its start and at its end, and every reading.

    Readings as of `take_round`.
    """

    arms: dict[str, Answer]
    readings: list[Reading] = field(default_factory=list)
    reports: dict[str, Answer] = field(default_factory=dict)

    @property
    def versions(self) -> dict[str, str]:
        """Return device, fse_patch, engine and torch."""
        told = self.arms["fused"]
        return {"device": told["device"], **told["versions"]}


def measure(
    job: Job,
    env: Mapping[str, str] | None = None,
    progress: Progress = lambda _: None,
    raw: Path | None = None,
) -> Measured:
    """Start the arms and take the rounds.

    Args:
        env: environment of the arms, default this process's.
        progress: is told in a line what is done.
        raw: gets everything as JSON after every round.

    Raises:
        ArmError: an arm failed, is not what it should be, or was silent.
        FsePatchError: ``raw`` cannot be written.
    """
    begun = time.monotonic()
    progress(f"starting {len(ARMS)} {job.engine} engines: {', '.join(ARMS)}")
    env = os.environ if env is None else env
    first = "fused" if env.get(LAYOUT) == "paired" else ""
    with LiveArms(job.engine, job.request(), env, job.limit, first) as arms:
        measured = Measured(arms.answers(lambda name, told: progress(ready(name, told))))
        if wrong := wrong_states(measured.arms, job.layers):
            raise ArmError("; ".join(wrong), "")
        timed = warm_up(arms, job.lengths, job.streams, progress)
        ran = [r for r in arms.ask("fused", {"do": "report"})["roles"] if r["role"] == "main"]
        if ran[0]["fused_layers"] != list(job.layers):
            raise ArmError(f"fused arm: layers {ran[0]['fused_layers']} ran, {list(job.layers)} should", "")
        for number in range(job.rounds):
            if number and time.monotonic() - begun > job.seconds:
                progress(f"{job.seconds:.0f} s are over: {number} of {job.rounds} rounds")
                break
            measured.readings += take_round(arms, job.lengths, job.streams, timed, number)
            write_raw(raw, job, measured)
            progress(f"round {number + 1} of {job.rounds}: {in_short(measured.readings, number)}")
        measured.reports = arms.ask_all({"do": "report"})
        write_raw(raw, job, measured)
    return measured


def ready(name: str, told: Answer) -> str:
    """Say what an arm is at its start, in short."""
    state = "fused" if told["roles"] else "stock"
    return f"{name}: {state}, ready after {told['start_seconds']:.0f} s"


def rows(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """Return a row for each number of streams.

    Keys: streams, rounds; stock_ms, fused_ms and again_ms, median milliseconds a step; ratio, stock over
    fused (median over the rounds) and lower (of its 95 % interval); again, stock over the second stock, and
    valid: whether it came out even; different_tokens, the fewest with which an arm's streams ended. Where a
    long answer took no longer than a short one there is no ratio (None).
    """
    return [_row(readings, streams) for streams in dict.fromkeys(r["streams"] for r in readings)]


def _row(readings: Sequence[Reading], streams: int) -> dict[str, Any]:
    chosen = [reading for reading in readings if reading["streams"] == streams]
    ms = {name: [r["ms"] for r in chosen if r["arm"] == name] for name in ARMS}
    row: dict[str, Any] = {"streams": streams, "rounds": len(ms["stock"])}
    row |= {f"{name}_ms": statistics.median(values) for name, values in ms.items()}
    if min(map(min, ms.values())) > 0:
        fused, again = ratio(ms["stock"], ms["fused"]), ratio(ms["stock"], ms["again"])
        row |= {"ratio": fused.median, "lower": fused.lower, "again": again.median, "valid": is_quiet(again)}
    else:
        row |= {"ratio": None, "lower": None, "again": None, "valid": False}
    return {**row, "different_tokens": min(r["different_tokens"] for r in chosen)}


def line(row: Mapping[str, Any]) -> str:
    """Return a row in words."""
    times = f"stock {row['stock_ms']:.3f} ms, fused {row['fused_ms']:.3f}"
    if row["ratio"] is None:
        return f"{row['streams']} streams: {times}: too short to be told apart"
    quiet = "" if row["valid"] else " NOT QUIET"
    return (
        f"{row['streams']} streams: {times} ({row['ratio']:.3f}x, >{row['lower']:.3f}), "
        f"again {row['again_ms']:.3f} ({row['again']:.4f}{quiet}), {row['different_tokens']} tokens, "
        f"{row['rounds']} rounds"
    )


def in_short(readings: Sequence[Reading], number: int) -> str:
    """Say what a round gave: of each number of streams stock, fused and stock again, in ms a step."""
    chosen = [reading for reading in readings if reading["round"] == number]
    parts = []
    for streams in dict.fromkeys(reading["streams"] for reading in chosen):
        ms = {r["arm"]: r["ms"] for r in chosen if r["streams"] == streams}
        parts.append(f"{streams}: " + " / ".join(f"{ms[name]:.3f}" for name in ARMS))
    return ", ".join(parts)


def write_raw(path: Path | None, job: Job, measured: Measured) -> None:
    """Write everything that was measured so far, as JSON.

    Raises:
        FsePatchError: the file cannot be written.
    """
    if path is None:
        return
    asked = {k: v for k, v in job.request().items() if k != "checkpoint"}
    held = {
        "model": job.checkpoint.resolve().name,
        "engine": job.engine,
        "request": asked,
        "lengths": vars(job.lengths),
        "arms": measured.arms,
        "reports": measured.reports,
        "readings": measured.readings,
    }
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(held))
        part.replace(path)
    except OSError as error:
        raise FsePatchError(f"{path}: {error.strerror}") from error


def csv_columns(engine: str) -> list[str]:
    """Return the columns of what `write_csv` writes."""
    return ["model", "engine", "sets", "commit", "device", "fse_patch", engine, "torch", *COLUMNS]


def write_csv(path: Path, job: Job, measured: Measured, rows: Sequence[dict[str, Any]], commit: str) -> None:
    """Append the rows of one model.

    Raises:
        FsePatchError: the file cannot be written, or has other columns, as those of another engine.
    """
    head = {"model": job.checkpoint.resolve().name, "engine": job.engine, "sets": job.sets, "commit": commit}
    csv_file.append(path, csv_columns(job.engine), [{**head, **measured.versions, **row} for row in rows])
