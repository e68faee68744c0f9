"""CSV files that measurements are appended to, and read from again."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FsePatchError


def check(path: Path, columns: Sequence[str]) -> None:
    """Check that rows can be appended, before they are measured.

    Raises:
        FsePatchError: there is no such folder, or the file cannot be read or has other columns.
    """
    if not path.resolve().parent.is_dir():
        raise FsePatchError(f"{path}: there is no such folder")
    try:
        if path.exists() and path.read_text().partition("\n")[0].strip() != ",".join(columns):
            raise FsePatchError(f"{path}: has other columns; give another file")
    except (OSError, UnicodeDecodeError) as error:
        raise FsePatchError(f"{path}: {error}") from error


def append(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows; what a row lacks stays empty.

    Raises:
        FsePatchError: as of `check`, or the file cannot be written.
    """
    check(path, columns)
    try:
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            if fresh:
                writer.writeheader()
            for row in rows:
                writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    except OSError as error:
        raise FsePatchError(f"{path}: {error.strerror}") from error


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows; none where there is no file yet.

    Raises:
        FsePatchError: the file cannot be read.
    """
    try:
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FsePatchError(f"{path}: {error}") from error
