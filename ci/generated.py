"""Files that a script writes and a check compares."""

from __future__ import annotations

import sys
from pathlib import Path


def settle(path: Path, text: str, write: bool) -> int:
    """Write the file, or say that it is out of date; exit status 0 if it is as it should be."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        print(f"{path}: up to date")
        return 0
    if not write:
        print(f"{path}: out of date; run again with --write", file=sys.stderr)
        return 1
    path.write_text(text, encoding="utf-8")
    print(f"{path}: written")
    return 0
