"""`fse-patch bench`: stock against every mode of the fused MoE block, or end to end, on this device."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import FsePatchError, did_you_mean
from ..fusion_core.forward.mode_registry import MODES
from . import bench_end_to_end as whole
from .arguments import engine_option, folder_of
from .output import print_json
from .verify import say

LAYERS = 4
DEFAULT_TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
# What `fse-patch tune` takes as well.
Checkpoint = Annotated[str, typer.Argument(help="Folder with the model's config.json; weights are random.")]
Engine = Annotated[str, engine_option()]
Tokens = Annotated[str, typer.Option(help="Numbers of tokens, with commas.")]
DEFAULT_ROUTINGS = "even,alike"
Routings = Annotated[
    str, typer.Option(help="How tokens choose experts, with commas: even, zipf, groups, alike.")
]
Layers = Annotated[int, typer.Option(min=1, help="Blocks with weights of their own.")]
Rounds = Annotated[int, typer.Option(min=5, help="Rounds of the arms in turn.")]
Csv = Annotated[
    Path | None, typer.Option(help="Append rows to this file; with --commit, take over those that it has.")
]
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
    routings: Routings = DEFAULT_ROUTINGS,
    layers: Layers = LAYERS,
    rounds: Rounds = 7,
    csv: Csv = None,
    commit: Commit = "",
    quant: Quant = "",
    plot: Annotated[Path | None, typer.Option(help="Write a picture: speed-up over tokens.")] = None,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Decode with the whole engine.")] = False,
    streams: whole.Streams = whole.STREAMS,
    sets: whole.Sets = 0,
    seconds: whole.Seconds = 0,
    engine_args: whole.EngineArgs = "{}",
    timeout: whole.Timeout = whole.TIMEOUT,
    raw: whole.Raw = None,
    json: Json = False,
) -> None:
    """Run the command. Exit status: 0 measured, 1 too far from float64, 3 refused, 2 bad input."""
    others = {"tokens": tokens != DEFAULT_TOKENS, "layers": layers != LAYERS, "quant": bool(quant)}
    others |= {"routings": routings != DEFAULT_ROUTINGS}
    theirs = {"streams": streams != whole.STREAMS, "sets": bool(sets), "seconds": bool(seconds)}
    theirs |= {
        "engine-args": engine_args != "{}",
        "timeout": timeout != whole.TIMEOUT,
        "raw": raw is not None,
    }
    for name, given in (others if end_to_end else theirs).items():
        if given:
            raise FsePatchError(f"--{name}: not {'with' if end_to_end else 'without'} --end-to-end")
    if end_to_end:
        counted = tuple(numbers(streams, "streams"))
        limits = whole.Limits(rounds, seconds, timeout)
        files = whole.Files(raw, csv, commit, plot, json)
        whole.run(folder_of(checkpoint), engine, counted, sets, engine_args, limits, files)
        return
    counts = numbers(tokens)
    folder = ready(checkpoint, engine, quant, {"csv": csv, "plot": plot})
    from ..lab import bench, csv_file, plots
    from ..lab.kept_rows import KeptRows
    from ..lab.routings import named

    if plot is not None:
        plots.figure_class()
    names = named(routings)
    # Engines log to stdout, where the report goes.
    with redirect_stdout(sys.stderr):
        pair = bench.open_pair(folder, engine, layers, quant)
        columns = bench.csv_columns(engine)
        if csv is not None:
            csv_file.check(csv, columns)
        # Before all rows: it makes known by which tables the GEMM runs.
        errors = bench.errors(pair)
        tables = bench.tuned_tables(pair)
        kept = KeptRows(csv, columns, bench.head(pair, folder.resolve().name, rounds, commit))
        rows = bench.measure(pair, counts, names, rounds, kept, say)
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "situation": str(pair.situation),
        "versions": bench.versions(engine),
        **tables,
        "rows": rows,
        "errors": errors,
        "failures": wrong(errors),
    }
    if json:
        print_json(report)
    else:
        print(report["situation"])
        print(in_words(tables))
        for row in rows:
            print(bench.line(row))
        print("\n".join(report["failures"]) or "numerics: every mode as close to float64 as stock")
    if plot is not None:
        plots.plot({folder.resolve().name: rows}, plot)
    if report["failures"]:
        raise typer.Exit(1)


def ready(checkpoint: str, engine: str, quant: str, outputs: dict[str, Path | None]) -> Path:
    """Check what can be checked before anything is loaded, and return the checkpoint's folder.

    Raises:
        FsePatchError: an argument is wrong, or the engine is not here.
    """
    from ..lab.vllm.quant_folder import QUANTISATIONS

    if quant and quant not in QUANTISATIONS:
        raise FsePatchError(f"--quant {quant!r}: unknown; {did_you_mean(quant, QUANTISATIONS)}")
    for name, file in outputs.items():
        if file is not None and not file.resolve().parent.is_dir():
            raise FsePatchError(f"--{name} {file}: there is no such folder")
    if find_spec("torch") is None:
        raise FsePatchError(f"torch is not installed here: install fse-patch into {engine}'s environment")
    return folder_of(checkpoint)


def in_words(tables: dict[str, str]) -> str:
    """Say which tuned tables were in use."""
    stock, fused = (name or "not looked up" for name in tables.values())
    return f"tuned tables of the grouped GEMM: stock {stock}, fused {fused}"


def wrong(errors: dict[str, Any]) -> list[str]:
    """Return what is too far from float64: more than 1.1 times as far as stock, or a control that is not."""
    stock = max(errors["stock"])
    failures = [
        f"{mode}: {max(errors[mode]):.3g} off float64, stock {stock:.3g}"
        for mode in MODES
        if mode in errors and not max(errors[mode]) <= 1.1 * stock
    ]
    if not min(errors["control"]) > 1.1 * stock:
        failures.append(
            f"the control (half the shared expert's weight) was not seen: {min(errors['control']):.3g}"
        )
    return failures


def numbers(text: str, option: str = "tokens") -> list[int]:
    """Return numbers of tokens or streams, in order.

    Raises:
        FsePatchError: the text has something else in it.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise FsePatchError(f"--{option} {text!r}: give numbers such as 1,2,4,8")
    return sorted({int(part) for part in parts})
