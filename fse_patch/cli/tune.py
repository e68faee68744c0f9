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
    DEFAULT_TOKENS,
    Checkpoint,
    Commit,
    Csv,
    Engine,
    Json,
    Layers,
    Quant,
    Rounds,
    Tokens,
    in_words,
    numbers,
    wrong,
)
from .output import print_json
from .verify import say


def command(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Table file; rows of other shapes in it are kept.")],
    engine: Engine = "vllm",
    tokens: Tokens = DEFAULT_TOKENS,
    layers: Layers = 4,
    rounds: Rounds = 7,
    csv: Csv = None,
    commit: Commit = "",
    quant: Quant = "",
    json: Json = False,
) -> None:
    """Run the command. Exit status: 0 stored, 1 a mode is wrong, 3 refused, 2 bad input or a busy device."""
    import torch

    from ..lab import bench, csv_file, tune

    counts = numbers(tokens)
    # Engines log to stdout, where the report goes.
    with redirect_stdout(sys.stderr):
        pair = bench.open_pair(checkpoint, engine, layers, quant)
        if csv is not None:
            csv_file.check(csv, bench.csv_columns(engine))
        errors = bench.errors(pair)
        say(f"off float64: {errors}")
        if failures := wrong(errors):
            raise AuditError("; ".join(failures))
        rows = bench.measure(pair, counts, rounds, say)
        say(in_words(bench.tuned_tables(pair)))
    if csv is not None:
        bench.write_csv(csv, checkpoint.resolve().name, pair, rows, commit)
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
    print(f"with even routing alone measured, small is kept up to {tune.EVEN_ROUTING} token")
    print(f"stored in {out}; set {TUNED}={out} where the engine runs")
