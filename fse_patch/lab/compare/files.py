"""The files of a comparison: all of them in a new folder, or none."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import FsePatchError
from .. import csv_file, plots
from . import page, table

CSV, PNG, HTML, JSON = "compare.csv", "compare.png", "compare.html", "compare.json"


def check(folder: Path) -> None:
    """Look whether a folder can be made, before anything is measured.

    Raises:
        FsePatchError: it is there already, or the one around it is not.
    """
    if folder.exists():
        raise FsePatchError(f"--out {folder}: is there already; give another folder")
    if not folder.resolve().parent.is_dir():
        raise FsePatchError(f"--out {folder}: there is no folder {folder.resolve().parent}")


def write(folder: Path, report: Mapping[str, Any], picture: bool) -> list[Path]:
    """Write table, page, figures and picture, and return their paths.

    Raises:
        FsePatchError: they cannot be written; nothing is left then.
    """
    with _in_place(folder) as place:
        csv_file.append(place / CSV, table.COLUMNS, report["rows"])
        (place / HTML).write_text(page.page(report), encoding="utf-8")
        (place / JSON).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if picture:
            plots.plot_servers({report["model"]: report["rows"]}, place / PNG)
        names = sorted(path.name for path in place.iterdir())
    return [folder / name for name in names]


@contextmanager
def _in_place(folder: Path) -> Iterator[Path]:
    """Yield a folder beside ``folder`` that gets its name at the end, or goes."""
    part: Path | None = None
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.resolve().parent))
        part.chmod(0o755)
        yield part
        part.rename(folder)
    except OSError as error:
        raise FsePatchError(f"--out {folder}: {error.strerror}") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
