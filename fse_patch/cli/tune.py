"""`fse-patch tune`: measures which mode is the fastest for how many tokens, and stores it."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from ..errors import AuditError
from ..settings import TUNED
from .bench import (
    DEFAULT_ROUTINGS,
    DEFAULT_TOKENS,
    Checkpoint,
    Commit,
    Csv,
    Engine,
    Json,
    Layers,
    Quant,
    Rounds,
    Routings,
    Tokens,
    in_words,
    numbers,
    ready,
    wrong,
)
from .output import print_json
from .verify import say


def command(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Table file; rows of other shapes in it are kept.")],
    engine: Engine = "vllm",
    tokens: Tokens = DEFAULT_TOKENS,
    routings: Routings = DEFAULT_ROUTINGS,
    layers: Layers = 4,
    rounds: Rounds = 7,
    csv: Csv = None,
    commit: Commit = "",
    quant: Quant = "",
    json: Json = False,
) -> None:
    """Run the command. Exit status: 0 stored, 1 a mode is wrong, 3 refused, 2 bad input or a busy device."""
    counts = numbers(tokens)
    folder = ready(checkpoint, engine, quant, {"csv": csv, "out": out})
    import torch

    from ..lab import bench, csv_file, tune
    from ..lab.kept_rows import KeptRows
    from ..lab.routings import named

    names = named(routings)
    # Engines log to stdout, where the report goes.
    with redirect_stdout(sys.stderr):
        pair = bench.open_pair(folder, engine, layers, quant)
        columns = bench.csv_columns(engine)
        if csv is not None:
            csv_file.check(csv, columns)
        errors = bench.errors(pair)
        say(f"off float64: {errors}")
        if failures := wrong(errors):
            raise AuditError("; ".join(failures))
        say(in_words(bench.tuned_tables(pair)))
        kept = KeptRows(csv, columns, bench.head(pair, folder.resolve().name, rounds, commit))
        rows = bench.measure(pair, counts, names, rounds, kept, say)
    row = tune.store(
        out,
        pair.situation,
        rows,
        bench.versions(engine),
        f"fse-patch tune {commit}".strip(),
        "cuda" if torch.version.hip is None else "rocm",
    )
    if json:
        print_json(row)
        return
    for step in row["steps"]:
        print(f"up to {step['up_to']} tokens: {step['mode']}")
    print(f"{'beyond' if row['steps'] else 'always'}: {row['otherwise']}")
    print(tune.routings_in_words(rows))
    print(f"stored in {out}; set {TUNED}={out} where the engine runs")
