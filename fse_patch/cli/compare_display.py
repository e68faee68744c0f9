"""Shows where a comparison is: a bar with the time left on a terminal, elsewhere a line for each step."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from .verify import say


class Display:
    """On stderr: stdout is the report's."""

    def __enter__(self) -> Display:
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                *(TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn()),
                *(TimeElapsedColumn(), TextColumn("{task.fields[left]}", markup=False)),
            )
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=None, left="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def begin(self, number: int, total: int, words: str, left: float | None) -> None:
        """Show a step that begins."""
        if self.bar is None:
            say(f"{number} of {total}: {words} ({in_words(left)})")
        else:
            self.bar.update(
                self.task, description=words, completed=number - 1, total=total, left=in_words(left)
            )


def in_words(left: float | None) -> str:
    """Say how long it takes yet."""
    if left is None:
        return "time left is not known yet"
    if left < 60:
        return "less than a minute left"
    return f"about {left / 60:.0f} min left" if left < 5400 else f"about {left / 3600:.1f} h left"
