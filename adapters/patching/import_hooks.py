"""Import hooks: subscribers are told when a module has been imported.

wrapt's hooks cannot be taken back, so there is one for a module; it looks up who is subscribed when it fires.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Protocol

import wrapt


class Subscriber(Protocol):
    """A receiver of imports."""

    def imported(self, module: str) -> None:
        """Hear that a module has just been executed; an exception makes its import fail."""


_subscribers: list[Subscriber] = []
_armed: set[str] = set()


def subscribe(subscriber: Subscriber) -> None:
    """Let ``subscriber`` hear of imports from now on."""
    if subscriber not in _subscribers:
        _subscribers.append(subscriber)


def unsubscribe(subscriber: Subscriber) -> None:
    """Let it hear of no more."""
    if subscriber in _subscribers:
        _subscribers.remove(subscriber)


def arm(module: str) -> bool:
    """Announce the import of ``module``; False if it is done, and there is nothing to wait for."""
    if module not in _armed and module not in sys.modules:
        _armed.add(module)
        wrapt.register_post_import_hook(_fire, module)
    return module in _armed


def _fire(module: ModuleType) -> None:
    name = module.__name__
    _armed.discard(name)
    try:
        for subscriber in list(_subscribers):
            subscriber.imported(name)
    except BaseException:
        # The import fails and the module is dropped, as Python does itself a moment later; a second attempt
        # must fail too, so the hook, which fires once, is set again.
        sys.modules.pop(name, None)
        arm(name)
        raise
