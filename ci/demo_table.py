"""Draws the demo's table from the rows on its standard input, for ci/demo.py, in an engine's environment."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
LEFT = ("engine", "family", "dtype")
RIGHT = ("layers\nfused", "slots\nloaded", "log-prob\ndifference", "noise", "control")
NOTES = """\
difference: mean over tokens, in nats. noise: stock against itself.
control: a shared slot's weight changed on purpose, which must be seen."""


def cells(row: dict[str, Any]) -> list[str]:
    head = [NAMES[row["engine"]], row["family"], row["dtype"]]
    if "mean_abs_logprob_diff" not in row:
        return [*head, "", "", "", "", "", "FAILED"]
    return [
        *head,
        f"{len(row['fused_layers'])} of {row['moe_layers']}",
        str(row["slots_loaded"]),
        f"{row['mean_abs_logprob_diff']:.1e}",
        f"{row['stock_noise']:.1e}",
        f"{row['control_diff']:.1e}",
        "equal" if row["passed"] else "FAILED",
    ]


def draw(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table and what has to be said below it; no wider than 80 columns."""
    titles = {f"{NAMES[row['engine']]} {row['version']}": None for row in rows}
    table = Table(
        title=f"Fused against stock on CPU, teacher-forced: {', '.join(titles)}",
        title_justify="left",
        box=box.SIMPLE,
        padding=0,
        show_edge=False,
    )
    for header in (*LEFT, *RIGHT, "verdict"):
        table.add_column(header, justify="right" if header in RIGHT else "left", no_wrap=True)
    for _, group in groupby(rows, lambda row: row["engine"]):
        for row in group:
            table.add_row(*cells(row))
        table.add_section()
    console.print(table)
    console.print()
    console.print(NOTES, markup=False, highlight=False)
    for engine, group in groupby(rows, lambda row: row["engine"]):
        if replaced := [row["family"] for row in group if row.get("replaced_operations")]:
            console.print(
                f"{NAMES[engine]} {', '.join(replaced)}: linear attention ran through\n"
                "replacement operations: the package index has no build of its kernels for CPUs.",
                markup=False,
                highlight=False,
            )
    for row in rows:
        for failure in row["failures"]:
            console.print(f"{NAMES[row['engine']]} {row['family']}: {failure}", markup=False, highlight=False)
        if row.get("log"):
            console.print(row["log"], markup=False, highlight=False)


if __name__ == "__main__":
    draw(json.load(sys.stdin), Console())
