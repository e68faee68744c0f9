"""Rows of measured blocks in a CSV: appended once they are measured, and taken over by a later run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FsePatchError
from ..fusion_core.forward.mode_registry import MODES
from . import csv_file, tune
from .routings import EVEN

# By which tuned tables the engine's grouped GEMM ran.
TABLES = ("stock_table", "fused_table")
OF_MODES = [f"{mode}_{what}" for mode in MODES for what in ("us", "ratio", "lower")]
# Of a row of `bench.measure`; those of a mode that does not run stay empty.
COLUMNS = ["tokens", "routing", "stock_us", "again", "valid", "floor_us", *OF_MODES]


class KeptRows:
    """The rows of one shape in a file.

    Args:
        path: None for no file: nothing is found, and nothing kept.
        columns: of the file.
        head: what all rows of this run have in common, and a row has that is taken over. Without a ``commit``
            in it none is: nobody knows what an older row was measured with.

    Raises:
        FsePatchError: the file has other columns, or a row that cannot be read.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], head: Mapping[str, Any]) -> None:
        self.path, self.columns, self.head = path, columns, head
        self._found: dict[tuple[int, str], dict[str, Any]] = {}
        if path is None or not head["commit"]:
            return
        csv_file.check(path, columns)
        for line, row in enumerate(csv_file.read(path), start=2):
            if all(row[name] == str(value) for name, value in head.items()):
                try:
                    kept = from_csv(row)
                except (TypeError, ValueError) as error:
                    raise FsePatchError(f"{path}, line {line}: not a whole row: {error}") from error
                self._found[kept["tokens"], kept["routing"]] = kept

    def find(self, tokens: int, routing: str) -> dict[str, Any] | None:
        """Return the row that an earlier run has left, unless it was too noisy for a table."""
        row = self._found.get((tokens, routing))
        return None if row is None or tune.is_too_noisy(row) else row

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows to the file.

        Raises:
            FsePatchError: the file cannot be written, or has other columns, as those of another engine.
        """
        if self.path is not None:
            csv_file.append(self.path, self.columns, [{**self.head, **row} for row in rows])


def from_csv(row: Mapping[str, str]) -> dict[str, Any]:
    """Return a row of a CSV as `bench.measure` has it; older files without a routing are of `EVEN`.

    Raises:
        TypeError, ValueError: the row is not whole.
    """
    return {
        "tokens": int(row["tokens"]),
        "routing": row.get("routing", EVEN),
        "valid": row["valid"] == "True",
        **{name: row[name] for name in TABLES},
        **{name: float(row[name]) for name in ("stock_us", "again", "floor_us")},
        # A file has no columns of modes that came later.
        **{name: float(row[name]) for name in OF_MODES if row.get(name, "") != ""},
    }
