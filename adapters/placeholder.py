"""A patch that changes nothing, for the placeholder entry of the ledger. Goes away with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def passthrough(original: Callable[..., Any]) -> Callable[..., Any]:
    """Call the original."""

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return call
