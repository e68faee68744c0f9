"""`fse-patch bench --end-to-end`: decode steps of the real engine, stock, fused and stock again."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import FsePatchError
from ..fusion_core.checkpoint.sources import read_json
from ..launch.flags import check_arguments
from ..settings import LAYOUT
from ..settings import load as load_settings
from .output import print_json
from .verify import decided, engines_end_with_us, parse_engine_args, say, vocab_size

# What `fse-patch bench` takes with --end-to-end alone.
Streams = Annotated[str, typer.Option(help="With --end-to-end: numbers of streams, with commas.")]
Sets = Annotated[
    int,
    typer.Option(
        min=0, help="With --end-to-end: layers share so many sets of routed experts; 0: each its own."
    ),
]
Seconds = Annotated[
    float, typer.Option(min=0, help="With --end-to-end: begin no more rounds after so many; 0: no limit.")
]
EngineArgs = Annotated[str, typer.Option(help="With --end-to-end: more engine arguments, as a JSON object.")]
Raw = Annotated[Path | None, typer.Option(help="With --end-to-end: every reading goes into this JSON file.")]
Timeout = Annotated[
    float, typer.Option(min=1, help="With --end-to-end: seconds for an engine to start or to answer.")
]
STREAMS = "1,2,4,8,16,64"
TIMEOUT = 900.0


@dataclass(frozen=True)
class Files:
    """Where the results go."""

    raw: Path | None
    csv: Path | None
    commit: str
    plot: Path | None
    json: bool


@dataclass(frozen=True)
class Limits:
    """Rounds, seconds after which none begins (0: no limit), and seconds that an answer may take."""

    rounds: int
    seconds: float
    timeout: float


def run(
    checkpoint: Path,
    engine: str,
    streams: tuple[int, ...],
    sets: int,
    engine_args: str,
    limits: Limits,
    out: Files,
) -> None:
    """Measure and report.

    Raises:
        RefusedError: the model does not fuse.
        FsePatchError: bad input, or an arm failed; the end of its log is printed.
    """
    from ..lab import csv_file, end_to_end, plots
    from ..lab.live_arms import ArmError

    if out.plot is not None:
        plots.figure_class()
    arguments = parse_engine_args(engine_args)
    for file in (out.raw, out.plot):
        if file is not None and not file.resolve().parent.is_dir():
            raise FsePatchError(f"{file}: there is no such folder")
    if out.csv is not None:
        csv_file.check(out.csv, end_to_end.csv_columns(engine))
    # On a GPU "auto" may pair.
    layout = "paired" if load_settings().layout == "paired" else "merged"
    _, main, version = decided(checkpoint, engine, layout)
    check_arguments(engine, version, arguments)
    import torch

    if not torch.cuda.is_available():
        raise FsePatchError("no CUDA device here; nothing to measure")
    job = end_to_end.Job(
        checkpoint,
        engine,
        main.moe.layers,
        vocab_size(read_json(checkpoint / "config.json"), checkpoint),
        streams,
        limits.rounds,
        sets,
        arguments,
        limits.seconds or math.inf,
        limits.timeout,
    )
    try:
        with engines_end_with_us():
            env = {**os.environ, LAYOUT: layout}
            measured = end_to_end.measure(job, env=env, progress=say, raw=out.raw)
    except ArmError as error:
        if error.log:
            print(error.log, file=sys.stderr)
        raise
    rows = end_to_end.rows(measured.readings)
    if out.csv is not None:
        end_to_end.write_csv(out.csv, job, measured, rows, out.commit)
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "engine": engine,
        "versions": measured.versions,
        "sets": sets,
        "start_seconds": {name: told["start_seconds"] for name, told in measured.arms.items()},
        "roles": measured.reports["fused"]["roles"],
        "rows": rows,
    }
    if out.json:
        print_json(report)
    else:
        print(", ".join(f"{name} {version}" for name, version in measured.versions.items()))
        for role in report["roles"]:
            print(f"{role['role']}: {len(role['fused_layers'])} layers fused; {role['modes'] or 'one mode'}")
        print("\n".join(map(end_to_end.line, rows)))
    if out.plot is not None:
        plots.plot_streams({checkpoint.resolve().name: rows}, out.plot)
