"""What the arms of a profile share inside the process that holds the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..errors import FsePatchError
from .decode_window import DecodeWindow, Looker

# Of the object whose method is a step: its window.
WINDOW = "_fse_patch_window"


def watch(owner: Any, method: str, decoding: Callable[[Any], int], asked: dict[str, Any]) -> None:
    """Let a window see each call of ``owner``'s step method.

    Args:
        decoding: of the step's first argument, as of `DecodeWindow.step`.
        asked: streams, warm_up, steps, looker.
    """
    looker: Looker = asked["looker"]
    window = DecodeWindow(asked["streams"], asked["warm_up"], asked["steps"], looker)
    original = getattr(owner, method)

    def step(given: Any, *args: Any, **kwargs: Any) -> Any:
        window.step(decoding(given))
        return original(given, *args, **kwargs)

    setattr(owner, method, step)
    setattr(owner, WINDOW, window)


def told(owner: Any) -> dict[str, Any]:
    """Return the window's table.

    Raises:
        FsePatchError: it never opened.
    """
    window: DecodeWindow = getattr(owner, WINDOW)
    window.close()
    if window.state == "waiting":
        raise FsePatchError(
            f"the window never opened: {window.streams} streams never decoded together for "
            f"{window.warm_up} steps; give more room for them in --engine-args"
        )
    return {"steps": window.seen, "rows": [asdict(row) for row in window.rows]}
