"""`fse-patch bench`: stock against every mode of the fused MoE block, on this device."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import FsePatchError
from ..settings import ENGINES
from .output import print_json
from .verify import say

DEFAULT_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
# What `fse-patch tune` takes as well.
Checkpoint = Annotated[Path, typer.Argument(help="Folder with the model's config.json; weights are random.")]
Engine = Annotated[str, typer.Option(help=f"One of {', '.join(ENGINES)}.")]
Tokens = Annotated[str, typer.Option(help="Numbers of tokens, with commas.")]
Layers = Annotated[int, typer.Option(min=1, help="Blocks with weights of their own.")]
Rounds = Annotated[int, typer.Option(min=5, help="Rounds of the arms in turn.")]
Csv = Annotated[Path | None, typer.Option(help="Append what was measured to this file.")]
Commit = Annotated[str, typer.Option(help="Goes into the rows: which source this is.")]
Quant = Annotated[
    str,
    typer.Option(
        help="Measure the experts in this format: fp8-block or fp8-tensor. Default: as config.json says."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def command(
    checkpoint: Checkpoint,
    engine: Engine = "vllm",
    tokens: Tokens = DEFAULT_TOKENS,
    layers: Layers = 4,
    rounds: Rounds = 7,
    csv: Csv = None,
    commit: Commit = "",
    quant: Quant = "",
    plot: Annotated[Path | None, typer.Option(help="Write a picture: speed-up over tokens.")] = None,
    json: Json = False,
) -> None:
    """Exit status: 0 measured, 1 an error against float64 is too large, 3 refused, 2 bad input."""
    from .. import bench
    from .. import plot as plots

    if plot is not None:
        plots.figure_class()
    counts = numbers(tokens)
    # Engines log to stdout, where the report goes.
    with redirect_stdout(sys.stderr):
        pair = bench.open_pair(checkpoint, engine, layers, quant)
        rows = bench.measure(pair, counts, rounds, say)
        errors = bench.errors(pair)
    if csv is not None:
        bench.write_csv(csv, checkpoint.resolve().name, pair, rows, commit)
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "situation": str(pair.situation),
        "versions": bench.versions(engine),
        "rows": rows,
        "errors": errors,
        "failures": wrong(errors),
    }
    if json:
        print_json(report)
    else:
        print(report["situation"])
        for row in rows:
            print(bench.line(row))
        print("\n".join(report["failures"]) or "numerics: every mode as close to float64 as stock")
    if plot is not None:
        plots.plot({checkpoint.resolve().name: rows}, plot)
    if report["failures"]:
        raise typer.Exit(1)


def wrong(errors: dict[str, Any]) -> list[str]:
    """What is too far from float64: a mode more than 1.1 times as far as stock, or a control that is not."""
    stock = max(errors["stock"])
    found = [
        f"{mode}: {max(errors[mode]):.3g} off float64, stock {stock:.3g}"
        for mode in ("small", "fused", "split")
        if mode in errors and not max(errors[mode]) <= 1.1 * stock
    ]
    if not min(errors["control"]) > 1.1 * stock:
        found.append(
            f"the control (half the shared expert's weight) was not seen: {min(errors['control']):.3g}"
        )
    return found


def numbers(text: str) -> list[int]:
    """Numbers of tokens.

    Raises:
        FsePatchError: the text has something else in it.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise FsePatchError(f"--tokens {text!r}: give numbers such as 1,2,4,8")
    return sorted({int(part) for part in parts})
