"""From measured rows to a tuned table: the fastest mode by number of tokens, none slower than stock."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..errors import FsePatchError
from ..fusion_core.forward.mode_registry import MODES
from ..fusion_core.forward.tuned import SLOWER, Situation, read_table, split_is_stock
from .routings import ALIKE, EVEN, ZIPF

# Below this a mode counts as slower than stock.
EQUAL = 0.985
# Where many tokens choose the same experts, the mode for few tokens may be slower than stock: it is no
# candidate without rows of both routings.
FOR_FEW, BOTH = "small", {EVEN, ALIKE}
# Tokens of which there is nothing to be alike.
ALONE = 1
# Requests that have nothing to do with each other route so: these say which mode is the fastest.
UNRELATED = {EVEN, ZIPF}
# How far stock may be off itself for a row to say anything.
FARTHEST = 0.05
HEAD = ("engine", "release", "backend", "device")
Rows = Sequence[dict[str, Any]]


def best_mode(rows: Rows, split_is_stock: bool = False, small_up_to: int = ALONE) -> str:
    """Return the fastest mode that is not slower than stock under any routing; "slower" without one.

    The fastest has the largest geometric mean of ratios under `UNRELATED`. In a row that is not valid, bounds
    count for less by what stock was off itself.

    Args:
        rows: of one number of tokens, a row for each routing.
        split_is_stock: `split` runs stock's kernels here, and would run without a table. Where nothing else
            is shown to be as fast, its median is enough.
        small_up_to: as of `steps`.
    """
    good = [mode for mode in _candidates(rows, small_up_to) if _is_equal(rows, mode, "lower")]
    if not good and split_is_stock and _is_equal(rows, "split", "ratio"):
        return "split"
    return max(good, key=lambda mode: _mean_ratio(rows, mode), default=SLOWER)


def is_open(rows: Rows) -> bool:
    """Return whether no mode is shown to be as fast as stock, though the medians of one are."""
    return best_mode(rows) == SLOWER and any(
        all(row.get(f"{mode}_ratio", 0.0) >= EQUAL for row in rows) for mode in _candidates(rows, ALONE)
    )


def is_too_noisy(row: dict[str, Any]) -> bool:
    """Return whether stock was so far off itself that the row says nothing."""
    return bool(abs(row["again"] - 1) > FARTHEST)


def _candidates(rows: Rows, small_up_to: int) -> list[str]:
    known = rows[0]["tokens"] <= small_up_to or {row["routing"] for row in rows} >= BOTH
    return [mode for mode in MODES if known or mode != FOR_FEW]


def _is_equal(rows: Rows, mode: str, what: str) -> bool:
    doubts = [0.0 if row["valid"] else abs(row["again"] - 1) for row in rows]
    return all(
        row.get(f"{mode}_{what}", 0.0) - doubt >= EQUAL for row, doubt in zip(rows, doubts, strict=True)
    )


def _mean_ratio(rows: Rows, mode: str) -> float:
    unrelated = [row for row in rows if row["routing"] in UNRELATED]
    return statistics.geometric_mean(float(row[f"{mode}_ratio"]) for row in unrelated or rows)


def steps(
    rows: Rows, split_is_stock: bool = False, small_up_to: int = ALONE
) -> tuple[list[dict[str, Any]], str]:
    """Return steps, and the mode beyond them. Between two numbers the mode of the larger one holds.

    Args:
        small_up_to: tokens up to which `small` needs no row of `ALIKE`.

    Raises:
        FsePatchError: stock was so far off itself that nothing can be said.
    """
    if not rows:
        raise FsePatchError("nothing was measured")
    if noisy := sorted({row["tokens"] for row in rows if is_too_noisy(row)}):
        raise FsePatchError(
            f"stock was not as fast as stock at {noisy} tokens; measure again on a quiet device"
        )
    ranges: list[dict[str, Any]] = []
    for tokens, mode, _ in _by_size(rows, split_is_stock, small_up_to):
        if ranges and ranges[-1]["mode"] == mode:
            ranges[-1]["up_to"] = tokens
        else:
            ranges.append({"up_to": tokens, "mode": mode})
    return ranges[:-1], ranges[-1]["mode"]


def gains(rows: Rows, split_is_stock: bool = False, small_up_to: int = ALONE) -> dict[int, float]:
    """Return by number of tokens the lower bound of stock over the mode of `steps`, the least over routings.

    Sizes of which nothing is as fast as stock have none. Arguments as of `steps`.
    """
    return {
        tokens: round(min(float(row[f"{mode}_lower"]) for row in here), 2)
        for tokens, mode, here in _by_size(rows, split_is_stock, small_up_to)
        if mode != SLOWER
    }


def _by_size(rows: Rows, split_is_stock: bool, small_up_to: int) -> Iterator[tuple[int, str, Rows]]:
    """Yield each number of tokens in ascending order, its mode as of `best_mode`, and its rows."""
    for tokens in sorted({int(row["tokens"]) for row in rows}):
        here = [row for row in rows if row["tokens"] == tokens]
        yield tokens, best_mode(here, split_is_stock, small_up_to), here


def routings_in_words(rows: Rows) -> str:
    """Say under which routings the rows were measured, and what follows for `small`."""
    names = list(dict.fromkeys(row["routing"] for row in rows))
    known = {*names} >= BOTH or all(row["tokens"] <= ALONE for row in rows)
    without = "" if known else f"; without {EVEN} and {ALIKE}, no {FOR_FEW} beyond {ALONE} token"
    return f"measured with the routings {', '.join(names)}{without}"


def store(
    path: Path,
    situation: Situation,
    rows: Rows,
    versions: dict[str, str],
    measured: str,
    platform: str = "cuda",
) -> dict[str, Any]:
    """Put the row of a situation into a table file, in the place of an older one; returns it.

    Raises:
        FsePatchError: the file is another device's, release's or backend's, or `steps` refuses the rows.
    """
    key = {name: value for name, value in asdict(situation).items() if name not in HEAD}
    head = {name: value for name, value in asdict(situation).items() if name in HEAD}
    as_stock = split_is_stock(situation, platform)
    between, otherwise = steps(rows, as_stock)
    row = {**key, "steps": between, "otherwise": otherwise, "gains": gains(rows, as_stock)}
    kept: list[dict[str, Any]] = []
    if path.exists():
        old = read_table(path).model_dump()
        if {name: old[name] for name in HEAD} != head:
            raise FsePatchError(f"{path}: a table of {', '.join(old[n] for n in HEAD)}; give another file")
        kept = [r for r in old["rows"] if {n: r[n] for n in key} != key]
    table = {**head, "versions": versions, "measured": measured, "rows": [*kept, row]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "# Written by `fse-patch tune`.\n" + yaml.safe_dump(table, sort_keys=False), encoding="utf-8"
    )
    read_table(path)
    return row
