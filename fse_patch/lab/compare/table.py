"""The table of a comparison: a row for each number of streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .client import KEPT, Level
from .steps import phase_of

Row = dict[str, Any]
SHORT = {"stock": "stock", "fused": "fused", "again": "stock again"}
COLUMNS = [
    "streams",
    *(f"{arm}_{what}" for what in KEPT.values() for arm in SHORT),
    *("ratio", "lower", "upper", "again", "verdict"),
]
HEADS = ("streams", "stock tokens/s", "fused", "stock again", "times as fast", "verdict")
FASTER, SLOWER, SAME = "faster", "slower", "as fast as stock within the noise"
BRIEF = "measured for too short a time"
# Below that a figure moves more from run to run than two stock servers show.
LEAST_SECONDS = 1.0


def rows(stock: Mapping[int, Level], fused: Mapping[int, Level], again: Mapping[int, Level]) -> list[Row]:
    """Return a row for each number of streams.

    Keys: streams; what was measured of each arm, such as stock_tokens_per_second; ratio, fused over the mean
    of both stocks, in tokens a second; lower and upper, over the faster and over the slower stock; again, the
    second stock over the first; verdict.
    """
    return [_row(streams, stock[streams], fused[streams], again[streams]) for streams in stock]


def _row(streams: int, stock: Level, fused: Level, again: Level) -> Row:
    held = {"stock": stock, "fused": fused, "again": again}
    row: Row = {"streams": streams}
    row |= {f"{arm}_{what}": held[arm][what] for what in KEPT.values() for arm in SHORT}
    one, ours, two = (held[arm]["tokens_per_second"] for arm in SHORT)
    lower, upper = ours / max(one, two), ours / min(one, two)
    # More than the two stocks differ from each other.
    spread = max(one, two) / min(one, two)
    verdict = FASTER if lower > spread else SLOWER if upper * spread < 1 else SAME
    if min(level["seconds"] for level in held.values()) < LEAST_SECONDS:
        verdict = BRIEF
    return {
        **row,
        "ratio": 2 * ours / (one + two),
        "lower": lower,
        "upper": upper,
        "again": two / one,
        "verdict": verdict,
    }


def sentence(rows: Sequence[Row]) -> str:
    """Say what all rows come to."""
    parts = []
    for verdict in (FASTER, SLOWER, SAME, BRIEF):
        held = [row for row in rows if row["verdict"] == verdict]
        if not held:
            continue
        at = ", ".join(str(row["streams"]) for row in held[:-1]) + (", " if held[1:] else "")
        at += phase_of(held[-1]["streams"])
        ratios = [row["ratio"] for row in held]
        times = f"{min(ratios):.2f}x to {max(ratios):.2f}x" if len(held) > 1 else f"{ratios[0]:.2f}x"
        parts.append(f"{verdict} at {at} ({times})")
    return "fused is " + "; ".join(parts) if parts else "nothing was measured"


def cells(row: Row) -> list[str]:
    """Return a row in words, below `HEADS`."""
    speeds = [f"{row[f'{arm}_tokens_per_second']:.4g}" for arm in SHORT]
    times = f"{row['ratio']:.2f} ({row['lower']:.2f}-{row['upper']:.2f})"
    return [str(row["streams"]), *speeds, times, row["verdict"]]


def rich_table(rows: Sequence[Row], title: str) -> Any:
    """Return a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for number, head in enumerate(HEADS):
        table.add_column(head, justify="left" if number == len(HEADS) - 1 else "right")
    colours = {FASTER: "green", SLOWER: "red"}
    for row in rows:
        table.add_row(*cells(row), style=colours.get(row["verdict"], ""))
    return table
