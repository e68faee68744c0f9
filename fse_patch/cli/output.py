"""How commands print: JSON for tools; for people a sentence, and a table where they ask for it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Colour = Literal["green", "yellow", "red"]
_CODES: Mapping[str, int] = {"red": 31, "green": 32, "yellow": 33}
_printed = False


def print_json(report: Mapping[str, Any]) -> None:
    """Print ``report`` as indented JSON on stdout."""
    global _printed
    _printed = True
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


def printed_json() -> bool:
    """Return whether this process has printed an object."""
    return _printed


def say(sentence: str, colour: Colour | None = None) -> None:
    """Print a line, in a colour where stdout is a terminal that has some (and NO_COLOR is not set)."""
    line = _printable(sentence)
    if colour and sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        line = f"\x1b[{_CODES[colour]}m{line}\x1b[0m"
    print(line)


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
    if isinstance(value, float):
        return f"{value:.2g}"
    if isinstance(value, list) and all(isinstance(n, int) for n in value):
        return f"{ranges(value)} ({len(value)})"
    return _printable(str(value))


def _printable(text: str) -> str:
    # JSON can hold halves of characters, which no terminal takes.
    return text.encode("utf-8", "replace").decode("utf-8")
