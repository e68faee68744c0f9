"""How commands print: JSON for tools, a table for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any


def print_json(report: Mapping[str, Any]) -> None:
    """Print ``report`` as indented JSON on stdout."""
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_table(title: str, report: Mapping[str, Any]) -> None:
    """Print ``report`` as a table of two columns; nested sections become rows with dotted keys."""
    # rich takes as long to import as the decision takes to make; --json does without.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(report):
        table.add_row(Text(key), Text(_words(value)))
    Console().print(table)


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers in words: [0, 1, 2, 5] is "0-2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _rows(report: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in report.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _words(value: Any) -> str:
    if value is None or value in ("", []):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(n, int) for n in value):
        return f"{ranges(value)} ({len(value)})"
    # JSON can hold halves of characters, which no terminal takes.
    return str(value).encode("utf-8", "replace").decode("utf-8")
