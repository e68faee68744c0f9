"""From measured rows to a tuned table: the fastest mode by number of tokens, none slower than stock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..errors import FsePatchError
from ..fusion_core.forward.mode_registry import MODES
from ..fusion_core.forward.tuned import SLOWER, Situation, read_table, split_is_stock

# Below this a mode counts as slower than stock.
EQUAL = 0.985
# Tokens up to which `small` may be kept where even routing alone was measured: it reads weights once for
# every token that chose them, and is slower than stock where many choose the same.
EVEN_ROUTING = 1
# How far stock may be off itself for a row to say anything.
FARTHEST = 0.05
HEAD = ("engine", "release", "backend", "device")


def best_mode(row: dict[str, Any], split_is_stock: bool = False) -> str:
    """Return the mode with the best median ratio that is not slower than stock; "slower" without one.

    In a row that is not valid, bounds count for less by what stock was off itself.

    Args:
        split_is_stock: `split` runs stock's kernels here, and would run without a table. Where nothing else
            is shown to be as fast, its median is enough.
    """
    doubt = 0.0 if row["valid"] else abs(row["again"] - 1)
    good = [m for m in MODES if row.get(f"{m}_lower", 0.0) - doubt >= EQUAL]
    if not good and split_is_stock and row.get("split_ratio", 0.0) - doubt >= EQUAL:
        return "split"
    return max(good, key=lambda m: float(row[f"{m}_ratio"]), default=SLOWER)


def is_open(row: dict[str, Any]) -> bool:
    """Return whether no mode is shown to be as fast as stock, though the median of one is."""
    return best_mode(row) == SLOWER and any(row.get(f"{m}_ratio", 0.0) >= EQUAL for m in MODES)


def steps(
    rows: Sequence[dict[str, Any]], split_is_stock: bool = False, small_up_to: int = EVEN_ROUTING
) -> tuple[list[dict[str, Any]], str]:
    """Return steps, and the mode beyond them. Between two numbers the mode of the larger one holds.

    Args:
        small_up_to: tokens up to which `small` was also measured with all tokens alike.

    Raises:
        FsePatchError: stock was so far off itself that nothing can be said.
    """
    if not rows:
        raise FsePatchError("nothing was measured")
    if noisy := [row["tokens"] for row in rows if abs(row["again"] - 1) > FARTHEST]:
        raise FsePatchError(
            f"stock was not as fast as stock at {noisy} tokens; measure again on a quiet device"
        )
    ranges: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: int(r["tokens"])):
        safe = row["tokens"] <= small_up_to
        known = row if safe else {k: v for k, v in row.items() if not k.startswith("small_")}
        mode = best_mode(known, split_is_stock)
        if ranges and ranges[-1]["mode"] == mode:
            ranges[-1]["up_to"] = row["tokens"]
        else:
            ranges.append({"up_to": row["tokens"], "mode": mode})
    return ranges[:-1], ranges[-1]["mode"]


def store(
    path: Path,
    situation: Situation,
    rows: Sequence[dict[str, Any]],
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
    between, otherwise = steps(rows, split_is_stock(situation, platform))
    row = {**key, "steps": between, "otherwise": otherwise}
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
