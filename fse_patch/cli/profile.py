"""`fse-patch profile`: kernels by time, stock against ours, of steps in which all streams decode, warm."""

from __future__ import annotations

import sys
from typing import Annotated, Literal, cast

import typer

from ..errors import FsePatchError
from ..fusion_core.checkpoint.sources import read_json
from ..lab import profile
from ..launch.flags import check_arguments
from .arguments import engine_option, folder_of
from .output import print_json
from .verify import decided, engines_end_with_us, parse_engine_args, say, vocab_size

ARMS = {"both": ("stock", "ours"), "stock": ("stock",), "ours": ("ours",)}
LOOKERS = ("torch", "outside")


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder of a checkpoint, or ORG/NAME that was downloaded.")
    ],
    engine: Annotated[str, engine_option()],
    streams: Annotated[int, typer.Option(min=1, help="Answers that are decoded at once.")] = 1,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before the window opens, all of decoding.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the window.")] = 32,
    arm: Annotated[str, typer.Option(help="both, stock or ours.")] = "both",
    by: Annotated[
        str, typer.Option(help="torch: a table; outside: a profiler outside waits for cudaProfilerStart.")
    ] = "torch",
    rows: Annotated[int, typer.Option(min=1, help="Kernels that are shown.")] = 25,
    engine_args: Annotated[str, typer.Option(help="More engine arguments, as a JSON object.")] = "{}",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each of the arms.")] = 900,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run the command. Exit status: 0 done, 3 refused, 2 bad input, 4 an engine did not run."""
    if arm not in ARMS:
        raise FsePatchError(f"--arm {arm}: use {', '.join(ARMS)}")
    if by not in LOOKERS:
        raise FsePatchError(f"--by {by}: use {' or '.join(LOOKERS)}")
    arguments = parse_engine_args(engine_args)
    folder = folder_of(checkpoint)
    _, _, version = decided(folder, engine, "auto")
    check_arguments(engine, version, arguments)
    window = {"streams": streams, "warm_up": warm_up, "steps": steps}
    window["looker"] = cast(Literal["torch", "outside"], by)  # type: ignore[assignment]
    job = profile.ProfileJob(folder, vocab_size(read_json(folder / "config.json"), folder), window, arguments)
    try:
        with engines_end_with_us():
            found = profile.profile(job, engine, ARMS[arm], timeout, say)
    except profile.ArmError as error:
        print(error.log, file=sys.stderr)
        raise
    table = profile.beside(found)
    if json:
        arms = {name: {k: v for k, v in told.items() if k != "rows"} for name, told in found.items()}
        print_json(
            {"engine": engine, "engine_version": version, "window": window, "arms": arms, "rows": table}
        )
    elif by == "torch":
        print("\n".join(profile.lines(table, ARMS[arm], rows)))
