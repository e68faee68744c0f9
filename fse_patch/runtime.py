"""What adapters tell `fse_patch.status()` about this process: decisions and counters."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

_lock = threading.Lock()
_decisions: list[dict[str, Any]] = []
_counters: dict[str, int] = {}
_listeners: list[Callable[[], object]] = []


def on_change(listener: Callable[[], object]) -> None:
    """Call ``listener`` whenever a decision or a model has changed; twice is once."""
    if listener not in _listeners:
        _listeners.append(listener)


def changed() -> None:
    """Tell the listeners that there is something new to report."""
    for listener in list(_listeners):
        listener()


def record_decision(decision: Mapping[str, Any]) -> None:
    """Record a decision, ready for JSON; its key ``engine`` says whose it is. Twice is once."""
    with _lock:
        if (entry := copy.deepcopy(dict(decision))) not in _decisions:
            _decisions.append(entry)


def decisions() -> list[dict[str, Any]]:
    """Return the recorded decisions, in order."""
    with _lock:
        return copy.deepcopy(_decisions)


def count(name: str, by: int = 1) -> None:
    """Add to a counter, such as "calls.fused"."""
    with _lock:
        _counters[name] = _counters.get(name, 0) + by


def counters() -> dict[str, int]:
    """Return the counters of this process."""
    with _lock:
        return dict(_counters)


def clear() -> None:
    """Forget all."""
    with _lock:
        _decisions.clear()
        _counters.clear()
