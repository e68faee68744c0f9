"""CSV files that measurements are appended to."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import FsePatchError


def append(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows; what a row lacks stays empty.

    Raises:
        FsePatchError: the file cannot be written, or has other columns.
    """
    try:
        fresh = not path.exists()
        if not fresh and path.read_text().partition("\n")[0].strip() != ",".join(columns):
            raise FsePatchError(f"{path}: has other columns; give another file")
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            if fresh:
                writer.writeheader()
            for row in rows:
                writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    except OSError as error:
        raise FsePatchError(f"{path}: {error.strerror}") from error
